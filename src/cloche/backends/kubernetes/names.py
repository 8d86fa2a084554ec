"""The names by which cloche's things in a namespace are known. Pure."""

from __future__ import annotations

LABEL_RUN = "cloche.dev/run"
LABEL_OWNER = "cloche.dev/owner"
LABEL_JOB = "batch.kubernetes.io/job-name"
"""Kubernetes' own, on a Job's pods (since 1.27)."""
LABEL_NETWORK = "cloche.dev/network"
"""``none`` or ``open``; network policies choose by it."""
LABEL_SUPERVISOR = "cloche.dev/supervisor"
"""On the ConfigMaps that hold a supervisor; they are shared by all, and no sweep touches them."""
EXPIRES = "cloche.dev/expires"
"""Annotation: Unix time in whole seconds, by the API server's clock, from which on anybody may remove the thing."""
PLACE = "cloche.dev/place"
"""Annotation: where the owner's lock is; only who shares that folder can tell whether the owner lives."""
COMMON_LABELS = {"app.kubernetes.io/name": "cloche", "app.kubernetes.io/managed-by": "cloche"}
OURS = "app.kubernetes.io/managed-by=cloche"
"""Selects everything of cloche's."""
CONTAINER = "box"
