"""The local engine: bubblewrap, kernel namespaces, no daemon.

=================== ===================================================================================================
``manifest``        profile and layout → the argument vector; pure
``client``          starts, signals and awaits the processes
``cgroup``          a box's cgroup, from its making to its removal
``places``          where it can be made on this machine
``interpreters``    which program runs a script, and what of the host must be shown for it
``owners``          the locked file that tells the living from the dead
``probe``           what works here, shown by a real box
``backend``         joins them
=================== ===================================================================================================
"""
