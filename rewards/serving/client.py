"""One HTTP request that ends when its time is up, whatever the server does.

Of the standard library, so that a client needs no further package. Its time-outs are per read, and
those of the usual clients are too: a server that sends a byte a second never trips them. So the
whole exchange runs against one timer that shuts the socket. Redirects are not followed, proxies of
the environment are not used, nothing is retried here.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

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
    headers: Mapping[str, str]  # names in lower case
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
    except ValueError as error:  # of urlsplit, and of a port beyond 65535
        problem = str(error)
    if problem:
        raise ValueError(
            f"Parameter `url` should read `http://host:port`. Found `url = {url!r}`: {problem}."
        )
    return str(url).rstrip("/")


class Calls:
    """The calls of one batch, to end them together. Safe to use from several threads."""

    def __init__(self) -> None:
        self._sockets: set[socket.socket] = set()
        self._ended = False
        self._lock = threading.Lock()

    def end(self) -> None:
        """End the calls under way, whose threads raise ``CallError``; further ones are refused."""
        with self._lock:
            self._ended = True
            for sock in self._sockets:
                _shut(sock)

    def add(self, sock: socket.socket) -> None:
        """Remember an open socket."""
        with self._lock:
            self._sockets.add(sock)
            if self._ended:
                _shut(sock)

    def discard(self, sock: socket.socket) -> None:
        """Forget a socket that is about to be closed."""
        with self._lock:
            self._sockets.discard(sock)

    @property
    def ended(self) -> bool:
        return self._ended


def call(
    url: str,
    path: str,
    *,
    seconds: float,
    calls: Calls,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Send a request: POST with a body, GET without.

    Args:
        url: Address of the server; see ``check_url``.
        path: What to ask for, e.g. ``/health``.
        seconds: Time for everything, from the connection to the last byte of the answer; only the
            look-up of the host's name is left to the system.
        calls: Where the call is entered while it runs.
        body: Bytes to send.
        headers: Header lines to send.

    Raises:
        CallError: If no complete answer came in time.
    """
    if seconds <= 0 or calls.ended:
        raise CallError("no time was left", again=True)
    deadline = time.monotonic() + seconds
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(
        parts.hostname or "",
        parts.port or (443 if parts.scheme == "https" else 80),
        timeout=min(seconds, _CONNECT_SECONDS),
    )
    late = threading.Event()
    sock: socket.socket | None = None
    timer: threading.Timer | None = None

    def expire() -> None:
        late.set()
        assert sock is not None
        _shut(sock)

    try:
        connection.connect()
        sock = connection.sock
        calls.add(sock)
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), expire)
        timer.daemon = True
        timer.start()
        if parts.scheme == "https":
            calls.discard(sock)
            sock = ssl.create_default_context().wrap_socket(
                sock, server_hostname=parts.hostname, do_handshake_on_connect=False
            )
            calls.add(sock)
            sock.do_handshake()  # now that the timer knows the socket: it can drip as well
            connection.sock = sock
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        answer = _exchange(connection, parts.path + path, body, headers or {})
    except (OSError, http.client.HTTPException) as error:
        if late.is_set() or time.monotonic() >= deadline:
            raise CallError(f"no answer within {seconds:.3g} s", again=True) from error
        raise CallError(_words(error), again=_passing(error)) from error
    finally:
        if timer is not None:
            timer.cancel()
        if sock is not None:
            calls.discard(sock)
            sock.close()
        connection.close()
    if late.is_set():  # a body that ends with the connection looks complete when that is shut
        raise CallError(f"no answer within {seconds:.3g} s", again=True)
    if calls.ended:
        raise CallError("given up", again=True)
    return answer


def _exchange(
    connection: http.client.HTTPConnection,
    path: str,
    body: bytes | None,
    headers: Mapping[str, str],
) -> Answer:
    # A server may refuse a body and hang up before it has read it: its answer says why.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request("GET" if body is None else "POST", path, body, dict(headers))
    with connection.getresponse() as response:
        content = response.read(_LONGEST_REPLY + 1)
        if response.status == 200 and response.length:  # it hung up; of a refusal a part will do
            raise http.client.IncompleteRead(content, response.length)
        if len(content) > _LONGEST_REPLY:
            raise http.client.HTTPException(f"the answer is longer than {_LONGEST_REPLY} bytes")
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Answer(status=response.status, headers=fields, body=content)


def _shut(sock: socket.socket) -> None:
    # The plain socket's method: that of a TLS socket swaps its state under a thread that reads.
    with contextlib.suppress(OSError):  # closed already
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _passing(error: Exception) -> bool:
    # A certificate stays what it is, and so does a server that does not speak HTTP.
    kinds = (OSError, http.client.IncompleteRead)
    return isinstance(error, kinds) and not isinstance(error, ssl.SSLError)


def _words(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
