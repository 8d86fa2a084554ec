"""For tests of programs that use cloche and of backends that are not part of it.

``fake`` is an engine that plays what a test wrote down; ``conformance`` is the suite that every backend must pass.
"""
