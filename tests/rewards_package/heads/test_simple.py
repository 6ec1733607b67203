"""Heads without a model: frozen numbers computed another way, and what definitions promise."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import RewardBatch, RewardError, create
from rewards.heads.simple import COLOURS, named_colours, oklab

RED, BLUE, WHITE = COLOURS["red"], COLOURS["blue"], COLOURS["white"]


def noisy_ramp(seed: int, height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth ramp with noise, `[H, W, 3]` uint8."""
    generator = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] * np.array([1.0, 0.5, 0.2])
    return (ramp + generator.uniform(0, 50, (height, width, 3))).round().astype(np.uint8)


def flat(*colours: tuple[int, int, int], shares=None, side: int = 20) -> np.ndarray:
    """Areas of flat colour that fill the given shares, `[side, side, 3]` uint8."""
    shares = shares or [1 / len(colours)] * len(colours)
    counts = [round(share * side * side) for share in shares]
    pixels = [colour for colour, count in zip(colours, counts, strict=True) for _ in range(count)]
    return np.array(pixels, dtype=np.uint8).reshape(side, side, 3)


# Scores are float32, which rounds by 6e-8 of them. Sums of some hundred pixels, which another
# batch, order or instruction set cuts otherwise, stay within ten of these.


def batch(arrays, prompts=None) -> RewardBatch:
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return RewardBatch(prompts=prompts or [""] * len(arrays), images=pixels.contiguous())


def test_jpeg_compressibility_is_minus_the_file_size():
    arrays = [noisy_ramp(0), noisy_ramp(1)]
    expected = []
    for array in arrays:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=95)
        expected.append(-len(file.getvalue()) / 1000)
    rewards = create("jpeg_compressibility")(batch(arrays))
    # A whole number of bytes over 1,000, in float32: half an eps, 6e-8.
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert (create("jpeg_compressibility", quality=50)(batch(arrays)) > rewards).all()
    with pytest.raises(ValueError, match="quality = 0"):
        create("jpeg_compressibility", quality=0)


def test_colourfulness_is_the_published_formula():
    arrays = [noisy_ramp(0), noisy_ramp(1)]
    expected = []
    for array in arrays:
        r, g, b = (array[..., i].astype(float) for i in range(3))
        rg, yb = r - g, (r + g) / 2 - b
        spread = np.sqrt(np.std(rg) ** 2 + np.std(yb) ** 2)
        expected.append(spread + 0.3 * np.sqrt(np.mean(rg) ** 2 + np.mean(yb) ** 2))
    # Computed in float64, and kept in float32: half an eps, 6e-8.
    np.testing.assert_allclose(create("colourfulness")(batch(arrays)), expected, rtol=1e-6)


def test_colourfulness_of_flat_colours():
    # Grey: rg = yb = 0. Pure red: rg = 255, yb = 127.5, no spread: 0.3 sqrt(255^2 + 127.5^2).
    arrays = [flat((77, 77, 77)), flat((255, 0, 0))]
    rewards = create("colourfulness")(batch(arrays))
    np.testing.assert_allclose(rewards, [0.0, 85.5296], atol=1e-4)  # four digits


def test_sharpness_is_the_variance_of_the_laplacian():
    arrays = [noisy_ramp(0), noisy_ramp(1)]
    expected = []
    for array in arrays:
        y = array.astype(float) @ [0.299, 0.587, 0.114]
        height, width = y.shape
        values = [
            y[i - 1, j] + y[i + 1, j] + y[i, j - 1] + y[i, j + 1] - 4 * y[i, j]
            for i in range(1, height - 1)
            for j in range(1, width - 1)
        ]
        expected.append(np.var(values))
    # Likewise.
    np.testing.assert_allclose(create("sharpness")(batch(arrays)), expected, rtol=1e-6)


def test_sharpness_falls_with_blur_and_needs_an_inner_pixel():
    sharp = noisy_ramp(0)
    soft = np.asarray(Image.fromarray(sharp).resize((8, 6)).resize((32, 24)))
    a, b, c = create("sharpness")(batch([sharp, soft, np.full_like(sharp, 200)])).tolist()
    assert a > b > c
    assert c == pytest.approx(
        0.0, abs=1e-9
    )  # float64, of squares of rounding: (200 eps)^2 and less
    with pytest.raises(RewardError, match="3 x 3"):
        create("sharpness")(batch([noisy_ramp(0, 2, 5)]))


@pytest.mark.parametrize("name", ["jpeg_compressibility", "colourfulness", "sharpness"])
def test_a_batch_scores_like_its_samples(name):
    head, arrays = create(name), [noisy_ramp(i) for i in range(4)]
    together = head(batch(arrays))
    alone = torch.cat([head(batch([array])) for array in arrays])
    torch.testing.assert_close(together, alone)


