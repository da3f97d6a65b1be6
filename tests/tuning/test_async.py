"""Runs under trio: the same steps, and a cancel at any step that loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from triollama import _engine
from triollama.tuning import TrainingConfig, TrainingDataset, prepare_training_data, train
from triollama.tuning.aio import train_async

TEXTS = [f"{a} is {b}." for a in ("The cat", "A dog", "My bird") for b in ("red", "blue", "old")]


@pytest.fixture(scope="module")
def path(tiny: Any) -> Path:
    found: Path = tiny("llama")
    return found


@pytest.fixture(scope="module")
def dataset(path: Path) -> Iterator[TrainingDataset]:
    with _engine.Model(path, vocab_only=True) as model:
        yield prepare_training_data(TEXTS, vocab=model.vocab, max_length=64)


CONFIG = TrainingConfig(
    rank=4, learning_rate=1e-2, epochs=2, dropout=0.1, threads=1, evaluate_every=3
)


def test_the_steps_are_those_of_the_blocking_run(
    path: Path, dataset: TrainingDataset, tmp_path: Path
) -> None:
    with train(path, dataset, CONFIG) as run:
        expected = [(step.step, step.loss, step.validation_loss) for step in run]
        weights = run.trainer.get("weights")

    async def main() -> None:
        async with train_async(path, dataset, CONFIG) as run:
            found = [(step.step, step.loss, step.validation_loss) async for step in run]
            assert found == expected
            assert run.status == "completed"
            assert np.array_equal(run.run.trainer.get("weights"), weights)
            await run.save_adapter(tmp_path / "a.gguf")

    trio.run(main)
    assert (tmp_path / "a.gguf").exists()
    assert "Trainer" not in _engine.live_objects()


@pytest.mark.parametrize("at", range(0, 16, 3))
def test_a_cancel_during_any_step_resumes_exactly(
    path: Path, dataset: TrainingDataset, tmp_path: Path, at: int
) -> None:
    with train(path, dataset, CONFIG) as whole:
        losses = [step.loss for step in whole]
        weights = whole.trainer.get("weights")
    checkpoint = tmp_path / "run.ckpt"
    seen: list[float] = []

    async def main() -> None:
        run = train_async(path, dataset, CONFIG, checkpoint=checkpoint)
        with trio.CancelScope() as scope:
            async with run, trio.open_nursery() as nursery:

                async def consume() -> None:
                    async for step in run:
                        seen.append(step.loss)
                        if len(seen) == at:
                            # The next step has begun, or is about to, when this takes effect.
                            nursery.start_soon(cancel)

                async def cancel() -> None:
                    scope.cancel()

                nursery.start_soon(consume)
                if at == 0:
                    nursery.start_soon(cancel)
        assert scope.cancelled_caught
        assert run.status == "stopped"

    trio.run(main)
    assert seen == losses[: len(seen)]
    with train(path, dataset, CONFIG, checkpoint=checkpoint, resume=True) as resumed:
        rest = [step.loss for step in resumed]
        assert np.array_equal(resumed.trainer.get("weights"), weights)
        assert resumed.summary().losses == losses
    assert len(seen) + len(rest) in (len(losses), len(losses) - 1)
    assert "Trainer" not in _engine.live_objects()


@pytest.mark.parametrize("when", ["in a step", "while leaving"])
def test_ctrl_c_writes_the_checkpoint_and_leaves_nothing(
    path: Path, run_isolated: Any, tmp_path: Path, when: str
) -> None:
    """In the main task, where trio raises KeyboardInterrupt."""
    run_isolated(
        """
        import functools, os, signal, sys, trio
        from triollama import _engine
        from triollama.tuning import TrainingConfig, prepare_training_data
        from triollama.tuning.aio import train_async

        path, checkpoint, when = sys.argv[1:]
        with _engine.Model(path, vocab_only=True) as model:
            data = prepare_training_data(["to be or not to be " * 9] * 8, vocab=model.vocab)
        config = TrainingConfig(rank=2, epochs=3, batch_size=2, threads=1)

        def interrupted(work):
            @functools.wraps(work)
            def call(*arguments):
                os.kill(os.getpid(), signal.SIGINT)
                return work(*arguments)
            return call

        async def main():
            training = train_async(path, data, config, checkpoint=checkpoint)
            async with training as run:
                async for step in run:
                    if when == "in a step" and step.step == 2:
                        run._steps = iter(interrupted(run._steps.__next__), None)
                    if when == "while leaving":
                        trio.lowlevel.current_trio_token().run_sync_soon(
                            os.kill, os.getpid(), signal.SIGINT
                        )
                        break

        try:
            trio.run(main)
        except KeyboardInterrupt:
            pass
        else:
            raise SystemExit("nobody was interrupted")
        assert not _engine.live_objects(), _engine.live_objects()
        assert os.path.exists(checkpoint)
        async def resume():
            again = train_async(path, data, config, checkpoint=checkpoint, resume=True)
            async with again as run:
                return [step.step async for step in run]
        assert trio.run(resume)[-1] == 12
        """,
        path,
        tmp_path / "checkpoint",
        when,
    )


def test_sigterm_writes_the_checkpoint_and_ends_the_process(
    path: Path, run_isolated: Any, tmp_path: Path
) -> None:
    result = run_isolated(
        """
        import os, signal, sys, trio
        from triollama import _engine
        from triollama.tuning import TrainingConfig, prepare_training_data, read_checkpoint
        from triollama.tuning.aio import train_async

        path, checkpoint = sys.argv[1:]
        with _engine.Model(path, vocab_only=True) as model:
            data = prepare_training_data(
                [f"{i} to be or not to be " * 9 for i in range(8)], vocab=model.vocab
            )
        config = TrainingConfig(rank=2, epochs=3, batch_size=2, threads=1)

        async def main():
            async with train_async(path, data, config, checkpoint=checkpoint) as run:
                async for step in run:
                    if step.step == 2:
                        os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("it went on")

        try:
            trio.run(main)
        except SystemExit as stop:
            assert not _engine.live_objects(), _engine.live_objects()
            assert read_checkpoint(checkpoint).summary.step == 2
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            raise
        """,
        path,
        tmp_path / "checkpoint",
        check=False,
    )
    assert result.returncode == 143, result.stderr


def test_stop_and_errors_in_the_block(path: Path, dataset: TrainingDataset, tmp_path: Path) -> None:
    async def stopping() -> None:
        async with train_async(path, dataset, CONFIG) as run:
            async for step in run:
                if step.step == 2:
                    run.stop()
            assert run.status == "stopped"

    trio.run(stopping)

    async def failing() -> None:
        async with train_async(path, dataset, CONFIG, checkpoint=tmp_path / "c") as run:
            async for _ in run:
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trio.run(failing)
    assert (tmp_path / "c").exists()
    assert "Trainer" not in _engine.live_objects()


def test_other_tasks_run_meanwhile(path: Path, dataset: TrainingDataset) -> None:
    ticks = 0

    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def tick() -> None:
                nonlocal ticks
                while True:
                    await trio.sleep(0)
                    ticks += 1

            nursery.start_soon(tick)
            async with train_async(path, dataset, CONFIG) as run:
                async for _ in run:
                    pass
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert ticks > 20


def test_a_cancel_while_loading_leaves_nothing_open(path: Path, dataset: TrainingDataset) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:

            async def enter() -> None:
                async with train_async(path, dataset, CONFIG):
                    await trio.sleep_forever()  # in case loading was faster than the cancel

            async def cancel() -> None:
                nursery.cancel_scope.cancel()

            nursery.start_soon(enter)
            await trio.lowlevel.checkpoint()  # the thread has been started
            nursery.start_soon(cancel)

    trio.run(main)
    assert "Trainer" not in _engine.live_objects()
