"""A real private cluster of one node for the tests.

What docker engines need too is their package's: ``cache``, ``host``, ``namespaces`` with ``init``, ``cgroups``, the test images,
and how programs are built from Go modules.

================= =====================================================================================================
``binaries``      Kubernetes, etcd and the CNI plugins (``modules/``), and the docker engines' containerd and runc
``images``        the test images as archives for containerd, and the one that holds a pod's namespaces
``certificates``  keys and certificates of everyone in it
``configuration`` addresses, and the files that its parts read
``parts``         its programs: how each is started, and how it tells that it works
``cluster``       all of it: start, close; stop, kill and start parts; enforce a network policy
``forwarder``     what makes it reachable from outside, and far away or hard to reach for a test
``__main__``      ``build``, ``up``, ``env``, ``down``
================= =====================================================================================================
"""
