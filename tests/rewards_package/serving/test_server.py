"""The reward server over real HTTP: nothing is lost or swapped, nothing costs more than allowed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import pickle
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from rewards import RewardBatch, RewardError, RewardHead, Scores, create
from rewards.identity import Identity
from rewards.serving import wire
from rewards.serving.batching import Batcher, Overloaded
from rewards.serving.client import Answer, call, open_client
from rewards.serving.dispatch import Dispatch
from rewards.serving.remote import RemoteHead
from rewards.serving.server import Limits, Service, build_app, is_loopback, listen, run
from waiting import DEADLINES, HANG, wait_until


class MeanColour(RewardHead):
    """1000 times the mean, with a digest of the pixels; NaN without "colour", poisoned by "no"."""

    unit = "promille"
    requires = ("the word colour",)

    def __init__(self) -> None:
        self.sizes: list[int] = []  # sizes of the batches that it was called with

    def score(self, batch: RewardBatch) -> Scores:
        self.sizes.append(len(batch))
        bad = [index for index, prompt in enumerate(batch.prompts) if prompt == "poison"]
        if bad:
            raise RewardError("It was poisoned.", samples=batch.samples(bad))
        values = batch.require_images().double().mean(dim=(1, 2, 3)) * 1000  # [N]
        silent = [index for index, prompt in enumerate(batch.prompts) if "colour" not in prompt]
        values[silent] = torch.nan
        pixels = [hashlib.sha256(array.tobytes()).hexdigest() for array in batch.arrays()]
        notes = [entry.get("note") for entry in batch.metadata]
        return Scores(values=values, extra={"pixels": pixels, "note": notes})

    def provenance(self) -> dict[str, str]:
        return {"weights": "none"}


class Held(MeanColour):
    """Holds its first batch until it is let go, so that the next ones queue up."""

    def __init__(self) -> None:
        super().__init__()
        self.opened, self.entered = threading.Event(), threading.Event()

    def score(self, batch: RewardBatch) -> Scores:
        self.entered.set()
        assert self.opened.wait(HANG)
        return super().score(batch)


class Words(RewardHead):
    """Number of words of a text."""

    def score(self, batch: RewardBatch) -> torch.Tensor:
        return torch.tensor([float(len(text.split())) for text in batch.require_texts()])


class Gate(RewardHead):
    """Waits until it is opened."""

    def __init__(self) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.prompts: list[str] = []  # that it was called with

    def score(self, batch: RewardBatch) -> torch.Tensor:
        self.prompts += batch.prompts
        self.entered.set()
        assert self.opened.wait(HANG)
        return torch.ones(len(batch))


@contextlib.contextmanager
def serving(token: str = "", limits: Limits | None = None, **heads: RewardHead) -> Iterator[str]:
    limits = limits or Limits()
    services = {}
    for name, head in heads.items():
        head.name = name
        identity = Identity.of(name, head, {})
        services[name] = Service(identity=identity, batcher=limits.batcher(head))
    listener = listen("127.0.0.1", 0)
    servers = []
    thread = threading.Thread(
        target=run,
        args=(services, listener),
        kwargs={"token": token, "limits": limits, "started": servers.append},
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        wait_until(lambda: servers or not thread.is_alive(), "the server did not start")
        for server in servers:
            server.should_exit = True
        thread.join(HANG)
        listener.close()
        for service in services.values():
            service.batcher.close()
        assert not thread.is_alive()


def noise_images(seeds, side: int = 8) -> torch.Tensor:
    """Noise of 8 bits per channel, another for every seed, `[N, 3, side, side]`."""
    drawn = [
        torch.randint(0, 256, (3, side, side), generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(drawn).float() / 255


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict, dict]:
    answer = asked(url, "/score", body, headers)
    return answer.status, json.loads(answer.body), dict(answer.headers)


def asked(url: str, path: str, body: bytes | None = None, headers: dict | None = None) -> Answer:
    async def ask() -> Answer:
        async with open_client([url]) as client:
            return await call(client, url + path, seconds=HANG, body=body, headers=headers)

    return asyncio.run(ask())


def request(head: str = "mean", prompts: int = 1, side: int = 8) -> bytes:
    batch = RewardBatch(prompts=["colour"] * prompts, images=noise_images(range(prompts), side))
    return wire.pack(head, batch, batch.arrays(), range(prompts))


def test_scores_survive_the_journey() -> None:
    prompts = ["a colour", "nothing", "ünï ☃ colour \ud800", "colour\n" * 50, "colour"]
    metadata = [{"note": {"deep": [1, None]}}, {}, {"note": "☃"}, {}, {"note": 1.5}]
    batch = RewardBatch(prompts=prompts, metadata=metadata, images=noise_images(range(5)))
    local = MeanColour().evaluate(batch)
    with serving(mean=MeanColour()) as url:
        head = RemoteHead(url, "mean", batch_size=2)
        scores = head.evaluate(batch)
        again = head(RewardBatch(prompts=prompts[:1], images=noise_images([0])))
    assert scores.values.tolist()[0] == local.values.tolist()[0] == float(again[0])  # to the bit
    torch.testing.assert_close(scores.values, local.values, rtol=0, atol=0, equal_nan=True)
    assert scores.values.isnan().tolist() == [False, True, False, False, False]
    assert scores.extra == local.extra  # the same pixels and the same metadata
    assert (head.unit, head.requires) == ("promille", ("the word colour",))
    assert head.provenance()["weights"] == "none"
    assert head.provenance()["url"] == url


def test_texts_travel_too() -> None:
    batch = RewardBatch(prompts=["?"] * 3, texts=["one", "one two", "ein zwei drei ☃"])
    with serving(words=Words()) as url:
        assert RemoteHead(url, "words", batch_size=2)(batch).tolist() == [1, 2, 4]
        with pytest.raises(RewardError, match="Found a batch of images"):
            RemoteHead(url, "words")(RewardBatch(prompts=["?"], images=noise_images([0])))


def test_64_clients_and_2000_images_each_get_their_own_scores(monkeypatch) -> None:
    mean = Held()
    limits = Limits(max_queue=2048)
    images = noise_images(range(2000))
    digests = [hashlib.sha256(a.tobytes()).hexdigest() for a in RewardBatch(
        prompts=[""] * 2000, images=images).arrays()]  # fmt: skip
    means = (images.double().mean(dim=(1, 2, 3)) * 1000).float()

    def client(number: int) -> int:
        mine = range(number, 2000, 64)
        prompts = [f"colour {index}" for index in mine]
        batch = RewardBatch(prompts=prompts, images=images[list(mine)])
        scores = RemoteHead(url, "mean", batch_size=8, timeout=HANG).evaluate(batch)
        assert scores.extra["pixels"] == [digests[index] for index in mine]
        # Means in float64, rounded to float32: 6e-8 of them.
        torch.testing.assert_close(scores.values, means[list(mine)], rtol=1e-6, atol=0)
        return len(mine)

    waiting: list[int] = []
    submit = Batcher.submit

    def counted(batcher: Batcher, samples: wire.Samples):
        future = submit(batcher, samples)
        waiting.append(len(samples))
        if sum(waiting) > 64:  # beside the batch that is held, which has at most 64
            mean.opened.set()
        return future

    monkeypatch.setattr(Batcher, "submit", counted)
    with serving(limits=limits, mean=mean) as url, ThreadPoolExecutor(64) as pool:
        assert sum(pool.map(client, range(64))) == 2000
    assert sum(mean.sizes) == 2000  # nothing was scored twice
    assert max(mean.sizes) > 8  # requests of several clients were scored together


def samples(batch: RewardBatch) -> wire.Samples:
    """The batch as it comes over the wire."""
    return wire.Samples(prompts=batch.prompts, metadata=batch.metadata, images=batch.uint8())


def holding() -> tuple[Held, Batcher]:
    """A batcher whose head is busy with a first sample until it is let go."""
    held = Held()
    held.name = "mean"
    batcher = Limits(max_batch=64, max_queue=64).batcher(held)
    batcher.admit(1, 64)
    batcher.submit(samples(RewardBatch(prompts=["colour"], images=noise_images([0]))))
    assert held.entered.wait(HANG)
    return held, batcher


def test_a_closed_batcher_fails_what_waits() -> None:
    held, batcher = holding()
    batcher.admit(1, 64)
    future = batcher.submit(samples(RewardBatch(prompts=["colour"], images=noise_images([0]))))
    closing = threading.Thread(target=batcher.close)
    closing.start()
    with pytest.raises(Overloaded, match="stopping"):
        future.result(HANG)
    with pytest.raises(Overloaded, match="stopping"):
        batcher.admit(1, 64)
    assert not batcher.ready
    held.opened.set()
    closing.join(HANG)
    assert held.sizes == [1]  # what was under way was finished


def test_a_poisoned_sample_fails_its_own_request_alone() -> None:
    held, batcher = holding()
    batches = {
        "good": RewardBatch(prompts=["colour"] * 3, images=noise_images(range(3))),
        "bad": RewardBatch(prompts=["colour", "poison"], images=noise_images([3, 4])),
        "late": RewardBatch(prompts=["colour"], images=noise_images([5])),
    }
    batcher.admit(6, 6 * 64)
    futures = {name: batcher.submit(samples(batch)) for name, batch in batches.items()}
    held.opened.set()
    assert futures["good"].result(HANG).values.tolist() == MeanColour()(batches["good"]).tolist()
    assert futures["late"].result(HANG).values.tolist() == MeanColour()(batches["late"]).tolist()
    with pytest.raises(RewardError, match="poisoned") as caught:
        futures["bad"].result(HANG)
    assert caught.value.samples == ((1, "poison"),)  # counted within its own request
    assert held.sizes == [1, 6, 3, 2, 1]  # together, then one by one
    batcher.close()
    with serving(mean=MeanColour()) as url, pytest.raises(RewardError, match="poisoned") as caught:
        RemoteHead(url, "mean", batch_size=2)(
            RewardBatch(prompts=["colour"] * 3 + ["poison"], images=noise_images(range(4)))
        )
    assert caught.value.samples == ((3, "poison"),)  # counted within the whole batch
    assert url in caught.value.cause


def test_images_of_different_sizes_and_texts_do_not_share_a_batch() -> None:
    held, batcher = holding()
    batches = [
        RewardBatch(prompts=["colour"], images=noise_images([0], side)) for side in (8, 9, 8, 9, 10)
    ]
    batcher.admit(len(batches), sum(batch.require_images()[0, 0].numel() for batch in batches))
    futures = [batcher.submit(samples(batch)) for batch in batches]
    held.opened.set()
    for batch, future in zip(batches, futures, strict=True):
        assert future.result(HANG).values.tolist() == MeanColour()(batch).tolist()
    assert held.sizes == [1, 2, 2, 1]
    batcher.close()


def test_100_mb_are_refused_unread() -> None:
    with serving(mean=MeanColour()) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=HANG) as sock:
            sock.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
            reply = b"".join(iter(lambda: sock.recv(4096), b""))  # to the end: it hangs up
        assert reply.startswith(b"HTTP/1.1 413")
        content = json.loads(reply.partition(b"\r\n\r\n")[2])
        assert content["error"]["kind"] == "too_large"
        assert "at most 64000000 bytes. Found 100000000" in content["error"]["cause"]
    with serving(limits=Limits(max_body=1000), mean=MeanColour()) as url:
        head = RemoteHead(url, "mean", timeout=HANG)
        head.load()  # now it knows, and sends no body that would be cut off with the reason
        with pytest.raises(RewardError, match=r"at most 1000 bytes\. Found .*Lower `batch_size`"):
            head(RewardBatch(prompts=["colour"], images=noise_images([0], 64)))
        head.close()


def test_a_body_without_length_is_refused() -> None:
    with serving(mean=MeanColour()) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=HANG)
        connection.request("POST", "/score", iter([b"abc"]), encode_chunked=True)
        with connection.getresponse() as response:
            assert response.status == 411
        connection.close()


def forged(header: object, *files: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack(">I", len(text)) + text + b"".join(files)


SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png(width: int, height: int) -> bytes:
    """A PNG file that claims a size, with damaged pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return SIGNATURE + header + chunk(b"IDAT", bytes(40)) + chunk(b"IEND", b"")


