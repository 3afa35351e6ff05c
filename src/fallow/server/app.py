"""The FastAPI application: the routes, and what they share."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from fallow.errors import FallowError
from fallow.meter.energy import EnergyMeter
from fallow.server import replica_metrics
from fallow.server.body import parse, read_body
from fallow.server.chat import ChatWriter, prepare_chat
from fallow.server.completions import CompletionWriter, prompts_of
from fallow.server.docs_page import docs_page
from fallow.server.errors import ApiError, from_engine
from fallow.server.gateway import Gateway, GatewayState
from fallow.server.generation import Generation, Mailbox
from fallow.server.metrics import Energy, Metrics
from fallow.server.openapi import describe_routes, error_responses
from fallow.server.record import record_of
from fallow.server.requests import ChatCompletionRequest, CompletionRequest
from fallow.server.responses import ChatCompletion, Completion, Health, ModelCard, ModelList
from fallow.server.sampling import sampling_params
from fallow.server.settings import ServerSettings
from fallow.server.sse import EventStream
from fallow.server.usage import VERSION

if TYPE_CHECKING:
    from fallow.engine.engine import Engine
    from fallow.engine.sampling import SamplingParams

_ENERGY_READING_SECONDS = 10.0
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"


class Service:
    """What the handlers need: the engine, the settings, and the way back from the engine's thread."""

    def __init__(self, engine: Engine, settings: ServerSettings, state: GatewayState) -> None:
        self.engine = engine
        self.state = state
        self.settings = settings
        self.model = settings.served_model_name or engine.model_name
        self._mailbox: Mailbox | None = None

    def check_model(self, name: str | None) -> None:
        """Raises ``ApiError`` 404 where a client asks for a model that is not served here."""
        if name is not None and name != self.model:
            raise ApiError(
                404,
                f"The model {name!r} does not exist here: this server has {self.model!r}.",
                param="model",
                code="model_not_found",
            )

    def model_card(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": _STARTED,
            "owned_by": "fallow",
            "max_model_len": self.engine.max_context,
        }

    async def answer(
        self,
        http: Request,
        request: ChatCompletionRequest | CompletionRequest,
        prepare: Callable[[], tuple[Sequence[str | list[int]], SamplingParams]],
        writer_of: Callable[[Generation], ChatWriter | CompletionWriter],
    ) -> Response:
        """Run a request on the engine, and answer it whole or as a stream."""
        self.check_model(request.model)
        if self._mailbox is None:
            self._mailbox = Mailbox(asyncio.get_running_loop())
        generation = Generation(self.engine, self._mailbox, n=request.n or 1)
        record = record_of(http.scope)
        record.generation, record.stream = generation, bool(request.stream)
        self.state.generations.add(generation)
        writer = writer_of(generation)
        try:
            generation.watch(http.receive)
            try:
                await generation.start(prepare)
            except FallowError as error:
                field = "messages" if isinstance(request, ChatCompletionRequest) else "prompt"
                raise from_engine(error, retry_after=self.settings.retry_after, prompt_field=field) from None
            if not request.stream:
                while batch := await generation.batch():
                    writer.collect(batch)
                return JSONResponse(writer.result())
        except BaseException:
            generation.close()
            raise
        finally:
            if not request.stream:
                generation.close()
        return EventStream(generation, write=writer.write, finish=writer.finish)


_STARTED = int(time.time())


def create_app(
    engine: Engine, settings: ServerSettings | None = None, *, replica_folder: Path | None = None
) -> FastAPI:
    """The OpenAI-compatible application around ``engine``, for any ASGI server.

    ``app.state.gateway`` (``GatewayState``) tells how many requests are under way; setting its ``draining`` makes
    new requests and ``/health`` answer 503. The app does not close the engine. ``replica_folder`` is where the
    replicas of one server have their sockets (``replica_metrics``).
    """
    settings = settings or ServerSettings()
    state = GatewayState()
    service = Service(engine, settings, state)
    metrics = Metrics(engine, energy=Energy(EnergyMeter()), price_per_hour=settings.price_per_hour)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        reading = asyncio.create_task(_read_energy(metrics))
        yield
        reading.cancel()

    app = FastAPI(title="Fallow", version=VERSION, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.gateway = state
    app.add_middleware(Gateway, settings=settings, metrics=metrics, state=state)
    app.add_exception_handler(HTTPException, _http_error)

    @app.post(
        "/v1/chat/completions", response_model=None, responses={200: {"model": ChatCompletion}, **error_responses()}
    )
    async def chat_completions(http: Request) -> Any:
        """Answer a conversation."""
        request = await _body(http, ChatCompletionRequest, settings)
        return await service.answer(
            http,
            request,
            lambda: prepare_chat(engine, request),
            lambda generation: ChatWriter(request, generation, service.model),
        )

    @app.post("/v1/completions", response_model=None, responses={200: {"model": Completion}, **error_responses()})
    async def completions(http: Request) -> Any:
        """Continue a text."""
        request = await _body(http, CompletionRequest, settings)
        return await service.answer(
            http,
            request,
            lambda: (prompts_of(request), sampling_params(request)),
            lambda generation: CompletionWriter(engine, request, generation, service.model),
        )

    @app.get("/v1/models", response_model=None, responses={200: {"model": ModelList}})
    async def models() -> Response:
        """The models that are served here: one."""
        return JSONResponse({"object": "list", "data": [service.model_card()]})

    @app.get("/v1/models/{model:path}", response_model=None, responses={200: {"model": ModelCard}})
    async def model(model: str) -> Response:
        """The model, if it is served here."""
        service.check_model(model)
        return JSONResponse(service.model_card())

    @app.get("/health", response_model=None, responses={200: {"model": Health}, 503: {"model": Health}})
    async def health() -> Response:
        """Whether new requests are taken: 200, or 503 while the server drains."""
        stats = engine.stats()
        status = "draining" if state.draining else "ok"
        body = {"status": status, "model": service.model, "running": stats.running, "waiting": stats.waiting}
        return JSONResponse(body, status_code=503 if state.draining else 200)

    @app.get("/metrics", response_model=None, response_class=Response)
    async def prometheus() -> Response:
        """Metrics in the Prometheus text format."""
        text = metrics.text() if replica_folder is None else await replica_metrics.gather(replica_folder)
        return Response(text, media_type=_PROMETHEUS)

    @app.get(replica_metrics.OWN_PATH, include_in_schema=False)
    async def own_metrics() -> Response:
        return Response(metrics.text(), media_type=_PROMETHEUS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi()))

    describe_routes(app)
    return app


async def _body(http: Request, kind: type[Any], settings: ServerSettings) -> Any:
    return await parse(kind, await read_body(http, limit=settings.max_body_bytes, timeout=settings.body_timeout))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {404: "There is no such path here: see /docs.", 405: "This path has another method: see /docs."}
    text = message.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, text, headers=dict(error.headers or {})).response()


async def _read_energy(metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(_ENERGY_READING_SECONDS)
        metrics.energy.joules()
