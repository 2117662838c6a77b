"""Which remote places may be used: those of the user's config, and those that were used with this store before.

A request to an object store is signed with this machine's credentials and may carry a session token. So a place named by a
bundle or a run directory (an address, an endpoint, a region) is used only if the user's config has it too, if an ingest or
scoring run of the user has recorded its digest in the store (`store/places/<digest>.json`), or with `trust=<digest>`.
A path of this machine's file system needs no permission: it is only read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.config.sections.runtime import is_address
from engine.errors import UserError
from engine.runtime import digest, marks

FOLDER = "places"
Places = Mapping[str, list[str | None]]  # config key of a place -> address, endpoint, region
PACKAGE = "pkg://"


def address(path: str, root: str) -> str:
    """A source's path as text: below `root` if only `root` is an address (`s3://bucket/events`, `pkg://package`).

    Joined as text, because a path library would turn `//` into `/`.
    """
    if "://" in root and "://" not in path and not path.startswith(("/", "~")):
        return f"{root.rstrip('/')}/{path}"
    return path


def place(path: str | None, endpoint: str | None = None, region: str | None = None) -> list[str | None] | None:
    """A remote place as [address, endpoint, region]; None for a path of this machine or of a package."""
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
    """Record the digests of places that the user's command uses; None (a local path) is ignored."""
    for item in reached:
        if item is not None:
            marks.put(store, FOLDER, digest.of_json(item))


def foreign(store: Path, found: Places) -> dict[str, list[str | None]]:
    """The places that were not used with the store before, by config key."""
    return {name: item for name, item in found.items() if not marks.has(store, FOLDER, digest.of_json(item))}


def trust_digest(found: Places) -> str:
    """The value of `trust=` that permits these places (hex SHA-256)."""
    return digest.of_json(sorted(found.items()))


def listed(found: Places) -> str:
    """The places as text, one per line."""
    lines = []
    for name, (path, endpoint, region) in found.items():
        more = [f"{key} {value}" for key, value in (("endpoint", endpoint), ("region", region)) if value]
        lines.append(f"  {name}: {', '.join([str(path), *more])}")
    return "\n".join(lines)


def check(store: Path, found: Places, trusted: str | None, owner: str, remedy: str = "") -> None:
    """Raise UserError for places of `owner` that were not used with the store before and are not `trusted`."""
    unknown = foreign(store, found)
    if unknown and trusted != trust_digest(unknown):
        raise UserError(
            f"a remote place must come from your own config, found in {owner}:\n{listed(unknown)}\n"
            "Requests there are signed with the credentials of this machine. "
            f"{remedy}To permit them for {owner}, add trust={trust_digest(unknown)}"
        )
