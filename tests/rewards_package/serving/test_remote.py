"""The `remote` head against servers that misbehave: a typed error in time, and never a score of 0.

What a real server does is in `test_server.py`; here each reply is written by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import itertools
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rewards import RewardBatch, RewardError, create
from rewards.serving import wire
from rewards.serving.client import Answer, CallError, call, open_client
from rewards.serving.dispatch import Dispatch
from rewards.serving.remote import RemoteHead
from waiting import DEADLINES, HANG, wait_until

IDENTITY = {
    "head": "judge",
    "unit": "points",
    "requires": [],
    "version": "1",
    "provenance": {"weights": "w1"},
    "digest": "d1",
}
Reply = tuple[int, dict[str, str], bytes]


def batch(size: int) -> RewardBatch:
    """Sample i is the text "i", so that a server can score it by its content."""
    return RewardBatch(
        prompts=[f"prompt {i}" for i in range(size)], texts=list(map(str, range(size)))
    )


def reply(scores: object, applies: object = None, **more: object) -> bytes:
    listed = scores if isinstance(scores, list) else []
    applies = [True] * len(listed) if applies is None else applies
    content = {"identity": IDENTITY, "scores": scores, "applies": applies, "extra": {}}
    return json.dumps({**content, **more}).encode()  # writes NaN and Infinity as they are


def honest(body: bytes) -> Reply:
    """Scores each text by the number that it is."""
    texts = wire.unpack(body)[0].texts or []
    return 200, {}, reply([float(text) for text in texts])


def health(body: bytes, identity: dict = IDENTITY, **more: object) -> Reply:
    heads = {"judge": {**identity, "ready": True, **more}}
    return 200, {}, json.dumps({"format": 1, "heads": heads}).encode()


class Scripted:
    """An HTTP server whose replies are functions of the request's body; counts the requests."""

    def __init__(
        self,
        score: Callable[[bytes], Reply],
        health: Callable[[bytes], Reply],
        place: socket.socket | None,
    ) -> None:
        outer = self
        self.seen: list[dict[str, str]] = []  # headers
        self.lock = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, make: Callable[[bytes], Reply]) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with outer.lock:
                    outer.seen.append({k.lower(): v for k, v in self.headers.items()})
                status, headers, content = make(body)
                with contextlib.suppress(OSError):  # the client has gone
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def do_POST(self) -> None:
                self.answer(score)

            def do_GET(self) -> None:
                self.answer(health)

            def log_message(self, *args: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 128  # by default 5: more wait a second for their connection

        self.server = Server(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.server.socket.close()
        self.server.socket = place or bound()
        self.server.server_port = self.server.socket.getsockname()[1]
        self.server.server_activate()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextlib.contextmanager
def scripted(
    score: Callable[[bytes], Reply] = honest,
    health: Callable[[bytes], Reply] = health,
    place: socket.socket | None = None,
) -> Iterator[Scripted]:
    server = Scripted(score, health, place)
    thread = threading.Thread(target=server.server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()
        thread.join()


@contextlib.contextmanager
def raw(pieces: Iterable[bytes] = (), pause: float = 0.0, hang_up: bool = False) -> Iterator[str]:
    """A server that reads little, sends the pieces with pauses, and holds the connection or not.

    Fails if a client waited until the server had had enough.
    """
    over = threading.Event()
    outlasted: list[bool] = []
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            for piece in pieces:
                connection.sendall(piece)
                if over.wait(pause):
                    return
            if not hang_up and not over.wait(HANG):
                outlasted.append(True)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (acceptor, *threads):
            thread.join()
        assert not outlasted


def bound() -> socket.socket:
    """A free address, taken; nobody listens there yet."""
    place = socket.socket()
    place.bind(("127.0.0.1", 0))
    return place


@pytest.fixture
def dead_url() -> Iterator[Callable[[], str]]:
    """Makes addresses where nobody listens."""
    with contextlib.ExitStack() as stack:

        def make() -> str:
            return f"http://127.0.0.1:{stack.enter_context(bound()).getsockname()[1]}"

        yield make


def get(url: str, seconds: float = HANG) -> Answer:
    async def ask() -> Answer:
        async with open_client([url]) as client:
            return await call(client, f"{url}/health", seconds=seconds)

    return asyncio.run(ask())


def failure(head: RemoteHead, size: int = 3) -> RewardError:
    with pytest.raises(RewardError) as caught:
        head(batch(size))
    assert caught.value.head == "remote"
    return caught.value


def test_scores_come_back_in_order_whatever_the_cut() -> None:
    with scripted() as server:
        for batch_size in (1, 3, 16):
            options = {"batch_size": batch_size, "max_parallel": 3, "timeout": HANG}
            head = RemoteHead(server.url, "judge", **options)
            assert head(batch(10)).tolist() == list(range(10))
        assert len(server.seen) == 10 + 4 + 1
        assert server.seen[0]["content-type"] == wire.CONTENT_TYPE
        assert 0 < float(server.seen[0]["reward-seconds"]) <= HANG  # what is left of them
        assert "authorization" not in server.seen[0]


def test_one_head_may_be_used_by_many_threads() -> None:
    with scripted() as server, ThreadPoolExecutor(8) as pool:
        head = RemoteHead(server.url, "judge", batch_size=2)
        found = list(pool.map(lambda size: head(batch(size)).tolist(), range(1, 17)))
    assert found == [list(range(size)) for size in range(1, 17)]


def test_a_dead_server_is_an_error_that_names_it(dead_url: Callable[[], str]) -> None:
    url = dead_url()
    for seconds in DEADLINES:
        error = failure(RemoteHead(url, "judge", retries=0, timeout=seconds))
        assert f"not scored within {seconds:g} s" in error.cause
        if "ConnectionRefusedError" in error.cause:  # else it had no time to try
            break
    assert url in error.cause
    assert "ConnectionRefusedError" in error.cause
    assert error.samples == tuple((i, f"prompt {i}") for i in range(3))


SLOW = {
    "silent": (),
    "half a header": (b"HTTP/1.1 200 OK\r\nContent-",),
    "half a body": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{",),
}


@pytest.mark.parametrize("pieces", SLOW.values(), ids=SLOW.keys())
def test_a_slow_server_is_an_error_at_the_deadline(pieces: tuple[bytes, ...]) -> None:
    with raw(pieces) as url:
        error = failure(RemoteHead(url, "judge", timeout=0.5))
    assert "not scored within 0.5 s" in error.cause


def test_an_answer_that_breaks_off_is_no_answer() -> None:
    with (
        raw(SLOW["half a body"], hang_up=True) as url,
        pytest.raises(CallError, match="without sending complete message body") as caught,
    ):
        get(url)
    assert caught.value.again


DRIPS = {
    "header": b"HTTP/1.1 200 OK\r\nX: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n",
    "body without length": b"HTTP/1.1 200 OK\r\n\r\n",
}


@pytest.mark.parametrize("beginning", DRIPS.values(), ids=DRIPS.keys())
def test_a_server_that_drips_does_not_outlast_the_deadline(beginning: bytes) -> None:
    drops = int(HANG / 0.05)  # more than the pauses of a client that waits for the end
    pieces = [beginning, *itertools.repeat(b"y", drops)]
    with raw(pieces, pause=0.05) as url:
        with pytest.raises(CallError, match=r"no answer within 0\.5 s"):
            get(url, 0.5)
        assert "0.5 s" in failure(RemoteHead(url, "judge", timeout=0.5)).cause


NAN, INFINITY = float("nan"), float("inf")
NONSENSE = {
    "no json": (b"<html>hello</html>", "not JSON"),
    "nothing": (b"", "not JSON"),
    "a list": (b"[1, 2, 3]", "valid dictionary"),
    "too short": (reply([1.0, 2.0]), "`scores` should be a list of 3. Found a list of 2"),
    "too long": (reply([1.0] * 4), "Found a list of 4"),
    "no scores": (
        reply(None, [True] * 3),
        "`scores` is wrong: Input should be a valid list. Found None",
    ),
    "nan": (reply([1.0, NAN, 2.0]), "NaN is no JSON number"),
    "infinity": (reply([1.0, INFINITY, 2.0]), "Infinity is no JSON number"),
    "overflow": (
        reply([1.0, 2.0, 3.0]).replace(b"2.0", b"1e999"),
        "`scores.1` is wrong: Input should be a finite number",
    ),
    "beyond float32": (reply([1.0, 1e39, 3.0]), "`scores.1` is wrong: Input should be less"),
    "huge": (reply([1.0, 10**400, 3.0]), "`scores.1` is wrong"),
    "null that applies": (reply([1.0, None, 3.0]), "Found None with `applies` = True"),
    "number that does not": (reply([1.0] * 3, [True, False, True]), "Found 1.0 with"),
    "text": (reply(["1", "2", "3"]), "`scores.0` is wrong: Input should be a valid number"),
    "true": (reply([True] * 3), "`scores.0` is wrong: Input should be a valid number"),
    "applies": (
        reply([1.0] * 3, [1, 1, 1]),
        "`applies.0` is wrong: Input should be a valid boolean",
    ),
    "no identity": (reply([1.0] * 3, identity=None), "`identity` is wrong"),
    "odd identity": (
        reply([1.0] * 3, identity={**IDENTITY, "digest": 3}),
        "`identity.digest` is wrong",
    ),
    "short column": (reply([1.0] * 3, extra={"x": [1]}), "`extra.x` should be a list of 3"),
}


@pytest.mark.parametrize(("body", "reason"), NONSENSE.values(), ids=NONSENSE.keys())
def test_nonsense_is_an_error_at_once(body: bytes, reason: str) -> None:
    with scripted(lambda _: (200, {}, body)) as server:
        error = failure(RemoteHead(server.url, "judge", timeout=HANG))
        assert reason in error.cause
        assert server.url in error.cause
        assert len(server.seen) == 1  # asked once
        assert [index for index, _ in error.samples] == [0, 1, 2]


def test_null_that_does_not_apply_is_nan() -> None:
    with scripted(lambda _: (200, {}, reply([1.0, None, 3], [True, False, True]))) as server:
        scores = RemoteHead(server.url, "judge")(batch(3))
    assert scores.isnan().tolist() == [False, True, False]
    assert scores[[0, 2]].tolist() == [1, 3]


def test_what_is_not_http_is_an_error() -> None:
    with raw([b"220 mail.example.org ready\r\n\r\n"]) as url:
        error = failure(RemoteHead(url, "judge", timeout=HANG))
    assert "illegal status line" in error.cause
    with raw([b"SSH-2.0-OpenSSH_9.6\r\n"]) as url:  # it may be the beginning of a header
        assert "0.5 s" in failure(RemoteHead(url, "judge", timeout=0.5)).cause


STATUSES = {
    301: ({"Location": "http://127.0.0.1:1/"}, 1, "status 301 to http://127.0.0.1:1/"),
    401: ({}, 1, "status 401"),
    404: ({}, 1, "status 404"),
    500: ({}, 3, "status 500: 'what?'"),
}


@pytest.mark.parametrize("status", STATUSES)
def test_bad_statuses_are_errors_after_bounded_retries(status: int) -> None:
    headers, requests, reason = STATUSES[status]
    with scripted(lambda _: (status, headers, b"what?")) as server:
        head = RemoteHead(server.url, "judge", retries=2, timeout=HANG, max_parallel=1)
        assert reason in failure(head).cause
        assert len(server.seen) == requests


def test_a_typed_refusal_is_passed_on() -> None:
    def refuse(kind: str, status: int, **more: object) -> Callable[[bytes], Reply]:
        content = {"error": {"kind": kind, "cause": "It is so.", **more}}
        return lambda _: (status, {}, json.dumps(content).encode())

    with scripted(refuse("head_failed", 500, head="judge", samples=[1])) as server:
        error = failure(RemoteHead(server.url, "judge", batch_size=2), size=2)
        assert error.samples == ((1, "prompt 1"),)
        assert error.cause == f"{server.url} (head_failed): It is so."
        assert len(server.seen) == 1  # it would fail again
    with scripted(refuse("head_failed", 500, samples=[7, "x"])) as server:
        assert len(failure(RemoteHead(server.url, "judge")).samples) == 3
    with scripted(refuse("unauthorised", 401)) as server:
        assert "Set `token_env`" in failure(RemoteHead(server.url, "judge")).cause


def test_a_passing_failure_is_retried() -> None:
    lock, failures = threading.Lock(), [500, 503, 502]

    def recover(body: bytes) -> Reply:
        with lock:
            return (failures.pop(), {}, b"") if failures else honest(body)

    with scripted(recover) as server:
        head = RemoteHead(server.url, "judge", batch_size=2, max_parallel=1, retries=3)
        assert head(batch(5)).tolist() == list(range(5))
        assert len(server.seen) == 3 + 3


def test_the_share_of_a_dead_server_goes_to_the_others(dead_url: Callable[[], str]) -> None:
    """Nobody waits for the dead one: of a batch that may take for ever it would have half."""
    with scripted() as server:
        head = RemoteHead([dead_url(), server.url], "judge", batch_size=1, timeout=1e6)
        assert head(batch(9)).tolist() == list(range(9))


def test_a_server_that_is_started_later_is_waited_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, refusals, pauses = threading.Lock(), [503] * 4, []
    rest = Dispatch._rest

    async def noted(dispatch: Dispatch, seconds: float) -> None:
        pauses.append(seconds)
        await rest(dispatch, seconds / 10)

    def starting(body: bytes) -> Reply:
        with lock:
            return (refusals.pop(), {}, b"starting") if refusals else honest(body)

    monkeypatch.setattr(Dispatch, "_rest", noted)
    with scripted(starting) as server:
        options = {"retries": 0, "batch_size": 2, "timeout": HANG}
        head = RemoteHead(server.url, "judge", max_parallel=1, **options)
        assert head(batch(5)).tolist() == list(range(5))
        assert len(server.seen) == 4 + 3
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8])  # what was asked for, not what it took
    assert "status 503: 'starting'. Asking again." in caplog.text
    caplog.clear()
    with bound() as place, ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{place.getsockname()[1]}"
        scores = pool.submit(RemoteHead(url, "judge", retries=0, timeout=HANG), batch(5))
        wait_until(lambda: len(pauses) > 4 + 2, "it was not asked again")
        assert not scores.done()
        assert "ConnectionRefusedError" in caplog.text
        with scripted(place=place):
            assert scores.result(HANG).tolist() == list(range(5))


@pytest.mark.parametrize("status", [301, 401, 404, 500])
def test_a_server_that_never_scores_is_left_out(status: int, caplog) -> None:
    def other(body: bytes) -> Reply:
        return status, {}, b"what?"

    with scripted(other) as wrong, scripted() as right:
        head = RemoteHead([wrong.url, right.url], "judge", batch_size=1, retries=1, timeout=HANG)
        assert head(batch(9)).tolist() == list(range(9))
        assert len(wrong.seen) <= 4  # two connections
    assert f"status {status}" in caplog.text


def test_load_warns_of_servers_that_cannot_score(
    caplog: pytest.LogCaptureFixture, dead_url: Callable[[], str]
) -> None:
    dead = dead_url()
    with scripted(health=lambda _: (404, {}, b"?")) as wrong, scripted() as right:
        head = RemoteHead([dead, wrong.url, right.url], "judge")
        head.load()
        assert f"goes on without a server: {dead}" in caplog.text
        assert f"goes on without a server: {wrong.url} answered with status 404" in caplog.text
        assert head.provenance()["remote_digest"] == "d1"
        with pytest.raises(RewardError, match=r"ConnectionRefused.* status 404"):
            RemoteHead([dead, wrong.url], "judge").load()


def test_the_share_of_a_hanging_server_goes_to_the_others_in_time() -> None:
    for seconds in DEADLINES:
        with scripted() as server, raw() as hanging:
            head = RemoteHead([hanging, server.url], "judge", batch_size=1, timeout=seconds)
            try:
                found = head(batch(9)).tolist()
                break
            except RewardError as error:  # a busy machine needs more than half of the time
                assert f"not scored within {seconds:g} s" in error.cause
    assert found == list(range(9))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate")
def test_https_is_spoken_and_certificates_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:P-256 -days 2"
    files = ["-keyout", key, "-out", certificate]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*make.split(), *files, *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with scripted() as server:
        server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        error = failure(RemoteHead(url, "judge", timeout=HANG))
        assert "certificate verify failed" in error.cause
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert RemoteHead(url, "judge")(batch(3)).tolist() == [0, 1, 2]
    with raw() as url:  # a handshake that never ends
        url = url.replace("http://127.0.0.1", "https://localhost")
        assert "0.5 s" in failure(RemoteHead(url, "judge", timeout=0.5)).cause


def test_all_servers_dead_names_each(dead_url: Callable[[], str]) -> None:
    urls = [dead_url(), dead_url()]
    for seconds in DEADLINES:
        error = failure(RemoteHead(urls, "judge", timeout=seconds))
        if all(url in error.cause for url in urls):  # else one had no time to be tried
            break
    assert all(url in error.cause for url in urls)


def other(body: bytes) -> Reply:
    identity = {**IDENTITY, "digest": "d2", "provenance": {"weights": "w2"}}
    return health(body, identity)


def test_servers_that_score_otherwise_are_an_error() -> None:
    def score(body: bytes) -> Reply:
        return 200, {}, reply([0.0], identity={**IDENTITY, "digest": "d2"})

    with scripted() as first, scripted(score, other) as second:
        with pytest.raises(RewardError, match=r"digest d2 .*weights w2.* instead of digest d1"):
            RemoteHead([first.url, second.url], "judge").load()
        # And a server that was restarted with other weights, noticed without asking for health.
        head = RemoteHead(first.url, "judge")
        head.load()
        head.urls = (second.url,)
        assert "scores otherwise" in failure(head, size=1).cause


def test_load_says_what_is_wrong(dead_url: Callable[[], str]) -> None:
    with scripted() as server:
        head = RemoteHead(server.url, "judge")
        assert head.provenance() == {}
        head.load()
        assert (head.unit, head.provenance()["weights"]) == ("points", "w1")
        assert head.provenance()["remote_digest"] == "d1"
        with pytest.raises(RewardError, match=r'no head "juge"\. Did you mean \'judge\''):
            RemoteHead(server.url, "juge").load()
        head.close()
        assert head.provenance() == {}
    for answer, reason in (
        (lambda _: (200, {}, b"hello"), "no reward server"),
        (lambda _: (200, {}, b"{}"), "no reward server"),
        (lambda _: (404, {}, b"?"), "status 404"),
        (lambda body: health(body, ready=False), "is not ready"),
    ):
        with scripted(health=answer) as server, pytest.raises(RewardError, match=reason):
            RemoteHead(server.url, "judge").load()
    with pytest.raises(RewardError, match="Does a reward server run there"):
        RemoteHead(dead_url(), "judge").load()


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'NO_SUCH_TOKEN'`, which is not set"):
        RemoteHead("http://localhost:1", "judge", token_env="NO_SUCH_TOKEN")
    monkeypatch.setenv("SOME_TOKEN", " secret\n")
    with scripted() as server:
        RemoteHead(server.url, "judge", token_env="SOME_TOKEN")(batch(1))
        assert server.seen[0]["authorization"] == "Bearer secret"
    monkeypatch.setenv("SOME_TOKEN", "two\nlines")
    with pytest.raises(ValueError, match="without white space"):
        RemoteHead("http://localhost:1", "judge", token_env="SOME_TOKEN")


def test_metadata_that_cannot_travel_names_its_sample() -> None:
    odd = RewardBatch(prompts=["a", "b"], texts=["a", "b"], metadata=[{}, {"x": object()}])
    with pytest.raises(RewardError, match="metadata cannot travel as JSON") as caught:
        RemoteHead("http://localhost:1", "judge")(odd)
    assert caught.value.samples == ((1, "b"),)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "localhost:8000"},
        {"url": "ftp://localhost"},
        {"url": "http://"},
        {"url": "http://host:99999"},
        {"url": "http://user:word@host"},
        {"url": "http://host/?q=1"},
        {"url": "http://ho st"},
        {"url": []},
        {"url": ["http://a", "http://a/"]},
        {"remote_name": ""},
        {"timeout": 0},
        {"retries": True},
        {"batch_size": "4"},
        {"url": ["http://a", 3]},
        {"timeout": INFINITY},
        {"retries": -1},
        {"batch_size": 0},
        {"max_parallel": 0},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        create("remote", **{"url": "http://localhost:1", "remote_name": "judge", **options})


def test_an_empty_batch_asks_nobody(dead_url: Callable[[], str]) -> None:
    assert torch.equal(RemoteHead(dead_url(), "judge")(batch(0)), torch.empty(0))
