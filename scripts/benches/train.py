"""LoRA training beside PEFT: tokens a second, peak memory; and upstream's own llama-finetune.

Both sides train the same adapter (rank 8 on all seven matrices of every layer) on the same row of
random tokens, all labelled, from the same weights: the default model's GGUF file here, and its
weights dequantised to F32 in transformers' Gemma3ForCausalLM there. Each side has a process of its
own and two threads; a step is forward, backward and AdamW.

PEFT needs torch, transformers, peft and gguf: `python scripts/check.py --torch --co -q` installs
them into the checkout's environment, or name the Python of another in ``TRIOLLAMA_PEFT_PYTHON``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ._harness import Figure, Options, interleave, sample_figure
from ._upstream import finetune

PEFT_PYTHON = "TRIOLLAMA_PEFT_PYTHON"
WORKER = Path(__file__).with_name("_train_worker.py")
THREADS = 2
VOCABULARIES = (4096, 65536)  # of the tiny models that show that memory does not follow it
MB = 1e6


class Worker:
    """One side in its own process; see _train_worker.py."""

    def __init__(self, side: str, model: Path, n_tokens: int, n_vocab: int, **options: Any) -> None:
        environment = dict(os.environ)
        python = sys.executable
        if side == "peft":
            python = peft_python()
            environment.pop("GOMP_SPINCOUNT", None)  # as PyTorch would have it
        rng = random.Random(n_tokens)
        job = {
            "model": str(model),
            "tokens": [rng.randrange(8, n_vocab) for _ in range(n_tokens + 1)],
            "threads": THREADS,
            "rank": 8,
            "alpha": 16.0,
            "learning_rate": 1e-4,
            **options,
        }
        self.n_tokens = n_tokens
        self.losses: list[float] = []
        self.peak = 0.0
        self.growth = 0.0
        self.process = subprocess.Popen(
            [python, str(WORKER), side, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None  # asked for above
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side of the benchmark ended with {self.process.wait()}")
        return dict(json.loads(line))

    def rate(self, steps: int) -> float:
        """Take some steps; the median of their tokens a second."""
        assert self.process.stdin is not None  # asked for above
        print(steps, file=self.process.stdin, flush=True)
        answer = self._answer()
        self.losses += answer["losses"]
        self.peak, self.growth = answer["peak"], answer["growth"]
        return float(self.n_tokens / statistics.median(answer["seconds"]))

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with self.process:
            if error:
                self.process.kill()


def peft_python() -> str:
    """The Python that has PEFT; empty if there is none."""
    here = all(importlib.util.find_spec(name) for name in ("torch", "peft", "transformers"))
    return os.environ.get(PEFT_PYTHON) or (sys.executable if here else "")


def processor() -> str:
    """Its name, and what of it training may use."""
    name, features = platform.processor() or platform.machine(), ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines if ":" in line)
        values = {key.strip(): value.strip() for key, value in found.items()}
        name = values.get("model name", name)
        family, model = values.get("cpu family"), values.get("model")
        known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
        has = [one for one in known if one in values.get("flags", "").split()]
        features = f" (family {family}, model {model}; {', '.join(has)})"
    return f"{name}{features}, {os.cpu_count()} cores"


def figures(options: Options) -> Iterator[Figure]:
    from triollama import models
    from triollama._engine import training_kernels

    print(processor(), flush=True)
    model = models.default_model()
    if peft_python():
        for n_tokens, steps, speed, share, most in (
            (512, 1, 1.0, 1 / 8, 700.0),
            (128, 2, 0.9, 1 / 4, None),
        ):
            if options.wants(f"train.speed_{n_tokens}", f"train.memory_{n_tokens}_of_peft"):
                yield from beside_peft(options, model, n_tokens, steps, speed, share, most)
        modes = {"exact": {"precision": "exact"}}
        if "dots" in training_kernels():
            modes["dots"] = {"precision": "fast", "kernel": "dots"}
        for name, mode in modes.items():
            for n_tokens in (512, 128):
                if options.wants(f"train.{name}_{n_tokens}"):
                    yield in_mode(options, model, n_tokens, name, **mode)
    else:
        print(f"no PEFT here, nor {PEFT_PYTHON}: nothing is compared with it", file=sys.stderr)
    if options.wants("train.memory_of_vocabulary"):
        yield vocabulary(options)
    if options.wants("train.llama_finetune"):
        yield beside_finetune(options, model)


def beside_peft(
    options: Options,
    model: Path,
    n_tokens: int,
    steps: int,
    speed: float,
    share: float,
    most: float | None,
) -> Iterator[Figure]:
    n_vocab = 262144
    with (
        Worker("triollama", model, n_tokens, n_vocab, precision="fast") as ours,
        Worker("peft", model, n_tokens, n_vocab, attention="sdpa") as theirs,
    ):
        repeats = options.repeats_or(8)
        pairs = interleave(lambda: ours.rate(steps), lambda: theirs.rate(steps), repeats)
        if abs(ours.losses[0] - theirs.losses[0]) > 0.05:
            losses = f"{ours.losses[0]} and {theirs.losses[0]}"
            raise RuntimeError(f"the sides do not train the same: their first losses are {losses}")
        yield pairs.ratio(
            f"train.speed_{n_tokens}",
            target=speed,
            note=f"fast mode {statistics.median(pairs.a):.1f} tok/s, PEFT "
            f"{statistics.median(pairs.b):.1f}; {n_tokens} tokens, {THREADS} threads; loss after "
            f"{len(ours.losses)} steps {ours.losses[-1]:.4f} and {theirs.losses[-1]:.4f}",
        )
        note = f"peak of the process: {ours.peak / MB:.0f} MB, PEFT {theirs.peak / MB:.0f} MB"
        yield sample_figure(
            f"train.memory_{n_tokens}_of_peft",
            [ours.peak / theirs.peak],
            "ratio",
            target=share,
            at_least=False,
            note=note,
        )
        if most:
            yield sample_figure(
                f"train.memory_{n_tokens}", [ours.peak / MB], "MB", target=most, at_least=False
            )


def in_mode(options: Options, model: Path, n_tokens: int, name: str, **mode: Any) -> Figure:
    """Tokens a second over PEFT's, which computes in F32."""
    with (
        Worker("triollama", model, n_tokens, 262144, **mode) as ours,
        Worker("peft", model, n_tokens, 262144, attention="sdpa") as theirs,
    ):
        pairs = interleave(lambda: ours.rate(1), lambda: theirs.rate(1), options.repeats_or(6))
        return pairs.ratio(
            f"train.{name}_{n_tokens}",
            note=f"{' '.join(mode.values())} {statistics.median(pairs.a):.1f} tok/s, PEFT "
            f"{statistics.median(pairs.b):.1f}; losses differ by "
            f"{abs(ours.losses[0] - theirs.losses[0]):.1e} in the first step",
        )


