"""The store: reused by content, incremental, bounded in memory, and always the bytes of a full build."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from engine.config import schema
from engine.config.compose import compose
from engine.config.sections.features import ViewConfig
from engine.config.tree import Config
from engine.config.units import Size
from engine.data.dataset import Dataset
from engine.data.make_dataset import ensure_dataset
from engine.errors import UserError
from engine.features import compute, partitions, store
from engine.features.kept_reads import KeptReads
from engine.features.table import FeatureTable, ensure_table
from engine.runtime import seal
from engine.runtime.run import Run
from tests.tiny import overrides, visits, write_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_tiny(tmp_path, 400)
    (folder / "visits.parquet").unlink()
    return folder


def config_of(folder: Path, *more: str) -> Config:
    return compose(overrides(folder, *more), str(folder / "conf")).config


def built(config: Config) -> FeatureTable:
    run = Run.create("features", config, {})
    table = ensure_table(config, run, ensure_dataset(config, run))
    run.finish({})
    return table


def from_scratch(folder: Path, tmp_path: Path, *more: str) -> FeatureTable:
    return built(config_of(folder, f"paths.store={tmp_path / f'fresh-{random.random()}'}", *more))


def months_of_visits(rows: int = 900, seed: int = 0) -> pa.Table:
    """The visits stretched over four months, in time order."""
    table = visits(rows, seed).sort_by([("at", "ascending"), ("visit", "ascending")])
    stretched = {}
    for name in ("at", "paid_at"):
        times = table[name].cast(pa.int64()).to_numpy(zero_copy_only=False)
        values = [None if np.isnan(t) else int(1_577_836_800_000_000 + (t - 1_577_836_800_000_000) * 4) for t in times]
        stretched[name] = pa.array(values, pa.timestamp("us", tz="UTC"))
    return pa.table({name: stretched.get(name, table[name]) for name in table.column_names})


def everything(table: FeatureTable) -> pa.Table:
    return table.read((0, table.dataset.rows)).combine_chunks()


def days_of(table: FeatureTable, view: str = "shop") -> int:
    return table.views[view].manifest["days_computed"]


def parts_of(table: FeatureTable, view: str = "shop") -> dict[str, int]:
    manifest = table.views[view].manifest
    return {name: manifest[f"parts_{name}"] for name in ("computed", "linked")}


@contextlib.contextmanager
def features_computed() -> Iterator[set[str]]:
    """Names of the features that are computed, not read from the store, in the block."""
    asked: set[str] = set()
    plain = compute.view_features

    def spy(*arguments: Any) -> dict[str, pa.Array]:
        found = plain(*arguments)
        asked.update(found)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "view_features", spy)
        yield asked


def test_a_view_is_computed_once_and_shared(folder: Path) -> None:
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    first = built(config_of(folder))
    other = built(config_of(folder, "name=other", "features.direct.shop=false", "features.views.shop.owner=somebody"))
    assert other.views["shop"].directory == first.views["shop"].directory


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        (
            "features.views.shop.windows=[6h,2d,5d]",
            {"shop_count_5d", "shop_bought_mean_5d", "shop_amount_mean_5d", "shop_amount_max_5d"},
        ),
        ("features.views.shop.aggregates.amount=[mean,max,std]", {"shop_amount_std_6h", "shop_amount_std_2d"}),
        ("features.views.shop.aggregates.amount=[max]", set()),
    ],
)
def test_a_change_computes_what_is_lacking_and_no_more(
    folder: Path, tmp_path: Path, change: str, computed: set[str]
) -> None:
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    built(config_of(folder))
    with features_computed() as asked:
        changed = built(config_of(folder, change))
    assert asked == computed
    fresh = from_scratch(folder, tmp_path, change)
    assert everything(changed).equals(everything(fresh)) and changed.digest == fresh.digest


def test_an_append_computes_the_new_month_only(folder: Path, tmp_path: Path) -> None:
    table = months_of_visits()
    cut = datetime.datetime(2020, 4, 1, tzinfo=datetime.UTC)
    old = table.filter(pc.less(table["at"], pa.scalar(cut, pa.timestamp("us", tz="UTC"))))
    pq.write_table(old, folder / "visits-0.parquet")
    before = built(config_of(folder))
    assert parts_of(before) == {"computed": 3, "linked": 0}
    pq.write_table(table.slice(old.num_rows), folder / "visits-1.parquet")
    after = built(config_of(folder))
    assert parts_of(after) == {"computed": 1, "linked": 3}
    fresh = from_scratch(folder, tmp_path)
    assert everything(after).equals(everything(fresh)) and after.digest == fresh.digest


def test_a_late_row_changes_what_can_see_it_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    table = months_of_visits()
    late = 300  # a visit of February
    rows = [index for index in range(table.num_rows) if index != late]
    pq.write_table(table.take(pa.array(rows)), folder / "visits-0.parquet")
    before = built(config_of(folder))
    pq.write_table(table.slice(late, 1), folder / "visits-1.parquet")
    after = built(config_of(folder))
    assert parts_of(after)["linked"] >= 2
    fresh = from_scratch(folder, tmp_path)
    assert everything(after).equals(everything(fresh))
    changed = (
        everything(after)
        .take(pa.array(rows))
        .filter(
            pa.array(
                [
                    a != b
                    for a, b in zip(
                        everything(after).take(pa.array(rows)).to_pylist(), everything(before).to_pylist(), strict=True
                    )
                ]
            )
        )
    )
    assert set(changed["shop"].to_pylist()) <= {table["shop"][late].as_py()}


def test_a_late_row_at_the_end_of_a_month_is_seen_by_the_next(folder: Path, tmp_path: Path) -> None:
    table = months_of_visits()
    february = pa.scalar(datetime.datetime(2020, 2, 1, tzinfo=datetime.UTC), pa.timestamp("us", tz="UTC"))
    late = pc.sum(pc.less(table["at"], february)).as_py() - 1
    pq.write_table(pa.concat_tables([table.slice(0, late), table.slice(late + 1)]), folder / "visits-0.parquet")
    before = built(config_of(folder))
    pq.write_table(table.slice(late, 1), folder / "visits-1.parquet")
    after = built(config_of(folder))
    assert parts_of(after) == {"computed": 2, "linked": 2}
    assert everything(after).equals(everything(from_scratch(folder, tmp_path)))
    assert not everything(after).slice(late + 1).equals(everything(before).slice(late))


def day_numbers(table: pa.Table) -> np.ndarray:
    return np.asarray(table["at"].cast(pa.int64())) // partitions.DAY


@contextlib.contextmanager
def rows_computed() -> Iterator[list[tuple[int, int]]]:
    """Ranges of dataset rows whose features are computed in the block."""
    found: list[tuple[int, int]] = []
    plain = store.compute_rows

    def spy(job: Any, have: set[str], rows: tuple[int, int]) -> dict[str, pa.Array]:
        found.append(rows)
        return plain(job, have, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "compute_rows", spy)
        yield found


def test_an_append_computes_the_new_day_only(folder: Path, tmp_path: Path) -> None:
    table = months_of_visits()
    days = day_numbers(table)
    last = int(np.searchsorted(days, days[-1]))
    pq.write_table(table.slice(0, last), folder / "visits-0.parquet")
    built(config_of(folder))
    pq.write_table(table.slice(last), folder / "visits-1.parquet")
    with rows_computed() as computed:
        after = built(config_of(folder))
    assert computed == [(last, table.num_rows)]
    assert (days_of(after), parts_of(after)) == (1, {"computed": 1, "linked": 3})
    fresh = from_scratch(folder, tmp_path)
    assert after.digest == fresh.digest
    same = [view.directory / "part-2020-04.parquet" for view in (after.views["shop"], fresh.views["shop"])]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_a_late_row_computes_the_days_from_its_own_on_as_far_as_windows_reach(folder: Path, tmp_path: Path) -> None:
    table = months_of_visits()
    days = day_numbers(table)
    late = int(np.searchsorted(days, days[0] + 70)) + 1  # in the middle of March
    pq.write_table(pa.concat_tables([table.slice(0, late), table.slice(late + 1)]), folder / "visits-0.parquet")
    built(config_of(folder))
    pq.write_table(table.slice(late, 1), folder / "visits-1.parquet")
    with rows_computed() as computed:
        after = built(config_of(folder))
    (rows,) = computed
    reached = [int(days[row]) for row in (rows[0], rows[1] - 1)]
    assert (
        reached[0] == days[late] and days[late] < reached[1] <= days[late] + 3
    )  # windows of 2 days, decided an hour before
    assert (days_of(after), parts_of(after)) == (reached[1] - reached[0] + 1, {"computed": 1, "linked": 3})
    assert after.digest == from_scratch(folder, tmp_path).digest


def test_a_part_ends_with_the_day_that_fills_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "PART_ROWS", 100)
    table = months_of_visits()
    pq.write_table(table.slice(0, 850), folder / "visits-0.parquet")
    before = built(config_of(folder)).views["shop"].manifest["parts"]
    sizes = [part["stop"] - part["start"] for part in before]
    assert max(sizes) < 100 + max(np.bincount(day_numbers(table) - day_numbers(table)[0]))
    assert [part["name"] for part in before if len(part["name"]) == 7] == ["2020-01", "2020-02", "2020-03", "2020-04"]
    assert len(before) > 8 and {len(part["name"]) for part in before} == {7, 10}
    pq.write_table(table.slice(850), folder / "visits-1.parquet")
    after = built(config_of(folder))
    assert parts_of(after)["linked"] >= len(before) - 1
    fresh = from_scratch(folder, tmp_path)
    assert everything(after).equals(everything(fresh)) and after.digest == fresh.digest


def test_days_of_unchanged_parts_of_the_dataset_are_not_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.data.make_dataset.PART_ROWS", 200)
    table = months_of_visits()
    pq.write_table(table.slice(0, 850), folder / "visits-0.parquet")
    built(config_of(folder))
    pq.write_table(table.slice(850), folder / "visits-1.parquet")
    starts: list[int] = []
    plain = partitions._tables_by_day

    def spy(dataset: Any, columns: Any, at: int) -> Iterator[Any]:
        starts.append(at)
        return plain(dataset, columns, at)

    monkeypatch.setattr(partitions, "_tables_by_day", spy)
    after = built(config_of(folder))
    days = day_numbers(table)
    assert starts == [
        np.searchsorted(days, days[799])
    ]  # four parts of 200 rows are as before; the day of the last may go on
    inputs = partitions.load(folder / "store", after.dataset.name, after.dataset.digest)
    (path,) = (folder / "store" / "features" / ".inputs").glob(f"*{after.dataset.digest[:16]}.json")
    path.unlink()
    for other in path.parent.glob("*.json"):
        other.unlink()
    built(config_of(folder))
    assert inputs == partitions.load(folder / "store", after.dataset.name, after.dataset.digest)


def test_the_store_keeps_the_inputs_of_the_newest_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "KEPT", 2)
    table = months_of_visits(60)
    for turn, (start, stop) in enumerate([(0, 20), (20, 40), (40, 60)]):
        pq.write_table(table.slice(start, stop - start), folder / f"visits-{turn}.parquet")
        newest = built(config_of(folder)).dataset.digest
    kept = [path.name for path in (folder / "store" / "features" / ".inputs").glob("*.json")]
    assert len(kept) == 2 and f"tiny-{newest[:16]}.json" in kept


def test_a_version_whose_inputs_are_gone_is_used_by_part(folder: Path, tmp_path: Path) -> None:
    table = months_of_visits()
    pq.write_table(table.slice(0, 890), folder / "visits-0.parquet")
    built(config_of(folder))
    for path in (folder / "store" / "features" / ".inputs").glob("*.json"):
        path.write_text("{}")
    pq.write_table(table.slice(890), folder / "visits-1.parquet")
    after = built(config_of(folder))
    assert parts_of(after) == {"computed": 1, "linked": 3} and days_of(after) > 15
    assert after.digest == from_scratch(folder, tmp_path).digest


def test_a_label_that_arrives_later_leaves_features_without_it_alone(folder: Path) -> None:
    table = months_of_visits()
    only_counts = ("~features.views.shop.aggregates.bought", "~features.views.shop.aggregates.amount")
    hidden = table.set_column(table.schema.get_field_index("bought"), "bought", pa.nulls(table.num_rows, pa.bool_()))
    pq.write_table(hidden, folder / "visits-0.parquet")
    before = built(config_of(folder, *only_counts))
    pq.write_table(table, folder / "visits-0.parquet")
    after = built(config_of(folder, *only_counts))
    assert after.dataset.digest != before.dataset.digest
    assert after.views["shop"].directory == before.views["shop"].directory


@pytest.mark.parametrize("seed", range(4))
def test_appends_and_late_rows_in_random_order_end_at_the_full_build(folder: Path, tmp_path: Path, seed: int) -> None:
    table = months_of_visits(300, seed)
    draw = random.Random(seed)
    order = draw.sample(range(300), 300)
    edges = sorted(draw.sample(range(20, 290), 3))
    for turn, (start, stop) in enumerate(zip([0, *edges], [*edges, 300], strict=True)):
        pq.write_table(table.take(pa.array(order[start:stop])), folder / f"visits-{turn}.parquet")
        found = built(config_of(folder))
    fresh = from_scratch(folder, tmp_path)
    assert everything(found).equals(everything(fresh)) and found.digest == fresh.digest


@pytest.mark.parametrize("memory", ["40KB", "150KB"])
def test_little_memory_gives_the_same_bytes(
    folder: Path, tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of rows, and history in passes over groups of entities, one of which owns most rows."""
    table = months_of_visits(1500)
    shop = pa.array(["giant" if i % 3 else s for i, s in enumerate(table["shop"].to_pylist())])
    pq.write_table(table.set_column(table.schema.get_field_index("shop"), "shop", shop), folder / "visits-0.parquet")
    roomy = built(config_of(folder))
    passes: list[int] = []
    plain = store._in_passes

    def spy(*arguments: Any) -> dict[str, pa.Array]:
        passes.append(arguments[-1])
        return plain(*arguments)

    monkeypatch.setattr(store, "_in_passes", spy)
    monkeypatch.setattr(store, "batch_rows", lambda job: 50 if memory == "40KB" else 400)
    tight = from_scratch(folder, tmp_path, "features.views.shop.windows=[6h,30d]")
    monkeypatch.undo()
    assert passes and max(passes) > 1
    roomy = from_scratch(folder, tmp_path, "features.views.shop.windows=[6h,30d]")
    assert everything(tight).equals(everything(roomy)) and tight.digest == roomy.digest


