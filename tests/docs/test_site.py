"""The documentation as a site, and that its reference leaves no public name out."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"

# What the reference shows as a whole, and what it leaves out: pieces that only the library puts
# together.
MODULES = ("triollama.errors", "triollama.tuning.errors")
INNER = {
    "triollama.files": {
        "FORMAT", "MAX_BYTES", "MAX_TITLE", "ContextSettings", "Format", "KVFile", "ModelIdentity",
        "adapters_key", "check_model", "check_text", "decode", "document_from", "encode",
        "known_params", "kv_folder", "kv_key", "read_kv", "remove_kv_except", "same_model",
        "saved_params", "tokens_key", "unknown_params", "write_document", "write_kv",
    },
    "triollama.models": {"DEFAULT_PACKAGE", "DEFAULT_SHA256"},
    "triollama.tuning": {
        "Encoder", "Example", "FREE_TO_CHANGE", "PreferenceExample", "Progress", "Row",
        "TrainingSession", "Tuning", "learning_rate_at", "pack_rows", "read_items", "read_jsonl",
        "row_of", "without_adapter",
    },
}  # fmt: skip


def shown() -> set[str]:
    text = "".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    return set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


@pytest.mark.parametrize(
    "module",
    ["triollama", *(f"triollama.{name}" for name in (
        "files", "lowlevel", "models", "server", "sync", "testing", "tuning"))],
)  # fmt: skip
def test_the_reference_has_every_public_name(module: str) -> None:
    if module == "triollama.server":
        pytest.importorskip("h11")
    package = importlib.import_module(module)
    names = {name.rpartition(".")[2] for name in shown()}
    for whole in MODULES:
        names |= set(importlib.import_module(whole).__all__)
    modules = {"chat", "errors", "lowlevel", "models", "sync", "testing", "tuning", "__version__"}
    assert set(package.__all__) - names - modules - INNER.get(module, set()) == set()


def test_the_reference_has_nothing_else() -> None:
    for name in shown():
        if name in MODULES or name.startswith("triollama.server."):
            continue
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name


def test_the_engine_s_docstrings_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its sources, as the extension has them."""
    pytest.importorskip("griffe", reason="the extra docs")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from engine_docs import EngineDocs
    from triollama import lowlevel

    found = EngineDocs()._found
    for name in lowlevel.__all__:
        text = inspect.cleandoc(getattr(lowlevel, name).__doc__ or "")
        assert text.endswith(found.get(name, "")), name  # after Cython's signature
        assert name in found or "\n" not in text, name
    logits = inspect.cleandoc(lowlevel.Context.logits.__doc__ or "")
    assert logits.endswith(found["Context.logits"]) and found["Context.logits"]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    for needed in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(needed, reason="the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "reference" / "trio" / "index.html").read_text(encoding="utf-8")
    assert "One native thread" in page or "Load a model and serve it" in page
    # Nothing is asked of other sites while a page is read.
    assert not re.findall(r'<(?:script|link)[^>]+(?:src|href)="https?://(?!127)', page)
