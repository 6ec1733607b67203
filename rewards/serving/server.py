"""The reward server: heads behind HTTP, for judges that need another machine or other packages.

``POST /score`` takes a batch in the format of ``rewards.serving.wire``, ``GET /health`` says which
heads there are and who they are. Every refusal is typed JSON. What a client may cost is bounded:
the body while it is read, the samples before they are decoded, the pixels before they are
decompressed, the characters before they are tokenised. How slowly a body may come, and how many
connections there may be, is the business of a proxy in front.
"""

# Without `from __future__ import annotations`: FastAPI reads the annotations of the handlers, and
# the names in them are local to `build_app`.

import asyncio
import hmac
import importlib.util
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from rewards.base import RewardError, RewardHead, Scores
from rewards.identity import Identity
from rewards.serving import wire
from rewards.serving.batching import Batcher, Overloaded

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

_LONGEST_SECONDS = 3600.0  # a request of a client that does not say how long it waits
_RETRY_SECONDS = 1
_GOODBYE_SECONDS = 30
_BODIES = 8  # the largest bodies that may be in memory at once
_FULL_REQUESTS = 8  # requests of the most pixels that may be under way at once, per head


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may cost.

    Raises:
        ValueError: If a limit is not positive, or smaller than one that it must hold.
    """

    max_body: int = 64_000_000  # bytes of a request
    max_batch: int = 64  # samples of a request, and of a call of the head
    max_pixels: int = 8 * 2048 * 2048  # pixels of a request, and of a call of the head
    max_queue: int = 512  # samples under way, per head

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(
                    f"Parameter `{name}` should be positive. Found `{name} = {value}`."
                )
        if self.max_queue < self.max_batch:
            raise ValueError(
                f"Parameter `max_queue` should be at least `max_batch` ({self.max_batch}). "
                f"Found `max_queue = {self.max_queue}`."
            )

    def batcher(self, head: RewardHead) -> Batcher:
        """Return a batcher for the head that keeps these limits."""
        return Batcher(
            head,
            max_batch=self.max_batch,
            max_queue=self.max_queue,
            max_batch_pixels=self.max_pixels,
            max_queue_pixels=_FULL_REQUESTS * self.max_pixels,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One served head."""

    identity: Identity
    batcher: Batcher


class Refusal(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, kind: str, cause: str, **details: Any) -> None:
        super().__init__(cause)
        self.status = status
        self.content = {"error": {"kind": kind, "cause": cause, **details}}


def check_packages() -> None:
    """Say whether a server can be started, before minutes are spent on loading heads.

    Raises:
        ImportError: If fastapi or uvicorn is not installed.
    """
    lacking = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ImportError(
            f"The reward server needs {' and '.join(lacking)}. Install with: "
            f'pip install "moa-diffusion[server]"'
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server bound to the host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one.

    Raises:
        OSError: If the address is not of this machine, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=512)


