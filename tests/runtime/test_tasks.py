"""Who does how much: cores and memory over the workers of a cluster, and one cluster for all shares of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.config import schema
from engine.config.tree import Config
from engine.runtime import environment
from engine.runtime.on_ray import pool, tasks
from tests.conftest import FakeRay


def config_of(cores: int = 0, **cluster: Any) -> Config:
    given = {"cluster": {"workers": 2, **cluster}, "resources": {"threads": cores, "memory": "4GB"}}
    return schema.build(Config, {"name": "t", **given})


@pytest.mark.parametrize(
    ("config", "local", "threads", "memory", "cpus"),
    [
        (config_of(), True, 4, 2 * 10**9, 1),
        (config_of(6), True, 3, 2 * 10**9, 1),
        (config_of(workers=16), True, 1, 4 * 10**9 // 16, 1),
        (config_of(6, threads=5), True, 5, 2 * 10**9, 1),
        (config_of(6), False, 1, 4 * 10**9, 1),
        (config_of(6, threads=5), False, 5, 4 * 10**9, 5),
    ],
)
def test_workers_of_one_machine_share_its_cores_and_memory(
    monkeypatch: pytest.MonkeyPatch, config: Config, local: bool, threads: int, memory: int, cpus: int
) -> None:
    monkeypatch.setattr(environment, "cores", lambda: 8)
    mine, actors = pool.actors_for(config, local, gpus=0.5)
    assert (mine.resources.threads, mine.resources.memory) == (threads, str(memory))
    assert actors == pool.Actors(config.cluster.workers, cpus, 0.5, patience=60)


def test_a_cluster_starts_with_the_first_shares_and_serves_all(tmp_path: Path, fake_ray: FakeRay) -> None:
    def make(mine: Config) -> tasks.Share:
        return lambda share: [share, mine.resources.memory]

    with tasks.Workers(config_of()) as workers:
        assert fake_ray.sessions == 0
        for turn in ("a", "b"):
            found = list(workers.run([f"{turn}1", f"{turn}2"], make, tmp_path / turn, str))
            assert sorted(found) == [[f"{turn}1", str(2 * 10**9)], [f"{turn}2", str(2 * 10**9)]]
        assert fake_ray.sessions == 1 and fake_ray.open == 1
    assert fake_ray.open == 0 and not list(tmp_path.iterdir())
