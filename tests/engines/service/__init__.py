"""The image of the service for the tests, without any registry: Debian's Python, what ``deploy/images/cloche`` pins, the wheel.

============== ========================================================================================================
``dockerfile`` what a Dockerfile says
``layers``     layers of images: a Debian with Python, an environment of packages
``archive``    images of several layers, as engines load them
``images``     the service's
``__main__``   ``build``, ``load-docker``, ``load-cluster``
============== ========================================================================================================
"""
