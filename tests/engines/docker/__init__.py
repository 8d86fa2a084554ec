"""Real private engines for the tests: a current Docker with gVisor, an old Docker, podman, and a registry.

================ ======================================================================================================
``cache``        where finished things are kept, so that a half-made one is never taken for whole
``host``         what this machine is: its programs, its Debian archive
``binaries``     engines from their Go modules (``modules/``), the old one and podman from Debian's packages
``images``       the test images, without any registry
``api``          the engine's HTTP API over its socket, as much as is needed here
``namespaces``   a network, mounts and processes of their own, which all go when one process goes
``init``         that process
``cgroups``      what an engine leaves in the kernel's cgroups
``private``      an engine in such namespaces: start, stop, kill, start again
``daemon``       Docker
``podman``       podman
``certificates`` an authority, a server's and a client's certificate, for Docker over TLS
``registry``     a real registry beside an engine
``place``        where engines that are up have their files; one command at a time
``__main__``     ``build``, ``up``, ``env``, ``down``
================ ======================================================================================================
"""
