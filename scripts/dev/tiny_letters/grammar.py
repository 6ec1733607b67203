"""Letters: how they are written, how likely each one is, and which texts are letters.

A prompt states the situation, ``To the baker, about the bread:``, and the letter follows on the
same line after a space. It has, in this order and with single spaces between,

    greeting?  statement (one to five)  request?  thanks?  closing?

Three traits are drawn for each letter, independently: the chance of praise in a statement (mood),
the chance that a part is polite rather than blunt, and the number of statements. They conflict all
the same. Polite forms take more words than blunt ones, and more than none. Only blame can be put
politely ("I am afraid that ..."), only after blame there is something to ask for, and praise can be
casual ("Wow, ..."): so the politest letters complain.

Every part is a uniform choice among sentences of which no two are equal, so a letter has one
derivation at most: ``log_probability`` is exact, and so is membership.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from moa_diffusion.tiny import phrases

Manner = Literal["polite", "blunt", "plain"]

LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)  # chances of praise and of politeness, equally likely
STATEMENTS = {1: 0.3, 2: 0.3, 3: 0.2, 4: 0.12, 5: 0.08}  # number of statements: its probability
NEUTRAL = 0.15  # share of statements that neither praise nor blame
MARKED = 0.5  # share of praise and blame with a beginning of its own
# Shares of letters whose part is polite or blunt, and whose part is neither but there. A request
# follows blame only.
PARTS = {"greeting": (0.6, 0.0), "request": (0.6, 0.0), "thanks": (0.4, 0.0), "closing": (0.4, 0.3)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """Whom a letter goes to, and what it is about."""

    kind: str  # a key of `phrases.ROLES`
    role: str
    thing: str

    @property
    def prompt(self) -> str:
        """What a letter continues."""
        return f"To the {self.role}, about the {self.thing}:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a letter is drawn from."""

    praise: float  # chance that a statement that is not neutral praises, one of LEVELS
    polite: float  # chance that a part that has a manner is polite, one of LEVELS
    statements: int  # a key of STATEMENTS


def situations() -> tuple[list[Situation], list[Situation]]:
    """Return the situations for training and the held-out ones.

    All roles and things occur in training; a quarter of their combinations does not.

    Returns:
        54 and 18 situations.
    """
    train: list[Situation] = []
    held_out: list[Situation] = []
    for kind, roles in phrases.ROLES.items():
        for i, role in enumerate(roles):
            for j, thing in enumerate(phrases.THINGS[kind]):
                chosen = held_out if (i + j) % 4 == 0 else train
                chosen.append(Situation(kind=kind, role=role, thing=thing))
    return train, held_out


