"""All private names of Ray that the engine uses.

setup.py limits Ray to the newest version with which they were tested; `tests/runtime/test_ray_private.py` fails with the name
that is missing in another version.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the entry point of a submitted job
NODE_ADDRESS = "_node_ip_address"  # a keyword of ray.init: where a local cluster listens
CALLBACKS = "_create_default_callbacks"  # of a trainer of Ray Train
NO_ROOM = "WorkerGroupStartupTimeoutError"  # the type of the error when workers could not be placed
IDLE, CLEANER = "DatasetsCallback", "PlacementGroupCleanerCallback"  # helpers of Ray Train, each an actor
REQUEST = "_do_request"  # of a JobSubmissionClient
# Module -> names in it.
NAMES = {
    "ray._raylet": ("AuthenticationTokenLoader", "Config"),
    "ray._private.worker": ("_global_node",),
    "ray._private.ray_constants": ("ENABLE_RAY_CLUSTER",),
    "ray._private.runtime_env.constants": (JOB_VARIABLE,),
    "ray._private.authentication.authentication_token_setup": ("maybe_enable_token_auth_if_token_available",),
    "ray._common.utils": ("get_default_ray_temp_dir",),
    "ray.train.v2._internal.exceptions": (NO_ROOM,),
    "ray.train.v2._internal.callbacks.datasets": (IDLE,),
    "ray.train.v2._internal.callbacks.placement_group_callback": (CLEANER,),
}


def _module(name: str) -> Any:
    assert name in NAMES, f"{name} is not among the private modules of Ray that are watched"
    return importlib.import_module(name)


def has_tokens() -> bool:
    """Whether the installed Ray has token authentication."""
    raylet = _module("ray._raylet")
    return all(hasattr(raylet, name) for name in NAMES["ray._raylet"])


def read_token_again() -> None:
    """Make Ray read mode and token again: it reads them once, but a process may join one cluster after another."""
    if has_tokens():
        raylet = _module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def send_kept_token() -> None:
    """Make Ray's clients send this user's stored token. Raises ImportError or AttributeError on an older Ray."""
    setup = _module("ray._private.authentication.authentication_token_setup")
    setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def may_form_clusters(value: bool) -> None:
    """Permit or forbid Ray to form clusters: if permitted, it replaces a loopback address by the machine's public one. Ray
    reads the variable on import, which may have happened before, so the constant is set.
    """
    _module("ray._private.ray_constants").ENABLE_RAY_CLUSTER = value


def services() -> dict[str, Any]:
    """Popen of GCS and raylet of the cluster that this process has started, by name; empty without one."""
    node = _module("ray._private.worker")._global_node if "ray" in sys.modules else None
    found = {} if node is None else dict(node.all_processes)
    return {kind: entries[0].process for kind, entries in found.items() if kind in ("gcs_server", "raylet")}


def temporary_directory() -> str:
    """The folder with the folders of all sessions on this machine."""
    return str(_module("ray._common.utils").get_default_ray_temp_dir())


def leave_out_callbacks(trainer: Any, names: set[str]) -> None:
    """Leave out Ray Train's callbacks of these names. In a version with other names they start."""
    make: Callable[[], list[Any]] | None = getattr(trainer, CALLBACKS, None)
    if make is not None:
        setattr(trainer, CALLBACKS, lambda: [item for item in make() if type(item).__name__ not in names])


def api(client: Any, path: str) -> Any:
    """The JSON reply of the dashboard of a job client's cluster at `path`."""
    return getattr(client, REQUEST)("GET", path).json()
