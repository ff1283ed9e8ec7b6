"""The server without what runs it: routes as Text Embeddings Inference has them, before a queue and a model."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from ..version import __version__
from .predict_requests import ErrorResponse, Info, Label, PredictRequest, Refused, read_request
from .served_model import Answered, Asked, Description
from .server_metrics import ServerMetrics
from .text_queue import Overloaded, TextQueue


try:
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ImportError('the server needs its extra: pip install "fastbert-hf[ray]"') from error


logger = logging.getLogger("ray.serve")
# So many characters of a text are read for each token that the model reads. Words have five, only garbage has more.
CHARACTERS_PER_TOKEN = 64
# Who sends a request more slowly is not waited for.
SECONDS_TO_SEND = 10.0
ERRORS = {
    status: {"model": ErrorResponse, "description": description}
    for status, description in {
        401: "The API key is missing, or another one.",
        408: "The request came too slowly.",
        413: "More texts or bytes than allowed.",
        422: "Something in the request is not as it must be.",
        424: "The model has no answer.",
        429: "More comes than can be answered in time: come again after Retry-After seconds.",
        503: "Not ready yet, or no longer.",
    }.items()
}
BODY = {"required": True, "content": {"application/json": {"schema": PredictRequest.model_json_schema()}}}


class Model(Protocol):
    """What answers the texts of a server."""

    servers: int
    """How many batches it answers at the same time; 0 where it does not answer."""

    async def describe(self) -> Description:
        """Return what who sends texts has to know."""

    async def answer(self, asked: Sequence[Asked], speed: float, demand: float) -> Sequence[Answered]:
        """
        Return the answers to some texts, of which those without a dial are answered at this speed.

        Args:
            asked, speed: As in [`ServedModel.answer`].
            demand (`float`): How many servers at the normal speed would be busy with all that is asked for.
        """


@dataclass(frozen=True)
class Limits:
    """
    What requests may be.

    Args:
        max_client_batch_size (`int`): Texts of one.
        max_body_bytes (`int`): Of one.
        max_concurrent_requests (`int`): That are at work at the same time.
    """

    max_client_batch_size: int = 32
    max_body_bytes: int = 2_000_000
    max_concurrent_requests: int = 512


class TextServer:
    """
    Ask a model for what requests ask for. `app` is an ASGI application with the routes.

    Args:
        model ([`Model`]): What answers.
        limits ([`Limits`]): What requests may be.
        api_key (`str`, *optional*): What a request has to bring as `Authorization: Bearer ...`.
    """

    def __init__(self, model: Model, limits: Limits = Limits(), api_key: str | None = None):
        self.model, self.limits, self.api_key = model, limits, api_key
        self.metrics = ServerMetrics()
        self.description: Description | None = None
        self.queue: TextQueue | None = None
        self.loop: asyncio.Task | None = None
        self.requests, self.drains = 0, False
        self.app = self._app()

    def _app(self) -> FastAPI:
        """Return the routes."""
        app = FastAPI(
            title="fastbert_hf",
            version=__version__,
            description="Classifies texts with as many layers as each needs, and fewer where many wait.",
        )
        app.add_exception_handler(Refused, refuse)
        app.add_exception_handler(HTTPException, no_route)
        app.add_api_route(
            "/predict",
            self.predict,
            methods=["POST"],
            response_model=list[Label] | list[list[Label]],
            responses=ERRORS,
            openapi_extra={"requestBody": BODY},
        )
        app.add_api_route("/info", self.info, response_model=Info)
        app.add_api_route("/health", self.health, responses={503: ERRORS[503]})
        app.add_api_route("/metrics", self.prometheus)
        return app

    async def start(self) -> None:
        """Begin to answer, with the settings that the model has. Called again, go by its newer ones."""
        self.description = await self.model.describe()
        control, most = self.description.control(), self.description.max_tokens
        control.servers = self.model.servers
        if self.description.reload_error is not None:
            self.metrics.reloads.inc()
        if self.queue is None:
            self.queue = TextQueue(control, self._answer, self.metrics.count, most)
            self.loop = asyncio.create_task(self.queue.run())
        else:
            self.queue.use(control, most)

    async def drain(self) -> None:
        """Refuse what comes, and wait until what waits is answered."""
        self.drains = True
        await self.queue.drain()

    async def _answer(self, asked: Sequence[Asked], speed: float) -> Sequence[Answered]:
        """Let the model answer a batch."""
        answers = await self.model.answer(asked, speed, self.queue.demand())
        self.queue.control.servers = self.model.servers
        return answers

    async def predict(self, request: Request) -> Response:
        """Classify a text, a pair, or many: a list of labels, or one for each text."""
        started = monotonic()
        self.requests += 1
        try:
            asked = read_request(await self._body(request))
            method = "batch" if asked.has_many() else "single"
            self.metrics.requests.labels(method).inc()
            answers = await self._answers(asked)
        except Refused as refused:
            self.metrics.failed.labels(refused.status).inc()
            raise
        finally:
            self.requests -= 1
        self.metrics.answered.labels(method).inc()
        self.metrics.duration.observe(monotonic() - started)
        return JSONResponse(answers if asked.has_many() else answers[0])

    async def info(self, request: Request) -> Info:
        """Tell which model this is, and what a request may be."""
        self._check_key(request)
        own, control = self._described(), self.queue.control
        settings, labels = own.settings, {str(index): label for index, label in own.config.id2label.items()}
        return Info(
            model_id=settings.model or "fastbert_hf/default_model",
            model_sha=getattr(own.config, "_commit_hash", None),
            model_dtype=own.dtype,
            model_type={"classifier": {"id2label": labels, "label2id": own.config.label2id}},
            max_input_length=own.max_tokens,
            max_batch_tokens=settings.max_batch_tokens,
            max_concurrent_requests=self.limits.max_concurrent_requests,
            max_client_batch_size=self.limits.max_client_batch_size,
            auto_truncate=settings.truncate or settings.max_length is not None,
            tokenization_workers=self.model.servers,
            version=__version__,
            num_layers=own.config.num_hidden_layers,
            speed=float(control.speeds[0]),
            max_speed=float(control.speeds[-1]),
            slo_ms=settings.slo_ms,
            dials=own.refusals,
            reload_error=own.reload_error,
        )

    async def health(self) -> Response:
        """Tell whether texts are answered."""
        self._described()
        return Response()

    async def prometheus(self, request: Request) -> Response:
        """Tell Prometheus what was counted."""
        self._check_key(request)
        waiting = [] if self.queue is None else self.queue.waiting
        self.metrics.waiting.set(len(waiting))
        self.metrics.waiting_tokens.set(sum(text.tokens for text in waiting))
        self.metrics.servers.set(self.model.servers)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _check_key(self, request: Request) -> None:
        """Raise unless the request brings the key, where there is one."""
        given = request.headers.get("authorization", "").encode()
        if self.api_key is not None and not secrets.compare_digest(given, f"Bearer {self.api_key}".encode()):
            raise Refused(401, "Validation", "the API key is missing or wrong: Authorization: Bearer KEY")

    def _described(self) -> Description:
        """Return what the model tells of itself, or raise where nothing is answered."""
        if self.description is None or self.drains or self.loop.done() or not self.model.servers:
            raise Refused(503, "Unhealthy", "the server does not answer now", Retry_After=1)
        return self.description

    async def _body(self, request: Request) -> bytes:
        """Return what was sent, as far as that is allowed."""
        self._check_key(request)
        self._described()
        if self.requests > self.limits.max_concurrent_requests:
            raise Refused(429, "Overloaded", "Model is overloaded", Retry_After=1)
        most = self.limits.max_body_bytes
        too_large = Refused(413, "Validation", f"the body must have at most {most:,} bytes")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(SECONDS_TO_SEND):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise too_large
        except TimeoutError:
            message = f"the body must be sent within {SECONDS_TO_SEND:g} seconds"
            raise Refused(408, "Validation", message) from None
        return bytes(body)

    async def _answers(self, request: PredictRequest) -> list[list[dict[str, Any]]]:
        """Return the labels of each text of a request."""
        asked, cost = self._asked(request)
        try:
            answers = await self.queue.answers(asked, cost)
        except Overloaded as overloaded:
            self.metrics.shed.inc(len(asked))
            seconds = max(1, math.ceil(overloaded.seconds))
            raise Refused(429, "Overloaded", "Model is overloaded", Retry_After=seconds) from None
        for place, answer in enumerate(answers):
            if answer.error is not None:
                status = 422 if answer.error_type == "Tokenizer" else 424
                raise Refused(status, answer.error_type, f"inputs, number {place}: {answer.error}")
        return [answer.labels for answer in answers]

    def _asked(self, request: PredictRequest) -> tuple[list[Asked], float | None]:
        """Return the texts of a request, and what its dial costs."""
        own, texts, most = self._described(), request.texts(), self.limits.max_client_batch_size
        if not texts:
            raise Refused(422, "Validation", 'there are no inputs: {"inputs": "I would go there again."}')
        if len(texts) > most:
            raise Refused(413, "Validation", f"batch size {len(texts)} > maximum allowed batch size {most}")
        dial, cost = request.dial(), None
        try:
            cost = None if dial is None else own.cost_of(*dial)
        except ValueError as error:
            raise Refused(422, "Validation", str(error)) from None
        cuts = bool(request.truncate) or own.settings.truncate or own.settings.max_length is not None
        side, longest = request.truncation_direction.lower(), CHARACTERS_PER_TOKEN * own.max_tokens
        asked = []
        for place, text in enumerate(texts):
            text = shortened(text, longest, side) if cuts else text
            length = number_of_characters(text)
            if length > longest and not cuts:
                message = f"inputs, number {place}, has {length:,} characters, and a text may have {longest:,}"
                raise Refused(422, "Tokenizer", f"{message}: truncate=true cuts it")
            asked.append(Asked(text, length, dial, cuts, side, request.raw_scores, request.top_k))
        return asked, cost


class Listener(uvicorn.Server):
    """
    Listen at an address, and leave signals to who calls this.

    Args:
        app: Of a [`TextServer`].
        host (`str`), port (`int`): The address.
        seconds_to_end (`float`): That requests are given when `should_exit` is set.
    """

    def __init__(self, app: FastAPI, host: str, port: int, seconds_to_end: float = 30.0):
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http="h11",  # which has a limit for headers; httptools has none
            lifespan="off",
            log_level="error",
            access_log=False,
            timeout_graceful_shutdown=int(seconds_to_end),
        )
        super().__init__(config)

    def capture_signals(self) -> AbstractContextManager:
        """Do nothing."""
        return nullcontext()


async def refuse(request: Request, refused: Refused) -> JSONResponse:
    """Return the error of a request that gets no answer."""
    body = {"error": str(refused), "error_type": refused.error_type}
    return JSONResponse(body, refused.status, refused.headers)


async def no_route(request: Request, error: HTTPException) -> JSONResponse:
    """Return the error of a request for what there is not."""
    known = "POST /predict, GET /info, /health, /metrics and /docs"
    body = {"error": f"{error.detail}: there are {known}", "error_type": "Validation"}
    return JSONResponse(body, error.status_code, error.headers)


def number_of_characters(text: str | Mapping[str, str]) -> int:
    """Return how long a text is, or the two of a pair together."""
    return len(text) if isinstance(text, str) else sum(map(len, text.values()))


def shortened(text: str | Mapping[str, str], most: int, side: str) -> str | dict[str, str]:
    """Return the end of a text that is read, or of both of a pair, with at most so many characters."""
    if isinstance(text, str):
        return text[-most:] if side == "left" else text[:most]
    return {name: shortened(part, most, side) for name, part in text.items()}
