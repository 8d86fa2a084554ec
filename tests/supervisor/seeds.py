"""Writes the fuzzer's first inputs: ``python -m tests.supervisor.seeds FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from tests.supervisor.test_start import MALFORMED

from cloche.spec import Limits
from cloche.supervisor.bundle import Bundle, Entry, File, Folder, Link

SMALL_BYTES = 8192


def seeds() -> Iterator[bytes]:
    """Whole bundles of every kind of record, and those that the tests know to be malformed."""
    limits = Limits(timeout_s=1)
    yield _bytes(Bundle(argv=["x"], env={}, limits=limits))
    yield _bytes(Bundle(argv=["a", "", "\udcff"], env={"A": "", "B": "c=d"}, limits=limits, stdin=b""))
    entries: list[Entry] = [Folder("d"), Folder("d/e"), File("d/f", b"data"), File("x", b"", executable=True)]
    entries += [Link("l", "d/f"), Link("d/l", "../x"), Link("d/e/l", "../../d/./f")]
    yield _bytes(Bundle(argv=["x"], env={}, limits=limits, entries=entries, stdin=b"stdin" * 10))
    yield _bytes(Bundle(argv=[""] * 300, env={}, limits=limits))
    for data, _ in MALFORMED.values():
        # The largest ones would make every run slow; the tests have them.
        if len(data) < SMALL_BYTES:
            yield data


def _bytes(bundle: Bundle) -> bytes:
    return b"".join(bundle.records())


def main() -> None:
    """Write one file for each."""
    folder = Path(sys.argv[1])
    for i, seed in enumerate(seeds()):
        (folder / f"seed-{i}").write_bytes(seed)


if __name__ == "__main__":
    main()
