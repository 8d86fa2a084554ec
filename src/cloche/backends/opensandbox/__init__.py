"""Boxes in an OpenSandbox service: a sandbox for each run, made, fed and removed over the service's REST API.

The service makes the sandbox and puts a program of its own into it, execd, which takes files and runs commands. What cloche
needs it uploads: the supervisor, which runs as root there and gives the script a uid of its own, and the bundle. The
supervisor's frames come as the lines of that command's stdout.

=============== =======================================================================================================
module          what it is
=============== =======================================================================================================
``address``     where the service is, and where it sends us (pure)
``allowed``     whether we go there (pure)
``facts``       what the service's answers mean (pure)
``events``      the stream of a command (pure)
``manifest``    profile → the body of a request, and the supervisor's command (pure)
``client``      speaks the service's API
``execd``       speaks execd's
``diagnose``    failures of either as cloche's errors
``probe``       what works here
``box``         one sandbox
``leftovers``   what the dead left
``backend``     joins them
=============== =======================================================================================================
"""
