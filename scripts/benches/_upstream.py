"""Upstream's own programs, built once from the pinned source with the flags of our build."""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

from _env import SetupError, build_upstream_tools
from fetch_llama_cpp import FetchError

# One build serves the benchmarks and the parity tests: what shapes it is all of these names.
TOOLS = (
    "llama-batched-bench", "llama-bench", "llama-completion", "llama-finetune", "llama-perplexity",
)  # fmt: skip


@functools.cache
def tool(name: str) -> Path:
    """The path of one of ``TOOLS``, built now if it was not before."""
    folder = build_upstream_tools(TOOLS)
    path = folder / (f"{name}.exe" if os.name == "nt" else name)
    if not path.exists():
        raise FileNotFoundError(f"{name} is not among what was built in {folder}")
    return path


@functools.cache
def server_program() -> Path:
    """llama-server, which is built by itself: nothing else needs the minutes that it takes."""
    folder = build_upstream_tools(["llama-server"])
    return folder / ("llama-server.exe" if os.name == "nt" else "llama-server")


def llama_bench(
    model: Path,
    *,
    n_prompt: int,
    n_gen: int,
    reps: int,
    threads: int,
    n_batch: int,
    n_ubatch: int,
    program: str | None = None,
) -> float:
    """Tokens a second that llama-bench measures, or another ``program`` of its kind: the median of
    its own repeats."""
    done = subprocess.run(
        [
            program or str(tool("llama-bench")), "--model", str(model), "--output", "json",
            "--n-prompt", str(n_prompt), "--n-gen", str(n_gen), "--repetitions", str(reps),
            "--threads", str(threads), "--batch-size", str(n_batch), "--ubatch-size", str(n_ubatch),
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"llama-bench ended with {done.returncode}:\n{done.stderr[-2000:]}")
    (result,) = json.loads(done.stdout)
    return float(statistics.median(result["samples_ts"]))


def finetune(model: Path, *, n_tokens: int, threads: int) -> tuple[float, str]:
    """Tokens a second of llama-finetune over rows of ``n_tokens``, a multiple of 256.

    Where it does not run, 0.0 and the reason. It trains all weights, in F32; LoRA it has not.
    """
    try:
        program = tool("llama-finetune")
    except (SetupError, FetchError) as error:
        return 0.0, f"it cannot be built: {error}"
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("The quick brown fox jumps over the lazy dog. " * n_tokens)
        done = subprocess.run(
            [
                str(program), "--model", str(model), "--file", str(text), "--ctx-size",
                str(n_tokens), "--batch-size", str(n_tokens), "--ubatch-size", str(n_tokens),
                "--threads", str(threads), "--epochs", "1", "--flash-attn", "off",
                "--val-split", "0.05", "--output", str(Path(folder) / "out.gguf"),
            ],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        )  # fmt: skip
    lines = [line.strip() for line in re.split(r"[\r\n]", done.stderr + done.stdout)]
    if done.returncode != 0:
        where = next((s for s in lines if re.search(r"\.(c|cpp|h):\d+: ", s)), lines[-1])
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"{done.returncode}"
        return 0.0, f"it ends with {how}: {where}"
    # Each row ends with a line of the log, which begins with minutes, seconds, ms and us.
    stamps = re.findall(r"(\d+)\.(\d\d)\.(\d{3}\.\d{3}) I epoch", "\n".join(lines))
    times = [60 * int(m) + int(s) + 1e-6 * int(us.replace(".", "")) for m, s, us in stamps]
    return n_tokens * (len(times) - 1) / (times[-1] - times[0]), "all weights, in F32"
