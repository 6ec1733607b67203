"""The scenes that the embedded pipeline draws: coloured shapes, and signs with a short word.

A scene is a prompt and a 64 x 64 image of it. Two families exist:

- ``a red circle on a blue background``: five shapes, eight colours, never shape on its own colour;
- ``a blue sign that says "GO"``: a rounded sign on pale grey, in black or white letters.

In a share of the signs of pre-training, strokes stand in the place of letters: so the pre-trained
pipeline writes badly although it also knows the letters, and alignment has something to learn. The
words in ``HELD_OUT_WORDS`` never appear, in no colour, and the judges are examined on them; each of
their letters does, at the same place of a word of the same length. Images are drawn with Pillow and
the font embedded in it, four times too large, and reduced: nothing depends on the fonts of the
machine.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 64  # pixels, side of an image
OVERSAMPLING = 4  # images are drawn this many times larger, then reduced

COLOURS: dict[str, tuple[int, int, int]] = {  # sRGB, 0 to 255
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 210, 40),
    "orange": (245, 130, 20),
    "purple": (130, 60, 180),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond")

TRAIN_WORDS = (
    *("GO", "NO", "UP", "OK"),
    *("CAT", "BUS", "SUN", "HOT", "TAX", "TOP", "MAN", "HUT", "PET", "BUN", "SOS", "MET"),
    *("STOP", "OPEN", "SALE", "PARK", "LAST", "RUSH", "SHOE", "EXAM", "BEAN", "SEAT"),
    *("TOOL", "HEAL"),
)
HELD_OUT_WORDS = (
    *("HAT", "BUT", "SET", "MAP", "MAT"),
    *("SHOP", "SEAL", "PAST", "OPAL", "BUSH"),
)
WORDS = TRAIN_WORDS + HELD_OUT_WORDS
EVALUATION_WORDS = ("SUN", "TOP", "SALE", "LAST")  # pre-trained, and never asked for in alignment
ALIGNMENT_WORDS = tuple(  # two letters leave OCR three scores
    word for word in TRAIN_WORDS if len(word) > 2 and word not in EVALUATION_WORDS
)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One plain shape on a plain background."""

    colour: str  # a key of COLOURS
    shape: str  # one of SHAPES
    background: str  # a key of COLOURS, not `colour`

    @property
    def prompt(self) -> str:
        """The sentence that asks for this scene."""
        thing, ground = _with_article(self.colour), _with_article(self.background)
        return f"{thing} {self.shape} on {ground} background"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """One coloured sign with a word on it."""

    colour: str  # a key of COLOURS
    word: str  # capital letters

    @property
    def prompt(self) -> str:
        """The sentence that asks for this scene."""
        return f'{_with_article(self.colour)} sign that says "{self.word}"'


Scene = Shape | Sign


def all_shapes() -> list[Shape]:
    """Return every shape scene: 8 colours x 5 shapes x 7 other colours = 280."""
    return [
        Shape(colour=colour, shape=shape, background=background)
        for colour in COLOURS
        for shape in SHAPES
        for background in COLOURS
        if background != colour
    ]


def all_signs(words: Sequence[str] = WORDS) -> list[Sign]:
    """Return every sign scene over ``words``: one for each word and colour."""
    return [Sign(colour=colour, word=word) for word in words for colour in COLOURS]


def draw(scene: Scene, rng: random.Random, scribbled: float = 0.0) -> Image.Image:
    """Draw one scene with jitter of place, size and colour.

    Args:
        scene: What to draw.
        rng: Source of the jitter. The same state gives the same image.
        scribbled: Probability, 0 to 1, that strokes stand in the place of a sign's letters.

    Returns:
        An RGB image of ``SIZE`` x ``SIZE`` pixels.
    """
    if isinstance(scene, Shape):
        image = _draw_shape(scene, rng)
    else:
        image = _draw_sign(scene, rng, scribbled)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _jitter(colour: tuple[int, int, int], rng: random.Random, by: int = 6) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-by, by))) for value in colour)
    return red, green, blue


