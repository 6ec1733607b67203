"""Rewards that need no model: for smoke tests, as drift monitors, and for images with colours.

All of them look at the image as a PNG file would store it, 8 bits per channel, so that an image
scores the same in memory and from disk.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardHead
from rewards.heads.ocr.target_text import without_quotes
from rewards.registry import register

# Pixels handled at once; keeps the temporaries of large batches near 100 MB.
_CHUNK = 2_000_000


def _in_chunks(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Score ``images [N, 3, H, W]``, a few at a time: ``[N]``."""
    size = max(1, _CHUNK // (images.shape[-1] * images.shape[-2]))
    return torch.cat([score(part) for part in images.split(size)])


@register("jpeg_compressibility")
class JpegCompressibility(RewardHead):
    """Minus the size of the image as a JPEG file, in kB of 1000 bytes; at most 0.

    Higher is better: the smoother an image, the smaller its file. The compressibility reward of
    DDPO (Black et al. 2023, https://arxiv.org/abs/2305.13301, section 5.1).

    Args:
        quality: JPEG quality, in [1, 95].

    Raises:
        ValueError: If the quality is out of range.
    """

    unit = "-kB"
    scores = "images"

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 95:
            raise ValueError(
                f"Parameter `quality` should be from 1 to 95. Found `quality = {quality}`."
            )
        self.quality = quality

    def score(self, batch: RewardBatch) -> Tensor:
        """Return minus the file sizes in kB, ``[N]``."""
        sizes = []
        for image in batch.to_pil():
            file = io.BytesIO()
            image.save(file, format="JPEG", quality=self.quality)
            sizes.append(file.tell() / 1000)
        return -torch.tensor(sizes)


@register("colourfulness")
class Colourfulness(RewardHead):
    """Colourfulness M3 of Hasler & Suesstrunk: 0 for grey, 15 slightly, 59 quite, 109 extremely.

    Higher is better; not divided by anything, range 0 to about 190. With rg = R - G and
    yb = (R + G) / 2 - B on 0-255 values,

        M3 = sqrt(std_rg^2 + std_yb^2) + 0.3 sqrt(mean_rg^2 + mean_yb^2)

    (Hasler & Suesstrunk 2003, "Measuring colourfulness in natural images", equation 3 of
    https://doi.org/10.1117/12.477378; standard deviations over all pixels, without correction).
    """

    unit = "M3"
    scores = "images"

    def score(self, batch: RewardBatch) -> Tensor:
        """Return M3, ``[N]``."""
        return _in_chunks(self._score, batch.uint8())

    @staticmethod
    def _score(images: Tensor) -> Tensor:
        r, g, b = images.flatten(2).double().unbind(1)  # [N, HW] each
        rg = r - g
        yb = 0.5 * (r + g) - b
        std = (rg.var(1, correction=0) + yb.var(1, correction=0)).sqrt()
        mean = (rg.mean(1).square() + yb.mean(1).square()).sqrt()
        return std + 0.3 * mean


@register("sharpness")
class Sharpness(RewardHead):
    """Variance of the Laplacian of the luma, on 0-255 values; 0 for a flat image.

    Higher is better, and noise counts as sharpness. Range 0 to about 1e6, a few hundreds for a
    photo in focus. The focus measure LAPV of Pech-Pacheco et al. 2000,
    "Diatom autofocusing in brightfield microscopy" (https://doi.org/10.1109/ICPR.2000.903548): the
    kernel [0 1 0; 1 -4 1; 0 1 0] on the BT.601 luma 0.299 R + 0.587 G + 0.114 B, variance over the
    inner (H - 2)(W - 2) pixels, without correction.
    """

    unit = "var(Laplacian)"
    scores = "images"

    def score(self, batch: RewardBatch) -> Tensor:
        """Return the variances, ``[N]``.

        Raises:
            ValueError: If the images have no inner pixel.
        """
        images = batch.uint8()
        if min(images.shape[2:]) < 3:
            raise ValueError(
                f"Images should be at least 3 x 3 pixels. Found shape {list(images.shape)}."
            )
        return _in_chunks(self._score, images)

    @staticmethod
    def _score(images: Tensor) -> Tensor:
        weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.double, device=images.device)
        y = torch.einsum("nchw,c->nhw", images.double(), weights)
        ring = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:]
        laplacian = ring - 4.0 * y[:, 1:-1, 1:-1]
        return laplacian.flatten(1).var(1, correction=0)


