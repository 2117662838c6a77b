"""Keys of `serve`: a model behind an HTTP endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from engine.config.schema import key
from engine.config.units import Size, Span
from engine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How the endpoint listens, batches and writes its log. The model and its history are those of `score`."""

    host: str = key("127.0.0.1", "address to listen on; one that is not loopback needs token_file")
    port: int = key(8080, "port to listen on; 0 = a free one", ge=0, le=65535)
    token_file: str | None = key(
        None, "file whose first line clients send as `Authorization: Bearer ...`; null = no token, on loopback only"
    )
    wait: Span = key(Span("2ms"), "longest time that a request waits for others, to be scored with them")
    batch_rows: int = key(4096, "most rows that are scored together", ge=1)
    queue_rows: int = key(65_536, "most rows that wait; further requests are answered 429", ge=1)
    rows: int = key(10_000, "most rows of a request", ge=1)
    body: Size = key(Size("16MB"), "largest body of a request")
    timeout: Span = key(Span("30s"), "longest time in which a client sends its request")
    follow: Span = key(Span("2s"), "how often score.model=NAME@ALIAS is looked up, so that a promotion is followed")
    max_age: Span | None = key(
        None,
        "longest time between the newest past event and a row's decision; older is refused, row by row; null = any",
    )
    log: bool = key(True, "write the rows that were served, with their features and scores, into the run directory")

    def __post_init__(self) -> None:
        try:
            loopback = self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            raise UserError(f"host must be an IP address or localhost, found {self.host!r}") from None
        if not loopback and self.token_file is None:
            raise UserError(
                f"token_file must be given to listen on {self.host}, which other machines reach: a file with a secret line"
            )
        if self.queue_rows < self.rows:
            raise UserError(f"queue_rows must be at least rows={self.rows}, found {self.queue_rows}")
