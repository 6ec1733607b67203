"""Finding, fetching, checking and reading the files of models."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from model_files import write, write_shards
from rewards import RewardError
from rewards.pretrained import locate
from rewards.pretrained.locate import Weights, check_name, find_weights
from rewards.pretrained.tensors import read_tensors
from rewards.pretrained.tokens import find_tokenizer
from waiting import HANG

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_folder_and_a_file_in_it(folder, monkeypatch):
    found = find_weights(str(folder))
    assert found == Weights(
        folder=folder,
        model=str(folder),
        revision="local",
        files=("model.safetensors",),
        beside=("config.json",),
    )
    assert found.has("config.json", "model.safetensors")
    assert not found.has("config.json", "tokenizer.json")
    write(folder, ["head.pth"])
    assert find_weights(str(folder / "head.pth"), required=()).files == ("head.pth",)
    assert find_weights(str(folder), tensors=False).files == ()

    monkeypatch.chdir(folder.parent)
    for name in ("./model", "model"):  # what exists is never taken for a hub model
        assert find_weights(name).folder == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_weights("~/model").folder == folder


def test_safetensors_come_before_pickles_and_whole_files_before_shards(folder):
    write(folder, ["pytorch_model.bin"])
    write_shards(folder, "safetensors")
    assert find_weights(str(folder)).files == ("model.safetensors",)
    (folder / "model.safetensors").unlink()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert find_weights(str(folder)).files == names
    (folder / "model.safetensors.index.json").unlink()
    assert find_weights(str(folder)).files == ("pytorch_model.bin",)


def test_a_folder_inside_an_installed_package():
    model = "package://moa_diffusion/tiny/pipeline/text_encoder"
    found = find_weights(model)
    assert found.model == model
    assert found.revision.startswith("moa-diffusion ")
    assert found.folder.parts[-3:] == ("tiny", "pipeline", "text_encoder")
    assert len(read_tensors(found)) > 10
    one = find_weights(f"{model}/model.safetensors")
    assert (one.folder, one.files, one.digest()) == (found.folder, found.files, found.digest())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "names a file or folder that does not exist"),
        ("/nowhere/model", "names a file or folder that does not exist"),
        ("~/nowhere", "names a file or folder that does not exist"),
        ("", "should name a model"),
        (None, "should name a model"),
        ("a b", "should be a folder, a file"),
        ("a/b/c", "should be a folder, a file"),
        ("https://huggingface.co/a/b", "should be a folder, a file"),
        ("a/b:", "should be a folder, a file"),
        ("a/b:../c", "should be a folder, a file"),
        ("package://no_such_package/x", "'no_such_package', which is not installed"),
        ("package://moa-diffusion/x", "'moa-diffusion', which is not installed"),
        ("package://moa_diffusion/nowhere", "`moa_diffusion` does not have"),
    ],
)
def test_names_that_cannot_be(model, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_name(model, option="head")
    assert "Parameter `head`" in str(caught.value)
    with pytest.raises(ValueError, match=message):
        find_weights(model)


def test_hub_names_pass_without_network_and_local_ones_take_no_revision(folder):
    for name in ("gpt2", "owner/name", "owner/name.v1:folder/head.pth"):
        check_name(name, revision="v1")
    with pytest.raises(ValueError, match=r"left out for a folder or file. Found `revision = 'v1'"):
        check_name(str(folder), revision="v1")


def test_missing_files_are_listed(tmp_path, folder):
    empty = write(tmp_path / "empty", ["other.json"])
    with pytest.raises(RewardError, match=r"lacks `config\.json` and weights \(model\.safetensors"):
        find_weights(str(empty))
    with pytest.raises(RewardError, match=r"lacks `vocab\.json` in"):
        find_weights(str(folder), required=["config.json", "vocab.json"])
    (folder / "model.safetensors").unlink()
    (folder / write_shards(folder, "safetensors")[1]).unlink()
    with pytest.raises(RewardError, match=r"lacks `model-00002-of-00002\.safetensors` in"):
        find_weights(str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "should be a JSON object"),
        ("[]", "should be a JSON object"),
        ("{}", "should be a JSON object.*weight_map"),
        ('{"weight_map": {"a": "../secret.bin"}}', "names files outside its folder"),
    ],
)
def test_broken_indices(tmp_path, text, message):
    folder = write(tmp_path / "model", ["config.json"])
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(RewardError, match=message):
        find_weights(str(folder))


def test_digests_can_be_recomputed_by_sha256sum(folder):
    one = find_weights(str(folder))
    assert one.digest() == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "model.safetensors").unlink()
    names = write_shards(folder, "safetensors")
    listing = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, check=True)
    assert find_weights(str(folder)).digest() == hashlib.sha256(listing.stdout).hexdigest()


def test_files_beside_the_tensors_count_where_no_commit_does(folder, tmp_path, monkeypatch):
    write(folder, ["vocab.json", "README.md"])
    options = {"optional": ["vocab.json", "merges.txt", "config.json"]}
    found = find_weights(str(folder), **options)
    assert found.beside == ("config.json", "vocab.json")
    listed = ["sha256sum", *found.beside]
    listing = subprocess.run(listed, cwd=folder, capture_output=True, check=True)
    origin = {"revision": "local", "files_sha256": hashlib.sha256(listing.stdout).hexdigest()}
    assert found.origin() == origin
    (folder / "README.md").write_text("others")
    assert find_weights(str(folder), **options).origin() == origin
    (folder / "vocab.json").write_text("[]")
    assert find_weights(str(folder), **options).origin() != origin
    alone = find_weights(str(folder / "model.safetensors"), required=())
    assert alone.origin("head_") == {"head_revision": "local"}
    package = find_weights("package://moa_diffusion/tiny/pipeline/text_encoder")
    assert package.origin().keys() == {"revision", "files_sha256"}

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    write(repository / "snapshots" / COMMIT, ["config.json", "model.safetensors"])
    assert find_weights("owner/name", revision=COMMIT).origin() == {"revision": COMMIT}


def test_another_digest_than_expected_is_an_error(folder):
    found = find_weights(str(folder))
    digest = found.digest()
    found.expect(None, digest)
    found.expect(digest.upper(), digest)
    with pytest.raises(RewardError, match=f"{digest}, expected is abc.*set `head_sha256`"):
        found.expect("ABC", digest, option="head_sha256")


def test_a_cached_hub_model_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"
    write(repository / "snapshots" / COMMIT, ["config.json", "model.safetensors"])
    write(repository / "refs", ["main"])
    (repository / "refs" / "main").write_text(COMMIT)
    found = find_weights("owner/name")
    assert (found.revision, found.files) == (COMMIT, ("model.safetensors",))
    assert find_weights("owner/name", revision=COMMIT).folder == found.folder
    assert find_weights("owner/name:model.safetensors").files == ("model.safetensors",)
    # What another program left there in part is not taken for the whole.
    with pytest.raises(RewardError, match=r"lacks `vocab\.json` .*`hf download owner/name --incl"):
        find_weights("owner/name", required=["config.json", "vocab.json"])
    message = r"lacks any of tokenizer\.json, vocab\.json, .*`hf download owner/name --include"
    with pytest.raises(RewardError, match=message):
        find_tokenizer("owner/name")

    def fetched(place: Any, revision: str | None, names: list[str]) -> Path:
        return write(found.folder, ["tokenizer.json"] if "tokenizer.json" in names else [])

    monkeypatch.setattr(locate, "_fetched", fetched)
    assert find_tokenizer("owner/name").has("tokenizer.json")


def test_without_network_the_error_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RewardError) as caught:
        find_weights("owner/name", revision="v2", optional=["vocab.json"])
    cause = caught.value.cause
    assert "`owner/name` is not in the local cache and could not be fetched" in cause
    assert (
        '`hf download owner/name --revision v2 --include "config.json" --include "vocab.json" '
        '--include "model.safetensors"' in cause
    )
    assert "Or name a local folder" in cause


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as fetching a snapshot takes."""

    repositories: ClassVar[dict[str, Path]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, *args):
        pass

    def refuse(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, content: bytes, kind: str, etag: str = "x"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        path = self.path.partition("?")[0]
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        repository, action, revision = "/".join(parts[:2]), parts[2], parts[3]
        if repository == "owner/gated":
            return self.refuse(403, "GatedRepo")
        if repository not in self.repositories:
            return self.refuse(401, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        folder = self.repositories[repository]
        if api and action == "tree":
            listing = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name}
                for p in sorted(folder.iterdir())
            ]
            return self.answer(json.dumps(listing).encode(), "application/json")
        if api:
            about = {"id": repository, "sha": COMMIT, "siblings": []}
            return self.answer(json.dumps(about).encode(), "application/json")
        if self.command == "GET":
            self.asked.append(f"{repository}/{parts[4]}")
        return self.answer((folder / parts[4]).read_bytes(), "application/octet-stream", parts[4])

    do_HEAD = do_GET


