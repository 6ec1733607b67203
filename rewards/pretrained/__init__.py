"""Models that others have trained: located, read strictly, fed."""

from rewards.pretrained.base import ModelHead, pick_device
from rewards.pretrained.locate import Weights, find_weights
from rewards.pretrained.preprocessing import Preprocessing, read_preprocessing
from rewards.pretrained.tensors import load_strictly, read_tensors

__all__ = [
    "ModelHead",
    "Preprocessing",
    "Weights",
    "find_weights",
    "load_strictly",
    "pick_device",
    "read_preprocessing",
    "read_tensors",
]