def test_threads_do_not_change_a_view(folder: Path, tmp_path: Path) -> None:
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    digests = {from_scratch(folder, tmp_path, f"resources.threads={count}").digest for count in (1, 2, 4)}
    assert len(digests) == 1


def test_memory_sets_the_rows_of_a_batch(folder: Path) -> None:
    pq.write_table(months_of_visits(60), folder / "visits-0.parquet")
    config = config_of(folder)
    run = Run.create("features", config, {})
    dataset = ensure_dataset(config, run)
    rows = []
    for memory in ("10MB", "100MB"):
        sized = dataclasses.replace(config, resources=dataclasses.replace(config.resources, memory=Size(memory)))
        job = store.Job("shop", config.features.views["shop"], sized, dataset, store.Inputs(), folder / "failed")
        rows.append(store.batch_rows(job))
    run.finish({})
    assert rows[1] == pytest.approx(10 * rows[0], rel=0.01)


def test_any_tool_can_read_a_view(folder: Path) -> None:
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    table = built(config_of(folder))
    stored = table.views["shop"]
    plain = pq.ParquetDataset(sorted(str(path) for path in stored.directory.glob("*.parquet"))).read()
    assert plain.equals(stored.read()) and plain.num_rows == table.dataset.rows


def test_a_stored_part_with_other_values_is_found_out(folder: Path) -> None:
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    config = config_of(folder)
    stored = built(config).views["shop"]
    manifest = (stored.directory / "manifest.json").read_text()
    digest = stored.manifest["parts"][0]["columns"]["shop_count_6h"]["digest"]
    (stored.directory / "manifest.json").write_text(manifest.replace(digest, "0" * 64))
    seal.write(stored.directory)  # by somebody who covers it up
    run = Run.create("features", config, {})
    with pytest.raises(UserError, match="other values of 'shop_count_6h' in 2020-01"):
        ensure_table(config, run, ensure_dataset(config, run), anew=True)
    assert not stored.directory.exists()
    run.finish({})


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_damaged_part_is_named_with_the_way_out(folder: Path, harm: Callable[[Path], None]) -> None:
    pq.write_table(months_of_visits(), folder / "visits-0.parquet")
    table = built(config_of(folder))
    part = table.views["shop"].directory / "part-2020-02.parquet"
    harm(part)
    with pytest.raises(UserError, match=rf"{part} is damaged .* Remove {part.parent} and run `features` again"):
        everything(table)


