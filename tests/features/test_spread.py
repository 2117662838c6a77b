"""Months of a view over real Ray workers: the bytes, the accounts and the errors of a build in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.features import store
from engine.features.table import ensure_table
from engine.runtime.run import Run
from tests.conftest import FakeRay
from tests.features.test_store import built, config_of, everything, folder, from_scratch, months_of_visits, parts_of

__all__ = ["folder"]
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]
RAY = ("cluster=ray", "cluster.workers=2")


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.parquet")}


def test_workers_write_the_files_that_one_process_writes(folder: Path, tmp_path: Path) -> None:
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    alone = from_scratch(folder, tmp_path)
    apart = built(config_of(folder, *RAY))
    ours, theirs = alone.views["shop"], apart.views["shop"]
    assert parts_of(apart) == {"computed": 4, "linked": 0}
    assert ours.directory.name == theirs.directory.name and ours.manifest == theirs.manifest
    assert files_of(ours.directory) == files_of(theirs.directory)
    assert sorted(path.name for path in theirs.directory.parent.iterdir()) == [theirs.directory.name]
    # One more window: the workers compute that, beside the columns that are there.
    wider = "features.views.shop.windows=[6h,2d,40d]"
    more = built(config_of(folder, *RAY, wider))
    assert everything(more).equals(everything(from_scratch(folder, tmp_path, wider)))


def test_what_a_worker_says_becomes_the_error_of_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fake_ray: FakeRay
) -> None:
    def refuse(*_: Any) -> Any:
        raise UserError("no such thing")

    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(store, "compute_rows", refuse)
        with pytest.raises(UserError, match="no such thing"):
            built(config_of(folder, *RAY))
    fake_ray.dead = True
    with pytest.raises(UserError, match="view 'shop' could not be computed in 4 tries: it died"):
        built(config_of(folder, *RAY))
    assert not list((folder / "store").rglob("features/**/.tries*"))
    assert not list((folder / "store").rglob("features/shop/*"))


def test_one_cluster_computes_all_views_of_a_build(folder: Path, fake_ray: FakeRay) -> None:
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    day = "features.views.day={entity: [shop], windows: [1d], aggregates: {amount: [mean]}}"
    views = built(config_of(folder, *RAY, day)).views
    assert [view.manifest["parts_computed"] for view in views.values()] == [4, 4]
    assert (fake_ray.sessions, fake_ray.open) == (1, 0)


@pytest.mark.usefixtures("fake_ray")
def test_months_computed_anew_agree_with_those_stored_whatever_order_they_are_done_in(folder: Path) -> None:
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    config = config_of(folder, *RAY)
    first = built(config)
    run = Run.create("features", config, {})
    again = ensure_table(config, run, ensure_dataset(config, run), anew=True)
    run.finish({})
    assert again.views["shop"].manifest == first.views["shop"].manifest
    months = [part["name"] for part in first.views["shop"].manifest["parts"]]
    assert months == ["2020-01", "2020-02", "2020-03", "2020-04"]


def test_one_new_month_starts_no_cluster(folder: Path, fake_ray: FakeRay) -> None:
    table = months_of_visits()
    pq.write_table(table.slice(0, 675), folder / "visits-0.parquet")
    built(config_of(folder))
    pq.write_table(table.slice(675), folder / "visits-1.parquet")
    assert parts_of(built(config_of(folder, *RAY)))["linked"] >= 2
    assert fake_ray.sessions == 0
