"""The table for those who come from the Swift API names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trio
from triollama import open_llama
from triollama.compat import swift
from triollama.errors import BusyError, ParameterError
from triollama.params import RAW_MAX_TOKENS

TESTS = Path(__file__).parents[1]
TABLE = (TESTS.parent / "docs" / "swift.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`([\w/]+\.py::\w+)`", TABLE))))
def test_a_test_that_the_table_names(named: str) -> None:
    file, test = named.split("::")
    source = (TESTS / file).read_text(encoding="utf-8")
    assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{named} does not exist"


def test_every_row_names_one() -> None:
    for line in TABLE.splitlines():
        if line.startswith("| ") and not line.startswith(("| Swift", "| there is")):
            assert "::test_" in line or line.startswith("| there |"), line


def test_training_rows_point_to_the_tests_of_training() -> None:
    section = TABLE[TABLE.index("## Training") : TABLE.index("## Errors")]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) >= 12
    assert all("`tuning/test_" in row for row in rows)


def test_model_and_vocabulary(tiny: Any) -> None:
    async def main() -> None:
        async with open_llama(tiny("gemma3"), n_ctx=256, max_streams=2, threads=1) as llama:
            assert llama.model.architecture == "gemma3"
            assert llama.model.n_layer == 2
            assert len(llama.model.fingerprint) == 32
            assert len(llama.vocab) == llama.model.vocab.n_tokens > 400
            assert llama.vocab.eos is not None
            assert llama.vocab.is_eog(llama.vocab.eos)
            async with llama.conversation("mine").stream("Hello", max_tokens=200) as turn:
                await turn.receive()
                (info,) = llama.active()
                assert (info.id, info.conversation) == (turn.id, "mine")
                async with llama.stream("x", max_tokens=200):
                    assert [one.conversation for one in llama.active()] == ["mine", ""]
            with pytest.raises(BusyError):
                llama.model.close()
        with pytest.raises(trio.ClosedResourceError):
            _ = llama.model

    trio.run(main)


def test_a_program_with_swift_names(tiny: Any, tmp_path: Path) -> None:
    """What each name does is what ours does."""
    params = swift.GenerationParams(max_tokens=6, threads=1, batch_threads=1)
    path = tmp_path / "chats.json"

    async def main() -> None:
        async with swift.SwiftyLlama(tiny("llama"), max_ctx=256, max_streams=2) as llama:
            assert llama.llama.n_ctx == 256
            assert llama.model_info.architecture == "llama"
            assert len(llama.vocab_info) > 256
            await llama.warm_up()
            async with llama.start("Once upon", params) as one:
                texts = [text async for text in one.stream]
            ours = await llama.llama.generate("Once upon", seed=42, max_tokens=6)
            assert "".join(texts) == ours.text

            async with llama.start("Hello", params, "mine") as one:
                async for _ in one.stream:
                    pass
            # More than waits for a reader, so that it is still at work when it is looked at.
            long = swift.GenerationParams(max_tokens=150, threads=1, batch_threads=1)
            async with llama.start("More", long, "mine", continue_conversation=True) as one:
                info = llama.get_generation_info(one.id)
                assert info is not None
                assert info.is_active and info.conversation_id == "mine"
                assert info.params.max_tokens == 150
                llama.update(one.id, swift.GenerationParams(max_tokens=140))
                assert llama.get_active_generation_ids() == [one.id]
                async for _ in one.stream:
                    pass
                assert llama.get_generation_info(one.id).is_active is False  # type: ignore[union-attr]
            assert llama.get_generation_info(one.id) is None
            with pytest.raises(ParameterError, match="no conversation 'other'"):
                llama.start("More", params, "other", continue_conversation=True)
            (state,) = llama.get_conversation_state()
            assert [m.role for m in state.messages] == ["user", "assistant"] * 2
            assert state.title is None
            llama.set_title("mine", "A title")

            await llama.save_conversations_to_json(path)
            (loaded,) = await llama.load_conversations_from_json(path)
            assert loaded == llama.get_conversation_state()[0]
            assert await llama.restore_conversations(path) == [loaded]
            async with llama.start("Afresh", params, "mine") as one:
                assert llama.cancel_generation(one.id)
                async for _ in one.stream:
                    pass
            (state,) = llama.get_conversation_state()  # begun anew, and cut off
            assert (state.messages, state.title) == ((), None)

    trio.run(main)


def test_swift_s_defaults() -> None:
    given = swift.GenerationParams().changes()
    assert given["seed"] == 42
    assert given["repeat_penalty"] == 1.1
    assert given["max_tokens"] == RAW_MAX_TOKENS == 100
    config = swift.TrainingConfig()
    assert (config.rank, config.learning_rate, config.epochs, config.batch_size) == (8, 2e-5, 3, 1)
    assert config.qlora is None
    assert swift.TrainingConfig(use_qlora=True).qlora is not None


def test_a_tuner_with_swift_names(tiny: Any) -> None:
    with swift.SwiftyLlamaTuning(tiny("llama"), n_ctx=64, threads=1) as tuner:
        assert tuner.get_current_training_session() is None
        assert tuner.get_training_metrics() is None
        dataset = tuner.prepare_training_data(["hello world"] * 3, 0.0)
        tuner.start_training_session(dataset, swift.TrainingConfig(lora_rank=2, epochs=1))
        metrics = tuner.get_training_metrics()
        assert metrics is not None and metrics.current_step == 3
        session = tuner.get_current_training_session()
        assert session is not None and session.status == "completed"