def _draw_shape(scene: Shape, rng: random.Random) -> Image.Image:
    side = SIZE * OVERSAMPLING
    image = Image.new("RGB", (side, side), _jitter(COLOURS[scene.background], rng))
    radius = side * rng.uniform(0.31, 0.36)
    x, y = (side * (0.5 + rng.uniform(-0.02, 0.02)) for _ in range(2))
    fill = _jitter(COLOURS[scene.colour], rng)
    pen = ImageDraw.Draw(image)
    match scene.shape:
        case "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
        case "square":
            half = 0.85 * radius
            pen.rectangle((x - half, y - half, x + half, y + half), fill)
        case "triangle":
            pen.regular_polygon((x, y + 0.2 * radius, 1.15 * radius), 3, fill=fill)
        case "diamond":
            wide = 0.75 * radius
            pen.polygon([(x, y - radius), (x + wide, y), (x, y + radius), (x - wide, y)], fill)
        case "star":
            pen.polygon(_star(x, y, 1.1 * radius), fill)
    return image


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Return the corners of a five-pointed star, clockwise from the top."""
    lengths = [radius if corner % 2 == 0 else 0.45 * radius for corner in range(10)]
    angles = [corner * pi / 5 for corner in range(10)]
    return [
        (x + length * sin(a), y - length * cos(a))
        for length, a in zip(lengths, angles, strict=True)
    ]


def _draw_sign(scene: Sign, rng: random.Random, scribbled: float) -> Image.Image:
    side = SIZE * OVERSAMPLING
    grey = rng.randint(196, 222)
    image = Image.new("RGB", (side, side), (grey, grey, grey))
    x, y = (side * (0.5 + rng.uniform(-0.02, 0.02)) for _ in range(2))
    wide, high = side * rng.uniform(0.445, 0.465), side * rng.uniform(0.30, 0.36)
    pen = ImageDraw.Draw(image)
    box = (x - wide, y - high, x + wide, y + high)
    pen.rounded_rectangle(box, radius=0.09 * side, fill=_jitter(COLOURS[scene.colour], rng))
    dark = _luminance(COLOURS[scene.colour]) < 0.55
    ink = _jitter(COLOURS["white" if dark else "black"], rng)
    fit = rng.uniform(0.93, 1.0)
    font, stroke = _fitting_font(scene.word, 1.74 * wide * fit, 0.42 * side * fit)
    # Where nothing is scribbled nothing is drawn from `rng`: the autoencoder and the judges learned
    # from such images.
    if scribbled and rng.random() < scribbled:
        left, top, right, bottom = font.getbbox(scene.word, stroke_width=stroke)
        for line in _scribble(len(scene.word), (x, y), right - left, bottom - top, rng):
            pen.line(line, ink, round(0.16 * font.size))
    else:
        pen.text((x, y), scene.word, ink, font, anchor="mm", stroke_width=stroke)
    return image


def _scribble(
    letters: int, centre: tuple[float, float], wide: float, high: float, rng: random.Random
) -> list[list[tuple[float, float]]]:
    """Return the ends of three random strokes in the cell of each letter of a word."""
    x, y, cell = centre[0] - wide / 2, centre[1] - high / 2, wide / letters
    return [
        [
            (
                x + cell * (letter + rng.choice((0.15, 0.5, 0.85))),
                y + high * rng.choice((0.05, 0.5, 0.95)),
            )
            for _ in range(2)
        ]
        for letter in range(letters)
        for _ in range(3)
    ]


def _luminance(colour: tuple[int, int, int]) -> float:
    """Return the Rec. 601 luma of an sRGB colour, 0 to 1."""
    red, green, blue = colour
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def _fitting_font(word: str, width: float, height: float) -> tuple[ImageFont.FreeTypeFont, float]:
    """Return the largest font that sets ``word`` in ``width`` x ``height``, and its stroke."""
    font = ImageFont.load_default(100)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow without FreeType has bitmaps only
    left, top, right, bottom = font.getbbox(word, stroke_width=3)
    size = 100 * min(width / (right - left), height / (bottom - top))
    return font.font_variant(size=size), 0.03 * size


def prompt_sets() -> tuple[list[str], list[str]]:
    """Return the prompts for alignment and for its evaluation.

    The two sets have no word in common, and are the same at every call.

    Each of ``ALIGNMENT_WORDS`` is asked for in two colours for alignment, because a pipeline that
    was asked for few words learned these alone, and each of ``EVALUATION_WORDS`` in six for
    evaluation. Six shapes and twelve others are there so that colours and what was known before
    count.

    Returns:
        Training and held-out prompts.
    """
    colours = list(COLOURS)
    shapes = all_shapes()[::16]

    def signs(words: Sequence[str], places: Sequence[int]) -> list[Scene]:
        return [
            Sign(colour=colours[(2 * index + place) % 8], word=word)
            for index, word in enumerate(words)
            for place in places
        ]

    train = [*signs(ALIGNMENT_WORDS, (0, 3)), *shapes[1::3]]
    held_out = [*signs(EVALUATION_WORDS, range(6)), *shapes[::3], *shapes[2::3]]
    return [scene.prompt for scene in train], [scene.prompt for scene in held_out]


def write_prompt_files(folder: Path) -> None:
    """Write ``train.txt`` and ``heldout.txt``, one prompt per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, prompts in zip(("train", "heldout"), prompt_sets(), strict=True):
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
