"""What an operator can set about a server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """Settings of one server; sizes in bytes, times in seconds, money in US dollars.

    ``served_model_name`` is the id under which clients know the model (default: the engine's ``model_name``).
    ``api_keys``: where it is not empty, every ``/v1`` request needs one of them as a bearer token.
    ``max_concurrent_requests`` bounds the requests that are held at once, whatever their state; the engine's own
    queue (``Engine(max_queue=...)``) bounds those that wait for a place in the batch.
    ``price_per_hour`` is what the machine costs; it feeds the cost counter of ``/metrics``.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 1024 * 1024
    max_concurrent_requests: int = 2048
    body_timeout: float = 60.0
    send_timeout: float = 120.0
    drain_timeout: float = 30.0
    retry_after: int = 1
    price_per_hour: float | None = None
    log_requests: bool = True

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_concurrent_requests", "body_timeout", "send_timeout", "retry_after"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be greater than 0.")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}: it must be between 0 and 65535.")
        if not self.drain_timeout >= 0:
            raise ValueError(f"drain_timeout is {self.drain_timeout}: it must be at least 0 seconds.")
        if self.price_per_hour is not None and not self.price_per_hour >= 0:
            raise ValueError(f"price_per_hour is {self.price_per_hour}: it must be at least 0 dollars.")
        if any(not key for key in self.api_keys):
            raise ValueError("An API key is empty: remove it, or give it a value.")