# sRGB values of the colour names that `prompt_colour` knows.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 210, 40),
    "orange": (245, 130, 20),
    "purple": (130, 60, 180),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "grey": (128, 128, 128),
    "gray": (128, 128, 128),
    "pink": (245, 150, 190),
    "brown": (125, 75, 40),
    "cyan": (40, 190, 210),
}
_NAMES = "|".join(COLOURS)
_COLOUR_WORD = re.compile(rf"\b({_NAMES})\b", re.IGNORECASE)
# "without any trace of red", "it isn't red", "red-free"; not "nothing but red", nor "no tail, red".
_NEGATION = (
    r"no|not|non|never|neither|nor|nothing|none|nobody|without|sans|except|excepting|excluding|"
    r"minus|lack|lacks|lacking|avoid|avoids|avoiding|omit|omits|omitting|remove|removed|removing|"
    r"devoid|absence|hardly|barely|instead|free (?:of|from)|(?:rather|other) than|apart from|"
    r"(?:any|every)thing but|\w+n['\u2019]t"
)
_BETWEEN = (  # a negation and its colour
    r"a|an|any|anything|the|its|one|longer|single|some|much|at|all|even|of|from|in|with|"
    r"(?:bit|hint|trace|touch|tint|shade|tone|hue|splash|spot|object|thing|part|area|element)s?|"
    r"colou?rs?|colou?red|painted|be|being|is|are|has|have|having|contains?|containing|includes?|"
    r"including|uses?|using|shows?|showing|wears?|wearing|visible|very|quite|really|too|bright|"
    r"dark|light|pale|deep|vivid|pure"
)
_NEGATED = re.compile(
    rf"\b(?:{_NEGATION})(?:[\s-]+(?:{_BETWEEN}))*[\s-]+(?:{_NAMES})\b|"
    rf"\b(?:{_NAMES})(?:[\s-]+free|\s+(?:is|are)\s+(?:absent|missing|forbidden|not))\b",
    re.IGNORECASE,
)

# "Red Bull", "the Green Bay Packers", "the White House": both words begin with a capital.
_TITLE_NAMES = "|".join(name.title() for name in COLOURS)
_PROPER_NAME = re.compile(rf"\b(?:{_TITLE_NAMES})(?:[ -][A-Z]\w*)+")
# The fruit: "an orange on a table", "two oranges, cut", but "an orange car", "an orange and blue
# car", "an orange, red and blue car". A preposition, a form of "be", an article or an end follows.
_FRUIT = re.compile(
    r"\b(?:an?|the|one|half an|each|every|another|this|that|my|your|his|her|its|our|their) orange"
    r"(?=\s*(?:$|[.!?;:)\]]|,(?!\s*(?:\w+\s+)?(?:and\s+|or\s+)?(?:"
    + _NAMES
    + r")\b))|\s+(?:(?:and|or|with) (?:an?|the|two|three|some|one)|in|on|at|of|under|over|above|"
    r"below|near|next|beside|besides|by|inside|into|from|behind|between|among|against|to|that|"
    r"which|is|are|was|being|lies|lying|sits|sitting|rests|resting|hangs|hanging|cut|sliced|peeled"
    r")\b)",
    re.IGNORECASE,
)
_BLACK_AND_WHITE = re.compile(  # means a photograph, and not "a black and white cat"
    r"\bblack-(?:and|&|n)-white\b|\bin black (?:and|&) white\b|"
    r"\bblack (?:and|&) white(?= (?:\w+ )?(?:photo\w*|picture|image|film|movie|drawing|sketch|"
    r"print|portrait|illustration|still|shot|footage|engraving|etching|woodcut|comic|manga)s?\b)",
    re.IGNORECASE,
)


def named_colours(prompt: str) -> tuple[str, ...]:
    """Return the colour names in a prompt, each once, in order.

    Quoted words are none, nor are words of proper names, the fruit, and black-and-white.
    """
    words = (word.lower() for word in _COLOUR_WORD.findall(_of_colours(prompt)))
    return tuple(dict.fromkeys("grey" if word == "gray" else word for word in words))


def negates_colour(prompt: str) -> bool:
    """Return whether a prompt says, outside quotes, of a colour that it should not be there."""
    return _NEGATED.search(_of_colours(prompt)) is not None


def _of_colours(prompt: str) -> str:
    """Return the prompt without the words that only look like colour names."""
    text = without_quotes(prompt)
    if not _is_title(text):
        text = _PROPER_NAME.sub(" ", text)
    return _BLACK_AND_WHITE.sub(" ", _FRUIT.sub(" ", text))


def _has_lookalike(prompt: str) -> bool:
    count = len(_COLOUR_WORD.findall(without_quotes(prompt)))
    return count > len(_COLOUR_WORD.findall(_of_colours(prompt)))


def _is_title(text: str) -> bool:
    """Return whether capitals say nothing: of at least four words, without small ones, all have."""
    small = ("and", "the", "for", "with", "from")
    words = [word for word in re.findall(r"[^\W\d_]{3,}", text) if word not in small]
    return len(words) > 3 and all(word[0].isupper() for word in words)


