#!/usr/bin/env python3
"""Teach a model by examples, and serve what it learned beside what it was.

    python examples/teach_and_serve.py MODEL.gguf chats.jsonl adapter.gguf [PORT]

Lines of the file: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", ...}]}.
An adapter that is there already is not trained again. Clients of OpenAI's API choose the model
"taught", or the bare one by its name; both are the same weights in memory.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import trio
from triollama.server import run_server
from triollama.tuning import TrainingConfig, Tuner


def teach(model: str, chats: str, adapter: Path) -> None:
    with Tuner(model) as tuner:
        data = tuner.prepare_training_data(chats)
        config = TrainingConfig(rank=8, epochs=3)
        tuner.start_training_session(data, config, checkpoint=adapter.with_suffix(".ckpt"))
        tuner.save_lora_adapter(adapter)


if __name__ == "__main__":
    model, chats, adapter, *port = sys.argv[1:]
    if not Path(adapter).exists():
        teach(model, chats, Path(adapter))
    trio.run(
        partial(
            run_server, model, port=int(port[0]) if port else 8080, adapters={"taught": adapter}
        )
    )