def vocabulary(options: Options) -> Figure:
    """Memory that training adds to the process, for a vocabulary 16 times as large."""
    from triollama.testing import make_tiny_model

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sides = []
        for n_vocab in VOCABULARIES:
            path = make_tiny_model(
                Path(folder) / f"{n_vocab}.gguf", "gemma3", n_vocab=n_vocab, dtype="Q8_0"
            )
            sides.append(
                stack.enter_context(
                    Worker("triollama", path, 512, n_vocab, precision="fast", targets="all-linear")
                )
            )
        small, large = sides
        pairs = interleave(
            lambda: large.rate(1) and large.growth, lambda: small.rate(1) and small.growth, 6
        )
        return pairs.ratio(
            "train.memory_of_vocabulary",
            target=1.1,
            at_least=False,
            note=f"memory that training adds with {VOCABULARIES[1]} and with {VOCABULARIES[0]} "
            f"tokens: {large.growth / MB:.1f} and {small.growth / MB:.1f} MB; 512 tokens",
        )


def beside_finetune(options: Options, default: Path) -> Figure:
    """Upstream's trainer, where it runs: on a small llama in F32, since it aborts on the default
    model. It trains all weights, which costs it no more than a third more products than LoRA."""
    from triollama.testing import make_tiny_model

    n_tokens, n_vocab = 256, 4096
    _, why = finetune(default, n_tokens=n_tokens, threads=THREADS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "llama.gguf"
        make_tiny_model(path, "llama", n_vocab=n_vocab, n_embd=512, n_layer=8)
        remarks = []

        def theirs() -> float:
            rate, remark = finetune(path, n_tokens=n_tokens, threads=THREADS)
            remarks.append(remark)
            return rate

        with Worker(
            "triollama", path, n_tokens, n_vocab, precision="exact", targets="all-linear"
        ) as ours:
            pairs = interleave(lambda: ours.rate(20), theirs, options.repeats_or(4))
    return pairs.ratio(
        "train.llama_finetune",
        note=f"exact mode {statistics.median(pairs.a):.0f} tok/s, llama-finetune "
        f"{statistics.median(pairs.b):.0f} ({remarks[-1]}); 8 layers of width 512, {n_tokens} "
        f"tokens. On the default model {why}",
    )
