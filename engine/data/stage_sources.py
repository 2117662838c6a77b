"""Stages every source file: found in the store, read by threads of this process, or by workers of the cluster."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engine.config.sections.data import DataConfig
from engine.data import stage, stage_on_workers
from engine.data.bounds import Bounds
from engine.data.files import COMPRESSIONS, SourceFile, resolve
from engine.data.ingest_plan import IngestPlan
from engine.data.readers import lake_tables
from engine.data.stage import Staged
from engine.runtime.remote import address
from engine.runtime.run import Run


def stage_files(plan: IngestPlan, run: Run) -> list[Staged]:
    """Every source file read, typed and checked; files in parallel, or the pieces of the only one."""
    many = len(plan.files) > len(plan.data.sources)
    with run.progress(f"{plan.data.name}: read") as progress:
        ready = _spread(plan, progress.advance)

        def one(place: int) -> Staged:
            if place in ready:
                return ready[place]
            file = plan.files[place]
            # On disk where other files may join it later: an append then reads the new ones only.
            room = 0 if _may_have_siblings(file, plan.data) else plan.memory // 4
            threads = 1 if many else plan.threads
            bounds = Bounds.of(plan.memory, plan.threads if many else 1)
            return stage.stage(file, plan.data, threads, plan.staged, progress.advance, room=room, bounds=bounds)

        if not many:
            return [one(place) for place in range(len(plan.files))]
        with ThreadPoolExecutor(plan.threads) as pool:
            futures = [pool.submit(one, place) for place in range(len(plan.files))]
            try:
                return [future.result() for future in futures]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise


def _spread(plan: IngestPlan, advance: Callable[[int], None]) -> dict[int, Staged]:
    """Position of a file -> its staged form, found in the store or made by workers of the cluster; empty without a
    cluster. A single missing file is left to this process.
    """
    if plan.config.cluster.kind != "ray":
        return {}
    places = [
        place
        for place, file in enumerate(plan.files)
        if file.format not in lake_tables.LIBRARIES and _on_disk(file, plan)
    ]
    with ThreadPoolExecutor(plan.threads) as threads:
        loaded = list(threads.map(lambda place: stage.load(plan.files[place], plan.data, plan.staged), places))
    ready = {place: found for place, found in zip(places, loaded, strict=True) if found is not None}
    advance(sum(found.tally.rows for found in ready.values()))
    lacking = [place for place in places if place not in ready]
    if len(lacking) > 1:
        made = stage_on_workers.stage_files(plan.config, [plan.files[place] for place in lacking], plan.staged, advance)
        ready |= zip(lacking, made, strict=True)
    return ready


def _on_disk(file: SourceFile, plan: IngestPlan) -> bool:
    """Whether the file's rows will be kept in the store: where other files may join it later, or memory may be short."""
    return _may_have_siblings(file, plan.data) or file.size * _growth(file) > plan.memory // 4


def _may_have_siblings(file: SourceFile, data: DataConfig) -> bool:
    path = address(data.sources[file.source].path, data.path)
    if file.format in lake_tables.LIBRARIES:
        return False
    return file.shown != (path.rstrip("/") if path.startswith("s3://") else str(resolve(path, data.path)))


def _growth(file: SourceFile) -> int:
    """Memory that a byte of the file may need."""
    dense = file.format in ("parquet", *lake_tables.LIBRARIES) or file.path.suffix in COMPRESSIONS
    return 12 if dense else 2
