"""What happens to every request before and after its handler: id, key, limits, draining, errors, log, metrics."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import traceback
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fallow.server.errors import ApiError
from fallow.server.generation import DisconnectedError, Generation
from fallow.server.metrics import Metrics
from fallow.server.record import RequestRecord, log_line, request_id
from fallow.server.settings import ServerSettings

_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/health",
    "/metrics",
    "/metrics/replica",
    "/docs",
    "/openapi.json",
)


def _route(path: str) -> str:
    # A fixed set: a label of the metrics must not grow with what clients make up.
    return "/v1/models" if path.startswith("/v1/models/") else path if path in _ROUTES else "other"


class ApiKeys:
    """The keys that are let in; compared by digest, all of them, so that the time tells nothing."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, authorization: str | None) -> None:
        """Raises ``ApiError`` 401 unless the header holds one of the keys as a bearer token."""
        if not self._digests:
            return
        scheme, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        if not found or scheme.lower() != "bearer":
            given = "is not valid" if authorization else "is missing"
            raise ApiError(
                401,
                f"The API key {given}: send the header 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


class GatewayState:
    """Shared by the gateway, the routes and the process that runs them."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0  # requests to /v1, from their first byte to the end of the answer
        self.generations: set[Generation] = set()

    def stop(self) -> None:
        """End every request that is under way with an error."""
        for generation in list(self.generations):
            generation.stop()


class Gateway:
    """ASGI middleware around the whole app; also knows how many requests are under way, and whether to drain."""

    def __init__(self, app: ASGIApp, *, settings: ServerSettings, metrics: Metrics, state: GatewayState) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._state = state
        self._keys = ApiKeys(settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = RequestRecord(
            id=request_id(headers.get("x-request-id")), method=scope["method"], route=_route(scope["path"])
        )
        scope["fallow.record"] = record

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            try:
                async with asyncio.timeout(self._settings.send_timeout):
                    await send(message)
            except TimeoutError:  # the client has not read for that long
                raise DisconnectedError from None

        api = scope["path"].startswith("/v1/")
        self._metrics.begin()
        self._state.in_flight += api
        try:
            if api:
                self._admit(headers)
            await self._app(scope, receive, send_noted)
        except (ClientDisconnect, DisconnectedError):
            record.disconnected = True
        except Exception as error:
            failure = error if isinstance(error, ApiError) else self._unexpected(error, record)
            if record.status is None:
                await failure.response()(scope, receive, send_noted)
        finally:
            self._state.in_flight -= api
            if record.generation is not None:
                self._state.generations.discard(record.generation)
            self._metrics.end(record)
            # Probes and scrapes come every few seconds: they are worth a line only when they fail.
            if self._settings.log_requests and (api or record.logged_status >= 400):
                log_line(record.to_json())

    def _admit(self, headers: Headers) -> None:
        self._keys.check(headers.get("authorization"))
        retry = {"retry-after": str(self._settings.retry_after)}
        if self._state.draining:
            raise ApiError(
                503,
                "The server is shutting down: send the request to another one, or try again later.",
                code="draining",
                headers=retry | {"connection": "close"},
            )
        limit = self._settings.max_concurrent_requests
        if self._state.in_flight > limit:
            raise ApiError(
                429,
                f"The server holds {limit} requests already, its limit: try again later.",
                code="overloaded",
                headers=retry,
            )

    @staticmethod
    def _unexpected(error: Exception, record: RequestRecord) -> ApiError:
        log_line({"event": "error", "id": record.id, "error": "".join(traceback.format_exception(error))})
        return ApiError(500, f"The server failed at this request; its log has more under {record.id}.")