def oklab(rgb: Tensor) -> Tensor:
    """Convert sRGB to OKLab (Ottosson 2020, https://bottosson.github.io/posts/oklab/).

    Args:
        rgb: Pixels ``[..., 3, P]``, gamma-encoded sRGB in [0, 1].

    Returns:
        ``[..., 3, P]``: lightness in [0, 1], and two opponent axes of about +-0.3.
    """
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    lms = torch.tensor(to_lms, dtype=rgb.dtype, device=rgb.device) @ linear
    # No negative values: all coefficients of the first matrix are positive.
    return torch.tensor(to_lab, dtype=rgb.dtype, device=rgb.device) @ lms.pow(1.0 / 3.0)


@register("prompt_colour")
class PromptColour(RewardHead):
    """Whether the image has the colours that the prompt names: 0 none of them, 1 all of them.

    Higher is better. For every colour named outside quotes, every pixel x has the closeness
    exp(-(|x - c| / tolerance)^2), with the distance |x - c| in OKLab (Ottosson 2020,
    https://bottosson.github.io/posts/oklab/); the ``share`` of pixels that are closest to c count,
    by their mean; the score is the mean over the named colours. Continuous in every pixel.
    A prompt that names no colour scores NaN, and so does one that wants a colour away ("without any
    red"): the head cannot see how much of it would be too much. Not taken for colours are words in
    quotes, in proper names ("Red Bull": the next word has a capital, too), the fruit ("an orange on
    a table") and black-and-white photographs. ``remarks`` tell of prompts with such words.

    What only a reader would know is taken for its colour, as in "a blue whale", "green tea" and
    "Jack Black"; and a colour with a capital before another, as in "a Red Ferrari", for a name.

    What it cannot see: where a colour is. A blue circle on red and a red circle on blue score the
    same, and so does any other arrangement of the same pixels.

    Args:
        share: Part of the pixels that a named colour should fill, in (0, 1]; more does not help.
        tolerance: OKLab distance at which the closeness has dropped to 1/e; positive. The two
            nearest names, blue and purple, are 0.14 apart; red and orange 0.18.

    Raises:
        ValueError: If a parameter is out of range.
    """

    unit = "share of named colours"
    scores = "images"
    requires = ("colour name",)

    def __init__(self, share: float = 0.15, tolerance: float = 0.1) -> None:
        if not 0.0 < share <= 1.0:
            raise ValueError(f"Parameter `share` should be in (0, 1]. Found `share = {share}`.")
        if not tolerance > 0.0:
            raise ValueError(
                f"Parameter `tolerance` should be positive. Found `tolerance = {tolerance}`."
            )
        self.share = share
        self.tolerance = tolerance

    def score(self, batch: RewardBatch) -> Tensor:
        """Return the mean closeness, ``[N]``; NaN where the prompt names none, or one to avoid."""
        images = batch.uint8().flatten(2)  # [N, 3, P]
        names = [() if negates_colour(p) else named_colours(p) for p in batch.prompts]
        step = max(1, _CHUNK // images.shape[-1])
        scores = [
            self._score(images[start : start + step], names[start : start + step])
            for start in range(0, len(names), step)
        ]
        return torch.cat(scores)

    def remarks(self, prompts: Sequence[str]) -> list[str]:
        """Say which prompts name a colour that should not be there, or have words like colours."""
        remarks = []
        if negated := [prompt for prompt in prompts if negates_colour(prompt)]:
            remarks.append(
                f"{len(negated)} of {len(prompts)} prompts name a colour that should not be there, "
                f"first {negated[0]!r}: they score NaN."
            )
        if alike := [prompt for prompt in prompts if _has_lookalike(prompt)]:
            remarks.append(
                f"{len(alike)} of {len(prompts)} prompts have a colour word in a proper name, of "
                f"the fruit or in black-and-white, first {alike[0]!r}: it is no colour to show."
            )
        return remarks

    def _score(self, images: Tensor, names: Sequence[tuple[str, ...]]) -> Tensor:
        """Score ``[N, 3, P]`` images for their named colours, ``[N]``."""
        # One row per (sample, named colour), R in all: prompts name different numbers of colours.
        pairs = [(n, colour) for n, colours in enumerate(names) for colour in colours]
        rows = torch.tensor([n for n, _ in pairs], dtype=torch.long, device=images.device)
        palette = torch.tensor([COLOURS[colour] for _, colour in pairs], device=images.device)
        centres = oklab(palette.reshape(-1, 3, 1) / 255.0)  # [R, 3, 1]

        lab = oklab(images / 255.0)  # [N, 3, P]
        squared = (lab[rows] - centres).square().sum(1)  # [R, P]
        kept = max(1, round(self.share * images.shape[-1]))
        nearest = squared.topk(kept, dim=1, largest=False, sorted=False).values  # [R, kept]
        closeness = torch.exp(-nearest / self.tolerance**2).mean(1)  # [R]

        total = torch.zeros(len(names), device=images.device).index_add_(0, rows, closeness)
        count = torch.tensor([len(colours) for colours in names], device=images.device)
        return total / count  # 0 / 0 is NaN: no colour named
