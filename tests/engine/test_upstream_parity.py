"""Greedy text of the default model is, token for token, what upstream's llama-completion gives.

llama-completion is built from the same pinned source with the same flags (cached; see
scripts/_env.py). It prints text, not token ids, but its debug log has a line between any two
tokens, and so tells where one ends. (Its session file lists ids, but asking for one makes it
compute the prompt's last token apart from the rest, which changes the logits.)
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from triollama.sync import Llama

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

N_PREDICT = 48
N_CTX = 512
N_BATCH = 256
N_UBATCH = 128
THREADS = 2

PROMPTS = {
    "story": "Once upon a time, in a village by the sea,",
    "list": "The four seasons of the year are:\n1.",
    "code": "def fibonacci(n):\n    ",
    "french": "La capitale de la France est",
    # Longer than a ubatch, so that the prompt is computed in more than one piece.
    "long": "".join(f"{i} times {i} is {i * i}. " for i in range(2, 24)) + "24 times 24 is",
}


TIME = r"\d\.\d\d\.\d{3}\.\d{3} [A-Z] "  # minutes, seconds, ..., level


@pytest.fixture(scope="module")
def completion_program() -> Path:
    from benches._upstream import tool

    return tool("llama-completion")


def complete(program: Path, model: Path, prompt: str, folder: Path) -> list[str]:
    """The text of each token that llama-completion generates."""
    (folder / "prompt.txt").write_text(prompt)
    log = folder / "log.txt"
    command = [
        program, "--model", model, "--file", folder / "prompt.txt", "-no-cnv",
        "--temp", "0", "--repeat-penalty", "1.0", "--n-predict", N_PREDICT, "--seed", "1",
        "--ctx-size", N_CTX, "--batch-size", N_BATCH, "--ubatch-size", N_UBATCH,
        "--threads", THREADS, "--threads-batch", THREADS, "--simple-io", "--no-warmup",
        "--verbose", "--log-file", log, "--log-colors", "off",
    ]  # fmt: skip
    done = subprocess.run(
        [str(item) for item in command], capture_output=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    # "n_remain" is logged once a token is sampled, then its text stands up to the next entry.
    tail = re.split(rf"{TIME}n_remain: \d+\n", log.read_text())[1:]
    pieces = [re.split(TIME, part)[0] for part in tail]
    pieces[-1] = pieces[-1].removesuffix("\n\n")  # with which the program ends its output
    text = done.stdout.decode()
    assert text.rstrip("\n") == (prompt + "".join(pieces)).rstrip("\n")
    return pieces


@pytest.fixture(scope="module")
def llama(default_model_path: Path) -> Llama:
    return Llama(
        default_model_path,
        n_ctx=N_CTX,
        n_batch=N_BATCH,
        n_ubatch=N_UBATCH,
        threads=THREADS,
        batch_threads=THREADS,
        model_options={"repack": "ggml"},
    )


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_equal_upstreams(
    name: str, llama: Llama, completion_program: Path, default_model_path: Path, tmp_path: Path
) -> None:
    prompt = PROMPTS[name]
    theirs = complete(completion_program, default_model_path, prompt, tmp_path)
    ours = llama.generate(prompt, max_tokens=N_PREDICT, temperature=0.0, repeat_penalty=1.0)
    assert len(theirs) == N_PREDICT
    assert [llama.vocab.piece(token).decode() for token in ours.tokens] == theirs
    assert ours.text == "".join(theirs)


def test_prompts_are_of_the_lengths_they_are_for(llama: Llama) -> None:
    lengths = {name: len(llama.tokenize(prompt)) for name, prompt in PROMPTS.items()}
    assert lengths["long"] > N_UBATCH
    assert max(lengths.values()) + N_PREDICT <= N_CTX
