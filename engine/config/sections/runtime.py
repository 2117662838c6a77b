"""Keys of `cluster`, `tracking`, `paths` and `resources`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.config.schema import key
from engine.config.units import Size, Span
from engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the work runs."""

    kind: str = key("local", "local = this process, ray = workers on Ray", choices=("local", "ray"))
    workers: int = key(1, "training or scoring workers", ge=1)
    threads: int = key(0, "compute threads of each worker; 0 = the cores divided among workers", ge=0)
    gpus_per_worker: float = key(0, "GPUs of each worker", ge=0)
    address: str | None = key(None, "null = the job's own cluster or a new local one; auto; host:port")
    timeout: Span = key(Span("60s"), "how long to wait for a silent worker before its work goes to others")
    stall: Span = key(Span("10min"), "how long a command waits without any progress before it ends")
    min_workers: int = key(
        0, "fewest workers with which an attempt may continue after the cluster shrank; 0 = all", ge=0
    )
    retries: int = key(3, "attempts after the first one failed", ge=0)
    dashboard: bool = key(False, "Ray's dashboard on a local cluster (loopback only)")
    upload_limit: Size = key(Size("100MB"), "largest working folder that `submit` uploads")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics are mirrored."""

    kind: str = key("off", "tracker that mirrors the metrics", choices=("off", "wandb"))
    project: str = key("engine", "W&B project")
    entity: str | None = key(None, "W&B entity")
    mode: str = key("auto", "auto = online if WANDB_API_KEY is set", choices=("auto", "online", "offline"))
    group: str | None = key(None, "group of runs in the tracker; null = the name of the experiment")
    tags: tuple[str, ...] = key((), "tags of the run in the tracker")
    rows: bool = key(False, "send the rows of data that a model's bundle holds (gate, samples); else by reference")
    timeout: Span = key(Span("60s"), "longest time for the mirror to open, or to finish after the run")


def is_address(text: str) -> bool:
    """Whether a path is an address such as s3://bucket/runs, also where a path library has changed it to s3:/bucket/runs."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.\-]+:/", text))


def posix_path(text: str) -> None:
    """Raise UserError for an address such as s3://bucket/runs."""
    if is_address(text):
        raise UserError(
            f"runs, store and registry must be on a POSIX path, found {text!r}: their files are renamed and locked, and a "
            "promotion needs a lock or a conditional put, which obstore has but the engine does not depend on. Use a shared "
            "file system; `score.output` may be s3://"
        )


PLACE = "default: beside the folder of --config-dir (in it where it is the working directory or holds one already)"


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Where files go: relative to where the command is started. By default they are beside the folder of --config-dir."""

    store: str = key("store", f"datasets and features; {PLACE}", parse=posix_path)
    runs: str = key("runs", f"run directories and the registry; {PLACE}", parse=posix_path)
    mode: str = key(
        "auto",
        "who may read output files: private = the user alone (0600, folders 0700), umask = by the process's umask, "
        "auto = private if columns are sensitive",
        choices=("auto", "private", "umask"),
    )


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What a process may use: memory, threads, time."""

    memory: Size = key(Size("4GB"), "memory limit of ingest and features; a row of the data may take an eighth of it")
    threads: int = key(0, "compute threads; 0 = all cores", ge=0)
    query: Span = key(Span("1h"), "longest wait for the next rows of a SQL query, which is then interrupted")