class RequestHandler:
    """Answers requests of clients, whatever brings them: who may ask, for what, and how much.

    Everything but the decoding of images happens in the thread of one event loop.

    Args:
        services: The heads by name.
        token: What clients must show as a bearer token; empty: nothing.
        limits: What requests may cost.
    """

    def __init__(self, services: Mapping[str, Service], *, token: str, limits: Limits) -> None:
        self.services, self.token, self.limits = services, token, limits
        self._in_memory = 0  # bytes of bodies

    def health(self, headers: Mapping[str, str]) -> wire.Health:
        """Return which heads there are, who they are, and what a request may cost.

        Args:
            headers: The request's headers, by lower-case name.

        Raises:
            Refusal: If the token is missing or wrong.
        """
        self._authorise(headers)
        heads = {
            name: wire.Served(**dict(service.identity), ready=service.batcher.ready)
            for name, service in self.services.items()
        }
        return wire.Health(format=wire.FORMAT, heads=heads, limits=asdict(self.limits))

    async def score(
        self, headers: Mapping[str, str], pieces: AsyncIterator[bytes], wait: float
    ) -> bytes:
        """Read a batch, have its head score it, and return the packed reply.

        Args:
            headers: The request's headers, by lower-case name.
            pieces: The body as it arrives; h11 sees to it that it is not longer than announced.
            wait: Seconds that the client waits.

        Raises:
            Refusal: For a request that is not let in, that is wrong, or that came to nothing.
        """
        self._authorise(headers)
        if "transfer-encoding" in headers:  # which would overrule the length
            raise Refusal(411, "no_length", "A request should have no Transfer-Encoding.")
        _check_length(headers.get("content-length"), self.limits.max_body)
        seconds = min(wait, _LONGEST_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                arrived: list[bytes] = []
                try:
                    async for piece in pieces:
                        self._reserve(len(piece))
                        arrived.append(piece)
                    return await self._reply(b"".join(arrived))
                finally:
                    self._in_memory -= sum(map(len, arrived))
        except TimeoutError:
            cause = f"Not scored within the {seconds:g} s that the client waits."
            raise Refusal(504, "late", cause) from None

    def _authorise(self, headers: Mapping[str, str]) -> None:
        given, expected = headers.get("authorization", ""), f"Bearer {self.token}"
        if self.token and not hmac.compare_digest(given.encode(), expected.encode()):
            raise Refusal(401, "unauthorised", "The bearer token is missing or wrong.")

    def _reserve(self, count: int) -> None:
        """Count bytes that have arrived, and not what is announced: that costs a client nothing."""
        if self._in_memory + count > _BODIES * self.limits.max_body:
            raise Refusal(503, "overloaded", f"{self._in_memory} bytes of requests are under way.")
        self._in_memory += count

    async def _reply(self, body: bytes) -> bytes:
        try:
            request, files = wire.unpack(body)
            service = self._service(request)
            scores = await self._evaluate(service.batcher, request, files)
            return wire.pack_reply(service.identity, scores)
        except wire.WireError as error:
            raise Refusal(400, "malformed", str(error)) from error
        except Overloaded as error:
            raise Refusal(503, "overloaded", str(error)) from error
        except RewardError as error:
            logger.warning("%s", error)
            details = {"head": error.head, "samples": [index for index, _ in error.samples]}
            raise Refusal(500, "head_failed", error.cause, **details) from error

    def _service(self, request: wire.ScoreRequest) -> Service:
        service = self.services.get(request.head)
        if service is None:
            cause = f'No head "{request.head}" here. Served: {", ".join(self.services)}.'
            raise Refusal(404, "unknown_head", cause)
        if service.identity.scores not in (request.kind, "both"):
            cause = (
                f'The head "{request.head}" scores {service.identity.scores}. Found {request.kind}.'
            )
            raise Refusal(400, "wrong_kind", cause)
        return service

    async def _evaluate(
        self, batcher: Batcher, request: wire.ScoreRequest, files: Sequence[memoryview]
    ) -> Scores:
        count = len(request.prompts)
        if count > self.limits.max_batch:
            cause = f"A request should have at most {self.limits.max_batch} samples. Found {count}."
            raise Refusal(413, "too_large", cause)
        opened = await asyncio.to_thread(wire.open_images, files)
        pixels = sum(image.width * image.height for image in opened)
        if pixels > self.limits.max_pixels:
            cause = (
                f"The images of a request should have at most {self.limits.max_pixels} pixels in "
                f"all. Found {pixels}."
            )
            raise Refusal(413, "too_large", cause)
        batcher.admit(count, pixels)
        decoding = asyncio.create_task(asyncio.to_thread(wire.decode, request, opened))
        try:
            samples = await asyncio.shield(decoding)
        except BaseException:

            def forget(ended: asyncio.Task[wire.Samples]) -> None:
                if not ended.cancelled():
                    ended.exception()  # or asyncio reports that nobody asked for it
                batcher.release(count, pixels)

            # Of a cancelled request too the room is free only when its thread has ended.
            decoding.add_done_callback(forget)
            raise
        return await asyncio.wrap_future(batcher.submit(samples))


def build_app(services: Mapping[str, Service], *, token: str, limits: Limits) -> "FastAPI":
    """Return the application: ``POST /score`` and ``GET /health``.

    Args:
        services: The heads by name.
        token: What clients must show as a bearer token; empty: nothing.
        limits: What requests may cost.

    Raises:
        ImportError: See ``check_packages``.
    """
    check_packages()
    from fastapi import FastAPI, Header, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="rewards", docs_url=None, redoc_url=None, openapi_url=None)
    handler = RequestHandler(services, token=token, limits=limits)

    @app.get("/health")
    async def health(request: Request) -> Response:
        return JSONResponse(handler.health(request.headers).model_dump())

    @app.post("/score")
    async def score(
        request: Request,
        wait: Annotated[float, Header(alias=wire.SECONDS_HEADER, gt=0)] = _LONGEST_SECONDS,
    ) -> Response:
        try:
            reply = await handler.score(request.headers, request.stream(), wait)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        return Response(reply, media_type="application/json")

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        # The connection is closed, or the rest of a refused body would still be read.
        headers = {"Connection": "close"}
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if refusal.status == 503:
            headers["Retry-After"] = str(_RETRY_SECONDS)
        return JSONResponse(refusal.content, refusal.status, headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_header(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        cause = f"{first['loc'][-1]}: {first['msg']}. Found {first['input']!r}."
        return await refuse(request, Refusal(400, "malformed", cause))

    return app


def run(
    services: Mapping[str, Service],
    listener: socket.socket,
    *,
    token: str,
    limits: Limits,
    started: Callable[[Any], None] = lambda server: None,
) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first.

    Args:
        services: The heads by name.
        listener: See ``listen``.
        token: See ``build_app``.
        limits: See ``build_app``.
        started: Called with the uvicorn server before it serves; setting ``should_exit`` on it ends
            it.

    Raises:
        ImportError: See ``check_packages``.
    """
    check_packages()
    import uvicorn

    app = build_app(services, token=token, limits=limits)
    # h11, though another parser may be installed: it is the one that the tests run on.
    config = uvicorn.Config(
        app,
        http="h11",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GOODBYE_SECONDS,
    )
    server = uvicorn.Server(config)
    started(server)
    server.run(sockets=[listener])


def _check_length(given: str | None, most: int) -> None:
    if given is None:
        raise Refusal(411, "no_length", "A request should have a Content-Length.")
    length = int(given)  # h11 lets nothing but digits through
    if length > most:
        cause = f"A body should have at most {most} bytes. Found {length}."
        raise Refusal(413, "too_large", cause)
