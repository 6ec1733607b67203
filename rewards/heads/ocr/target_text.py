"""The text that a prompt asks to see in the image, and how far another text is from it.

The rule is the one of Flow-GRPO's OCR reward (Liu et al. 2025, https://arxiv.org/abs/2505.05470):
the target stands in quotes, white space does not count, and a distance never exceeds the length
of the target.

Deviations: Unicode is normalised (NFKC) and case folded instead of lower-cased; characters that
cannot be seen do not count either; apostrophes, quotation marks and dashes are those of ASCII,
whichever form they have; and Greek and Cyrillic letters whose capital looks like a Latin one are
that Latin letter: an image does not show which of them it is, and engines answer with either.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal, get_args

Quotes = Literal["double", "curly", "single", "any"]

# Letters and digits of scripts that put a space between words. A mark directly after one opens
# nothing (5" is a length, dogs' a genitive), and a mark directly before one closes nothing (it's).
_WORD = r"0-9A-Za-z\u00c0-\u024f\u0370-\u058f\u1e00-\u1fff"


def _between(opening: str, closing: str, marks: str) -> str:
    """Return the pattern of a text between marks, which holds others only within words."""
    content = rf"(?:[^{marks}]|(?<=[{_WORD}])[{marks}](?=[{_WORD}]))*"
    return rf"(?<![{_WORD}]){opening}({content}){closing}(?![{_WORD}])"


_PATTERNS = {
    "double": re.compile(_between('"', '"', '"')),
    "curly": re.compile(
        "\u201c([^\u201c\u201d]*)\u201d|" + _between("\u2018", "\u2019", "\u2018\u2019")
    ),
    # Neither the '90s nor rock 'n' roll is quoted.
    "single": re.compile(_between(r"'(?!\d\ds\b|n')", "'", "'")),
}
# By their opening marks, with those that close them: German and Polish, Swedish, French, German
# and Danish, Chinese and Japanese.
_OTHERS = {
    "\u201e": '\u201c\u201d"',
    "\u201d": "\u201d",
    "\u201a": "\u2018\u2019'",
    "\u00ab": "\u00bb",
    "\u00bb": "\u00ab",
    "\u2039": "\u203a",
    "\u203a": "\u2039",
    "\u300c": "\u300d",
    "\u300e": "\u300f",
    "\uff02": "\uff02",
}
_PATTERNS["any"] = re.compile(
    "|".join(
        [
            *(_PATTERNS[style].pattern for style in ("double", "curly", "single")),
            *(_between(mark, f"[{ends}]", mark + ends) for mark, ends in _OTHERS.items()),
        ]
    )
)
# A mark that is left without its partner; directly after a digit it is a unit.
_LONE = re.compile('(?<!\\d)["\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d\u300e\u300f\uff02]')
_ESCAPED = re.compile("\\\\+(?=[\"'])")
_UNSEEN = ("Cc", "Cf")  # control and format characters: joiners, marks of direction, soft hyphens
_VARIANTS = frozenset(map(chr, range(0xFE00, 0xFE10)))  # which of its forms an emoji takes

_MARKS = str.maketrans(  # typographic forms, of which an OCR engine answers with some
    {
        **dict.fromkeys(
            "\u2018\u2019\u201a\u201b\u2032\u2035\u2039\u203a\u02b9\u02bb\u02bc\u00b4`", "'"
        ),
        **dict.fromkeys(
            "\u201c\u201d\u201e\u201f\u2033\u2036\u00ab\u00bb\u02ba\u301d\u301e\u301f", '"'
        ),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\ufe58\ufe63\uff0d", "-"),
    }
)

# Folded letters whose capitals look alike: Cyrillic, Greek.
_LOOK_ALIKES = str.maketrans(
    "\u0430\u0432\u0435\u043a\u043c\u043d\u043e\u0440\u0441\u0442\u0443\u0445\u0456\u0455\u0458"
    "\u03b1\u03b2\u03b5\u03b6\u03b7\u03b9\u03ba\u03bc\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7",
    "abekmhopctyxisjabezhikmnoptyx",
)


def check_quotes(style: str) -> str:
    """Return the style if it is one of ``Quotes``.

    Raises:
        ValueError: Otherwise.
    """
    if style not in _PATTERNS:
        raise ValueError(
            f"Parameter `quotes` should be one of {', '.join(get_args(Quotes))}. "
            f"Found `quotes = {style!r}`."
        )
    return style


def quoted_target(prompt: str, quotes: str = "double") -> str | None:
    """Return the text inside the first pair of quotes.

    Args:
        prompt: A prompt, e.g. ``a blue sign that says "GO"``; backslashes before its marks do not
            count.
        quotes: ``double`` (ASCII), ``curly`` (typographic, double or single), ``single`` (ASCII,
            with apostrophes left alone) or ``any`` (whichever pair opens first, also guillemets,
            corner brackets and marks that open at the foot of the line).

    Returns:
        The text as it stands, or None if the prompt has no such pair or only white space is in it.
    """
    return next(iter(quoted_texts(prompt, quotes)), None) or None


def quoted_texts(prompt: str, quotes: str = "double") -> list[str]:
    """Return the texts inside all pairs of quotes, as they stand; "" for white space alone.

    Args:
        prompt: See ``quoted_target``.
        quotes: See ``quoted_target``.
    """
    return [text if text.strip() else "" for _, text in _quoted(prompt, quotes)]


def quote_marks(prompt: str) -> str:
    """Return the marks around the first text in quotes, whichever they are; "" for none."""
    return next((f"{m[0]}{m[-1]}" for m, text in _quoted(prompt, "any") if text.strip()), "")


def has_lone_mark(prompt: str) -> bool:
    """Return whether a quotation mark opens a text that nothing closes, or closes none."""
    return _LONE.search(without_quotes(prompt)) is not None


def without_quotes(prompt: str) -> str:
    """Return the prompt without its quoted parts, of whatever style."""
    return _PATTERNS["any"].sub(" ", _ESCAPED.sub("", prompt))


def _quoted(prompt: str, quotes: str) -> list[tuple[str, str]]:
    """Return quoted texts with and without their marks."""
    matches = _PATTERNS[check_quotes(quotes)].finditer(_ESCAPED.sub("", prompt))
    return [(m[0], next(group for group in m.groups() if group is not None)) for m in matches]


def comparable(text: str) -> str:
    """Return the text as it is compared: NFKC, case folded, without what cannot be seen.

    Apostrophes, quotation marks and dashes of whatever form become those of ASCII, and Greek and
    Cyrillic letters that look like Latin ones become those.
    """
    # Before NFKC, which takes an acute accent apart, and after, for marks that it makes.
    folded = unicodedata.normalize("NFKC", text.translate(_MARKS)).casefold()
    # Folding can leave the normal form, e.g. for a dotted capital I.
    shown = "".join(unicodedata.normalize("NFKC", folded).translate(_MARKS).split())
    return "".join(filter(_is_seen, shown)).translate(_LOOK_ALIKES)


def _is_seen(character: str) -> bool:
    return unicodedata.category(character) not in _UNSEEN and character not in _VARIANTS


def has_words(text: str) -> bool:
    """Return whether a letter or a digit is in the text: engines read words, not dots."""
    return any(character.isalnum() for character in comparable(text))


def readable(alphabet: str) -> frozenset[str]:
    """Return the characters of ``comparable`` texts that can be written in an alphabet."""
    return frozenset(character for letter in alphabet for character in comparable(letter))


def levenshtein(a: str, b: str) -> int:
    """Edit distance: the fewest insertions, deletions and substitutions from ``a`` to ``b``."""
    if len(a) < len(b):
        a, b = b, a
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        current = [i]
        for j, y in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (x != y)))
        previous = current
    return previous[-1]


def legibility(read: str, target: str, *, substring_ok: bool = True) -> float:
    """Return how well a text that was read matches the target: 1 - d / len(target), in [0, 1].

    d is 0 if the target is a substring of what was read (with ``substring_ok``), else the edit
    distance capped at the length of the target. Both texts are made ``comparable`` first.

    Returns:
        The score, or NaN if nothing of the target is left to compare.
    """
    read, target = comparable(read), comparable(target)
    if not target:
        return float("nan")
    if substring_ok and target in read:
        return 1.0
    distance = min(levenshtein(read, target), len(target))
    return 1.0 - distance / len(target)
