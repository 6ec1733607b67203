"""Tensors are read without running code, in every format, and each is accounted for."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model_files import TENSORS, write, write_shards
from rewards import RewardError
from rewards.pretrained.locate import find_weights
from rewards.pretrained.tensors import load_strictly, read_tensor, read_tensors


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "safetensors", "bin"])
def test_all_formats_read_the_same(tmp_path, kind):
    whole = [kind] if "." in kind else []
    folder = write(tmp_path / "model", ["config.json", *whole])
    if not whole:
        write_shards(folder, kind)
    found = read_tensors(find_weights(str(folder)))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], TENSORS[key]) for key in TENSORS)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "safetensors", "bin"])
def test_one_tensor_is_read_alone(tmp_path, kind, monkeypatch):
    whole = [kind] if "." in kind else []
    folder = write(tmp_path / "model", ["config.json", *whole])
    if not whole:
        write_shards(folder, kind)
    found = find_weights(str(folder))
    monkeypatch.setattr("safetensors.torch.load_file", None)  # reads all of a file
    for name in TENSORS:
        assert torch.equal(read_tensor(found, name), TENSORS[name])
    with pytest.raises(RewardError, match="lack the tensor `gone`"):
        read_tensor(found, "gone")
    if kind == "model.safetensors":
        (folder / kind).write_bytes(b"damaged")
        with pytest.raises(RewardError, match="holds no readable weights"):
            read_tensor(found, "gone")


def test_the_format_of_torch_before_1_6_is_read(tmp_path):
    file = tmp_path / "old.pth"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    assert read_tensors(find_weights(str(file), required=())).keys() == TENSORS.keys()


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "holds no readable weights"),
        (b"", "holds no readable weights .*Fetch it again"),
        (Bomb(), "is damaged, or holds other things than tensors"),
        ([1, 2], "should hold tensors by name"),
        ({"a": 1}, "should hold tensors by name"),
    ],
)
def test_damaged_and_dangerous_files_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "head.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(RewardError, match=message):
        read_tensors(find_weights(str(file), required=()))
    assert not (tmp_path / "exploded").exists()


def test_a_name_in_two_shards_is_refused(folder):
    (folder / "model.safetensors").unlink()
    names = write_shards(folder, "safetensors")
    save_file(TENSORS, folder / names[1])
    with pytest.raises(RewardError, match=r"a\.weight stand in two of the files"):
        read_tensors(find_weights(str(folder)))


class Small(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.a = nn.Linear(width, 2, bias=False)
        self.b = nn.ParameterDict({"bias": torch.zeros(2)})


def test_strict_loading_accounts_for_every_name(folder):
    weights = find_weights(str(folder))
    with torch.device("meta"):
        module = Small()
    load_strictly(module, weights)
    assert torch.equal(module.a.weight, TENSORS["a.weight"])
    assert module.b["bias"].device.type == "cpu"

    with pytest.raises(RewardError, match=r"unexpected: b\.bias\.$"):
        load_strictly(nn.ModuleDict({"a": Small().a}), weights)
    load_strictly(nn.ModuleDict({"a": Small().a}), weights, ignore=("bias",))
    load_strictly(Small().a, weights, prefix="a.")
    named = nn.ModuleDict({"c": Small().a, "b": Small().b})
    load_strictly(named, weights, stored_as=lambda name: name.replace("c.", "a."))
    assert torch.equal(named["c"].weight, TENSORS["a.weight"])
    with pytest.raises(RewardError, match=r"missing: a\.kernel; unexpected: a\.weight\.$"):
        load_strictly(Small().a, weights, prefix="a.", stored_as=lambda name: "kernel")
    with pytest.raises(RewardError, match=r"missing: c\.bias, c\.weight\.$"):
        module = Small()
        module.c = nn.Linear(1, 1)
        load_strictly(module, weights)
    with pytest.raises(
        RewardError, match=r"of another shape: a\.weight \(\[2, 3\] instead of \[2, 4\]\)"
    ):
        load_strictly(Small(width=4), weights)


def test_only_some_of_many_names_are_shown(folder):
    module = nn.ModuleDict({f"m{i:02}": nn.Linear(1, 1, bias=False) for i in range(20)})
    with pytest.raises(RewardError, match=r"m05\.weight and 14 more; unexpected"):
        load_strictly(module, find_weights(str(folder)))
