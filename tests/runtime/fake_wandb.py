"""A W&B endpoint on loopback that takes what the library sends and keeps it; it can also be slow, broken or deaf.

Only as much of the server as the library needs to sync: GraphQL by operation name, the file stream, and file uploads. The
history of a run is kept as the real server keeps it: lines by offset, a later line at the same offset in its place.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODES = ("well", "errors", "slow", "drops")


class FakeWandb:
    """What was received, by run id."""

    def __init__(self, mode: str = "well") -> None:
        assert mode in MODES
        self.mode = mode
        self.requests: list[str] = []
        self.clients: set[str] = set()
        self.bodies: list[bytes] = []
        self.files: dict[str, dict[str, dict[int, str]]] = {}  # run id -> file -> offset -> line
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.exit_codes: dict[str, int] = {}
        self.history_chunks: list[tuple[int, int]] = []  # (offset, lines)
        self.lock = threading.Lock()
        self.url = ""

    def history(self, run: str) -> list[dict[str, Any]]:
        """Lines of the run's history, in order."""
        lines = self.files.get(run, {}).get("wandb-history.jsonl", {})
        return [json.loads(lines[offset]) for offset in sorted(lines)]

    def points(self, run: str) -> list[tuple[int, str, float]]:
        """(step, metric, value) of every point by its own step, as often as it is there."""
        return [
            (int(line["step"]), name, value)
            for line in self.history(run)
            for name, value in line.items()
            if isinstance(value, (int, float)) and not name.startswith("_") and name != "step"
        ]

    def summary(self, run: str) -> dict[str, Any]:
        """The last summary."""
        lines = self.files.get(run, {}).get("wandb-summary.json", {})
        return json.loads(lines[max(lines)]) if lines else {}

    def config(self, run: str) -> dict[str, Any]:
        """The last config, flat."""
        return {name: entry["value"] for name, entry in self.runs[run].get("config", {}).items() if name != "_wandb"}

    def everything(self) -> bytes:
        """All that was received, in one piece."""
        return b"\n".join([*self.bodies, *self.uploads.values()])

    # ------------------------------------------------------------------------------------------------- requests

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = match.group(1) if match else ""
        handler = getattr(self, f"on_{name}", None)
        return handler(variables) if handler else self.default(name, query)

    def default(self, name: str, query: str) -> dict[str, Any]:
        return {}

    def on_Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": "tester", "username": "tester", "flags": "{}", "teams": {"edges": []}}}

    def on_UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["name"]
        with self.lock:
            kept = self.runs.setdefault(run, {})
            kept.update({k: v for k, v in variables.items() if v is not None and k != "config"})
            if variables.get("config"):
                kept["config"] = json.loads(variables["config"])
        project = {"name": variables.get("project"), "entity": {"name": "tester"}}
        bucket = {
            "id": f"id-{run}", "name": run, "displayName": variables.get("displayName"), "description": "",
            "config": variables.get("config"), "sweepName": None, "project": project, "historyLineCount": 0,
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def on_RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["name"]
        history = self.history(run)
        if run not in self.runs:
            return {
                "model": {
                    "id": "m",
                    "name": variables.get("project"),
                    "entity": {"id": "e", "name": "tester"},
                    "bucket": None,
                }
            }
        tail = json.dumps([json.dumps(history[-1])] if history else [])
        bucket = {
            "id": f"id-{run}", "name": run, "summaryMetrics": json.dumps(self.summary(run)), "displayName": run,
            "logLineCount": 0, "historyLineCount": len(history), "eventsLineCount": 0, "historyTail": tail,
            "eventsTail": "[]", "config": json.dumps(self.runs[run].get("config", {})), "tags": [], "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        return {
            "model": {
                "id": "m",
                "name": variables.get("project"),
                "entity": {"id": "e", "name": "tester"},
                "bucket": bucket,
            }
        }

    def on_CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["run"]
        files = [{"name": f, "uploadUrl": f"{self.url}/upload/{run}/{f}"} for f in variables["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def on_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        values = variables.get("input", variables)
        with self.lock:
            self.artifacts.append(values)
        number = str(len(self.artifacts))
        sequence = {"id": f"s{number}", "latestArtifact": None}
        artifact = {"id": f"a{number}", "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def on_CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        values = variables.get("input", variables)
        number = values.get("artifactID", "a")
        file = {
            "id": "f", "name": "wandb_manifest.json", "displayName": "m", "uploadHeaders": [],
            "uploadUrl": f"{self.url}/upload/manifest/{number}",
        }  # fmt: skip
        return {"createArtifactManifest": {"artifactManifest": {"id": f"m{number}", "file": file}}}

    def on_ArtifactType(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def on_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for spec in variables.get("artifactFiles") or variables.get("input", {}).get("artifactFiles", []):
            path = f"artifact/{spec['artifactID']}/{spec['name']}"
            node = {
                "id": path, "name": spec["name"], "displayName": spec["name"], "uploadUrl": f"{self.url}/upload/{path}",
                "uploadHeaders": [], "storagePath": path, "artifact": {"id": spec["artifactID"]},
                "uploadMultipartUrls": None,
            }  # fmt: skip
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        values = variables.get("input", variables)
        return {"commitArtifact": {"artifact": {"id": values["artifactID"], "digest": ""}}}

    def on_UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"useArtifact": {"artifact": {"id": "a"}}}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        with self.lock:
            files = self.files.setdefault(run, {})
            for name, chunk in (body.get("files") or {}).items():
                lines = files.setdefault(name, {})
                if name == "wandb-history.jsonl":
                    self.history_chunks.append((chunk["offset"], len(chunk["content"])))
                for place, line in enumerate(chunk["content"]):
                    lines[chunk["offset"] + place] = line
            if "exitcode" in body and body["exitcode"] is not None:
                self.exit_codes[run] = body["exitcode"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeWandb

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def _take(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _handle(self) -> None:
        fake, body = self.fake, self._take()
        fake.clients.add(self.client_address[0])
        fake.requests.append(f"{self.command} {self.path}")
        if fake.mode == "slow":
            time.sleep(120)
        if fake.mode == "errors":
            return self._answer({"errors": [{"message": "out of order"}]}, 500)
        if fake.mode == "drops":
            self.connection.close()
            return None
        if self.path.startswith("/upload/"):
            fake.uploads[self.path.removeprefix("/upload/")] = body
            return self._answer({})
        fake.bodies.append(body)
        if not self.path.endswith(("/graphql", "/file_stream")):
            return self._answer({})  # the library's own telemetry
        content = json.loads(body) if body else {}
        if self.path.endswith("/graphql"):
            return self._answer({"data": fake.graphql(content.get("query", ""), content.get("variables") or {})})
        match = re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if match:
            fake.stream(match.group(1), content)
        return self._answer({})

    do_GET = do_POST = do_PUT = _handle

    def _answer(self, value: Any, status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is none."""


@contextmanager
def serving(mode: str = "well") -> Iterator[FakeWandb]:
    """A fake endpoint, for the length of the block."""
    fake = FakeWandb(mode)
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = _Server(("127.0.0.1", 0), handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
