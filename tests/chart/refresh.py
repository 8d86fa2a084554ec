"""``python -m tests.chart.refresh``: what in the chart is made from something else, made anew.

The table of values in the chart's README comes from the comments in values.yaml that begin with ``--``, as helm-docs makes it.
The manifests in the chart's folder ``files`` are those of deploy/kubernetes, byte by byte: Helm reads nothing outside of a chart.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from tests.chart.rendering import CHART

MANIFESTS = CHART.parents[1] / "kubernetes"
COPIED = ("admission-policy.yaml", "deletion-policy.yaml", "network-open.yaml")
VALUES = CHART / "values.yaml"
README = CHART / "README.md"
BEGIN = "<!-- values: python -m tests.chart.refresh -->\n"
END = "<!-- end of values -->\n"

_KEY = re.compile(r"( *)([A-Za-z][A-Za-z0-9]*):(?: |$)")
_COMMENT = re.compile(r" *# ?(.*)")


class Row(NamedTuple):
    """A value that has a comment."""

    path: str
    default: Any
    about: str


def rows() -> Iterator[Row]:
    """In the order of values.yaml."""
    text = VALUES.read_text()
    defaults = yaml.safe_load(text)
    above: list[tuple[int, str]] = []
    about: list[str] = []
    for line in text.splitlines():
        if comment := _COMMENT.fullmatch(line):
            said = comment[1]
            if said.startswith("-- "):
                about = [said.removeprefix("-- ")]
            elif about:
                about.append(said.strip())
        elif key := _KEY.match(line):
            indent = len(key[1])
            above = [(depth, name) for depth, name in above if depth < indent] + [(indent, key[2])]
            names = [name for _, name in above]
            if about:
                yield Row(".".join(names), _at(defaults, names), " ".join(about))
            about = []
        else:
            about = []


def _at(values: Any, names: list[str]) -> Any:
    for name in names:
        values = values[name]
    return values


def leaves(values: dict[str, Any], path: str = "") -> Iterator[str]:
    """The paths of all values that have none below them."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def table() -> str:
    """As Markdown."""
    lines = ["| value | default | |", "|---|---|---|"]
    for row in rows():
        default = json.dumps(row.default, ensure_ascii=False)
        lines.append(f"| `{row.path}` | `{default}` | {row.about.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def readme() -> str:
    """The README with the table as it has to be."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    """Write what is not as it has to be."""
    README.write_text(readme())
    for name in COPIED:
        shutil.copyfile(MANIFESTS / name, CHART / "files" / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
