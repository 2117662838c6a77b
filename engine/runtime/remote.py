"""Which remote places may be reached: those of the user's config, and those that this machine's store has reached before.

A request to an object store is signed with this machine's credentials, and a session token travels with it. So a place that a
bundle or a run directory brings (an address, an endpoint, a region) is used when the user's config says the same, when an ingest
or a scoring run of the user's has left its digest in the store (`store/places/<digest>.json`), or with `trust=<digest>`.
A path of this machine's file system needs none of that: it is only read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.sections.runtime import is_address
from engine.errors import UserError
from engine.runtime import digest, marks

FOLDER = "places"
Places = Mapping[str, list[str | None]]  # what names a place -> address, endpoint, region
PACKAGE = "pkg://"


def address(path: str, root: str) -> str:
    """A source's path as text: below `root` where that is an address (`s3://bucket/events`, `pkg://package`) and it is none.

    A path library would make one slash of the two.
    """
    if "://" in root and "://" not in path and not path.startswith(("/", "~")):
        return f"{root.rstrip('/')}/{path}"
    return path


def place(path: str | None, endpoint: str | None = None, region: str | None = None) -> list[str | None] | None:
    """What identifies a remote place; None for a path of this machine or of a package."""
    here = path is None or not is_address(path) or path.startswith(PACKAGE)
    return None if here and not endpoint else [path, endpoint or None, region or None]


def of_data(data: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """The remote places of a data section as plain dicts, by config key of the source."""
    root, found = str(data.get("path") or ""), {}
    for name, source in (data.get("sources") or {}).items():
        item = place(address(str(source["path"]), root), source.get("endpoint"), source.get("region"))
        if item is not None:
            found[f"data.sources.{name}"] = item
    return found


def own(data: Mapping[str, Any], said: Mapping[str, Any]) -> list[list[str | None]]:
    """The places of the sources of `data` that the user's own section `said` names: its sources', and those below its root."""
    root = str(said.get("path") or "")
    below: list[list[str | None]] = []
    if place(root) is not None:
        paths = [str(source["path"]) for source in (data.get("sources") or {}).values()]
        below = [[address(path, root), None, None] for path in paths if address(path, root) != path]
    return [*of_data(said).values(), *below]


def record(store: Path, *reached: list[str | None] | None) -> None:
    """Keep the digests of places that the user's command reaches; None is no remote place."""
    for item in reached:
        if item is not None:
            marks.put(store, FOLDER, digest.of_json(item))


def foreign(store: Path, found: Places) -> dict[str, list[str | None]]:
    """Those of the places, by what names them, that the store has not reached."""
    return {name: item for name, item in found.items() if not marks.has(store, FOLDER, digest.of_json(item))}


def trust_digest(found: Places) -> str:
    """What `trust=` must say for these places (hex SHA-256)."""
    return digest.of_json(sorted(found.items()))


def listed(found: Places) -> str:
    """The places, one a line."""
    lines = []
    for name, (path, endpoint, region) in found.items():
        more = [f"{key} {value}" for key, value in (("endpoint", endpoint), ("region", region)) if value]
        lines.append(f"  {name}: {', '.join([str(path), *more])}")
    return "\n".join(lines)


def check(store: Path, found: Places, trusted: str | None, owner: str, remedy: str = "") -> None:
    """Refuse places of `owner` that the store has not reached and `trusted` does not name. Raises UserError."""
    unknown = foreign(store, found)
    if unknown and trusted != trust_digest(unknown):
        raise UserError(
            f"a remote place must come from your own config, found in {owner}:\n{listed(unknown)}\n"
            "Requests there are signed with the credentials of this machine. "
            f"{remedy}To go there on the word of {owner}, add trust={trust_digest(unknown)}"
        )
