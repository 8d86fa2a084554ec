"""The mode ``remote``: a cloche service, spoken to over HTTP. It brings events, not frames, so it is no backend.

``request``, ``answer`` and ``intake`` are pure; ``client`` is the only one that talks to the service; ``service`` and ``run``
join them.

What is said by the spec, or by a setting that is set here, is sent along; for the rest the service's own settings hold. The
bounds of what comes back (CLOCHE_MAX_OUTPUT_BYTES, CLOCHE_MAX_ARTIFACT_BYTES) cannot be sent: what the service cut stays cut,
and what is more than may be kept here is cut here.
"""
