"""Upstream's own programs on the same files: llama-perplexity and llama-completion.

They are built from the same pinned source with the same flags (cached; see scripts/_env.py).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama import _engine
from triollama.sync import Llama
from triollama.tuning import Encoder, check_adapter, evaluate_text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

pytestmark = [pytest.mark.slow, pytest.mark.upstream]

N_CTX = 256
PROMPT = "The lighthouse keeper had not spoken to anyone for a year, until one morning"


def run_tool(name: str, *arguments: object) -> str:
    """What a program of upstream's prints, to both streams."""
    from benches._upstream import tool

    done = subprocess.run(
        [str(tool(name)), *map(str, arguments), "--threads", "2", "--no-warmup"],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    output = (done.stdout + done.stderr).decode(errors="replace")
    assert done.returncode == 0, output[-2000:]
    return done.stdout.decode() if name == "llama-completion" else output


def upstream_perplexity(model: Path, text: Path, n_ctx: int, *more: object) -> tuple[float, int]:
    """Perplexity, and the number of windows."""
    for _ in range(3):  # upstream's logger may lose its last line when the program ends
        output = run_tool("llama-perplexity", "-m", model, "-f", text, "-c", n_ctx, *more)
        estimate = re.search(r"Final estimate: PPL = ([\d.]+)", output)
        windows = re.search(r"calculating perplexity over (\d+) chunks", output)
        if estimate and windows:
            break
    assert estimate and windows, output[-2000:]
    return float(estimate[1]), int(windows[1])


def adapter_for(model: Path, path: Path) -> None:
    """An adapter that has learned an ending of PROMPT by heart."""
    with _engine.Model(model, vocab_only=True) as vocabulary:
        text = ", he opened the door and said good morning to the sea, twice."
        example = Encoder(vocabulary.vocab).completion(PROMPT, text)
    labels = np.append(np.where(example.targets[1:], example.tokens[1:], -1), -1)
    with _engine.Trainer(model, rank=4, alpha=8.0, threads=2) as trainer:
        for _ in range(5):
            trainer.forward_backward(example.tokens, labels.astype(np.int32))
            trainer.adamw_step(1e-3)
        trainer.save_adapter(path)


@pytest.fixture(scope="module")
def adapter(default_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upstream") / "adapter.gguf"
    adapter_for(default_model_path, path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 1,500 tokens of English."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    answers = []
    for line in (ROOT / "data" / "chats.jsonl").read_text(encoding="utf-8").splitlines()[:90]:
        answers += [m["content"] for m in json.loads(line)["messages"] if m["role"] == "assistant"]
    path.write_text("\n".join(answers)[:6000], encoding="utf-8")
    return path


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_perplexity_of_a_tiny_model(tiny: Any, text: Path, arch: str) -> None:
    """F32 weights: four digits, which is what llama-perplexity prints of large numbers."""
    path = tiny(arch)
    expected, windows = upstream_perplexity(path, text, 128)
    with _engine.Model(path, vocab_only=True) as model, _engine.Trainer(path, rank=1) as trainer:
        found = evaluate_text(trainer, model.vocab, text.read_text(encoding="utf-8"), n_ctx=128)
    assert found.total_examples == windows
    assert found.perplexity == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("adapted", [False, True])
def test_perplexity_of_the_default_model(
    default_model_path: Path, text: Path, adapter: Path, adapted: bool
) -> None:
    """Q4_K_M: upstream quantises activations to 8 bits, the exact mode does not."""
    more = ("--lora", adapter) if adapted else ()
    expected, windows = upstream_perplexity(default_model_path, text, N_CTX, *more)
    with (
        _engine.Model(default_model_path, vocab_only=True) as model,
        _engine.Trainer(default_model_path, rank=4, alpha=8.0, threads=2) as trainer,
    ):
        if adapted:
            trainer.load_adapter(adapter)
        content = text.read_text(encoding="utf-8")
        found = evaluate_text(trainer, model.vocab, content, n_ctx=N_CTX)
    print(f"\nllama-perplexity {expected:.4f}, ours {found.perplexity:.4f}, {windows} windows")
    assert found.total_examples == windows >= 4
    assert found.perplexity == pytest.approx(expected, rel=0.01)


def test_llama_completion_loads_our_adapter(
    default_model_path: Path, adapter: Path, tmp_path: Path
) -> None:
    assert check_adapter(adapter, default_model_path).is_compatible
    (tmp_path / "prompt.txt").write_text(PROMPT)
    settings = [
        "-m", default_model_path, "--file", tmp_path / "prompt.txt", "-no-cnv", "--temp", "0",
        "--repeat-penalty", "1.0", "--n-predict", 40, "--seed", "1", "--ctx-size", 512,
        "--batch-size", 256, "--ubatch-size", 128, "--threads-batch", 2, "--simple-io",
        "--log-verbosity", 0,
    ]  # fmt: skip
    bare = run_tool("llama-completion", *settings)
    theirs = run_tool("llama-completion", *settings, "--lora", adapter)
    assert theirs != bare
    with Llama(
        default_model_path, n_ctx=512, n_batch=256, n_ubatch=128, threads=2, batch_threads=2,
        model_options={"repack": "ggml"},
    ) as llama:  # fmt: skip
        loaded = _engine.Adapter(llama.model, adapter)
        _engine.set_adapters(llama.context, [(loaded, 1.0)])
        ours = llama.generate(PROMPT, max_tokens=40, temperature=0.0, repeat_penalty=1.0)
        _engine.set_adapters(llama.context, [])
        loaded.close()
    print(f"\n{ours.text!r}")
    assert theirs.removeprefix(PROMPT).rstrip("\n").startswith(ours.text.rstrip("\n"))
    assert len(ours.tokens) > 10