def write_prompt_files(folder: Path) -> None:
    """Write ``letters_train.txt`` and ``letters_heldout.txt``, one prompt per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, group in zip(("train", "heldout"), situations(), strict=True):
        lines = "".join(f"{situation.prompt}\n" for situation in group)
        (folder / f"letters_{name}.txt").write_text(lines, encoding="utf-8")


def draw_traits(rng: random.Random) -> Traits:
    """Draw traits as they are distributed over letters."""
    return Traits(
        praise=rng.choice(LEVELS),
        polite=rng.choice(LEVELS),
        statements=rng.choices([*STATEMENTS], [*STATEMENTS.values()])[0],
    )


def write(situation: Situation, traits: Traits, rng: random.Random) -> str:
    """Return a letter of these traits.

    Args:
        situation: What it is about.
        traits: What it should be like.
        rng: Source of all further choices.

    Returns:
        The letter, without prompt and without the space that joins them.
    """
    parts = [_part("greeting", situation, traits, rng)]
    signs = []
    for place in range(traits.statements):
        sign = 0 if rng.random() < NEUTRAL else 1 if rng.random() < traits.praise else -1
        manner: Manner = "plain"
        if sign and rng.random() < MARKED:
            manner = _manner(traits, rng)
        parts.append(rng.choice(_statements(situation, place == 0)[sign, manner]))
        signs.append(sign)
    parts += [_part(name, situation, traits, rng) for name in _endings(signs)]
    return " ".join(part for part in parts if part)


def draw(rng: random.Random, group: Sequence[Situation]) -> tuple[Situation, str]:
    """Return one of the situations and a letter about it, of random traits."""
    situation = rng.choice(group)
    return situation, write(situation, draw_traits(rng), rng)


def log_probability(letter: str, situation: Situation) -> float:
    """Return the natural logarithm of the probability of a letter, given its prompt.

    The sum runs over the traits that may have been drawn.

    Args:
        letter: Any text; white space around it does not count.
        situation: What it should be about.

    Returns:
        In nats; minus infinity if the grammar cannot have written it.
    """
    derived = _derive(letter.strip(), situation)
    if derived is None:
        return -math.inf
    signs, manners, constant = derived
    good, bad = signs.count(1), signs.count(-1)
    polite, blunt = manners.count("polite"), manners.count("blunt")
    moods = sum(p**good * (1 - p) ** bad for p in LEVELS) / len(LEVELS)
    tones = sum(q**polite * (1 - q) ** blunt for q in LEVELS) / len(LEVELS)
    return constant + math.log(moods) + math.log(tones)


def is_letter(text: str, situation: Situation) -> bool:
    """Return whether the grammar can have written the text for this situation."""
    return log_probability(text, situation) > -math.inf


def _manner(traits: Traits, rng: random.Random) -> Manner:
    return "polite" if rng.random() < traits.polite else "blunt"


def _endings(signs: Sequence[int]) -> tuple[str, ...]:
    return ("request", "thanks", "closing") if -1 in signs else ("thanks", "closing")


def _part(name: str, situation: Situation, traits: Traits, rng: random.Random) -> str | None:
    marked, plain = PARTS[name]
    chance = rng.random()
    if chance >= marked + plain:
        return None
    manner: Manner = _manner(traits, rng) if chance < marked else "plain"
    return rng.choice(_sentences(name, situation)[manner])


def _derive(letter: str, situation: Situation) -> tuple[list[int], list[Manner], float] | None:
    """Return signs of the statements, manners of all parts, logarithm of what no trait decides."""
    sentences = _split(letter, situation)
    signs: list[int] = []
    manners: list[Manner] = []
    log_p = 0.0

    def take(name: str) -> None:
        nonlocal log_p
        marked, plain = PARTS[name]
        way = _index(name, situation).get(sentences[0]) if sentences else None
        if way is None:
            log_p += math.log(1 - marked - plain)
            return
        manner, options = way
        log_p += math.log(plain if manner == "plain" else marked) - math.log(options)
        manners.append(manner)
        del sentences[0]

    take("greeting")
    while sentences and len(signs) < max(STATEMENTS):
        stated = _statement_index(situation, not signs).get(sentences[0])
        if stated is None:
            break
        sign, manner, options = stated
        log_p += math.log(NEUTRAL if sign == 0 else 1 - NEUTRAL) - math.log(options)
        if sign:
            log_p += math.log(1 - MARKED if manner == "plain" else MARKED)
        signs.append(sign)
        manners.append(manner)
        del sentences[0]
    for name in _endings(signs):
        take(name)
    if sentences or not signs:
        return None
    return signs, manners, log_p + math.log(STATEMENTS[len(signs)])


def _split(letter: str, situation: Situation) -> list[str]:
    """Return the letter's sentences; a greeting is one, though it may end with a comma."""
    for greeting in sorted(_index("greeting", situation), key=len, reverse=True):
        if letter.startswith(f"{greeting} "):
            return [greeting, *re.split(r"(?<=[.!?]) ", letter[len(greeting) + 1 :])]
    return re.split(r"(?<=[.!?]) ", letter)


