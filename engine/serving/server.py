"""The HTTP endpoint: routes, limits, the token, metrics. Answers name the field that is wrong, and never hold a traceback."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from engine.config.sections.serving import ServeConfig
from engine.data.dataset import row_ids
from engine.errors import UserError
from engine.serving.batches import Batches, Full
from engine.serving.online import Answer, Online
from engine.serving.openapi import described, fields_of
from engine.serving.request import ARROW, JSON, Fields, Given, Malformed, as_json, numbers, read_rows
from engine.serving.served import Log

LATENCIES = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
OPEN = ("/healthz", "/readyz")  # answered without the token


class Refused(Exception):
    """A request that is answered with an error of the client."""

    def __init__(self, status: int, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.status, self.facts = status, facts


class Meters:
    """Figures for Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.seconds = Histogram(
            "engine_serve_seconds", "seconds of a request", ["route"], buckets=LATENCIES, registry=self.registry
        )
        self.requests = Counter(
            "engine_serve_requests", "requests by route and status", ["route", "status"], registry=self.registry
        )
        self.rows = Counter("engine_serve_rows", "rows by outcome", ["outcome"], registry=self.registry)
        self.batch = Histogram(
            "engine_serve_batch_rows",
            "rows of a batch",
            buckets=(1, 2, 5, 10, 50, 200, 1000, 4096, 16384),
            registry=self.registry,
        )
        self.queue = Gauge("engine_serve_queue_rows", "rows that wait or are being scored", registry=self.registry)
        self.age = Gauge("engine_serve_past_age_seconds", "seconds since the newest past event", registry=self.registry)


