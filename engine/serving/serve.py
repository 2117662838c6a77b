"""The `serve` step: a model behind an HTTP endpoint in this process, until it is interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.config.tree import Config
from engine.errors import UserError
from engine.runtime import storage
from engine.runtime.run import Run
from engine.serving.online import Online, load
from engine.training.bundle import find_model, read_bundle

ENDPOINT = "endpoint.json"


def check_servable(config: Config) -> None:
    """Check the config before any work. Raises UserError."""
    if config.cluster.kind != "local":
        raise UserError(f"serve works in one process: cluster must be local, found {config.cluster.kind}")
    find_model(config.score.model, Path(config.paths.runs))
    for name in ("uvicorn", "starlette", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"serve needs {name}, which was not found: pip install 'tabular-engine[serve]'")


def serve(config: Config, run: Run) -> dict[str, float]:
    """Answer requests until SIGINT or SIGTERM; requests that were accepted are answered first."""
    server = importlib.import_module("engine.serving.server")
    token = server.token_of(config.serve.token_file)
    online = load(config, run)
    run.note(model=online.predictor.digest)
    log = None
    if config.serve.log:
        served = importlib.import_module("engine.serving.served")
        log = served.Log(run.path("served"))
    app = server.Server(online, config.serve, config.score.model, log, token, run.warn)
    asyncio.run(_listen(config, run, app, online))
    return _figures(app)


async def _listen(config: Config, run: Run, app: Any, online: Online) -> None:
    uvicorn = importlib.import_module("uvicorn")
    settings = uvicorn.Config(
        app.app, host=config.serve.host, port=config.serve.port, log_config=None, access_log=False, lifespan="on",
        timeout_keep_alive=30, limit_concurrency=None, server_header=False, timeout_graceful_shutdown=30,
    )  # fmt: skip
    server = _Uvicorn.of(uvicorn, settings)
    with _until_signalled(server):
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.02)
        if server.started:
            host, port = server.servers[0].sockets[0].getsockname()[:2]
            storage.write_json(run.path(ENDPOINT), {"host": host, "port": port, "model": online.predictor.digest})
            run.log(f"{config.score.model} ({online.predictor.digest[:12]}) is served on http://{host}:{port}")
            following = asyncio.create_task(_follow(config, run, app, online))
            await serving
            following.cancel()
        else:
            await serving


class _Uvicorn:
    @staticmethod
    def of(uvicorn: Any, settings: Any) -> Any:
        """Uvicorn's server, which leaves signals alone: it would raise them again after its end."""

        class Quiet(uvicorn.Server):  # type: ignore[misc, name-defined]
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        return Quiet(settings)


@contextlib.contextmanager
def _until_signalled(server: Any) -> Iterator[None]:
    """End the server with SIGINT and SIGTERM, which are a serving run's usual end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def _follow(config: Config, run: Run, app: Any, online: Online) -> None:
    """Change to the model that the alias names, whenever it names another."""
    while "@" in config.score.model:
        await asyncio.sleep(config.serve.follow.seconds)
        try:
            place = await asyncio.to_thread(find_model, config.score.model, Path(config.paths.runs))
            digest = (await asyncio.to_thread(read_bundle, place)).digest
            if digest == online.predictor.digest:
                continue
            online = await asyncio.to_thread(load, config, run, online)
            await app.replace(online)
            run.log(f"{config.score.model} is {digest[:12]} from now on")
        except UserError as error:
            run.warn(f"{config.score.model} is still {online.predictor.digest[:12]}: {error}")


def _figures(app: Any) -> dict[str, float]:
    """Requests and rows, by outcome."""
    found: dict[str, float] = {}
    for family in app.meters.registry.collect():
        for sample in family.samples:
            if sample.name == "engine_serve_rows_total":
                found[f"serve/rows_{sample.labels['outcome']}"] = sample.value
            elif sample.name == "engine_serve_requests_total":
                name = f"serve/answered_{sample.labels['status']}"
                found[name] = found.get(name, 0.0) + sample.value
    return found
