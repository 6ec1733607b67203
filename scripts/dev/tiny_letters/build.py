"""Makes the language model and the two classifiers: three trainings, side by side if asked."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from tiny_letters.classifiers import RULES, train_classifier
from tiny_letters.pretrain import train_language_model
from tiny_pipeline import parallel


def build(
    output: Path,
    *,
    seed: int = 0,
    lm_steps: int = 1000,
    lm_batch: int = 64,
    trait_steps: int = 500,
    trait_batch: int = 64,
    processes: int = 2,
) -> None:
    """Train all three and save them in the format of transformers.

    Equal arguments give equal files on the same machine and libraries, however many processes there
    are; another processor may round differently.

    Args:
        output: Folder, made if missing; gets the folders ``lm``, ``traits/mood`` and
            ``traits/politeness``.
        seed: Seed of merges, weights and letters.
        lm_steps: Updates of the language model.
        lm_batch: Letters in each, four or more.
        trait_steps: Updates of each classifier.
        trait_batch: Texts in each.
        processes: Processes of one thread each; there is work for three.
    """
    output.mkdir(parents=True, exist_ok=True)
    # No process group: where there is one, transformers saves nothing but what its first rank has.
    with ProcessPoolExecutor(
        processes, parallel.context(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        tasks = [pool.submit(train_language_model, output, seed, lm_steps, lm_batch)]
        tasks += [
            pool.submit(train_classifier, output / "traits", seed, trait_steps, trait_batch, trait)
            for trait in RULES
        ]
        for task in tasks:
            task.result()
