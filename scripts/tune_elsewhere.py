#!/usr/bin/env python3
"""Trains an adapter for a model file, and asks others what they make of it: llama.cpp's own
llama-completion with the adapter file, and PEFT with the export, on the same file read by
transformers.

    python scripts/tune_elsewhere.py MODEL.gguf [--steps 40] [--learning-rate 2e-4]

Data are data/chats.jsonl. Prints held-out losses before and after, here and in PEFT, and answers.
Needs what `python scripts/check.py --torch` installs; without PyTorch that part is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from _cache import ROOT
from benches._upstream import TOOLS, tool

DATA = ROOT / "data"


def upstream(model: Path, adapter: Path | None, prompt: str, folder: Path, n: int) -> str:
    """What llama-completion makes of the prompt, greedily."""
    assert "llama-completion" in TOOLS
    (folder / "prompt.txt").write_text(prompt, encoding="utf-8")
    done = subprocess.run(
        [
            str(tool("llama-completion")), "-m", str(model), "--file", str(folder / "prompt.txt"),
            "-no-cnv", "--special", "--temp", "0", "--repeat-penalty", "1.0",
            "--n-predict", str(n), "--ctx-size", "512", "--threads", "2", "--no-warmup",
            "--simple-io", "--log-verbosity", "0", *(["--lora", str(adapter)] if adapter else []),
        ],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=True,
    )  # fmt: skip
    return done.stdout.decode(errors="replace")


def in_peft(model: Path, export: Path, examples: Any) -> tuple[float, float] | None:
    """The mean loss over the learned tokens, of the bare model and with the export."""
    try:
        import peft
        import torch
        import transformers
    except ImportError:
        return None
    from triollama.tuning import row_of

    torch.set_num_threads(2)
    bare = transformers.AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    ).eval()

    def loss(network: Any) -> float:
        total, count = 0.0, 0
        with torch.no_grad():
            for example in examples:
                row = row_of([example])
                logits = network(torch.as_tensor(row.tokens)[None].long(), use_cache=False).logits
                labels = torch.as_tensor(row.labels).long()
                total += float(
                    torch.nn.functional.cross_entropy(
                        logits[0], labels, ignore_index=-1, reduction="sum"
                    )
                )
                count += row.n_labels
        return total / count

    before = loss(bare)
    return before, loss(peft.PeftModel.from_pretrained(bare, export))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--held-out", type=int, default=20, help="how many conversations")
    options = parser.parse_args()
    from triollama.chat import template_for_model
    from triollama.tuning import TrainingConfig, Tuner, evaluate_examples, read_items
    from triollama.tuning.watch import Watch

    held_out = list(read_items(DATA / "chats-held-out.jsonl"))[: options.held_out]
    config = TrainingConfig(
        learning_rate=options.learning_rate,
        max_steps=options.steps,
        packing=True,
        precision="fast",
        evaluate_every=options.steps // 2,
        threads=2,
    )
    with Tuner(options.model, threads=2) as tuner, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = tuner.prepare_training_data(DATA / "chats.jsonl", validation=held_out)
        print(data.report())
        watch = Watch()
        tuner.start_training_session(data, config, on_step=watch.step, progress=watch.progress)
        watch.close()
        for at, loss in tuner.training_summary().validation:
            print(f"held-out loss after step {at} ({config.precision}): {loss:.4f}")
        adapter, export = folder / "adapter.gguf", folder / "peft"
        tuner.save_lora_adapter(adapter)
        tuner.export_model(export, "peft")
        from triollama._engine import Trainer

        with Trainer(options.model, rank=config.rank, alpha=config.alpha, threads=2) as trainer:
            bare = evaluate_examples(trainer, data.validation).average_loss
            trainer.load_adapter(adapter)
            tuned = evaluate_examples(trainer, data.validation).average_loss
        print(f"held-out loss, exact: {bare:.4f} bare, {tuned:.4f} tuned")
        theirs = in_peft(options.model.resolve(), export, data.validation)
        if theirs:
            print(f"the same in PEFT: {theirs[0]:.4f} bare, {theirs[1]:.4f} tuned")
        tuner.apply_lora(adapter)
        template = template_for_model(tuner.model)
        for chat in held_out[:5]:
            asked = [m for m in chat["messages"] if m["role"] != "assistant"][:1]
            if asked[0]["role"] != "user":
                continue
            (one,) = tuner.compare([asked], max_tokens=40)
            prompt = template.render(asked).text
            says = upstream(options.model, adapter, prompt, folder, 40)
            print(
                json.dumps(
                    {"asked": one.prompt, "bare": one.base, "tuned": one.tuned,
                     "llama-completion": says[-len(one.tuned) - 20 :]},
                    ensure_ascii=False, indent=1,
                )
            )  # fmt: skip


if __name__ == "__main__":
    main()
