"""Upstream's own programs, built once from the pinned source with the flags of our build."""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
from pathlib import Path

from _env import build_upstream_tools

# One build serves the benchmarks and the parity tests: what shapes it is all of these names.
TOOLS = ("llama-bench", "llama-completion", "llama-perplexity")


@functools.cache
def tool(name: str) -> Path:
    """The path of one of ``TOOLS``, built now if it was not before."""
    folder = build_upstream_tools(TOOLS)
    path = folder / (f"{name}.exe" if os.name == "nt" else name)
    if not path.exists():
        raise FileNotFoundError(f"{name} is not among what was built in {folder}")
    return path


def llama_bench(
    model: Path, *, n_prompt: int, n_gen: int, reps: int, threads: int, n_batch: int, n_ubatch: int
) -> float:
    """Tokens a second that llama-bench measures: the median of its own repeats."""
    done = subprocess.run(
        [
            str(tool("llama-bench")), "--model", str(model), "--output", "json",
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
