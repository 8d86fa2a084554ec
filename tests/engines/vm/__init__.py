"""A virtual machine made from Debian packages, in which the local backend meets kernels and service managers that are not ours.

============ ==========================================================================================================
``image``    the machine's disk: debootstrap, the project's dependencies, two users; kept in a cache
``project``  a second disk with the wheel and the tests, made anew for each run
``machine``  boots both with qemu and brings the results back
``__main__`` joins them
``guest``    what runs inside: ``main.py`` plays the scenes of ``scenes.py``, each with the tests beside it
============ ==========================================================================================================
"""
