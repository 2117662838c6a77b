"""Which code of a recorded run may run again here.

A run directory may come from an untrusted source, and to reproduce it is to run its code. So each run records the digest of
its engine in the store (`store/code/<digest>.json`): code that is recorded there may run again without a question. Other
code needs `trust=<digest>`, and so do remote places in the record (`engine.runtime.remote`).
"""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError
from engine.runtime import digest as digests
from engine.runtime import marks, remote
from engine.runtime.environment import CodeRecord

FOLDER = "code"


def record(store: Path, code: CodeRecord) -> None:
    """Record the digest of the running engine (`environment.code()`) in the store."""
    marks.put(
        store, FOLDER, code["engine_digest"], engine_version=code["engine_version"], engine_git=code["engine_git"]
    )


def is_recorded(store: Path, digest: str) -> bool:
    """Whether an engine of this digest (hex SHA-256) has made a run with this store."""
    return marks.has(store, FOLDER, digest)


def check(store: Path, digest: str | None, places: remote.Places, trusted: str | None, what: str) -> None:
    """Raise UserError for code (its digest; None: the installed one) not recorded in this store, or places not used with it.

    `trusted` permits them all the same: the digest of that code, of those places, or of both. `what` describes the code.
    """
    code = digest if digest and not is_recorded(store, digest) else None
    unknown = remote.foreign(store, places)
    found = [*([code] if code else []), *([remote.trust_digest(unknown)] if unknown else [])]
    wanted = found[0] if len(found) == 1 else digests.of_json(found)
    if not found or trusted == wanted:
        return
    parts = []
    if code:
        parts.append(
            f"code must have run with the store {store} before it runs again, found code without a record there:\n{what}\n"
            "Read that code."
        )
    if unknown:
        parts.append(
            f"the rerun must read from places that were used with the store {store} before, found others:\n"
            f"{remote.listed(unknown)}\nRequests there are signed with the credentials of this machine."
        )
    raise UserError("\n".join(parts) + f" To continue, add trust={wanted}")
