"""EasyOCR on fixed weights, which cannot be had in a test.

Its own files hold networks of its own classes that find text everywhere and read the letter G,
whatever they see: everything but the learning is real.
"""

from __future__ import annotations

import hashlib
import os
import sys
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards import RewardBatch, RewardError, create
from rewards.heads.ocr.engines import EasyOcr
from rewards.heads.ocr.plans import plan_engine

pytest.importorskip("easyocr")


def batch(*texts: str) -> RewardBatch:
    prompts = [f'a sign that says "{text}"' for text in texts]
    source = torch.Generator().manual_seed(0)
    return RewardBatch(prompts=prompts, images=torch.rand(len(texts), 3, 64, 64, generator=source))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with both files, which EasyOCR's list of checksums is made to agree with."""
    from easyocr import config
    from easyocr.craft import CRAFT
    from easyocr.model.vgg_model import Model

    folder = tmp_path_factory.mktemp("weights")
    entry, craft = config.recognition_models["gen2"]["english_g2"], config.detection_models["craft"]
    letters = entry["characters"]
    sizes = {"input_channel": 1, "output_channel": 256, "hidden_size": 256}
    with torch.device("meta"):  # the constructors would spend a second on random numbers
        reader, detector = Model(num_class=1 + len(letters), **sizes), CRAFT(pretrained=False)
    for network in (reader, detector):
        for tensor in network.to_empty(device="cpu").state_dict().values():
            tensor.fill_(0.01)
    last = detector.conv_cls[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1.0, 0.0]))  # text everywhere, no links
        reader.Prediction.weight.zero_()
        reader.Prediction.bias.zero_()[1 + letters.index("G")] = 9.0
    with pytest.MonkeyPatch.context() as patch:
        for network, known in ((reader, entry), (detector, craft)):
            state = {f"module.{key}": value for key, value in network.state_dict().items()}
            path = folder / known["filename"]
            torch.save(state, path)
            patch.setitem(known, "md5sum", hashlib.md5(path.read_bytes()).hexdigest())
        yield folder


def easy(folder: Path, **options):
    options = {"model_dir": str(folder), "device": "cpu", **options}
    return create("ocr", engine="easyocr", workers=0, engine_options=options)


def test_easyocr_tells_what_it_can_write(weights):
    head = easy(weights)
    found = head(batch("G", "G\u00c9", "\u0413"))
    assert found[0] == 1.0
    assert found[1:].isnan().all()  # English has no accents, and the last is a Cyrillic letter
    russian = plan_engine(
        "easyocr",
        detect=True,
        detection_side=None,
        options={"languages": ["ru"], "device": "cpu"},
    )
    assert "\u0413" in russian.alphabet()


@pytest.mark.parametrize("detect", [True, False])
def test_easyocr_loads_and_reads_without_a_trace(weights, detect, monkeypatch):
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    path = list(sys.path)
    options = {"model_dir": str(weights), "device": "cpu", "download_enabled": False}
    head = create("ocr", engine="easyocr", workers=0, detect=detect, engine_options=options)
    head.load()
    found = head.provenance()
    scores = head.evaluate(batch("GO", "g"))
    assert scores.extra["read"] == ["G", "G"]
    assert scores.values.tolist() == [0.5, 1.0]
    head.offload()  # nothing to free on the CPU
    files = {"english_g2.pth", "craft_mlt_25k.pth"} if detect else {"english_g2.pth"}
    assert set(found) == {"engine", "easyocr"} | files
    assert (
        found["english_g2.pth"]
        == hashlib.sha256((weights / "english_g2.pth").read_bytes()).hexdigest()
    )
    assert sys.path == path
    assert "LRU_CACHE_CAPACITY" not in os.environ


def test_on_a_gpu_easyocr_stays_on_the_one_it_is_given_and_leaves_it_on_request(monkeypatch):
    moves = []

    class Network:
        def __init__(self, name):
            self.name = name

        def to(self, place):
            moves.append((self.name, place))

    class Reader:
        def __init__(self, languages, *, gpu, **_):
            assert (languages, gpu) == (["en"], "cuda:1")
            self.recognizer = torch.nn.Module()  # stands for the wrapper over all GPUs
            self.recognizer.module = Network("recognizer")
            self.detector = torch.nn.Module()
            self.detector.module = Network("detector")

        def detect(self, image, **_):
            return [[[0, 8, 0, 8]]], [[]]

        def recognize(self, grey, level, tilted, **_):
            assert (grey.shape, level, tilted) == ((8, 8), [[0, 8, 0, 8]], [])
            return ["GO"]

    monkeypatch.setattr("easyocr.Reader", Reader)
    engine = EasyOcr(detect=True, device="cuda:1")
    image = np.zeros((8, 8, 3), np.uint8)
    assert engine.read(image) == ["GO"]
    assert moves == []
    engine.offload()
    engine.offload()
    assert moves == [("recognizer", "cpu"), ("detector", "cpu")]
    engine.read(image)
    assert moves[2:] == [("recognizer", "cuda:1"), ("detector", "cuda:1")]


def test_missing_weights_are_told_at_once_if_they_may_not_be_fetched(tmp_path):
    folder = tmp_path / "none"
    with pytest.raises(ValueError, match=r"english_g2\.zip and .*craft_mlt_25k\.zip into .*none"):
        easy(folder, download_enabled=False)
    assert not folder.exists()


def test_missing_weights_are_fetched_once(weights, tmp_path, monkeypatch):
    fetched = []

    def retrieve(url, target, reporthook):
        fetched.append(url)
        name = Path(url).with_suffix(".pth").name
        with zipfile.ZipFile(target, "w") as archive:
            archive.write(weights / name, name)

    monkeypatch.setattr("easyocr.utils.urlretrieve", retrieve)
    for _ in range(2):
        options = {"model_dir": str(tmp_path / "new"), "device": "cpu"}
        head = create("ocr", engine="easyocr", detect=False, workers=0, engine_options=options)
        head.load()
    (url,) = fetched
    assert url.startswith("https://github.com/JaidedAI/EasyOCR/")


def test_without_network_an_error_says_how_to_mend_it(tmp_path, monkeypatch):
    def retrieve(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("easyocr.utils.urlretrieve", retrieve)
    head = easy(tmp_path)
    for call in (head.load, lambda: head(batch("GO"))):
        with pytest.raises(RewardError, match=r"no network.*by hand: Unpack https.*into"):
            call()


def test_damaged_weights_are_told(weights, tmp_path):
    (tmp_path / "english_g2.pth").write_bytes((weights / "english_g2.pth").read_bytes()[:-1])
    with pytest.raises(RewardError, match=r"english_g2\.pth are damaged.*Delete the file"):
        easy(tmp_path).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": ["eng"]}, "Found .eng.. Did you mean 'en'"),
        ({"languages": ["ch_sim", "ja"]}, "only compatible with English"),
        ({"device": "cuda:99"}, "device = 'cuda:99'"),
    ],
)
def test_wrong_options_of_easyocr_are_refused(weights, options, message):
    with pytest.raises(ValueError, match=message):
        easy(weights, **options)
