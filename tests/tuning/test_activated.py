"""Activated adapters (aLoRA): trained with no part in what comes before their invocation, and
served on the bare model's memory of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from triollama import AdapterError, GenerationParams, UnsupportedError, _engine, open_llama
from triollama.sync import Llama
from triollama.tuning import (
    AdapterApplicationError,
    IncompatibleAdapterError,
    InvalidSettingError,
    TrainingConfig,
    Tuner,
    check_adapter,
    load_peft,
    prepare_training_data,
    save_merged,
    save_peft,
    train,
)

INVOCATION = (7, 8)
AT = 24  # where the example says it last
N = 40


def example() -> tuple[np.ndarray, np.ndarray]:
    """It says the invocation twice; labelled is also what comes before."""
    tokens = np.random.default_rng(0).integers(9, 480, N).astype(np.int32)
    tokens[[5, 6]] = tokens[[AT, AT + 1]] = INVOCATION
    return tokens, np.append(tokens[1:], -1).astype(np.int32)


def trained(path: Path, steps: int = 6, **options: Any) -> _engine.Trainer:
    trainer = _engine.Trainer(
        path, **{"rank": 4, "alpha": 8.0, "threads": 2, "invocation": INVOCATION, **options}
    )
    for _ in range(steps):
        trainer.forward_backward(*example())
        trainer.adamw_step(1e-2)
    return trainer


def test_before_its_invocation_the_model_is_the_bare_one(tiny: Any) -> None:
    tokens, labels = example()
    with trained(tiny("gemma3")) as trainer, _engine.Trainer(tiny("gemma3"), rank=1) as bare:
        assert trainer.invocation == INVOCATION
        found, base = trainer.evaluate(tokens, labels).nll, bare.evaluate(tokens, labels).nll
        assert np.array_equal(found[:AT], base[:AT])
        assert np.abs(found[AT:] - base[AT:]).max() > 0.1
        tokens[AT] = tokens[5] = 9  # never invoked
        assert np.array_equal(
            trainer.evaluate(tokens, labels).nll, bare.evaluate(tokens, labels).nll
        )
        trainer.clear_gradients()
        trainer.forward_backward(tokens, labels)
        assert trainer.gradient_norm() == 0.0


def test_the_gradient_is_the_slope_of_the_loss(tiny: Any) -> None:
    with trained(tiny("llama"), dropout=0.0) as trainer:
        trainer.clear_gradients()
        trainer.forward_backward(*example())
        slope = trainer.get("gradients").astype(np.float64)
        start, norm = trainer.get("weights"), np.linalg.norm(slope)
        losses = []
        for sign in (1, -1):
            trainer.set("weights", (start + sign * 1e-2 * slope / norm).astype(np.float32))
            losses.append(trainer.evaluate(*example()).loss)
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(norm, rel=1e-2)


def test_each_text_of_a_packed_row_has_its_own(tiny: Any) -> None:
    tokens, labels = example()
    other = tokens[::-1].copy()  # never says it
    with trained(tiny("qwen3")) as trainer:
        nll = trainer.evaluate(
            np.concatenate([tokens, other, tokens]),
            np.concatenate([labels, labels, labels]),
            positions=np.tile(np.arange(N), 3),
            segments=np.repeat(np.arange(3), N),
        ).nll
        expected = [trainer.evaluate(one, labels).nll for one in (tokens, other, tokens)]
        np.testing.assert_allclose(nll, np.concatenate(expected), atol=2e-5)


def test_files_say_what_invokes_it(tiny: Any, tmp_path: Path) -> None:
    path, saved = tiny("llama"), tmp_path / "adapter.gguf"
    with trained(path) as trainer:
        trainer.save_adapter(saved)
        weights = trainer.get("weights")
        with pytest.raises(UnsupportedError, match="invocation"):
            save_merged(trainer, tmp_path / "merged.gguf")
        save_peft(trainer, tmp_path / "peft")
    assert check_adapter(saved, path).invocation == INVOCATION
    with _engine.Model(path) as model, _engine.Adapter(model, saved) as adapter:
        assert adapter.invocation == INVOCATION
    options = {"rank": 4, "alpha": 8.0}
    with _engine.Trainer(path, **options, invocation=INVOCATION, seed=3) as again:
        again.load_adapter(saved)
        assert np.array_equal(again.get("weights"), weights)
        load_peft(again, tmp_path / "peft")
        assert np.array_equal(again.get("weights"), weights)
    for invocation in ((), (8, 7), (7,)):
        with _engine.Trainer(path, **options, invocation=invocation) as other:
            with pytest.raises(AdapterError, match="invo"):
                other.load_adapter(saved)
            with pytest.raises(IncompatibleAdapterError, match="alora_invocation_tokens"):
                load_peft(other, tmp_path / "peft")
    with pytest.raises(ValueError, match="invocation token 480"):
        _engine.Trainer(path, invocation=(480,))
    with Llama(path, n_ctx=64) as llama, pytest.raises(UnsupportedError, match="open_llama"):
        llama.load_adapter(saved)
    with Tuner(path) as tuner, pytest.raises(AdapterApplicationError, match="open_llama"):
        tuner.apply_lora(saved)


def test_it_is_served_as_it_was_trained(tiny: Any, tmp_path: Path) -> None:
    path, saved = tiny("llama"), tmp_path / "adapter.gguf"
    tokens, labels = example()
    with trained(path) as trainer:
        trainer.save_adapter(saved)
        expected = trainer.evaluate(tokens, labels).nll

    async def main() -> None:
        with trio.fail_after(100):
            async with open_llama(path, n_ctx=256, max_streams=2, threads=2) as llama:
                adapter = await llama.load_adapter(saved)
                chosen = [(adapter, 1.0)]
                for n in (N, AT + 1, AT):  # with, and before it is said whole
                    score = await llama.score(tokens[:n].tolist(), adapters=chosen)
                    again = await llama.score(tokens[:n].tolist(), adapters=chosen)
                    assert np.array_equal(score.logprobs, again.logprobs)
                    if n == N:
                        np.testing.assert_allclose(-score.logprobs, expected, atol=2e-2)
                whole = (await llama.score(tokens.tolist(), adapters=chosen)).logprobs
                bare = (await llama.score(tokens.tolist())).logprobs
                np.testing.assert_allclose(whole[:AT], bare[:AT], atol=1e-4)
                assert np.abs(whole[AT:] - bare[AT:]).max() > 0.1

    trio.run(main)


GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=8)
LONG = "Tell me of the sea, of the boats and the gulls, and of what the tide leaves behind."


def test_the_bare_model_s_memory_serves_it(tiny: Any, tmp_path: Path) -> None:
    path, saved = tiny("gemma3"), tmp_path / "adapter.gguf"
    with _engine.Model(path, vocab_only=True) as model:
        invocation = model.vocab.tokenize("Judge:", False, True)
    with trained(path, invocation=invocation) as trainer:  # not invoked: give it an effect
        noise = np.random.default_rng(1).normal(0.0, 0.1, trainer.n_parameters)
        trainer.set("weights", noise.astype(np.float32))
        trainer.save_adapter(saved)

    async def main() -> None:
        with trio.fail_after(100):
            async with open_llama(path, n_ctx=512, max_streams=3, threads=2) as llama:
                adapter = await llama.load_adapter(saved)
                chosen = [(adapter, 1.0)]
                chat = llama.conversation(params=GREEDY)
                await chat.say(LONG)
                said = chat.total_tokens
                chat.set_adapters(chosen)
                judged = await chat.say("Judge:")
                assert judged.usage.cached_tokens >= said - 1

                fresh = llama.conversation(
                    params=GREEDY, messages=chat.messages[:-2], adapters=chosen
                )
                assert (await fresh.say("Judge:")).text == judged.text
                assert llama.statistics().set_changes >= 1
                # What it computed itself serves nobody else; what is before it does.
                chat.set_adapters(())
                chat.rewind()
                plain = await chat.say("Judge:")
                assert plain.text != judged.text
                assert plain.usage.cached_tokens >= said - 1
                alone = llama.conversation(params=GREEDY, messages=chat.messages[:-2])
                assert (await alone.say("Judge:")).text == plain.text
                # Not invoked: the bare model.
                never = llama.conversation(params=GREEDY, adapters=chosen)
                assert (await never.say(LONG)).text == chat.messages[1].content

    trio.run(main)


CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {a}?"},
            {"role": "assistant", "content": f"It is {a}."},
            {"role": "user", "content": f"Judge: {a}"},
            {"role": "assistant", "content": f"{a}, good"},
        ]
    }
    for a in "abcdefgh"
]


def test_a_run_takes_a_text_and_refuses_what_it_cannot_teach(tiny: Any, tmp_path: Path) -> None:
    path = tiny("gemma3")
    with _engine.Model(path, vocab_only=True) as model:
        from triollama.chat import template_for_model

        options: dict[str, Any] = {"vocab": model.vocab, "template": template_for_model(model)}
        last = prepare_training_data(CHATS, only_last=True, **options)
        both = prepare_training_data(CHATS, **options)
        expected = tuple(model.vocab.tokenize("Judge:", False, True))
    config = TrainingConfig(rank=2, max_steps=3, invocation="Judge:", learning_rate=1e-2)
    with train(path, last, config, checkpoint=tmp_path / "run.ckpt") as run:
        assert run.trainer.invocation == expected
        list(run)
        run.save_adapter(tmp_path / "adapter.gguf")
    with train(path, last, config, checkpoint=tmp_path / "run.ckpt", resume=True) as run:
        assert run.resumed_at == 3
    assert check_adapter(tmp_path / "adapter.gguf", path).invocation == expected
    with pytest.raises(InvalidSettingError, match="only_last=True"), train(path, both, config):
        pass
    other = TrainingConfig(rank=2, invocation=[5, 6, 7])
    with pytest.raises(InvalidSettingError, match="does not say"), train(path, last, other):
        pass
    for wrong in ("", (), (1.5,), (-1,), 7):
        with pytest.raises(InvalidSettingError, match="invocation"):
            TrainingConfig(invocation=wrong)
    unknown = TrainingConfig(invocation=(10**6,))
    with pytest.raises(InvalidSettingError, match="vocabulary"), train(path, last, unknown):
        pass
