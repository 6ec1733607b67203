"""What every head with a pretrained model gets from its base class."""

from __future__ import annotations

import gc
import hashlib
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rewards import RewardBatch, RewardError, Scores
from rewards.pretrained.base import ModelHead, pick_device
from rewards.pretrained.preprocessing import normalise
from rewards.pretrained.tensors import load_strictly


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.moves: list[str] = []

    def forward(self, pixels):
        return self.linear(pixels.mean(dim=(2, 3))).squeeze(-1)

    def to(self, *args, **kwargs):
        self.moves += [str(argument) for argument in args]
        return self if "cuda:0" in self.moves else super().to(*args, **kwargs)


class ToyHead(ModelHead):
    name = "toy"
    required = ()
    builds = 0
    fail: Exception | None = None

    def __init__(self, model: str, **options) -> None:
        super().__init__(model=model, device="cpu", **options)
        self.batches: list[int] = []

    def _build(self, weights):
        type(self).builds += 1
        module = Toy()
        load_strictly(module, weights)
        return module.to(self.dtype)

    def _score_batch(self, module, images, prompts):
        self.batches.append(len(images))
        if self.fail is not None:
            raise self.fail
        values = module(normalise(images).to(self.dtype))
        return Scores(values=values, extra={"prompt": list(prompts)})


class OtherHead(ToyHead):
    def _build(self, weights):
        return super()._build(weights)


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1, 3, generator=generator)
    tensors = {"linear.weight": weight, "linear.bias": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    ToyHead.builds = OtherHead.builds = 0
    return str(tmp_path)


def batch(n: int = 5) -> RewardBatch:
    images = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(n))
    return RewardBatch(prompts=[f"prompt {i}" for i in range(n)], images=images)


def test_scores_do_not_depend_on_the_batch_size(folder):
    whole = ToyHead(folder, batch_size=99)
    wanted = whole.evaluate(batch())
    for size in (1, 2, 5):
        head = ToyHead(folder, batch_size=size)
        found = head.evaluate(batch())
        # Sums of 108 float32 pixels, of another batch: some 6e-8 of 0.2.
        torch.testing.assert_close(found.values, wanted.values, rtol=1e-6, atol=1e-6)
        assert found.extra == wanted.extra == {"prompt": [f"prompt {i}" for i in range(5)]}
        assert max(head.batches) == size


def test_nothing_is_loaded_before_it_is_needed(folder):
    head = ToyHead(folder)
    assert ToyHead.builds == 0
    assert head.provenance() == {"model": folder, "dtype": "float32"}
    head.load()
    assert ToyHead.builds == 1
    head(batch())
    assert ToyHead.builds == 1
    assert head.provenance().keys() == {"model", "dtype", "revision", "sha256"}


def test_heads_with_the_same_model_share_it_until_the_last_is_closed(folder):
    first, second, half = ToyHead(folder), ToyHead(folder), ToyHead(folder, dtype="bfloat16")
    other = OtherHead(folder)
    for head in (first, second, half, other):
        head(batch())
    assert first._shared is second._shared
    assert len({id(head._shared) for head in (first, half, other)}) == 3
    assert (ToyHead.builds, OtherHead.builds) == (2, 1)

    module = weakref.ref(first._shared.module)
    first.close()
    first.close()
    gc.collect()
    assert module() is not None
    second.close()
    gc.collect()
    assert module() is None
    first(batch())  # loads again
    assert ToyHead.builds == 3


def test_threads_load_once(folder):
    head = ToyHead(folder)
    twin = ToyHead(folder)
    gate = threading.Barrier(4)
    scores: list[torch.Tensor] = []

    def work(mine):
        gate.wait()
        scores.append(mine(batch()))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in (head, head, twin, twin)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ToyHead.builds == 1
    assert all(torch.equal(score, scores[0]) for score in scores)
    assert len(scores) == 4


def test_offload_goes_to_the_cpu_and_the_next_batch_comes_back(folder):
    head, twin = ToyHead(folder), ToyHead(folder)
    head.offload()  # nothing loaded: nothing to do
    head.device = twin.device = torch.device("cuda:0")  # `Toy.to` only writes down where to
    head.load()
    twin.load()
    module = head._shared.module
    module.moves.clear()
    head.offload()
    head.offload()
    assert module.moves == ["cpu"]
    head(batch())
    twin(batch())
    assert module.moves == ["cpu", "cuda:0"]
    twin.offload()  # what one offloads is offloaded for all
    head(batch())
    assert module.moves == ["cpu", "cuda:0", "cpu", "cuda:0"]


def test_a_model_that_does_not_fit_goes_back_to_the_cpu(folder, monkeypatch):
    head = ToyHead(folder)
    head.load()
    head.device = torch.device("cuda:0")
    moves = []

    def to(self, device):
        moves.append(str(device))
        if str(device) == "cuda:0":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self

    monkeypatch.setattr(Toy, "to", to)
    with pytest.raises(RewardError, match=r'"toy" failed: The model does not fit on cuda:0\.'):
        head.load()
    assert moves == ["cuda:0", "cpu"]
    head.device = torch.device("cpu")
    assert head(batch()).isfinite().all()