def test_only_numbers_are_aggregated(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'shop' must be a number or a boolean, found type string; .*rows: \[count\]"):
        config_of(folder, "features.views.shop.aggregates={shop: [count]}")


def test_lacking_view_asks_for_windows_and_aggregates_that_are_new() -> None:
    view = schema.build(
        ViewConfig, {"entity": ["shop"], "windows": ["6h", "2d"], "aggregates": {"amount": ["mean", "max"]}}
    )
    data = config_data()
    assert (
        store.lacking_view(
            "v", view, data, {"v_amount_mean_6h", "v_amount_max_6h", "v_amount_mean_2d", "v_amount_max_2d"}
        )
        is None
    )
    rest = store.lacking_view("v", view, data, {"v_amount_mean_6h", "v_amount_max_6h"})
    assert rest is not None and rest.windows == ("2d",)


def config_data() -> Any:
    columns = {
        "id": {"type": "int64", "role": "id"},
        "at": {"type": "timestamp", "role": "event_time"},
        "shop": "string",
        "amount": {"type": "float64", "known_at": "prior"},
    }
    from engine.config.sections.data import DataConfig

    return schema.build(DataConfig, {"sources": {"x": {"path": "x", "columns": {"id": "int64"}}}, "columns": columns})


def test_a_snapshot_gives_the_same_training_set_after_a_backfill(folder: Path) -> None:
    table = months_of_visits()
    pq.write_table(table.slice(0, 800), folder / "visits-0.parquet")
    before = built(config_of(folder))
    pq.write_table(table.slice(800), folder / "visits-1.parquet")
    assert built(config_of(folder)).digest != before.digest
    again = built(config_of(folder, f"split.snapshot={before.dataset.digest[:12]}"))
    assert again.digest == before.digest and everything(again).equals(everything(before))
    with pytest.raises(UserError, match="found 0 for 'nosuch'"):
        built(config_of(folder, "split.snapshot=nosuch"))


def test_views_decode_a_column_once_and_get_what_the_dataset_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(months_of_visits(300), folder / "visits-0.parquet")
    plain = built(config_of(folder)).dataset
    decoded: list[tuple[list[str], tuple[int, int]]] = []
    read = Dataset.read
    monkeypatch.setattr(
        Dataset, "read", lambda self, names, rows: decoded.append((names, rows)) or read(self, names, rows)
    )
    kept = KeptReads(plain.directory, plain.manifest, plain.seal, 1_000_000)
    asked = [(["at", "shop"], None), (["shop", "amount"], (0, 300)), (["amount", "at"], (7, 90)), (["at"], (0, 300))]
    for names, rows in asked:
        assert kept.read(names, rows).equals(read(plain, names, rows)) and kept.read([], rows).num_rows
    whole = (0, 300)
    assert [item for item in decoded if item[0]] == [
        (["at", "shop"], whole),
        (["amount"], whole),
        (["amount", "at"], (7, 90)),
    ]
    with pytest.raises(UserError, match="'shp' is not a column"):
        kept.read(["shp"])
    assert type(pickle.loads(pickle.dumps(kept))) is Dataset
    decoded.clear()
    small = KeptReads(plain.directory, plain.manifest, plain.seal, 3000)
    for _ in range(2):
        small.read(["at"], (0, 200)), small.read(["at"], (100, 300))
    assert len(decoded) == 2 + 2 and small.read(["at"], (0, 200)).equals(read(plain, ["at"], (0, 200)))
