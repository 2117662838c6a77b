"""A hook of mkdocs: pages that are made when the documents are built, and links between all of them.

The reference is made from the list of commands and the typed config, so that it cannot be behind them. Pages of the repository's
root and the notebook become pages; a link to what has no page (a test, a config) keeps its text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine import __main__ as shell
from engine import commands
from engine.config import compose, schema
from engine.config.tree import Config

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository that are pages or pictures too, by their place in the site.
PLACES = {
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/results/report.png": "pictures/report.png",
}
NOTEBOOK = "notebooks/first_hour.ipynb"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
OF_A_RUN = "run"  # the page of the keys that are in no section


# -------------------------------------------------------------------------------------------------- the reference


def sections() -> dict[str, list[tuple[str, str, str, str]]]:
    """Section -> (key, type, default, meaning) of each of its keys."""
    found: dict[str, list[tuple[str, str, str, str]]] = {}
    for path, kind, default, meaning in schema.documented(Config):
        section = path.split(".")[0] if "." in path else OF_A_RUN
        shown = "required" if default == "(required)" else f"`{shell._plain(default)}`"
        found.setdefault(section, []).append((path, kind, shown, meaning))
    return found


def keys_page(section: str, keys: list[tuple[str, str, str, str]]) -> str:
    """The page of a section."""
    lines = [f"# Keys: {section}", "", _read_by(section), "", "| key | meaning | type | default |", "|---|---|---|---|"]
    for path, kind, default, meaning in keys:
        lines.append(f"| `{path}` | {_cell(meaning)} | {_cell(kind)} | {default.replace('|', chr(92) + '|')} |")
    groups = compose.groups()
    if section in groups:
        named = f"{section}=NAME" if section in compose.chosen() else f"+{section}=NAME"
        lines += [
            "",
            f"`{named}` chooses one of the files of `conf/{section}/`: {', '.join(f'`{name}`' for name in groups[section])}.",
        ]
    return "\n".join(lines) + "\n"


def _read_by(section: str) -> str:
    if section == OF_A_RUN:
        return "Keys that every command takes."
    readers = [name for name, command in commands.COMMANDS.items() if section in (*command.sections, *commands.EVERY)]
    links = [f"[{name}](../commands.md#{_anchor(name)})" for name in readers]
    return f"Read by {', '.join(links)}." if section not in commands.EVERY else "Read by every command."


def commands_page() -> str:
    """Every command with its usage, what it does and the sections of keys that it reads."""
    pages = sections()
    lines = ["# Commands", "", "`engine COMMAND` is the same as `python -m engine COMMAND`.", ""]
    for name, command in commands.COMMANDS.items():
        own = [section for section in (*command.sections, *commands.EVERY) if section in pages]
        read = [f"[{section}](keys/{section}.md)" for section in (*own, OF_A_RUN)]
        lines += [f"## engine {name}", "", f"{_cell(command.help[0].upper() + command.help[1:])}.", ""]
        lines += ["```text", f"engine {name} {command.usage}".rstrip(), "```", "", f"Keys: {', '.join(read)}.", ""]
    lines += ["## Options of every command", "", "| option | meaning |", "|---|---|"]
    lines += [f"| `{name}` | {_cell(meaning)} |" for name, meaning in shell.OPTIONS.items()]
    return "\n".join([*lines, "", shell.WORDS]) + "\n"


def _anchor(name: str) -> str:
    return re.sub(r"[ -]+", "-", f"engine {name}")


def _cell(text: str) -> str:
    """A text that is no markup, for a cell of a table."""
    return re.sub(r"([\\|*_<>\[\]])", r"\\\1", text).replace("\\<", "&lt;").replace("\\>", "&gt;")


# --------------------------------------------------------------------------------------------------- the notebook


def notebook_page(path: Path) -> str:
    """A notebook as a page: its texts, and its code in blocks."""
    parts = [f"*[The notebook itself]({path.name}); this page shows it without its output.*"]
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    first, *rest = parts[1:]
    return "\n\n".join([first, parts[0], *rest]) + "\n"


# ---------------------------------------------------------------------------------------------------------- links


def relinked(text: str, source: str, page: str) -> str:
    """The text of `source` (a path in the repository), with links that are right on `page` (a path in the site)."""

    def link(match: re.Match[str]) -> str:
        picture, shown, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        there = os.path.normpath(os.path.join(os.path.dirname(source), path))
        place = PLACES.get(there, there.removeprefix("docs/") if there.startswith("docs/") else None)
        if place is None:
            return shown
        found = os.path.relpath(place, os.path.dirname(page) or ".")
        return f"{picture}[{shown}]({found}{'#' + anchor if anchor else ''})"

    fences = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in fences)


# ---------------------------------------------------------------------------------------------------------- mkdocs


def generated() -> Iterator[tuple[str, str]]:
    """(place in the site, text) of every page that is made."""
    for source, page in PLACES.items():
        if page.endswith(".md"):
            yield page, relinked((ROOT / source).read_text(encoding="utf-8"), source, page)
    yield "reference/commands.md", commands_page()
    for section, keys in sections().items():
        yield f"reference/keys/{section}.md", keys_page(section, keys)
    yield f"{NOTEBOOK.removesuffix('.ipynb')}.md", notebook_page(ROOT / "docs" / NOTEBOOK)


def on_config(config: Any) -> Any:
    """Add the reference to the navigation."""
    keys = [{section: f"reference/keys/{section}.md"} for section in sections()]
    config.nav.append({"Reference": [{"Commands": "reference/commands.md"}, {"Keys": keys}]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made, and the pictures that are beside them."""
    from mkdocs.structure.files import File  # the tests read this module without mkdocs

    for place, text in generated():
        files.append(File.generated(config, place, content=text))
    for source, place in PLACES.items():
        if not place.endswith(".md"):
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page of docs/."""
    own = (ROOT / "docs" / page.file.src_uri).is_file()
    return relinked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri) if own else markdown