def test_no_memory_for_a_batch_is_an_error_that_says_what_to_do(folder):
    head = ToyHead(folder, batch_size=2)
    head.fail = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RewardError, match=r"for 2 images at once\. Lower `batch_size`") as caught:
        head(batch())
    assert [index for index, _ in caught.value.samples] == [0, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_an_error(folder, value):
    class Broken(ToyHead):
        def _score_batch(self, module, images, prompts):
            scores = torch.zeros(len(images))
            scores[-1] = value
            return scores

    with pytest.raises(RewardError, match=f"should be finite. Found {value}") as caught:
        Broken(folder, batch_size=2)(batch(4))
    assert caught.value.samples == ((1, "prompt 1"),)


def test_a_wrong_number_of_scores_is_an_error(folder):
    class Broken(ToyHead):
        def _score_batch(self, module, images, prompts):
            return torch.zeros(len(images) + 1)

    with pytest.raises(RewardError, match=r"one score per image \(5\). Found the shape \[6\]"):
        Broken(folder)(batch())


def test_autocast_around_the_call_changes_nothing(folder):
    head = ToyHead(folder)
    wanted = head(batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(batch()), wanted)


def test_loading_leaves_gradients_off_and_texts_are_refused(folder):
    head = ToyHead(folder)
    head.load()
    assert not any(p.requires_grad for p in head._shared.module.parameters())
    with pytest.raises(RewardError, match="scores images"):
        head(RewardBatch(prompts=["a"], texts=["b"]))


def cached(folder: str, root: Path) -> Path:
    """Return a snapshot as the hub's cache has it: links to blobs called by their SHA-256."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    content = (Path(folder) / "model.safetensors").read_bytes()
    blob = blobs / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(blob)
    return snapshot


def test_of_the_hubs_files_the_name_is_the_digest_unless_one_is_expected(
    folder, tmp_path, monkeypatch
):
    """Of 16 GB it is known at once; whoever names a digest has the files read."""
    snapshot = cached(folder, tmp_path / "models--a--b")
    digest = (snapshot / "model.safetensors").resolve().name
    read, count = hashlib.file_digest, []
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: count.append(args) or read(*args))
    by_name = ToyHead(str(snapshot))
    by_name.load()
    assert by_name.provenance()["sha256"] == digest
    assert count == []
    by_content = ToyHead(str(snapshot), sha256=digest)
    by_content.load()
    assert len(count) == 1, "although another head had loaded it"
    ToyHead(folder).load()
    assert len(count) == 2, "another folder's file has another name"
    by_name.close()
    by_content.close()
    blob = (snapshot / "model.safetensors").resolve()
    changed = bytearray(blob.read_bytes())
    changed[-1] ^= 1
    blob.write_bytes(changed)
    with pytest.raises(RewardError, match=f"expected is {digest}"):
        ToyHead(str(snapshot), sha256=digest).load()


def test_the_expected_digest_is_checked_before_anything_is_built(folder):
    right = ToyHead(folder)
    right.load()
    digest = right.provenance()["sha256"]
    ToyHead(folder, sha256=digest.upper()).load()
    with pytest.raises(RewardError, match=f"their SHA-256 is {digest}, expected is 00ff"):
        ToyHead(folder, sha256="00ff").load()  # although the module is there already
    right.close()
    gc.collect()
    builds = ToyHead.builds
    with pytest.raises(RewardError, match="set `sha256` to their digest"):
        ToyHead(folder, sha256="00ff").load()
    assert ToyHead.builds == builds


def test_missing_weights_and_failures_of_any_kind_name_the_head(tmp_path, folder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RewardError, match=r'"toy" failed: The model .* lacks weights'):
        ToyHead(str(empty)).load()

    class Broken(ToyHead):
        def _build(self, weights):
            raise OSError("disk gone")

    with pytest.raises(RewardError, match='"toy" failed: OSError: disk gone'):
        Broken(folder).load()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, r"one of float32, bfloat16, float16. Found `dtype = 'float8'`\."),
        ({"batch_size": 0}, r"Found `batch_size = 0`\."),
        ({"revision": "v1"}, r"Parameter `revision` should be left out"),
    ],
)
def test_wrong_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ToyHead(folder, **options)


def test_devices(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"auto or a torch device. Found `device = 'gpu'`\."):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(ValueError, match=f"Found `device = '{name}'`"):
            pick_device(name)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == pick_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 2)
    assert pick_device("cuda:3") == torch.device("cuda", 3)
    with pytest.raises(ValueError, match="of which torch sees 4"):
        pick_device("cuda:4")