# --- prompt_colour -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "colours"),
    [
        ("a red circle on a blue background", ("red", "blue")),
        ('a blue sign that says "RED"', ("blue",)),
        ("a blue sign that says \u201cred\u201d and 'green'", ("blue",)),
        ("Blue, blue and BLUE", ("blue",)),
        ("a gray cat on grey stone", ("grey",)),
        ("a bluebird on a hundred roses", ()),
        ('a sign that says "GO"', ()),
    ],
)
def test_colour_names_are_whole_words_outside_quotes(prompt, colours):
    assert named_colours(prompt) == colours


@pytest.mark.parametrize(
    ("prompt", "colours"),
    [
        ("an orange on a table", ()),
        ("a bowl with an orange", ()),
        ("An orange, a knife and a red cup", ("red",)),
        ("two oranges and half an orange.", ()),
        ("an orange is peeled", ()),
        ("an orange and a lemon", ()),
        ("an orange car", ("orange",)),
        ("an orange and blue car", ("orange", "blue")),
        ("an orange, red and white flag", ("orange", "red", "white")),
        ("an orange, bright red and white flag", ("orange", "red", "white")),
        ("a wall in orange", ("orange",)),
        ("a can of Red Bull on a green table", ("green",)),
        ("Red Bull can on ice", ()),
        ("a helmet of the Green Bay Packers", ()),
        ("a photo of the White House, at dusk", ()),
        ("a Red-Bull racing car", ()),
        ("Red car on a road", ("red",)),
        ("a wall, Red, White and Blue", ("red", "white", "blue")),
        ("A Red Car On A Blue Road With Green Trees", ("red", "blue", "green")),
        ("Red Car on a Blue Road", ("red", "blue")),
        ("A RED CAR", ("red",)),
        ("a black-and-white photo of a cat", ()),
        ("a cat in black and white", ()),
        ("a black & white film still, red curtain", ("red",)),
        ("a black and white street photograph", ()),
        ("a black and white cat", ("black", "white")),
    ],
)
def test_words_that_look_like_colours_are_none(prompt, colours):
    assert named_colours(prompt) == colours


def test_words_that_look_like_colours_are_told():
    prompts = ["an orange on a table", "no Red Bull", "a red car", 'a "Red Bull" sign, orange']
    (remark,) = create("prompt_colour").remarks(prompts)
    assert remark == (
        "2 of 4 prompts have a colour word in a proper name, of the fruit or in black-and-white, "
        "first 'an orange on a table': it is no colour to show."
    )


NEGATED = [
    "an image without any red",
    "a car, no red",
    "a room with no trace of blue or green",
    "a cat that isn't white",
    "a cat that isn\u2019t very dark grey",
    "a red car, not blue",
    "neither red nor blue",
    "a non-red rose",
    "a red-free room",
    "a room free of pink",
    "anything but yellow",
    "a flag of all colours except green",
    "a hat that is orange instead of brown",
    "nothing red",
    "a sky where purple is missing",
    "it does not contain any black objects",
]
WANTED = [
    "a cat with no tail on a red mat",
    "no people, red sky",
    "nothing but red",
    "not only red but blue",
    "a house without windows and a red door",
    'a red sign that says "no red"',
    "a notable red knot",
    "a gluten-free red cake",
    "house no. 5, red",
    "a box with nothing in it and red walls",
]


def test_a_prompt_that_wants_a_colour_away_does_not_apply():
    head = create("prompt_colour")
    arrays = [noisy_ramp(0)] * len(NEGATED + WANTED)
    found = head(batch(arrays, NEGATED + WANTED)).isnan().tolist()
    assert found == [True] * len(NEGATED) + [False] * len(WANTED)
    (remark,) = head.remarks([*WANTED, *NEGATED])
    assert remark == (
        "16 of 26 prompts name a colour that should not be there, first 'an image without any "
        "red': they score NaN."
    )
    assert head.remarks(WANTED) == []


def test_oklab_agrees_with_the_published_table():
    # XYZ (0.950, 1.000, 1.089), white, is (1, 0, 0); sRGB red is (0.628, 0.225, 0.126).
    lab = oklab(torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))  # columns: white, red
    np.testing.assert_allclose(lab[:, 0], [1.0, 0.0, 0.0], atol=1e-4)
    np.testing.assert_allclose(lab[:, 1], [0.6280, 0.2249, 0.1258], atol=1e-4)  # four digits


def colour(array: np.ndarray, prompt: str, **options) -> float:
    return float(create("prompt_colour", **options)(batch([array], [prompt])))


