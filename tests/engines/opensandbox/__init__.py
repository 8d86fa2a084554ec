"""A real OpenSandbox server, with a Docker daemon of its own, for the tests; what runs in its sandboxes is a stand-in.

=============== =======================================================================================================
module          what it is
=============== =======================================================================================================
``service``     the server from its package, and the way to it
``images``      the images of its sandboxes, and the one that carries execd
``execd``       the stand-in for execd, in Go
``__main__``    ``build``, ``up``, ``env``, ``down``
=============== =======================================================================================================
"""
