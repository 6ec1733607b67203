"""Makes the judges: two trainings, side by side if there are two processes."""

from __future__ import annotations

from pathlib import Path

from tiny_judges.clip import train_clip
from tiny_judges.deqa import train_deqa
from tiny_pipeline import parallel


def build(
    output: Path,
    *,
    seed: int = 0,
    clip_steps: int = 600,
    clip_batch: int = 96,
    deqa_steps: int = 2400,
    deqa_batch: int = 64,
    processes: int = 2,
) -> None:
    """Train the judges and save them in the formats of the full-size weights.

    Equal arguments give the same judges on the same machine and libraries, however many processes
    there are; another processor may round differently.

    Args:
        output: Folder, made if missing; gets the folders ``clip``, ``aesthetic`` and ``deqa``.
        seed: Seed of weights, scenes and what is done to them.
        clip_steps: Updates of the CLIP and the aesthetic head on it.
        clip_batch: Images in each.
        deqa_steps: Updates of the DeQA.
        deqa_batch: Images in each.
        processes: Processes of one thread each; a third has nothing to do.
    """
    output.mkdir(parents=True, exist_ok=True)
    sizes = (clip_steps, clip_batch), (deqa_steps, deqa_batch)
    parallel.run(_train, processes, output, seed, sizes)


def _train(
    rank: int, world: int, output: Path, seed: int, sizes: tuple[tuple[int, int], ...]
) -> None:
    for index, train in enumerate((train_clip, train_deqa)):
        if index % world == rank:
            train(output, seed, *sizes[index])
