"""The reward server: heads behind HTTP, for judges that need another machine or other packages.

``POST /score`` takes a batch in the format of ``rewards.serving.wire``, ``GET /health`` says which
heads there are and who they are. Every refusal is typed JSON. What a client may cost is bounded:
the body while it is read, the samples before they are decoded, the pixels before they are
decompressed, the characters before they are tokenised.
"""

# Without `from __future__ import annotations`: FastAPI reads the annotations of the handlers, and
# the names in them are local to `build_app`.

import asyncio
import hmac
import importlib.util
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may cost.

    Raises:
        ValueError: If a limit is not positive, or smaller than one that it must hold.
    """

    max_body: int = 64_000_000  # bytes of a request
    max_batch: int = 64  # samples of a request, and of a call of the head
    max_pixels: int = 2048 * 2048  # of a picture
    max_batch_pixels: int = 8 * 2048 * 2048  # of a request, and of a call of the head
    max_queue: int = 512  # samples under way, per head
    max_queue_pixels: int = 64 * 2048 * 2048  # of pictures under way, 3 bytes each, per head
    max_text: int = 100_000  # characters of a prompt, and of a text to score
    max_upload: int = 60  # seconds that a body may take to arrive

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(
                    f"Parameter `{name}` should be positive. Found `{name} = {value}`."
                )
        given = asdict(self)
        for small, large in (
            ("max_batch", "max_queue"),
            ("max_pixels", "max_batch_pixels"),
            ("max_batch_pixels", "max_queue_pixels"),
        ):
            if given[large] < given[small]:
                raise ValueError(
                    f"Parameter `{large}` should be at least `{small}` ({given[small]}). "
                    f"Found `{large} = {given[large]}`."
                )

    def batcher(self, head: RewardHead) -> Batcher:
        """Return a batcher for the head that keeps these limits."""
        return Batcher(
            head,
            max_batch=self.max_batch,
            max_queue=self.max_queue,
            max_batch_pixels=self.max_batch_pixels,
            max_queue_pixels=self.max_queue_pixels,
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
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="rewards", docs_url=None, redoc_url=None, openapi_url=None)
    in_memory = 0  # bytes of bodies; handlers run in one thread

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> Response:
        # The connection is closed, or the rest of a refused body would still be read.
        headers = {"Connection": "close"}
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if refusal.status == 503:
            headers["Retry-After"] = str(_RETRY_SECONDS)
        return JSONResponse(refusal.content, refusal.status, headers)

    def authorise(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise Refusal(401, "unauthorised", "The bearer token is missing or wrong.")

    @app.get("/health")
    async def health(request: Request) -> Response:
        authorise(request)
        heads = {
            name: {**service.identity.to_json(), "ready": service.batcher.ready}
            for name, service in services.items()
        }
        content = {"format": wire.FORMAT, "heads": heads, "limits": asdict(limits)}
        return JSONResponse(content)

    @app.post("/score")
    async def score(request: Request) -> Response:
        authorise(request)
        if "transfer-encoding" in request.headers:  # which would overrule the length
            raise Refusal(411, "no_length", "A request should have no Transfer-Encoding.")
        length = _length(request.headers.get("content-length"), limits.max_body)
        seconds = _seconds(request.headers.get(wire.SECONDS_HEADER))
        try:
            async with asyncio.timeout(seconds), reservation() as reserve:
                body = await read(request, length, reserve)
                return Response(await answer(body), media_type="application/json")
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except TimeoutError:
            cause = f"Not scored within the {seconds:g} s that the client waits."
            raise Refusal(504, "late", cause) from None

    async def read(request: Request, length: int, reserve: Callable[[int], None]) -> bytes:
        pieces: list[bytes] = []
        received = 0
        try:
            async with asyncio.timeout(limits.max_upload):
                async for piece in request.stream():
                    received += len(piece)
                    if received > length:
                        cause = f"The body is longer than the {length} bytes it was said to have."
                        raise Refusal(413, "too_large", cause)
                    reserve(len(piece))
                    pieces.append(piece)
        except TimeoutError:
            cause = f"{received} of {length} bytes arrived within {limits.max_upload} s."
            raise Refusal(408, "late", cause) from None
        return b"".join(pieces)

    @asynccontextmanager
    async def reservation() -> AsyncIterator[Callable[[int], None]]:
        # What has arrived counts, and not what is announced: that costs a client nothing.
        nonlocal in_memory
        mine = 0

        def reserve(count: int) -> None:
            nonlocal in_memory, mine
            if in_memory + count > _BODIES * limits.max_body:
                raise Refusal(503, "overloaded", f"{in_memory} bytes of requests are under way.")
            in_memory += count
            mine += count

        try:
            yield reserve
        finally:
            in_memory -= mine

    async def answer(body: bytes) -> bytes:
        try:
            header = wire.unpack_header(body)
        except wire.WireError as error:
            raise Refusal(400, "malformed", str(error)) from error
        if header.head not in services:
            known = ", ".join(services)
            raise Refusal(404, "unknown_head", f'No head "{header.head}" here. Served: {known}.')
        count = len(header.prompts)
        if count > limits.max_batch:
            cause = f"A request should have at most {limits.max_batch} samples. Found {count}."
            raise Refusal(413, "too_large", cause)
        service = services[header.head]
        kind = "images" if header.texts is None else "texts"
        if service.identity.scores not in (kind, "both"):
            cause = f'The head "{header.head}" scores {service.identity.scores}. Found {kind}.'
            raise Refusal(400, "wrong_kind", cause)
        try:
            scores = await evaluate(service.batcher, header, body)
            return wire.pack_reply(service.identity, scores)
        except wire.WireError as error:
            raise Refusal(400, "malformed", str(error)) from error
        except Overloaded as error:
            raise Refusal(503, "overloaded", str(error)) from error
        except RewardError as error:
            logger.warning("%s", error)
            details = {"head": error.head, "samples": [index for index, _ in error.samples]}
            raise Refusal(500, "head_failed", error.cause, **details) from error

    async def evaluate(batcher: Batcher, header: wire.Header, body: bytes) -> Scores:
        count = len(header.prompts)
        wire.check_texts(header, limits.max_text)
        pixels = wire.count_pixels(header, body, limits.max_pixels)
        if pixels > limits.max_batch_pixels:
            cause = (
                f"The pictures of a request should have at most {limits.max_batch_pixels} pixels "
                f"in all. Found {pixels}."
            )
            raise Refusal(413, "too_large", cause)
        batcher.admit(count, pixels)
        decoding = asyncio.create_task(asyncio.to_thread(wire.unpack_samples, header, body))
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


def _length(given: str | None, most: int) -> int:
    if given is None:
        raise Refusal(411, "no_length", "A request should have a Content-Length.")
    length = int(given)  # h11 lets nothing but digits through
    if length > most:
        cause = f"A body should have at most {most} bytes. Found {length}."
        raise Refusal(413, "too_large", cause)
    return length


def _seconds(given: str | None) -> float:
    try:
        seconds = float(given) if given is not None else _LONGEST_SECONDS
    except ValueError as error:
        raise Refusal(400, "malformed", f"{wire.SECONDS_HEADER} should be a number.") from error
    if not seconds > 0:
        raise Refusal(400, "malformed", f"{wire.SECONDS_HEADER} should be positive.")
    return min(seconds, _LONGEST_SECONDS)