def black(
    width: int, height: int, *, bits: int = 8, before: bytes = b"", after: bytes = b""
) -> bytes:
    """A whole black PNG file, with chunks put before and after the one that tells its size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    packer = zlib.compressobj(9)
    row = bytes(1 + width * 3 * bits // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    tail = chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return SIGNATURE + before + header + after + tail


def chunk(name: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def one(*files: bytes, **more: object) -> bytes:
    header = {"format": 1, "head": "mean", "prompts": ["p"] * len(files)}
    return forged({**header, "images": [len(file) for file in files], **more}, *files)


SMALL = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
TEXTS = {"format": 1, "head": "mean", "prompts": ["p"]}
MALFORMED = {
    "nothing": (b"", "begin with a length"),
    "pickle": (pickle.dumps({"prompts": ["x"]}), "shorter than its header says"),
    "no json": (struct.pack(">I", 4) + b"\xff{[(", "not JSON"),
    "deep": (struct.pack(">I", 100_000) + b"[" * 100_000, "not JSON"),
    "nan": (struct.pack(">I", 3) + b"NaN", "not JSON"),
    "other format": (
        forged({"format": 2}),
        "of one version, and this side speaks format 1. Found 2",
    ),
    "no prompts": (forged({"format": 1, "head": "mean", "prompts": []}), "at least 1 item"),
    "number": (one(png(8, 8), prompts=[3]), "`prompts.0` is wrong: Input should be a valid string"),
    "short": (one(png(8, 8))[:-1], "end with the last image"),
    "negative": (
        one(png(8, 8), images=[-5]),
        "`images.0` is wrong: Input should be greater than 0",
    ),
    "lengths": (one(png(8, 8), metadata=[{}, {}]), "`metadata` should be a list of 1"),
    "both": (one(png(8, 8), texts=["x"]), "exactly one"),
    "neither": (forged({"format": 1, "head": "mean", "prompts": ["p"]}), "exactly one"),
    "jpeg": (one(b"\xff\xd8\xff\xe0" + bytes(60)), "no PNG file"),
    "bomb": (one(png(50_000, 50_000)), "could be decompression bomb"),
    "damaged": (one(png(8, 8)), "cannot be read"),
    "empty": (one(png(0, 8)), "no PNG file"),
    "16 bits": (one(black(8, 8, bits=16)), "RGB of 8 bits. Found RGB;16B"),
    "transparency": (
        one(black(8, 8, after=chunk(b"tRNS", bytes(6)))),
        "plain sRGB. Found transparency",
    ),
    "on its side": (one(black(8, 8, after=chunk(b"eXIf", bytes(6)))), "plain sRGB. Found exif"),
    "other colours": (
        one(black(8, 8, after=chunk(b"gAMA", bytes([0, 0, 177, 143])))),
        "plain sRGB. Found gamma",
    ),
    "number as text": (
        forged({**TEXTS, "texts": [3]}),
        "`texts.0` is wrong: Input should be a valid string",
    ),
}


def test_what_is_malformed_is_refused_with_the_reason() -> None:
    with serving(mean=MeanColour()) as url:
        for name, (body, reason) in MALFORMED.items():
            status, content, _ = post(url, body)
            assert (status, content["error"]["kind"]) == (400, "malformed"), name
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(content["error"]["cause"])
        status, content, _ = post(url, request(head="means"))
        assert (status, content["error"]["kind"]) == (404, "unknown_head")
        status, content, _ = post(url, request(), **{wire.SECONDS_HEADER: "nan"})
        assert (status, content["error"]["kind"]) == (400, "malformed")
        status, content, _ = post(url, request(prompts=65))
        assert (status, content["error"]["kind"]) == (413, "too_large")
        assert post(url, request())[0] == 200  # and it is still well


def test_images_are_counted_before_they_are_decompressed(monkeypatch) -> None:
    decoded: list[int] = []
    decode = wire.checked_png.decode
    monkeypatch.setattr(wire.checked_png, "decode", lambda file: decoded.append(1) or decode(file))
    monkeypatch.setattr("rewards.serving.server._FULL_REQUESTS", 1)
    limits = Limits(max_pixels=128)
    gate = Gate()
    with serving(limits=limits, gate=gate) as url, ThreadPoolExecutor(1) as pool:
        status, content, _ = post(url, request("gate", 3))
        assert (status, content["error"]["kind"]) == (413, "too_large")
        assert "at most 128 pixels in all. Found 192" in content["error"]["cause"]
        status, content, _ = post(url, one(black(20, 20, before=SMALL), head="gate"))
        assert (status, content["error"]["kind"]) == (413, "too_large")
        assert "Found 400" in content["error"]["cause"]  # the size that would be decompressed
        assert decoded == []
        first = pool.submit(post, url, request("gate", 2))
        assert gate.entered.wait(HANG)
        status, content, _ = post(url, request("gate", 2))  # 128 are under way, 64 are left
        assert (status, content["error"]["kind"]) == (503, "overloaded")
        assert "Images of 128 pixels wait already" in content["error"]["cause"]
        assert len(decoded) == 2
        gate.opened.set()
        assert first.result(HANG)[0] == 200
        assert post(url, request("gate", 2))[0] == 200  # the room has been given back


def test_room_is_given_back_after_a_damaged_image(monkeypatch) -> None:
    monkeypatch.setattr("rewards.serving.server._FULL_REQUESTS", 1)
    limits = Limits(max_pixels=64)
    with serving(limits=limits, mean=MeanColour()) as url:
        for _ in range(3):
            assert post(url, one(png(8, 8)))[0] == 400
        assert post(url, request())[0] == 200


def test_a_batch_of_the_head_is_bounded_in_pixels() -> None:
    held = Held()
    held.name = "mean"
    batcher = Limits(max_pixels=128).batcher(held)
    batches = [RewardBatch(prompts=["colour"], images=noise_images([seed])) for seed in range(4)]
    batcher.admit(4, 4 * 64)
    futures = [batcher.submit(samples(batches[0]))]
    assert held.entered.wait(HANG)
    futures += [batcher.submit(samples(batch)) for batch in batches[1:]]
    held.opened.set()
    assert [f.result(HANG).values.tolist() for f in futures] == [
        MeanColour()(batch).tolist() for batch in batches
    ]
    assert held.sizes == [1, 2, 1]
    batcher.close()


def test_a_length_does_not_hide_a_chunked_body() -> None:
    with serving(mean=MeanColour()) as url:
        with connection(url) as sock:
            sock.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n")
            sock.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
            sent = 0
            with contextlib.suppress(OSError):  # it hangs up
                while sent < 1 << 30:
                    sent += sock.send(b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n")
            assert sent < 1 << 27
        with connection(url) as sock:
            sock.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n")
            sock.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 411")


def connection(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=HANG)


def test_announced_bodies_that_do_not_arrive_keep_nobody_out() -> None:
    for seconds in (1, 10, 100):  # a busy machine does not send a small body in time
        with serving(mean=MeanColour()) as url, contextlib.ExitStack() as stack:
            hogs = [stack.enter_context(connection(url)) for _ in range(20)]
            for sock in hogs:
                sock.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\n")
                sock.sendall(b"Reward-Seconds: %d\r\n" % seconds)
                sock.sendall(b"Content-Length: 64000000\r\n\r\nx")
            status = post(url, request())[0]
            replies = [b"".join(iter(lambda sock=sock: sock.recv(4096), b"")) for sock in hogs]
        told = f"Not scored within the {seconds} s".encode()
        if all(told in reply for reply in replies):
            break
    assert status == 200
    for reply in replies:
        assert reply.startswith(b"HTTP/1.1 504")
        assert told in reply


def test_the_token_is_asked_for() -> None:
    with serving(token="secret", mean=MeanColour()) as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, content, _ = post(url, request(), **headers)
            assert (status, content["error"]["kind"]) == (401, "unauthorised")
            answer = asked(url, "/health", headers=headers)
            assert answer.status == 401
            assert b"mean" not in answer.body
        assert post(url, request(), Authorization="Bearer secret")[0] == 200


def test_health_tells_who_scores() -> None:
    with serving(mean=MeanColour(), words=Words()) as url:
        health = json.loads(asked(url, "/health").body)
    assert list(health["heads"]) == ["mean", "words"]
    told = health["heads"]["mean"]
    assert told["ready"] is True
    assert (told["unit"], told["provenance"]["weights"]) == ("promille", "none")
    assert len(told["digest"]) == 64
    assert health["limits"]["max_batch"] == 64


def test_an_overloaded_server_says_so_and_the_client_waits(monkeypatch) -> None:
    gate, refused = Gate(), threading.Event()
    rest = Dispatch._rest

    async def noted(dispatch: Dispatch, seconds: float) -> None:
        refused.set()
        await rest(dispatch, seconds)

    monkeypatch.setattr(Dispatch, "_rest", noted)
    with (
        serving(limits=Limits(max_batch=2, max_queue=2), gate=gate) as url,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(post, url, request("gate", 2))
        assert gate.entered.wait(HANG)
        status, content, headers = post(url, request("gate", 2))
        assert (status, content["error"]["kind"]) == (503, "overloaded")
        assert headers["retry-after"] == "1"
        batch = RewardBatch(prompts=["p"] * 2, images=noise_images([0, 1]))
        second = pool.submit(RemoteHead(url, "gate", retries=0, timeout=HANG), batch)
        assert refused.wait(HANG)
        assert not second.done()
        gate.opened.set()
        assert first.result(HANG)[0] == 200
        assert second.result(HANG).tolist() == [1, 1]


def test_what_nobody_waits_for_any_more_is_not_scored(monkeypatch) -> None:
    gate, admitted, admit = Gate(), [], Batcher.admit
    monkeypatch.setattr(Batcher, "admit", lambda self, *n: admit(self, *n) or admitted.append(self))
    limits = Limits(max_batch=2, max_queue=4)
    with serving(limits=limits, gate=gate) as url, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, url, request("gate", 2))
        assert gate.entered.wait(HANG)
        for earlier in range(1, 4):  # more than there is room for
            batch = RewardBatch(prompts=["late"] * 2, images=noise_images([0, 1]))
            for seconds in DEADLINES:
                with pytest.raises(RewardError, match=f"within {seconds:g} s") as caught:
                    RemoteHead(url, "gate", timeout=seconds)(batch)
                assert len(caught.value.samples) == 2
                if len(admitted) > earlier:  # else a busy machine did not get it there in time
                    break
            # By the server's own clock.
            wait_until(lambda: admitted[0]._samples == 2, "it was not given up")
        gate.opened.set()
        assert first.result(HANG)[0] == 200
        assert post(url, request("gate", 2))[0] == 200
    assert gate.prompts == ["colour"] * 4


def test_columns_that_are_not_json_are_an_error() -> None:
    class Odd(RewardHead):
        def score(self, batch: RewardBatch) -> Scores:
            return Scores(values=torch.ones(len(batch)), extra={"x": [float("nan")] * len(batch)})

    with serving(odd=Odd()) as url, pytest.raises(RewardError, match="should hold JSON values"):
        RemoteHead(url, "odd")(RewardBatch(prompts=["p"], images=noise_images([0])))


def test_the_identity_changes_with_what_changes_the_scores() -> None:
    class Wide(MeanColour):
        neutral_options = ("device", "workers")

    digest = Identity.of("mean", Wide(), {}).digest
    assert Identity.of("mean", Wide(), {"device": "cuda:1", "workers": 3}).digest == digest
    assert Identity.of("mean", Wide(), {"dtype": "float16"}).digest != digest
    assert Identity.of("mean", Held(), {}).digest != digest
    # Only the head knows which options do not matter.
    assert Identity.of("m", Held(), {"device": "x"}).digest != Identity.of("m", Held(), {}).digest
    identity = Identity.of("mean", MeanColour(), {})
    assert identity.provenance["module"] == __name__
    assert identity.provenance["weights"] == "none"
    assert Identity.model_validate_json(identity.model_dump_json()) == identity
    own = Identity.of("sharpness", create("sharpness"), {})
    assert own.provenance == {}  # the version says it all


SOURCE = """
from functools import partial
from rewards import RewardHead
import torch

