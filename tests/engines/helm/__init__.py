"""A real Helm for the tests of the chart.

================ ======================================================================================================
``binaries``     helm from its Go module (``modules/``)
``__main__``     ``build``, ``env``
================ ======================================================================================================

How a program is built from a module, and kept, is the docker engines' affair: their ``binaries`` and ``cache``.
"""