CLIENT = """
import json, sys
from rewards import RewardError
from rewards.pretrained.locate import find_weights
for model, revision in json.load(sys.stdin):
    try:
        found = find_weights(model, revision=revision, optional=["merges.txt"])
        print(json.dumps([found.revision, found.files, found.digest()]))
    except RewardError as error:
        print(json.dumps(error.cause))
"""


def test_fetching_from_a_hub(tmp_path):
    """Over real HTTP, in a process of its own: the hub's address is read at import."""
    safe = write(tmp_path / "a", ["config.json", "model.safetensors", "pytorch_model.bin"])
    pickled = write(tmp_path / "b", ["config.json", "pytorch_model.bin", "merges.txt"])
    lacking = write(tmp_path / "c", ["config.json", "README.md"])
    Hub.repositories = {"owner/safe": safe, "owner/pickled": pickled, "owner/lacking": lacking}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wanted = [
        ("owner/safe", None),
        ("owner/pickled", COMMIT),
        ("owner/lacking", None),
        ("owner/gated", None),
        ("owner/nothing", None),
        ("owner/safe", "v9"),
        ("owner/safe", None),
    ]
    try:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT],
            input=json.dumps(wanted),
            env={
                **os.environ,
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
            },
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            timeout=HANG,
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
    safe_found, pickled_found, lacking_told, gated, nothing, revision, again = [
        json.loads(line) for line in done.stdout.splitlines()
    ]
    assert safe_found == [COMMIT, ["model.safetensors"], find_weights(str(safe)).digest()]
    assert pickled_found == [COMMIT, ["pytorch_model.bin"], find_weights(str(pickled)).digest()]
    assert "lacks weights (model.safetensors" in lacking_told
    assert "accepted its licence" in gated
    assert "https://huggingface.co/owner/gated" in gated
    assert "no model `owner/nothing` that you may read" in nothing
    assert "has no revision `v9`" in revision
    assert again == safe_found
    # Each file once, and never the pickle beside the safetensors.
    assert sorted(Hub.asked) == [
        "owner/lacking/config.json",
        "owner/pickled/config.json",
        "owner/pickled/merges.txt",
        "owner/pickled/pytorch_model.bin",
        "owner/safe/config.json",
        "owner/safe/model.safetensors",
    ]
