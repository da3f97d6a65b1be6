"""Careless and hostile callers: see attacks.py, which runs each topic in a process of its own."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ATTACKS = Path(__file__).with_name("attacks.py")

TOPICS = {
    "context_sizes": ("llama", "gemma3", "mamba2"),
    "batches": ("llama", "gemma3", "jamba", "mamba2"),
    "memory": ("llama", "gemma3", "jamba", "mamba2"),
    "forged_states": ("llama", "gemma3", "jamba"),
    "tokens_and_text": ("llama", "gemma3", "qwen3"),
    "grammars": ("llama", "qwen3"),
    "sampling": ("llama",),
    "prompts": ("llama", "gemma3", "jamba"),
    "after_close": ("llama", "jamba"),
    "closed_while_iterating": ("llama",),
    "sequences": ("llama",),
    "threads": ("llama", "gemma3"),
    "forks": ("llama",),
    "options": ("llama", "gemma3"),
}


def attack(topic: str, *paths: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(ATTACKS), topic, *map(str, paths)],
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    tried = result.stdout.splitlines()
    assert result.returncode == 0, (
        f"ended with {result.returncode} on: {tried[-1] if tried else None}\n{result.stderr}"
    )
    assert tried


@pytest.mark.parametrize(
    ("topic", "arch"), [(topic, arch) for topic, archs in TOPICS.items() for arch in archs]
)
def test_attack(topic: str, arch: str, tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny(arch), path)
    attack(topic, path)


@pytest.mark.parametrize("arch", ["llama", "gemma3", "jamba", "mamba2"])
def test_states(arch: str, tiny: Any) -> None:
    attack("states", tiny(arch), tiny(arch, seed=1))


def test_every_topic_is_tried() -> None:
    namespace = runpy.run_path(str(ATTACKS), run_name="attacks")
    assert set(namespace["TOPICS"]) == {*TOPICS, "states"}
