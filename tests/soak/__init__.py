"""The soak: many runs over all modes at once, while clients, boxes and engines die; then nothing may be left, and nothing wrong.

============= =========================================================================================================
``kinds``     what a run does, and what its result must be
``plan``      which runs, for which clients, and what happens to them: by chance, from a seed. Pure
``oracle``    whether a result is true, given what happened to the run. Pure
``worker``    the program that a client is: it uses nothing but cloche
``client``    one such process: it is told of runs, killed, started anew
``places``    a mode as it is on this machine: how its boxes are killed from outside, its engine restarted
``inventory`` all that runs could leave, and what they must not touch
``course``    drives it all
``report``    what came of it, for people and for machines
``__main__``  ``python -m tests.soak``, the same as ``make soak``
============= =========================================================================================================
"""
