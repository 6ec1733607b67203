"""Which text a prompt asks for, and the legibility formula."""

from __future__ import annotations

import math
import random
import re

import pytest

from rewards.heads.ocr.target_text import (
    comparable,
    has_lone_mark,
    has_words,
    legibility,
    levenshtein,
    quote_marks,
    quoted_target,
    quoted_texts,
    without_quotes,
)


@pytest.mark.parametrize(
    ("prompt", "quotes", "target"),
    [
        ('a sign that says "GO"', "double", "GO"),
        ('"one" and "two"', "double", "one"),
        ('"New\nYork"', "double", "New\nYork"),
        ("a sign", "double", None),
        ('an open "quote', "double", None),
        ('empty ""', "double", None),
        ('blank "  "', "double", None),
        ('empty "" first, then "GO"', "double", None),
        ("a sign \u201cGO\u201d", "double", None),
        ("a sign \u201cGO\u201d", "curly", "GO"),
        ("it\u2019s a sign \u2018don\u2019t stop\u2019", "curly", "don\u2019t stop"),
        ('a sign "GO"', "curly", None),
        ("a sign that says 'GO'", "single", "GO"),
        ("it's a sign that says 'don't stop'", "single", "don't stop"),
        ("it's a sign", "single", None),
        ("the dogs' sign", "single", None),
        ("'a' or \u201cb\u201d", "any", "a"),
        ('it\'s \u201cb\u201d or "c"', "any", "b"),
        ('"c" or \u201cb\u201d', "any", "c"),
        ("no text", "any", None),
        # inches, seconds, feet and years are no quotes, nor are letters and marks side by side
        ('a 5" nail and a 6" nail', "double", None),
        ('a 5" nail that says "GO"', "double", "GO"),
        ('a "GO" sign of 5"', "double", "GO"),
        ('a 12"x18" poster', "any", None),
        ('a "5"x7" card" x', "double", '5"x7'),
        ("a 5\u201d nail and a 6\u201d nail", "any", None),
        ("a 6' man by a 5' door", "single", None),
        ("a 6\u2019 man by a 5\u2019 door", "any", None),
        ("the dogs' and the cats' bowls", "single", None),
        ("a '90s car that says 'GO'", "single", "GO"),
        ("rock 'n' roll", "any", None),
        ('says"GO" here', "double", None),
        ('an open "quote and "GO"', "double", "GO"),
        # Chinese puts no spaces between words
        ('\u5199\u7740"\u5f00\u95e8"\u7684\u724c', "double", "\u5f00\u95e8"),
        # backslashes of JSON or a shell, and CSV's doubled marks
        ('says \\"GO\\"', "double", "GO"),
        ("says \\'GO\\'", "single", "GO"),
        ('""GO"" here', "double", "GO"),
        # quotes of other languages
        ("\u201eGO\u201c", "any", "GO"),
        ("\u201eGO\u201d", "any", "GO"),
        ('\u201eGO"', "any", "GO"),
        ("\u201dGO\u201d", "any", "GO"),
        ("\u201aGO\u2018", "any", "GO"),
        ("\u00abGO\u00bb", "any", "GO"),
        ("\u00bbGO\u00ab", "any", "GO"),
        ("\u2039GO\u203a", "any", "GO"),
        ("\u300cGO\u300d", "any", "GO"),
        ("\u300eGO\u300f", "any", "GO"),
        ("\uff02GO\uff02", "any", "GO"),
        ("\u00abGO\u00bb", "curly", None),
    ],
)
def test_quoted_target(prompt, quotes, target):
    assert quoted_target(prompt, quotes) == target


@pytest.mark.parametrize(
    ("prompt", "texts", "marks", "lone"),
    [
        ('"A" and \u201cB\u201d', ["A", "B"], '""', False),
        ("\u00abA\u00bb", ["A"], "\u00ab\u00bb", False),
        ('"A', [], "", True),
        ("\u201eA", [], "", True),
        ("A\u300d", [], "", True),
        ('"A" and "', ["A"], '""', True),
        ('""', [""], "", False),
        ('a 5" nail', [], "", False),
        ("it's", [], "", False),
    ],
)
def test_what_is_quoted_and_how(prompt, texts, marks, lone):
    assert quoted_texts(prompt, "any") == texts
    assert quote_marks(prompt) == marks
    assert has_lone_mark(prompt) is lone


