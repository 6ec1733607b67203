"""The commands of ``scripts/heads.py``: list, check, score, serve."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewards.base import RewardHead
from rewards.commands.check_head import prepare, try_head
from rewards.commands.head_cards import CARDS
from rewards.commands.head_options import about
from rewards.commands.score_folder import ScoreTable, match, score_pairs, summary, texts_of
from rewards.identity import Identity
from rewards.registry import available
from rewards.serving import server

TOKEN_VARIABLE = "MOA_REWARDS_TOKEN"
_WIDTHS = {"memory": 14, "licence": 12}  # leave room for the other columns of the list
_TRAINER_KEYS = ("weight", "head", "path")  # a training config's keys; others are options


def list_heads(console: Console) -> None:
    """Print all registered heads with what one wants to know before using them."""
    table = Table(title="Reward heads")
    for column in (
        "name",
        "unit",
        "range",
        "needs",
        "weights",
        "memory",
        "licence",
        "packages",
        "scores",
    ):
        whole = column in ("name", "scores")
        table.add_column(column, overflow="fold", no_wrap=whole, max_width=_WIDTHS.get(column))
    for name, info in available().items():
        card = CARDS.get(name)
        facts = ["-"] * 4
        packages = "-"
        if card is not None:
            facts = [card.range, card.weights, card.memory, card.licence]
            lacking = [pkg for pkg in card.packages if importlib.util.find_spec(pkg) is None]
            packages = f"{', '.join(card.packages)}: installed" if card.packages else "none needed"
            if lacking:
                packages = f"missing: {', '.join(lacking)}"
        if info.problem:
            packages = f"unusable: {info.problem}"
        needs = ", ".join(info.requires) or "-"
        cells = (name, info.unit or "-", facts[0], needs, *facts[1:], packages, info.scores)
        table.add_row(*map(Text, cells))  # not as markup: a unit may have brackets
    console.print(table)


def show_head(console: Console, name: str) -> None:
    """Print what a head is, and its options with types, defaults and ranges.

    Args:
        console: Where to print.
        name: See ``rewards.create``.

    Raises:
        ValueError: If there is no such head.
        ImportError: If it needs a package that is not installed.
    """
    sentence, options = about(name)
    console.print(Text(f"{name}: {sentence}" if sentence else name))
    if name in CARDS:
        card, info = CARDS[name], available()[name]
        console.print(Text(f"unit {info.unit}; range {card.range}; weights {card.weights}"))
    if not options:
        console.print(Text("It has no options."))
        return
    table = Table()
    for column in ("option", "type", "default", "meaning"):
        table.add_column(column, overflow="fold", no_wrap=column == "option")
    for one in options:
        table.add_row(*map(Text, (one.name, one.kind, one.default, one.meaning)))
    console.print(table)


def check_head(name: str, options: Mapping[str, Any], *, texts: bool = False) -> None:
    """Load a head, score a fitting and a degraded sample, and print what came out.

    Args:
        name: See ``rewards.create``.
        options: Options of the head.
        texts: Whether to have a head that scores both, images and texts, score texts.

    Raises:
        Unusable: If the head cannot be loaded.
        RewardError: If it cannot score.
    """
    began = time.monotonic()
    head = prepare(name, options, kind="texts" if texts else None)
    loaded = time.monotonic() - began
    try:
        checked = try_head(head, texts=texts)
    finally:
        head.close()
    good, bad = checked.scores.values.tolist()
    print(f"{name}: works; unit: {head.unit or '-'}")
    for label, value in (("fitting sample", good), ("degraded sample", bad)):
        shown = "does not apply (NaN)" if value != value else f"{value:.6g}"
        print(f"  {label}: {shown}")
    print(f"  seconds: {loaded:.2f} to load, {checked.seconds:.2f} to score both")
    for key, text in checked.provenance.items():
        print(f"  {key}: {text}")


def score_samples(
    name: str,
    options: Mapping[str, Any],
    folder: Path | None,
    prompts: Sequence[tuple[str, Mapping[str, Any]]],
    output: Path,
    *,
    batch_size: int,
) -> None:
    """Score the images of a folder, or texts, into a table and print a summary.

    Args:
        name: See ``rewards.create``.
        options: Options of the head.
        folder: Folder of images; None scores the texts that stand with the prompts.
        prompts: See ``rewards.commands.score_folder.match``, and ``texts_of`` where there is no
            folder.
        output: See ``rewards.commands.score_folder.ScoreTable``.
        batch_size: Images or texts at once.

    Raises:
        ValueError: If images and prompts do not match or a text is missing, which is seen before
            anything is loaded, an image cannot be read, or the rows of an earlier failure are
            those of another run.
        Unusable: If the head cannot be loaded.
        RewardError: If the head fails.
    """
    if batch_size < 1:
        raise ValueError(
            f"Parameter `batch_size` should be at least 1. Found `batch_size = {batch_size}`."
        )
    pairs = texts_of(prompts) if folder is None else match(folder, prompts)
    table = ScoreTable(output, pairs)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        head = prepare(name, options, kind="texts" if folder is None else "images")
        try:
            table.begin(Identity.of(name, head, options).digest)
            if table.scores:
                print(f"{len(table.rows())} of {len(pairs)} scores are in {table.partial} already.")
            for remark in head.remarks(list(dict.fromkeys(prompt for _, prompt, _ in pairs))):
                print(f"note: {remark}")
            score_pairs(head, table, batch_size=batch_size)
            identity = Identity.of(name, head, options)
        finally:
            head.close()
        table.finish({**identity.model_dump(), "options": dict(options)})
    except BaseException:  # Ctrl-C included
        if table.scores:
            print(
                f"{len(table.rows())} of {len(pairs)} scores are kept in {table.partial}. "
                f"The same command goes on after them."
            )
        raise
    print(summary(table.rows()))
    print(f"Written to {output}.")


def serve(
    wanted: Mapping[str, Mapping[str, Any]],
    *,
    host: str,
    port: int,
    token: str,
    limits: server.Limits,
) -> None:
    """Load heads and serve them until SIGINT or SIGTERM.

    Args:
        wanted: Options by head; see ``chosen_heads``.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        token: What clients must show; needed beyond loopback.
        limits: What requests may cost.

    Raises:
        ValueError: If the token is missing or malformed.
        ImportError: See ``rewards.serving.server.check_packages``.
        OSError: If the address cannot be had.
        Unusable: If a head cannot be loaded.
    """
    if not server.is_loopback(host) and not token:
        raise ValueError(
            f"Beyond this machine (`--host {host}`) the server needs a token. Put one into a file "
            f"(`--token_file FILE`) or into the environment variable {TOKEN_VARIABLE}."
        )
    if not all("!" <= character <= "~" for character in token):
        raise ValueError("The token should be ASCII letters, digits and signs without white space.")
    server.check_packages()
    heads: dict[str, RewardHead] = {}
    services: dict[str, server.Service] = {}
    listener = server.listen(host, port)  # a port that is taken is told before minutes of loading
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    def leave_if_asked(_: object) -> None:
        """Leave though the exception was lost: Python ignores those of callbacks, as of imports."""
        if asked:
            raise KeyboardInterrupt

    # Both signals end it in the same way, whether it loads or serves.
    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, (name, options) in enumerate(wanted.items(), start=1):
            print(f"[{number}/{len(wanted)}] loading {name} ...", flush=True)
            began = time.monotonic()
            rest = {key: value for key, value in options.items() if key not in _TRAINER_KEYS}
            heads[name] = prepare(options.get("head", name), rest, options.get("path"))
            heads[name].name = name
            identity = Identity.of(name, heads[name], rest)
            services[name] = server.Service(identity=identity, batcher=limits.batcher(heads[name]))
            seconds, digest = time.monotonic() - began, identity.digest[:12]
            print(f"[{number}/{len(wanted)}] {name}: {seconds:.1f} s, digest {digest}", flush=True)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}"
        print(f"Serving {', '.join(services)} at {address} (Ctrl-C ends it)", flush=True)
        server.run(services, listener, token=token, limits=limits, started=leave_if_asked)
    except KeyboardInterrupt:
        print("Stopped.", flush=True)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        listener.close()
        for name, head in heads.items():
            if name in services:
                services[name].batcher.close()
            else:
                head.close()


def chosen_heads(
    names: str | None, config: Path | None, options: str | None
) -> dict[str, dict[str, Any]]:
    """Return the heads to serve, with options.

    Args:
        names: Names, separated by commas; None takes all heads of the config or of the options.
        config: A YAML file: a mapping from heads to their options, or a training config, whose
            section ``rewards`` is one.
        options: The same as JSON text.

    Raises:
        ValueError: If the config or the options are malformed or lack a head that has been named,
            or no head is named at all.
    """
    given: Any = {}
    if config is not None:
        try:
            given = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"`{config}` cannot be read: {error}") from error
        given = given["rewards"] if isinstance(given, dict) and "rewards" in given else given
    elif options is not None:
        try:
            given = json.loads(options)
        except ValueError as error:
            raise ValueError(f"`--options` should be JSON: {error}.") from error
    if not isinstance(given, dict) or not all(isinstance(v, dict | None) for v in given.values()):
        raise ValueError("Options should read `{head: {option: value}}`.")
    wanted = [name.strip() for name in names.split(",")] if names else [str(key) for key in given]
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError("Name the heads to serve, each once: `--heads ocr,sharpness`.")
    unused = [key for key in given if key not in wanted]
    if unused and config is None:
        raise ValueError(f"`--options` has heads that are not served: {', '.join(unused)}.")
    return {name: dict(given.get(name) or {}) for name in wanted}


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Read options given as ``key=value``; a value that is JSON is read as such, else as text.

    Raises:
        ValueError: If one has no "=".
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"An option should read `key=value`. Found {pair!r}.")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options


def read_token(file: Path | None) -> str:
    """Return the server's token, from a file or else from the environment; empty if there is none.

    Raises:
        ValueError: If the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"The token file `{file}` cannot be read: {error}.") from error
    if not token:
        raise ValueError(f"The token file `{file}` is empty.")
    return token
