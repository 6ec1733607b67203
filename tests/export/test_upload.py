"""An export is sent to the hub as the hub's own client does it: to a server that answers as one."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moa_diffusion.export.upload import check_repository, upload
from moa_diffusion.types import ConfigError


@dataclass
class Hub:
    """What a hub has been told, and the answers that it gives instead of its own."""

    address: str = ""
    made: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    refuses: int = 0  # the status that making a repository ends with; 0 for none


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the parts of its API that sending files takes."""
    told = Hub()

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            told.tokens.add(self.headers["Authorization"])
            if self.path == "/api/repos/create":
                told.made.append(json.loads(body))
                answer = {"url": f"{told.address}/somebody/{told.made[-1]['name']}"}
                self.give(answer, told.refuses or 200)
            elif self.path == "/api/validate-yaml":
                self.give({"errors": [], "warnings": []})
            elif self.path == "/api/models/somebody/mine/preupload/main":
                names = [file["path"] for file in json.loads(body)["files"]]
                ways = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                self.give({"files": ways})
            elif self.path == "/api/models/somebody/mine/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        told.files[line["value"]["path"]] = content
                address = f"{told.address}/somebody/mine/commit/b"
                self.give({"success": True, "commitUrl": address, "commitOid": "b"})
            else:
                self.give({"error": self.path}, 404)

        def give(self, answer: object, status: int = 200) -> None:
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        told.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", told.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield told
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "README.md").write_text("---\nlibrary_name: diffusers\n---\n# mine\n")
    (tmp_path / "images" / "0.png").write_bytes(b"picture")
    return tmp_path


@pytest.mark.parametrize("private", [False, True])
def test_all_files_arrive(hub: Hub, folder: Path, private: bool) -> None:
    assert upload(folder, "somebody/mine", private=private) == f"{hub.address}/somebody/mine"
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("mine", "somebody")
    assert (made.get("visibility") == "private" or made.get("private", False)) == private
    assert hub.tokens == {"Bearer hf_of_a_test"}
    written = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}
    assert hub.files == {name: path.read_bytes() for name, path in written.items()}


def test_a_refusal_says_what_to_do(hub: Hub, folder: Path) -> None:
    hub.refuses = 403
    with pytest.raises(ConfigError, match=r"(?s)--push_to_hub: .*`hf auth login`.*`hf upload some"):
        upload(folder, "somebody/mine", private=False)
    assert hub.files == {}


def test_offline_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="OfflineModeIsEnabled"):
        upload(folder, "somebody/mine", private=False)


def test_a_name_that_is_none_is_told_before_anything_is_written() -> None:
    check_repository("somebody/mine")
    with pytest.raises(ConfigError, match="--push_to_hub: should be a repository"):
        check_repository("some/body/mine")
