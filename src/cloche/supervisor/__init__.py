"""The supervisor: the static program that is a box's first process, and the two formats it speaks.

``bundle`` is what goes in, ``frames`` what comes out; both are pure. ``binary`` finds the program that the wheel carries.
The program's source is in ``c/``.
"""
