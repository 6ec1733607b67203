"""The procedural scenes: deterministic, in the colours they name, listed in the prompt files."""

import random

import numpy as np
import pytest

from moa_diffusion.tiny import PROMPTS_PATH
from tiny_pipeline.scenes import (
    ALIGNMENT_WORDS,
    COLOURS,
    EVALUATION_WORDS,
    HELD_OUT_WORDS,
    SIZE,
    TRAIN_WORDS,
    Shape,
    Sign,
    all_shapes,
    all_signs,
    draw,
    prompt_sets,
    write_prompt_files,
)


def test_prompts_read_as_documented() -> None:
    shape = Shape(colour="red", shape="circle", background="blue")
    assert shape.prompt == "a red circle on a blue background"
    assert Sign(colour="blue", word="GO").prompt == 'a blue sign that says "GO"'


def test_scenes_are_distinct() -> None:
    prompts = [scene.prompt for scene in [*all_shapes(), *all_signs()]]
    assert len(set(prompts)) == len(prompts) == 280 + 8 * len(TRAIN_WORDS + HELD_OUT_WORDS)


def test_equal_seeds_draw_equal_images() -> None:
    for scene in (all_shapes()[17], all_signs()[3]):
        first, again, other = (np.asarray(draw(scene, random.Random(s))) for s in (1, 1, 2))
        assert first.shape == (SIZE, SIZE, 3)
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)


@pytest.mark.parametrize("scene", all_shapes()[::9], ids=lambda scene: scene.prompt)
def test_shapes_have_their_colours(scene: Shape) -> None:
    image = np.asarray(draw(scene, random.Random(0))).astype(int)
    middle = np.median(image[28:36, 28:36].reshape(-1, 3), axis=0)
    assert np.abs(middle - COLOURS[scene.colour]).max() <= 6
    assert np.abs(image[1, 1] - COLOURS[scene.background]).max() <= 6


@pytest.mark.parametrize("colour", COLOURS)
def test_signs_have_their_colour_and_contrasting_letters(colour: str) -> None:
    image = np.asarray(draw(Sign(colour=colour, word="STOP"), random.Random(0))).astype(int)
    plate = image[16:48, 8:56].reshape(-1, 3)
    assert np.abs(np.median(plate, axis=0) - COLOURS[colour]).max() <= 6
    assert np.ptp(plate.sum(axis=1)) > 250


def test_scribbles_fill_the_place_of_the_letters() -> None:
    scene = Sign(colour="blue", word="STOP")
    written, scribbled, again = (
        np.asarray(draw(scene, random.Random(0), share)).astype(int) for share in (0.0, 1.0, 1.0)
    )
    assert np.array_equal(scribbled, again)
    ink = [(image.min(axis=2) > 150)[12:52, 6:58] for image in (written, scribbled)]
    rows, columns = zip(*(np.nonzero(where) for where in ink), strict=True)
    for ends in (rows, columns):  # strokes keep within the word's box, but for their width
        assert abs(ends[0].min() - ends[1].min()) <= 4
        assert abs(ends[0].max() - ends[1].max()) <= 4
    assert (ink[0] != ink[1]).mean() > 0.1


def test_scribbles_are_as_frequent_as_asked() -> None:
    scene = Sign(colour="red", word="CAT")
    pairs = [[draw(scene, random.Random(i), share) for share in (0.0, 0.4)] for i in range(200)]
    differs = [written.tobytes() != drawn.tobytes() for written, drawn in pairs]
    assert 0.3 < np.mean(differs) < 0.5  # .4, and three standard errors of .035


def test_held_out_words_are_new_but_their_letters_are_not() -> None:
    assert not set(TRAIN_WORDS) & set(HELD_OUT_WORDS)
    known = {(len(word), at, letter) for word in TRAIN_WORDS for at, letter in enumerate(word)}
    for word in HELD_OUT_WORDS:
        assert {(len(word), at, letter) for at, letter in enumerate(word)} <= known


def test_prompt_lists_have_no_word_in_common() -> None:
    assert not set(ALIGNMENT_WORDS) & set(EVALUATION_WORDS)
    lists = zip(prompt_sets(), (ALIGNMENT_WORDS, EVALUATION_WORDS), (6, 12), strict=True)
    for prompts, expected, count in lists:
        assert len(set(prompts)) == len(prompts)
        words = [prompt.split('"')[1] for prompt in prompts if "sign" in prompt]
        assert set(words) == set(expected) <= set(TRAIN_WORDS)
        assert len(words) / len(prompts) > 0.6
        shapes = {prompt for prompt in prompts if "sign" not in prompt}
        assert len(shapes) == count
    train, held_out = prompt_sets()
    assert not set(train) & set(held_out)


def test_committed_prompt_lists_are_the_generated_ones(tmp_path) -> None:
    write_prompt_files(tmp_path)
    for name in ("train.txt", "heldout.txt"):
        assert (tmp_path / name).read_text() == (PROMPTS_PATH / name).read_text()
