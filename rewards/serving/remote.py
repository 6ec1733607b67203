"""A head that runs elsewhere: behind one or several reward servers (``rewards.serving.server``)."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import httpx2
import numpy as np

from rewards.base import RewardBatch, RewardError, RewardHead, Scores
from rewards.coroutines import LoopRunner
from rewards.identity import Identity
from rewards.registry import register
from rewards.serving import wire
from rewards.serving.client import Answer, CallError, call, check_url, open_client
from rewards.serving.dispatch import Dispatch, DispatchError, SendError
from rewards.suggestions import did_you_mean

_SHOWN = 300  # characters of an answer that is quoted in an error
_HEALTH_SECONDS = 10.0
_PASSING = (408, 429, 502, 503, 504)  # statuses that may be others in a moment
_UNCLEAR = 500  # a status that may be, or may not
_TOO_LARGE = "Lower `batch_size`, or raise the server's limit."
_SERVERS_OWN = ("unauthorised", "unknown_head")  # refusals that another server may not share

_log = logging.getLogger(__name__)


@register("remote")
class RemoteHead(RewardHead):
    """The scores of a head on a reward server; higher is better. ``scripts/heads.py serve`` is one.

    A batch is cut into requests, which the servers share in parallel: each takes the next
    one when it is free. What a dead server leaves undone goes to the others, and it is asked again
    until the time is up, since it may be starting. Images travel as PNG, which loses nothing of
    their 8 bits per channel. What the served head scores, images or texts, the first answer
    tells; until then both are sent. Servers are reached directly: proxies of the environment are
    not used, redirects are not followed.

    Args:
        url: Address of the server, ``http://host:port``, or a list of several.
        remote_name: Name of the head on the server.
        timeout: Number of seconds for a batch, retries included; positive. With several servers, a
            request that takes more than half of the time left is sent to another, so allow twice
            what it takes.
        retries: Number of answers of status 500 in a row, without a reason that is known, after
            which a connection to a server is given up; at least 0. A server that is overloaded,
            late or not to be reached is asked again until the time is up.
        token_env: Environment variable that holds the server's token; empty: none is sent.
        batch_size: Number of samples per request, at least 1; the server may allow fewer.
        max_parallel: Number of requests under way at once, per server; at least 1.

    Raises:
        ValueError: If a parameter is out of range, or the environment variable is not set.
    """

    unit = "that of the served head"  # which the first answer tells
    neutral_options = ("url", "timeout", "retries", "token_env", "batch_size", "max_parallel")

    def __init__(
        self,
        url: str | Sequence[str],
        remote_name: str,
        timeout: float = 300.0,
        retries: int = 3,
        token_env: str = "",
        batch_size: int = 16,
        max_parallel: int = 2,
    ) -> None:
        urls = [url] if isinstance(url, str) else list(url)
        self.urls = tuple(check_url(one) for one in urls)
        if not urls or len(set(self.urls)) < len(urls):
            raise ValueError(f"Parameter `url` should name each server once. Found `url = {url}`.")
        if not remote_name:
            raise ValueError("Parameter `remote_name` should name a head. Found an empty text.")
        if not 0 < timeout < math.inf:
            raise ValueError(
                f"Parameter `timeout` should be positive. Found `timeout = {timeout}`."
            )
        if retries < 0:
            raise ValueError(
                f"Parameter `retries` should be at least 0. Found `retries = {retries}`."
            )
        for name, value in (("batch_size", batch_size), ("max_parallel", max_parallel)):
            if value < 1:
                raise ValueError(
                    f"Parameter `{name}` should be at least 1. Found `{name} = {value}`."
                )
        self.remote_name = remote_name
        self.timeout = timeout
        self.retries = retries
        self.batch_size = batch_size
        self.max_parallel = max_parallel
        self._token = _read_token(token_env)
        self._identity: tuple[str, Identity] | None = None  # url, who it is
        self._max_body: dict[str, int] = {}  # bytes that a server takes, by its url, once known
        self._loop = LoopRunner()

    def score(self, batch: RewardBatch) -> Scores:
        """Return the scores, ``[N]``, NaN where the server says that the objective does not apply.

        Raises:
            RewardError: If not all samples were scored in time; names server, cause and samples.
        """
        for index, entry in enumerate(batch.metadata):
            try:
                wire.dump(dict(entry))
            except ValueError as error:
                raise RewardError(
                    f"The metadata cannot travel as JSON: {error}.", samples=batch.samples([index])
                ) from error
        size = self.batch_size
        parts = [range(i, min(i + size, len(batch))) for i in range(0, len(batch), size)]
        arrays = None if batch.images is None else batch.arrays()
        try:
            return wire.joined(self._loop.run(self._send(batch, arrays, parts)))
        except DispatchError as error:
            concerned = [index for part in error.parts for index in parts[part]]
            if error.samples and max(error.samples) < len(concerned):
                concerned = [concerned[position] for position in error.samples]
            raise RewardError(
                error.cause, head=self.name, samples=batch.samples(concerned)
            ) from error

    def load(self) -> None:
        """Ask every server who it is; warn of those that cannot score, if another can.

        Raises:
            RewardError: If none answers and serves the head, or one scores with other weights than
                the others.
        """
        problems = []
        for url in self.urls:
            try:
                self._check_identity(url, self._loop.run(self._health(url)))
            except SendError as error:
                hint = " Does a reward server run there?" if error.again else ""
                problems.append(f"{error.cause.rstrip('.')}.{hint}")
                if not error.again and not error.elsewhere:
                    raise RewardError(problems[-1], head=self.name) from error
        if len(problems) == len(self.urls):
            raise RewardError(" ".join(problems), head=self.name)
        for problem in problems:
            _log.warning('Reward head "%s" goes on without a server: %s', self._label, problem)

    def provenance(self) -> Mapping[str, str]:
        """Return what the servers' head says, with their addresses, version and digest."""
        if self._identity is None:
            return {}
        _, identity = self._identity
        return {
            **identity.provenance,
            "url": ", ".join(self.urls),
            "remote_name": self.remote_name,
            "remote_version": identity.version,
            "remote_digest": identity.digest,
        }

    def close(self) -> None:
        """Forget who the servers are; no connection outlives its batch."""
        self._identity = None
        self._loop.close()

    async def _send(
        self, batch: RewardBatch, arrays: np.ndarray | None, parts: Sequence[range]
    ) -> list[Scores]:
        async with open_client(self.urls) as client:

            async def ask(url: str, part: int, seconds: float) -> Scores:
                pack = partial(wire.pack, self.remote_name, batch, arrays, parts[part])
                return await self._ask(client, url, pack, len(parts[part]), seconds)

            dispatch = Dispatch(
                self.urls,
                ask,
                parts=len(parts),
                workers=self.max_parallel,
                retries=self.retries,
                seconds=self.timeout,
            )
            return await dispatch.run()

    async def _ask(
        self,
        client: httpx2.AsyncClient,
        url: str,
        pack: Callable[[], bytes],
        count: int,
        seconds: float,
    ) -> Scores:
        clock = asyncio.get_running_loop().time
        deadline = clock() + seconds
        body = await asyncio.to_thread(pack)
        most = self._max_body.get(url, len(body))
        if len(body) > most:  # sent all the same, it would be cut off, and the reason with it
            cause = f"{url}: A request should have at most {most} bytes. Found {len(body)}."
            raise SendError(f"{cause} {_TOO_LARGE}")
        answer = await self._call(client, url, "/score", deadline - clock(), body)
        try:
            identity, scores = wire.unpack_reply(answer.body, count)
        except ValueError as error:
            raise SendError(f"{url} answered nonsense: {error}", elsewhere=True) from error
        self._check_identity(url, identity)
        return scores

    async def _health(self, url: str) -> Identity:
        seconds = min(self.timeout, _HEALTH_SECONDS)
        async with open_client([url]) as client:
            answer = await self._call(client, url, "/health", seconds)
        try:
            health = wire.checked(wire.Health, answer.body)
        except wire.WireError as error:
            cause = f"{url} is no reward server of this format: {error}"
            raise SendError(cause, elsewhere=True) from error
        heads = health.heads
        if "max_body" in health.limits:
            self._max_body[url] = health.limits["max_body"]
        if self.remote_name not in heads:
            hint = did_you_mean(self.remote_name, list(heads))
            cause = f'{url} serves no head "{self.remote_name}".{hint} Served: {", ".join(heads)}.'
            raise SendError(cause, elsewhere=True)
        if not heads[self.remote_name].ready:
            raise SendError(f'{url} says that "{self.remote_name}" is not ready.', elsewhere=True)
        return heads[self.remote_name]

    async def _call(
        self,
        client: httpx2.AsyncClient,
        url: str,
        path: str,
        seconds: float,
        body: bytes | None = None,
    ) -> Answer:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        if body is not None:
            headers |= {"Content-Type": wire.CONTENT_TYPE, wire.SECONDS_HEADER: f"{seconds:.3f}"}
        try:
            answer = await call(client, url + path, seconds=seconds, body=body, headers=headers)
        except CallError as error:
            cause = f"{url}: {error.cause}"
            raise SendError(cause, again=error.again, elsewhere=True) from error
        if answer.status != 200:
            raise _refused(url, answer)
        return answer

    def _check_identity(self, url: str, identity: Identity) -> None:
        if self._identity is None:
            self._identity = (url, identity)
            self.unit = identity.unit
            self.requires = identity.requires
            self.scores = identity.scores
        first, known = self._identity
        if identity.digest != known.digest:
            raise SendError(
                f"{url} scores otherwise than {first}: {_describe(identity)} instead of "
                f"{_describe(known)}. Serve the same weights, options and version everywhere."
            )


