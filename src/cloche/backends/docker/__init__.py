"""A container per run, on a Docker daemon or on Podman's compatible socket.

``address`` finds the daemon, ``credentials`` what registries want to see, ``client`` speaks the Engine API and is the only
room that does, ``manifest`` writes the requests' bodies and ``demux`` takes the attached stream apart (both pure),
``images`` and ``volume`` see to what a box is made from, ``probe`` tells what works here, ``box`` is one container, and
``backend`` joins them.
"""
