"""Docker Compose for the tests, and what it needs to bring up everything that ``deploy/compose`` describes.

============ ==========================================================================================================
``binaries`` ``docker-compose`` from its Go module
``images``   an image with the OpenSandbox server, for the profile ``opensandbox``
``__main__`` ``build``, ``env``
============ ==========================================================================================================
"""
