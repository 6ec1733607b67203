"""One HTTP request that ends when its time is up, whatever the server does.

Redirects are not followed, proxies of the environment are not used, nothing is retried here.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import h11
import httpx2

_CONNECT_SECONDS = 10.0
_LONGEST_REPLY = 64_000_000  # bytes


class CallError(Exception):
    """No answer came.

    Args:
        cause: What went wrong.
        again: Whether the same request may succeed later.
    """

    def __init__(self, cause: str, *, again: bool) -> None:
        super().__init__(cause)
        self.cause = cause
        self.again = again


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a server said."""

    status: int
    headers: Mapping[str, str]  # names in any case
    body: bytes


def check_url(url: object) -> str:
    """Return the address of a server without a slash at its end.

    Raises:
        ValueError: If it is no ``http://host[:port][/path]`` or ``https://...``.
    """
    problem = ""
    try:
        parts = urlsplit(str(url))
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            problem = "no http:// or https:// address"
        elif parts.query or parts.fragment or parts.username is not None:
            problem = "an address with user, query or fragment"
        elif not all("!" <= character <= "~" for character in str(url)):
            problem = "an address with white space or letters beyond ASCII"
    except ValueError as error:  # urlsplit raises it, also for a port beyond 65535
        problem = str(error)
    if problem:
        raise ValueError(
            f"Parameter `url` should read `http://host:port`. Found `url = {url!r}`: {problem}."
        )
    return str(url).rstrip("/")


def open_client(urls: Sequence[str]) -> httpx2.AsyncClient:
    """Return a client that has as many connections to the servers as it has calls.

    Args:
        urls: Addresses of the servers; certificates are loaded only for https.
    """
    encrypted = any(url.startswith("https:") for url in urls)
    return httpx2.AsyncClient(
        verify=ssl.create_default_context() if encrypted else False,
        trust_env=False,
        limits=httpx2.Limits(max_connections=None),
        headers={"Accept-Encoding": "identity"},
    )


async def call(
    client: httpx2.AsyncClient,
    url: str,
    *,
    seconds: float,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Send a request: POST with a body, GET without.

    Args:
        client: See ``open_client``.
        url: What to ask for, with the address of the server.
        seconds: Time for everything, from the connection to the last byte of the answer.
        body: Bytes to send.
        headers: Header lines to send.

    Raises:
        CallError: If no complete answer came in time.
    """
    response: httpx2.Response | None = None
    content = bytearray()
    method = "GET" if body is None else "POST"
    # A handshake of TLS that is cancelled leaves its socket open, one that is late does not: so it
    # has to be late first.
    limits = httpx2.Timeout(None, connect=min(0.9 * seconds, _CONNECT_SECONDS))
    try:
        async with (
            asyncio.timeout(seconds),
            client.stream(method, url, content=body, headers=headers, timeout=limits) as response,
        ):
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > _LONGEST_REPLY:
                    cause = f"the answer is longer than {_LONGEST_REPLY} bytes"
                    raise CallError(cause, again=False)
    except TimeoutError as error:
        raise CallError(f"no answer within {seconds:.3g} s", again=True) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        if response is None or response.status_code == 200:  # a refusal need not be complete
            root = _root(error)
            # What breaks off may be whole the next time. But a certificate stays what it is, and
            # so does a server whose answer does not begin as one of HTTP.
            lasting = (h11.RemoteProtocolError, httpx2.InvalidURL, ssl.SSLError)
            again = response is not None or not isinstance(root, lasting)
            cause = f"{type(root).__name__}: {root}".removesuffix(": ")
            raise CallError(cause, again=again) from error
    return Answer(status=response.status_code, headers=response.headers, body=bytes(content))


def _root(error: BaseException) -> BaseException:
    # The system's own words, which the layers above it leave out.
    while True:
        group = error.exceptions[0] if isinstance(error, ExceptionGroup) else None
        inner = group or error.__cause__ or error.__context__
        if inner is None or isinstance(inner, ssl.SSLWantReadError):  # which says nothing
            return error
        error = inner
