"""A server in a thread of its own, and its client."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn


@dataclass(frozen=True)
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def text(self) -> str:
        """Its text."""
        return self.content.decode()

    def json(self) -> Any:
        """Its JSON."""
        return json.loads(self.content)


class Client:
    """Asks one port, with a connection for each request."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(
        self, method: str, path: str, content: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """One request."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, content, headers or {})
            found = connection.getresponse()
            return Answer(found.status, {name.lower(): value for name, value in found.getheaders()}, found.read())

    def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        """GET."""
        return self.ask("GET", path, None, headers)

    def post(self, path: str, body: Any = None, content: bytes | None = None, kind: str = "application/json") -> Answer:
        """POST of JSON, or of bytes."""
        return self.ask("POST", path, json.dumps(body).encode() if content is None else content, {"content-type": kind})


@contextlib.contextmanager
def listening(app: Any) -> Iterator[Client]:
    """A client of an application that listens on a free port of loopback."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and thread.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield Client(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