@pytest.mark.parametrize(
    ("text", "words"),
    [("GO", True), ("5", True), ("\u958b", True), ("...", False), ("\u2615\ufe0f", False)],
)
def test_words_are_letters_or_digits(text, words):
    assert has_words(text) is words


def test_an_unknown_style_lists_the_known_ones():
    with pytest.raises(ValueError, match="double, curly, single, any"):
        quoted_target("x", "guillemets")


def test_without_quotes_drops_every_style():
    prompt = "a \"red\" b 'green' c \u201cblue\u201d it's d"
    assert without_quotes(prompt).split() == ["a", "b", "c", "it's", "d"]


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("GO", "GO", 0)],
)
def test_levenshtein(a, b, distance):
    assert levenshtein(a, b) == distance
    assert levenshtein(b, a) == distance


def test_levenshtein_is_a_metric():
    generator = random.Random(0)
    for _ in range(200):
        a, b, c = ("".join(generator.choices("ab", k=generator.randrange(6))) for _ in range(3))
        assert (levenshtein(a, b) == 0) == (a == b)
        assert levenshtein(a, c) <= levenshtein(a, b) + levenshtein(b, c)
        assert abs(len(a) - len(b)) <= levenshtein(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("read", "target", "substring_ok", "score"),
    [
        ("GO", "GO", True, 1.0),
        ("go", "GO", True, 1.0),
        ("", "GO", True, 0.0),
        ("GO!", "GO", True, 1.0),
        ("GO!", "GO", False, 0.5),
        ("the cargo ship", "GO", True, 1.0),
        ("the cargo ship", "GO", False, 0.0),  # distance 10, capped at 2
        ("STEP", "STOP", True, 0.75),
        ("STO", "STOP", True, 0.75),
        ("XYZW", "STOP", True, 0.0),
        ("new\nyork", "New York", True, 1.0),
        ("N E W Y O R K", "New York", False, 1.0),
        ("\uff27\uff2f", "GO", True, 1.0),  # full-width letters
        ("Cafe\u0301", "CAF\u00c9", False, 1.0),  # combining accent
        ("STRASSE", "Stra\u00dfe", False, 1.0),
        ("Cafe", "Caf\u00e9", True, 0.75),
        ("DON'T", "don\u2019t", False, 1.0),
        ("don\u2018t", "don't", False, 1.0),
        ("don\u00b4t", "don`t", False, 1.0),
        ('"hi"', "\u201chi\u201d", False, 1.0),
        ("\u201ehi\u201c", "\u00abhi\u00bb", False, 1.0),
        ("9-5", "9\u20135", False, 1.0),
        ("\uff0d5 \u2014 x", "\u22125 \u2011 x", False, 1.0),
        ("dont", "don\u2019t", False, 0.8),
        # Letters that no image tells apart: a stop sign in Cyrillic, hotel in Greek capitals.
        ("CTO\u041f", "\u0421\u0422\u041e\u041f", False, 1.0),
        ("\u0421\u0422\u041e\u041f", "CTO\u041f", False, 1.0),
        (
            "\u039e\u0395NO\u0394OXEIO",
            "\u039e\u0395\u039d\u039f\u0394\u039f\u03a7\u0395\u0399\u039f",
            False,
            1.0,
        ),
        ("CTO", "\u0421\u0422\u041e\u041f", False, 0.75),
    ],
)
def test_legibility(read, target, substring_ok, score):
    # Python's floats, a quotient of whole numbers.
    assert legibility(read, target, substring_ok=substring_ok) == pytest.approx(score)


def test_a_target_of_white_space_does_not_apply():
    assert math.isnan(legibility("GO", " \u3000\n"))


def test_legibility_stays_in_range_and_never_gains_from_strictness():
    generator = random.Random(1)
    for _ in range(300):
        read = "".join(generator.choices("abc ", k=generator.randrange(8)))
        target = "".join(generator.choices("abc", k=generator.randrange(1, 5)))
        strict = legibility(read, target, substring_ok=False)
        loose = legibility(read, target)
        assert 0.0 <= strict <= loose <= 1.0


def test_comparable_is_a_fixed_point():
    for text in (
        "\u0130stanbul",
        "\ufb01ne",
        "A\u00a0B\tC",
        "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2",
        *map(chr, range(0x10000)),
    ):
        assert comparable(comparable(text)) == comparable(text)
        assert not re.search(r"\s", comparable(text))