def test_both_colours_one_colour_no_colour():
    both, one, none = flat(RED, BLUE), flat(RED), flat(COLOURS["green"])
    prompt = "a red circle on a blue background"
    assert colour(both, prompt) == pytest.approx(1.0)
    assert colour(one, prompt) == pytest.approx(0.5, abs=0.01)  # red is 3e-6 of blue
    assert colour(none, prompt) < 0.01  # 1e-5
    assert np.isnan(colour(both, 'a sign that says "RED"'))


@pytest.mark.parametrize("name", sorted(set(COLOURS) - {"gray"}))
def test_every_colour_is_told_from_every_other(name):
    others = [other for other in COLOURS if COLOURS[other] != COLOURS[name]]
    arrays = [flat(COLOURS[name]), *(flat(COLOURS[other]) for other in others)]
    own, *wrong = create("prompt_colour")(batch(arrays, [f"a {name} wall"] * len(arrays)))
    assert own == pytest.approx(1.0)
    assert max(wrong) < 0.2  # 0.12, of the two that are most alike


def test_the_arrangement_of_pixels_is_not_seen():
    array = noisy_ramp(3)
    shuffled = np.random.default_rng(0).permutation(array.reshape(-1, 3)).reshape(array.shape)
    prompt = "a red and brown leaf"
    # A mean of 768 shares in float32, in another order: 100 eps at most.
    assert colour(shuffled, prompt) == pytest.approx(colour(array, prompt), rel=1e-5)


def test_the_score_grows_with_the_area_up_to_the_share_and_with_closeness():
    shares = [0.0, 0.05, 0.1, 0.15, 0.5]
    grown = [colour(flat(RED, WHITE, shares=[s, 1 - s]), "a red dot") for s in shares]
    # White is 2e-8 of red.
    np.testing.assert_allclose(grown, [0, 1 / 3, 2 / 3, 1, 1], atol=0.01)
    wide = [
        colour(flat(RED, WHITE, shares=[s, 1 - s]), "a red dot", share=0.5) for s in (0.15, 0.5)
    ]
    np.testing.assert_allclose(wide, [0.3, 1.0], atol=0.01)

    steps = np.linspace(0, 1, 12)[:, None] * (np.array(RED) - np.array(BLUE)) + np.array(BLUE)
    path = [colour(flat(tuple(step)), "a red wall") for step in steps.round().astype(int)]
    assert path == sorted(path)


def test_frozen_number_by_hand():
    array = noisy_ramp(5)
    rgb = array.reshape(-1, 3) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)

    def lab(values):
        lms = np.cbrt(
            values
            @ np.array(
                [
                    [0.4122214708, 0.2119034982, 0.0883024619],
                    [0.5363325363, 0.6806995451, 0.2817188376],
                    [0.0514459929, 0.1073969566, 0.6299787005],
                ]
            )
        )
        return lms @ np.array(
            [
                [0.2104542553, 1.9779984951, 0.0259040371],
                [0.7936177850, -2.4285922050, 0.7827717662],
                [-0.0040720468, 0.4505937099, -0.8086757660],
            ]
        )

    scores = []
    for name in ("brown", "black"):
        centre = np.array(COLOURS[name]) / 255
        centre = np.where(centre <= 0.04045, centre / 12.92, ((centre + 0.055) / 1.055) ** 2.4)
        closeness = np.exp(-((lab(linear) - lab(centre)) ** 2).sum(1) / 0.1**2)
        scores.append(np.sort(closeness)[::-1][: round(0.15 * len(closeness))].mean())
    # Closeness is exp of 100 times a squared distance of up to 1, so 1e-7 of that is 1e-5 of it.
    assert colour(array, "brown earth, black sky") == pytest.approx(np.mean(scores), rel=1e-4)


def test_prompts_with_different_numbers_of_colours_share_a_batch(monkeypatch):
    arrays = [noisy_ramp(i) for i in range(4)]
    prompts = ["red", "nothing", "red, blue and white", "blue"]
    head = create("prompt_colour")
    together = head(batch(arrays, prompts))
    assert together.isnan().tolist() == [False, True, False, False]
    alone = torch.cat([head(batch([a], [p])) for a, p in zip(arrays, prompts, strict=True)])
    torch.testing.assert_close(together, alone, equal_nan=True)
    monkeypatch.setattr("rewards.heads.simple._CHUNK", 1)
    torch.testing.assert_close(head(batch(arrays, prompts)), together, equal_nan=True)
    assert head(batch(arrays[:1], ["nothing"])).isnan().all()


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.5}, {"tolerance": 0.0}])
def test_parameters_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        create("prompt_colour", **options)
