"""What the sub-commands of ``scripts/bench.py`` measure on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gradients import measure_gradients
from benchmarks.methods import measure_guards, measure_methods
from benchmarks.ocr import measure_ocr
from benchmarks.precision import measure_precision
from benchmarks.remote import measure_remote
from benchmarks.train import measure_training

MEASURE: dict[str, Callable[..., dict[str, Any]]] = {  # with the sub-command's own options
    "train": measure_training,
    "gradients": measure_gradients,
    "methods": measure_methods,
    "guards": measure_guards,
    "ocr": measure_ocr,
    "precision": measure_precision,
    "remote": measure_remote,
}
