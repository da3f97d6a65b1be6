#!/usr/bin/env python3
"""Teach the default model, which only continues text, to chat: minutes on two CPU cores.

    python scripts/teach_chat.py [--adapter FILE] [--report FILE]

Trains a LoRA adapter on data/chats.jsonl, then asks held-out questions with and without it: how
many replies the model ends by itself, and what it says. An interrupted run goes on where it was.
The model is Gemma 3 270M, under the Gemma Terms of Use, https://ai.google.dev/gemma/terms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if sys.version_info < (3, 11):  # noqa: UP036 - before anything that an older Python cannot read
    sys.exit("triollama needs Python 3.11 or newer; this is " + sys.version.split()[0])

from _cache import ROOT
from _env import SetupError, ensure_environment, inside

if TYPE_CHECKING:
    from triollama.tuning import TrainingStep

DATA = ROOT / "data"
MAX_TOKENS = 64


def show(step: TrainingStep) -> None:
    text = f"step {step.step}/{step.total_steps}  loss {step.loss:.3f}"
    if step.validation_loss is not None:
        text += f"  held out {step.validation_loss:.3f}"
    print(f"{text}  {step.tokens_per_second:.0f} tokens/s", flush=True)


def teach(options: argparse.Namespace) -> None:
    import msgspec
    from triollama.chat import template_for_model
    from triollama.tuning import TrainingConfig, Tuner, prepare_training_data, read_items

    config = TrainingConfig(
        rank=8,
        learning_rate=1e-3,
        schedule="linear",
        warmup_steps=3,
        epochs=1,
        max_steps=options.steps,
        packing=True,
        precision="fast",
        evaluate_every=12,
        checkpoint_every=5,
        threads=options.threads,
    )
    held_out = list(read_items(DATA / "chats-held-out.jsonl"))
    with Tuner(n_ctx=1024, threads=options.threads) as tuner:
        data = prepare_training_data(
            DATA / "chats.jsonl",
            vocab=tuner.model.vocab,
            template=template_for_model(tuner.model),
            validation=held_out,
        )
        print(data.statistics())
        tuner.start_training_session(
            data, config, checkpoint=options.checkpoint, resume=True, on_step=show
        )
        tuner.save_lora_adapter(options.adapter)
        summary = tuner.training_summary()
        tuner.apply_trained()
        prompts = []
        for chat in held_out:
            answer = next(i for i, m in enumerate(chat["messages"]) if m["role"] == "assistant")
            prompts.append(chat["messages"][:answer])
        compared = tuner.compare(prompts[: options.prompts], max_tokens=MAX_TOKENS)
    before = sum(one.base_ended for one in compared)
    after = sum(one.tuned_ended for one in compared)
    for one in compared[:8]:
        print(f"\n> {one.prompt}\nbase:  {one.base!r}\ntuned: {one.tuned!r}")
    print("\nheld-out loss:", ", ".join(f"{loss:.3f} ({at})" for at, loss in summary.validation))
    print(
        f"of {len(compared)} held-out prompts the model ended its reply within {MAX_TOKENS} tokens:"
        f" {before} before, {after} after"
    )
    print(f"adapter: {options.adapter}")
    if options.report:
        report = {
            "held_out_loss": summary.validation,
            "losses": summary.losses,
            "ended_before": before,
            "ended_after": after,
            "replies": msgspec.to_builtins(compared),
        }
        Path(options.report).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    build = ROOT / "build"
    parser = argparse.ArgumentParser(description="Teach the default model to chat.")
    parser.add_argument("--adapter", default=build / "chat.gguf", help="where to write it")
    parser.add_argument("--checkpoint", default=build / "teach_chat.ckpt")
    parser.add_argument("--report", help="write figures and replies to this file, as JSON")
    parser.add_argument("--steps", type=int, default=48, help="training steps (default 48)")
    parser.add_argument("--prompts", type=int, default=40, help="held-out prompts (default 40)")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    try:
        python = ensure_environment(["demo"])
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not inside():
        return subprocess.run([python, *sys.orig_argv[1:]], check=False).returncode
    teach(options)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