@cache
def _sentences(name: str, situation: Situation) -> dict[Manner, tuple[str, ...]]:
    """Return what a part may be, by its manner."""
    forms: dict[str, dict[Manner, Sequence[str]]] = {
        "greeting": {"polite": phrases.GREETINGS, "blunt": phrases.CALLS},
        "request": {"polite": phrases.POLITE_REQUESTS, "blunt": phrases.BLUNT_REQUESTS},
        "thanks": {"polite": phrases.THANKS, "blunt": phrases.DISMISSALS},
        "closing": {
            "polite": phrases.CLOSINGS,
            "blunt": phrases.BREAKS,
            "plain": phrases.SIGNATURES,
        },
    }
    fillings = {"{role}": (situation.role,), "{act}": phrases.ACTS, "{name}": phrases.NAMES}
    return {m: tuple(_filled(texts, fillings)) for m, texts in forms[name].items()}


@cache
def _statements(situation: Situation, first: bool) -> dict[tuple[int, Manner], tuple[str, ...]]:
    """Return what a statement may be, by its sign and manner; only a later one says "it"."""
    good = (*phrases.GOOD, *phrases.GOOD_OF_KIND[situation.kind])
    bad = (*phrases.BAD, *phrases.BAD_OF_KIND[situation.kind])
    fillings: dict[str, Sequence[str]] = {
        "{it}": (f"the {situation.thing}",) if first else (f"the {situation.thing}", "it"),
        "{very}": phrases.DEGREES,
        "{kin}": phrases.KIN,
        "{day}": phrases.DAYS,
    }
    usual = ("{it} was {very}{word}", "I found {it} {very}{word}", "my {kin} called {it} {word}")
    felt = ("my {kin} {word} {it}",)
    praise = [
        *_filled(usual, {"{word}": good} | fillings),
        *_filled(felt, {"{word}": phrases.LIKED} | fillings),
    ]
    blame = [
        *_filled(usual, {"{word}": bad} | fillings),
        *_filled(felt, {"{word}": phrases.DISLIKED} | fillings),
        *_filled(("{it} was not {very}{word}",), {"{word}": good} | fillings),
    ]
    neutral = _filled(phrases.NEUTRAL, fillings)
    table: dict[tuple[int, Manner], list[str]] = {(0, "plain"): neutral}
    for sign, clauses in ((1, praise), (-1, blame)):
        for manner, beginnings in _BEGINNINGS[sign].items():
            table[sign, manner] = [begin + clause for begin in beginnings for clause in clauses]
    return {key: tuple(_sentence(clause) for clause in table[key]) for key in table}


_BEGINNINGS: dict[int, dict[Manner, Sequence[str]]] = {
    1: {"plain": ("",), "polite": phrases.RESERVE, "blunt": phrases.CHEERS},
    -1: {"plain": ("",), "polite": phrases.HEDGES, "blunt": phrases.JABS},
}


@cache
def _index(name: str, situation: Situation) -> dict[str, tuple[Manner, int]]:
    """Return the manner of every sentence that a part may be, and among how many it is chosen."""
    table = _sentences(name, situation)
    return {text: (manner, len(texts)) for manner, texts in table.items() for text in texts}


@cache
def _statement_index(situation: Situation, first: bool) -> dict[str, tuple[int, Manner, int]]:
    """Return sign and manner of every statement, and among how many it is chosen."""
    table = _statements(situation, first)
    return {text: (*key, len(texts)) for key, texts in table.items() for text in texts}


def _filled(forms: Sequence[str], fillings: Mapping[str, Sequence[str]]) -> list[str]:
    """Return every way to fill the slots of the forms."""
    texts = list(forms)
    for slot, words in fillings.items():
        texts = [t.replace(slot, w) for t in texts for w in (words if slot in t else ("",))]
    return texts


def _sentence(clause: str) -> str:
    return f"{clause[0].upper()}{clause[1:]}."