def redness(images, prompts, url=""):
    return images[:, 0].mean(dim=(1, 2))

halved = partial(redness, url="x")

class Red(RewardHead):
    def score(self, batch):
        return batch.images[:, 0].mean(dim=(1, 2))
"""


def test_servers_of_other_code_are_told_apart(tmp_path) -> None:
    changed = SOURCE.replace("images[:, 0]", "images[:, 1]")
    for name, text in (("a", SOURCE), ("b", SOURCE), ("c", changed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(text)

    def digest(folder: str, attribute: str, **options: object) -> str:
        head = create("red", f"{tmp_path / folder / 'mine.py'}:{attribute}", **options)
        return Identity.of("red", head, options).digest

    for attribute in ("redness", "halved", "Red"):
        assert digest("a", attribute) == digest("b", attribute)  # wherever the file lies
        assert digest("a", attribute) != digest("c", attribute)
    assert digest("a", "redness") != digest("a", "redness", url="http://judge")
    found = create("red", f"{tmp_path / 'a' / 'mine.py'}:redness").provenance()
    sha256 = hashlib.sha256(SOURCE.encode()).hexdigest()
    assert found == {"module": "mine", "name": "redness", "source_sha256": sha256}
    local = create(f"{tmp_path / 'a' / 'mine.py'}:redness")
    other = create(f"{tmp_path / 'c' / 'mine.py'}:redness")
    with (
        serving(red=local) as first,
        serving(red=other) as second,
        pytest.raises(RewardError, match="scores otherwise"),
    ):
        RemoteHead([first, second], "red").load()


def test_limits_and_addresses() -> None:
    with pytest.raises(ValueError, match="max_pixels = 0"):
        Limits(max_pixels=0)
    with pytest.raises(ValueError, match="max_queue = 4"):
        Limits(max_batch=8, max_queue=4)
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"))
    assert build_app({}, token="", limits=Limits()).openapi_url is None