def _read_token(variable: str) -> str:
    if not variable:
        return ""
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ValueError(
            f"Parameter `token_env` should name an environment variable that holds the token. "
            f"Found `token_env = {variable!r}`, which is not set."
        )
    if not all("!" <= character <= "~" for character in token):
        raise ValueError(f"The token in {variable} should be ASCII letters without white space.")
    return token


def _refused(url: str, answer: Answer) -> SendError:
    # The server's own words where they are of the format, else what came.
    try:
        error = wire.checked(wire.ErrorReply, answer.body).error
    except wire.WireError:
        where = answer.headers.get("location", "")
        shown = f" to {where}" if where else f": {answer.body[:_SHOWN].decode(errors='replace')!r}"
        if answer.status == 413:  # the server hung up on the body, and its words were lost
            shown = f". {_TOO_LARGE}"
        return SendError(
            f"{url} answered with status {answer.status}{shown}",
            again=answer.status in (*_PASSING, _UNCLEAR),
            elsewhere=True,
            costs=answer.status == _UNCLEAR,
        )
    cause = f"{url} ({error.kind}): {error.cause}"
    if error.kind == "overloaded":
        return SendError(cause, again=True, pause=_retry_after(answer))
    if error.kind == "unauthorised":
        cause += " Set `token_env` to the environment variable that holds the server's token."
    if error.kind == "too_large":
        cause += f" {_TOO_LARGE}"
    return SendError(
        cause,
        samples=error.samples,
        again=error.kind == "late",
        elsewhere=error.kind in _SERVERS_OWN,
    )


def _retry_after(answer: Answer) -> float:
    try:
        seconds = float(answer.headers.get("retry-after", ""))
    except ValueError:  # missing, or a date
        seconds = 1.0
    return min(seconds, 30.0) if seconds > 0.1 else 0.1  # NaN too


def _describe(identity: Identity) -> str:
    more = ", ".join(f"{key} {value}" for key, value in identity.provenance.items())
    return f"digest {identity.digest[:12]} (version {identity.version}{', ' if more else ''}{more})"
