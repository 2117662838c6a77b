"""Which code of a recorded run or of a model may run here.

A run directory may come from an untrusted source, and to reproduce it, or to score with its model, is to run its code. So each
run records the digests of its engine and of its plug-ins in the store (`store/code/<digest>.json`): code that is recorded there
may run again without a question. Other code needs `trust=<digest>`, and so do remote places in the record
(`engine.runtime.remote`).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from engine.config.plugins import Plugin
from engine.errors import UserError
from engine.runtime import digest, marks, remote
from engine.runtime.environment import CodeRecord

FOLDER = "code"


def record(store: Path, code: CodeRecord) -> None:
    """Record the digest of the running engine (`environment.code()`) in the store."""
    marks.put(
        store, FOLDER, code["engine_digest"], engine_version=code["engine_version"], engine_git=code["engine_git"]
    )


def record_plugin(store: Path, plugin: Plugin) -> None:
    """Record a file of code that the user has run, or has trusted, in the store."""
    marks.put(store, FOLDER, plugin.digest, file=plugin.file)


def is_recorded(store: Path, value: str) -> bool:
    """Whether code of this digest (hex SHA-256), an engine or a plug-in, has run with this store."""
    return marks.has(store, FOLDER, value)


def check(store: Path, digests: Collection[str], places: remote.Places, trusted: str | None, what: str) -> None:
    """Raise UserError for code (by digest) that is not recorded in this store, or places not used with it.

    `trusted` permits them all the same: the digest of that code, of those places, or of all. `what` describes the code.
    """
    code = [value for value in digests if not is_recorded(store, value)]
    unknown = remote.foreign(store, places)
    found = [*code, *([remote.trust_digest(unknown)] if unknown else [])]
    wanted = found[0] if len(found) == 1 else digest.of_json(found)
    if not found or trusted == wanted:
        return
    parts = []
    if code:
        parts.append(
            f"code must have run with the store {store} before, found code without a record there:\n{what}\n"
            "Read that code."
        )
    if unknown:
        parts.append(
            f"the rerun must read from places that were used with the store {store} before, found others:\n"
            f"{remote.listed(unknown)}\nRequests there are signed with the credentials of this machine."
        )
    raise UserError("\n".join(parts) + f" To continue, add trust={wanted}")