class Server:
    """The application over one model at a time; `replace` changes the model between two batches."""

    def __init__(
        self,
        online: Online,
        settings: ServeConfig,
        reference: str,
        log: Log | None,
        token: str | None,
        warn: Callable[[str], None],
    ) -> None:
        self.online, self.settings, self.reference, self.warn = online, settings, reference, warn
        self.served_log, self.token, self.meters = log, token, Meters()
        self.ready = False
        self._describe()
        routes = [
            Route("/v1/score", self._route(self.score), methods=["POST"]),
            Route("/v1/events", self._route(self.events), methods=["POST"]),
            Route("/v1/model", self._route(self.model), methods=["GET"]),
            Route("/openapi.json", self._route(self.openapi), methods=["GET"]),
            Route("/healthz", self._route(self.health), methods=["GET"]),
            Route("/readyz", self._route(self.is_ready), methods=["GET"]),
            Route("/metrics", self._route(self.metrics), methods=["GET"]),
        ]
        self.app = Starlette(routes=routes, lifespan=self._lifespan)

    def _describe(self) -> None:
        bundle = self.online.predictor.bundle
        self.fields = Fields.of_rows(bundle.data, bundle.features)
        events = self.online.past.events
        self.event_fields = Fields.of_events(bundle.data, [] if events is None else events.table.column_names)

    async def replace(self, online: Online) -> None:
        """Score with another model from the next batch on; requests that are being scored keep theirs."""

        def change() -> None:
            self.online = online
            self._describe()

        await self.batches.call(change)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        s = self.settings
        self.batches = Batches(lambda rows: self.online.score(rows), s.wait.seconds, s.batch_rows, s.queue_rows)
        working = asyncio.create_task(self.batches.run())
        self.ready = True
        try:
            yield
        finally:
            self.ready = False
            working.cancel()
            await asyncio.to_thread(self.batches.close)
            if self.served_log is not None:
                await asyncio.to_thread(self.served_log.close)

    # ------------------------------------------------------------------------------------------------------ requests

    def _route(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The route with the token, the measures and the errors of every route."""

        async def routed(request: Request) -> Response:
            began, route = time.perf_counter(), request.url.path
            try:
                self._check_token(request)
                response = await answer(request)
            except Refused as error:
                response = _error(error.status, str(error), **error.facts)
            except Malformed as error:
                response = _error(422, str(error), field=error.field, row=error.row)
            except UserError as error:
                response = _error(422, str(error))
            except Full:
                response = _error(429, f"{self.batches.rows:,} rows wait, at most {self.settings.queue_rows:,} may")
                response.headers["Retry-After"] = "1"
            except ClientDisconnect:
                response = _error(499, "the client has left")
            except (
                Exception
            ) as error:  # a fault of the engine: no value of a row goes into the log, nothing to the client
                last = traceback.extract_tb(error.__traceback__)[-1]
                self.warn(f"{route}: {type(error).__name__} in {Path(last.filename).name}:{last.lineno}")
                response = _error(500, "the server could not answer; its log says why")
            self.meters.seconds.labels(route).observe(time.perf_counter() - began)
            self.meters.requests.labels(route, response.status_code).inc()
            return response

        return routed

    def _check_token(self, request: Request) -> None:
        if self.token is None or request.url.path in OPEN:
            return
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise Refused(401, "the header Authorization must be `Bearer` and the token of serve.token_file")

    async def _body(self, request: Request) -> bytes:
        most, found = self.settings.body.bytes, bytearray()
        try:
            async with asyncio.timeout(self.settings.timeout.seconds):
                async for part in request.stream():
                    found += part
                    if len(found) > most:
                        raise Refused(413, f"a body must have at most {most:,} bytes (serve.body), found more")
        except TimeoutError:
            raise Refused(408, f"a request must be sent within {self.settings.timeout} (serve.timeout)") from None
        return bytes(found)

    def _read(self, request: Request, body: bytes, fields: Fields) -> Given:
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind not in (JSON, ARROW):
            raise Refused(415, f"the content type must be {JSON} or {ARROW}, found {kind}")
        return read_rows(body, kind, fields, self.online.predictor.bundle.data, self.settings.rows)

    async def score(self, request: Request) -> Response:
        """POST /v1/score: rows in, a score or the reason for none out, in their order."""
        body = await self._body(request)
        while True:
            fields = self.fields
            given = self._read(request, body, fields)
            try:
                answer = await self._answer(given)
                break
            except Full:
                raise
            except Exception:
                if self.fields is fields:
                    raise  # else another model, with other fields, came while the rows waited
        none = sum(reason is not None for reason in answer.refused)
        self.meters.rows.labels("refused").inc(none)
        self.meters.rows.labels("scored").inc(len(answer.refused) - none)
        for size in self.batches.sizes:
            self.meters.batch.observe(size)
        self.batches.sizes.clear()
        if self.served_log is not None:
            self.served_log.add(given.rows, answer, time.time_ns() // 1000)
        if request.headers.get("accept", "").startswith(ARROW) or (
            request.headers.get("content-type", "").startswith(ARROW) and "accept" not in request.headers
        ):
            return Response(_stream(answer), media_type=ARROW)
        return Response(as_json({"model": answer.bundle.digest, "rows": _rows(answer)}), media_type=JSON)

    async def _answer(self, given: Given) -> Answer:
        """The answer to rows; those that ingest would quarantine are not scored."""
        good = np.array([reason is None for reason in given.refused])
        if good.all():
            return await self.batches.submit(given.rows)
        bundle = self.online.predictor.bundle
        ids = row_ids(given.rows, bundle.data.ids)
        if not good.any():
            lacking = pa.table({"row_id": ids}), given.refused
            return Answer(*lacking, bundle, pa.table({}), self.online.past.newest)
        found = await self.batches.submit(given.rows.filter(pa.array(good)))
        places = pa.array(np.where(good, np.cumsum(good) - 1, 0), mask=~good)
        reasons = iter(found.refused)
        refused = [reason if reason is not None else next(reasons) for reason in given.refused]
        columns = found.columns.take(places)
        columns = columns.set_column(columns.column_names.index("row_id"), "row_id", ids)
        return Answer(columns, refused, found.bundle, found.raw.take(places), found.newest)

    async def events(self, request: Request) -> Response:
        """POST /v1/events: past events, with their outcomes, that windows count from now on."""
        given = self._read(request, await self._body(request), self.event_fields)
        if bad := [reason for reason in given.refused if reason is not None]:
            raise Malformed(f"{len(bad):,} of {len(given.refused):,} events break a rule of the data: {bad[0]}")
        if self.online.past.events is None:
            return Response(as_json({"added": 0, "why": "the model has no windows over past events"}), media_type=JSON)
        await self.batches.call(lambda: self.online.past.add(given.rows))
        return Response(as_json({"added": given.rows.num_rows}), media_type=JSON)

    async def model(self, _: Request) -> Response:
        """GET /v1/model: which model answers, and what it asks for."""
        bundle = self.online.predictor.bundle
        facts = {
            "model": bundle.digest,
            "reference": self.reference,
            "fields": fields_of(self.fields),
            "target": bundle.data.target,
        }
        return Response(as_json({**facts, "scores": list(self.online.predictor.columns) or ["score"]}), media_type=JSON)

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json: the routes, and the fields of a row with their types."""
        return Response(as_json(described(self.fields, self.event_fields, self.reference)), media_type=JSON)

    async def health(self, _: Request) -> Response:
        """GET /healthz: the process answers."""
        return Response(b"ok\n", media_type="text/plain")

    async def is_ready(self, _: Request) -> Response:
        """GET /readyz: a model is loaded."""
        return Response(
            b"ready\n" if self.ready else b"not ready\n", 200 if self.ready else 503, media_type="text/plain"
        )

    async def metrics(self, _: Request) -> Response:
        """GET /metrics, for Prometheus."""
        self.meters.queue.set(self.batches.rows)
        if (newest := self.online.past.newest) is not None:
            self.meters.age.set(time.time() - newest / 1e6)
        return Response(generate_latest(self.meters.registry), media_type="text/plain; version=0.0.4")


def _error(status: int, message: str, **facts: Any) -> Response:
    known = {name: value for name, value in facts.items() if value is not None}
    return Response(as_json({"error": message, **known}), status, media_type=JSON)


def _rows(answer: Answer) -> list[dict[str, Any]]:
    columns = {
        name: numbers(column.combine_chunks())
        for name, column in zip(answer.columns.column_names, answer.columns.columns, strict=True)
    }
    found = []
    for place, reason in enumerate(answer.refused):
        if reason is not None:
            found.append({"row_id": columns["row_id"][place], "refused": reason})
        else:
            found.append({name: values[place] for name, values in columns.items()})
    return found


def _stream(answer: Answer) -> bytes:
    """An Arrow stream of the output columns, null where a row is refused, with `refused` and `model`."""
    good = pa.array([reason is None for reason in answer.refused])
    columns: dict[str, Any] = {"row_id": answer.columns["row_id"]}
    for name in answer.columns.column_names[1:]:
        column = answer.columns[name].combine_chunks()
        columns[name] = pa.compute.if_else(good, column, pa.scalar(None, column.type))
    columns |= {
        "refused": pa.array(answer.refused, pa.string()),
        "model": pa.array([answer.bundle.digest] * len(answer.refused)),
    }
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def token_of(path: str | None) -> str | None:
    """The first line of the token file. Raises UserError where it is absent or empty."""
    if path is None:
        return None
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"serve.token_file must be a readable text file, but {path!r} is not: {error}") from None
    if len(lines[0].strip()) < 16:
        raise UserError(f"the first line of serve.token_file {path!r} must be a secret of at least 16 characters")
    return lines[0].strip()
