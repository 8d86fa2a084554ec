"""The kubernetes mode: a Job per run, in a namespace that is locked down, over the API server's REST API.

================ ======================================================================================================
``kubeconfig``   where the API server is: a pod's service account, or a configuration file
``credentials``  as whom to speak: tokens that rotate, client certificates, plugins
``client``       the only room that talks to the API server
``facts``        its objects as values
``manifest``     profile → the Job and its ConfigMaps
``watch``        one watch for all pods of this process
``diagnose``     what the cluster says of a pod → how the run ended, or why it could not begin
``box``          one pod, from its Job to its last byte
``leftovers``    what the dead left
``probe``        what works in this namespace, and why not
``backend``      joins them
================ ======================================================================================================
"""
