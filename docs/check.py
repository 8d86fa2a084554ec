"""Checks the documentation: links lead somewhere, examples run, and docs/settings.md is what the code says.

A code block runs if its first line ends in `run`, as in ```` ```python run ```` (or `bash run`): from the top of the
checkout, with cloche on the PATH. It has to end with 0. `python docs/check.py --write` writes docs/settings.md anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from cloche.settings import PREFIX, Settings, extra, variables

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "docs" / "settings.md"
EXAMPLE_TIMEOUT_S = 120

FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\]\((?P<target>[^()\s]+(?:\([^()\s]*\))?)(?:\s+\"[^\"]*\")?\)|\b(?:src|href)=\"(?P<html>[^\"]+)\"")
HEADING = re.compile(r"^#{1,6} +(?P<text>.+?) *#*$", re.MULTILINE)
TARGET = re.compile(r"\bmake ([a-z]+(?:-[a-z]+)*)\b")


def pages() -> list[Path]:
    """Every Markdown file of the checkout, without what was built or installed."""
    skipped = {".venv", "build", "dist", "node_modules"}
    return sorted(p for p in ROOT.rglob("*.md") if not skipped & set(p.relative_to(ROOT).parts))


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    names: set[str] = set()
    for match in HEADING.finditer(FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match["text"]).lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = 0
        while (numbered := f"{name}-{count}" if count else name) in names:
            count += 1
        names.add(numbered)
    return names


def broken_links(page: Path) -> Iterator[str]:
    """Links to files that are not there, and to headings that no page has."""
    text = page.read_text(encoding="utf-8")
    for match in LINK.finditer(CODE_SPAN.sub("", FENCE.sub("", text))):
        target = match["target"] or match["html"]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / unquote(path)).resolve() if path else page
        if not file.is_relative_to(ROOT) or not file.exists():
            yield f"{target} leads nowhere"
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            yield f"{target}: the page has no such heading"


def unknown_targets(page: Path) -> Iterator[str]:
    """`make` commands, in code, that the Makefile does not know."""
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    code = [match["code"] for match in FENCE.finditer(text)] + CODE_SPAN.findall(FENCE.sub("", text))
    for target in TARGET.findall("\n".join(code)):
        if target not in known:
            yield f"make {target}: the Makefile has no such target"


def failing_examples(page: Path) -> Iterator[str]:
    """Examples that do not run."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        words = match["info"].split()
        if words[1:] != ["run"]:
            continue
        where = f"the example in line {text.count(chr(10), 0, match.start()) + 1}"
        match words[0]:
            case "python":
                command = [sys.executable, "-W", "error", "-c", match["code"]]
            case "bash":
                command = ["bash", "-euo", "pipefail", "-c", match["code"]]
            case language:
                yield f"{where}: nothing here runs {language}"
                continue
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        started = time.monotonic()
        try:
            done = subprocess.run(  # noqa: S603 # examples of our own
                command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=EXAMPLE_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            yield f"{where} did not end within {EXAMPLE_TIMEOUT_S} s"
            continue
        print(f"{page.relative_to(ROOT)}: {where} ended with {done.returncode} in {time.monotonic() - started:.1f} s")
        if done.returncode:
            yield f"{where} ended with {done.returncode}\n{done.stdout}{done.stderr}"


def settings_page() -> str:
    """docs/settings.md, made from the fields of :class:`cloche.settings.Settings`."""
    names = variables()
    lines = [
        "# Settings",
        "",
        "Everything is set by environment variables, which are read once. A variable that is set to nothing counts as",
        "unset. A `CLOCHE_` name that is not in this list is an error. Where there is an alias, the `CLOCHE_` name wins.",
        "",
        "This page is made from `src/cloche/settings.py` by `python docs/check.py --write`.",
    ]
    for field, info in Settings.model_fields.items():
        about = extra(info)
        aliases = [f"`{name}`" for name, of in names.items() if of == field and not name.startswith(PREFIX)]
        default = about["unset"] or f"`{shown(info.default)}`"
        lines += ["", f"## {PREFIX}{field.upper()}", "", str(info.description), ""]
        lines += [f"- Default: {default} ({about['why']}).", f"- Allowed: {about['allowed']}."]
        if aliases:
            lines.append(f"- Alias: {', '.join(aliases)}.")
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    """A default as one would write it into the environment."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= 2**10:
        for unit, size in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
            if value % size == 0:
                return f"{value // size}{unit}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Check everything; tell all that is wrong."""
    if sys.argv[1:] == ["--write"]:
        SETTINGS.write_text(settings_page(), encoding="utf-8")
        return 0
    complaints: list[str] = []
    if not SETTINGS.exists() or SETTINGS.read_text(encoding="utf-8") != settings_page():
        complaints.append("docs/settings.md is not what the code says; run: python docs/check.py --write")
    for page in pages():
        for check in (broken_links, unknown_targets, failing_examples):
            complaints += [f"{page.relative_to(ROOT)}: {complaint}" for complaint in check(page)]
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    print(f"{len(pages())} pages checked, {len(complaints)} complaints")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
