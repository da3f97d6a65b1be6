"""Opening and leaving: loading, cancelling it, Ctrl-C in each phase, and what is left behind."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from triollama import GenerationParams, Llama, Stream, open_llama, run_llama
from triollama import _engine as engine
from triollama.errors import ModelFormatError, ModelNotFoundError, ParameterError
from triollama.testing import FakeEngine, Reply, open_fake_llama
from triollama.testing.fake_memory import FakeReply

Tiny = Callable[..., Path]
GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=8)
OPTIONS: dict[str, Any] = {"n_ctx": 256, "max_streams": 2, "threads": 1}


@pytest.fixture
def path(tiny: Tiny) -> Path:
    return tiny("llama")


def run(main: Callable[[], Any]) -> None:
    async def bounded() -> None:
        with trio.fail_after(60):
            await main()

    trio.run(bounded)


def native_objects() -> dict[str, int]:
    return {
        name: count
        for name, count in engine.live_objects().items()
        if name in ("Model", "Context", "Decoder")
    }


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.promise("S1")
def test_loading_reports_progress_in_the_callers_thread(path: Path) -> None:
    seen: list[float] = []

    async def main() -> None:
        task = trio.lowlevel.current_task()

        def progress(value: float) -> None:
            assert trio.lowlevel.current_trio_token() is not None
            assert task is not None
            seen.append(value)

        async with open_llama(path, **OPTIONS, progress=progress) as llama:
            await llama.generate("x", GREEDY)

    run(main)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


@pytest.mark.promise("S2")
def test_a_cancelled_load_stops_and_leaves_nothing(path: Path) -> None:
    before = native_objects()

    async def main() -> None:
        with trio.CancelScope() as scope:
            async with open_llama(path, **OPTIONS, progress=lambda value: scope.cancel()):
                pytest.fail("the load was not cancelled")
        assert scope.cancelled_caught

    run(main)
    assert native_objects() == before


@pytest.mark.promise("S1")
def test_what_the_progress_callback_raises_comes_out(path: Path) -> None:
    before = native_objects()

    def progress(value: float) -> None:
        raise LookupError("mine")

    async def main() -> None:
        async with open_llama(path, **OPTIONS, progress=progress):
            pytest.fail("loaded")

    with pytest.raises(LookupError, match="mine"):
        run(main)
    assert native_objects() == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_ctx": 0}, "n_ctx"),
        ({"max_streams": 0}, "max_streams"),
        ({"max_streams": 2**20}, "max_streams"),
        ({"context_options": {"n_seq_max": 0}}, "n_seq_max"),
        ({"threads": 0}, "threads"),
        ({"batch_threads": 2**20}, "batch_threads"),
        ({"max_queue": -1}, "max_queue"),
        ({"prompt_budget": 0.0}, "prompt_budget"),
        ({"type_k": "f99"}, "type_k"),
        ({"deterministic": True, "context_options": {"swa_full": False}}, "deterministic"),
    ],
)
def test_wrong_options_are_named_and_leave_nothing(
    path: Path, options: dict[str, Any], named: str
) -> None:
    before = native_objects()

    async def main() -> None:
        async with open_llama(path, **{**OPTIONS, **options}):
            pytest.fail("opened")

    with pytest.raises(ParameterError, match=rf"\b{named}\b") as caught:
        run(main)
    assert caught.value.parameter == named
    assert native_objects() == before


def test_wrong_files_are_typed(tmp_path: Path) -> None:
    async def main(path: Path) -> None:
        async with open_llama(path, **OPTIONS):
            pytest.fail("opened")

    with pytest.raises(ModelNotFoundError):
        run(functools.partial(main, tmp_path / "none.gguf"))
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGUF but not really" * 10)
    with pytest.raises(ModelFormatError):
        run(functools.partial(main, junk))


def test_run_llama_serves_a_nursery(path: Path) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            llama: Llama = await nursery.start(functools.partial(run_llama, path, **OPTIONS))
            assert len((await llama.generate("x", GREEDY)).tokens) == 8
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.ClosedResourceError):
            llama.stream("x")

    run(main)


@pytest.mark.promise("S5")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_nothing_is_left_whatever_the_road_out(path: Path) -> None:
    async def normal() -> None:
        async with open_llama(path, **OPTIONS) as llama:
            await llama.generate("x", GREEDY)

    async def error() -> None:
        with pytest.raises(KeyError):
            async with open_llama(path, **OPTIONS) as llama, llama.stream("x", GREEDY):
                raise KeyError

    async def cancelled() -> None:
        with trio.CancelScope() as scope:
            async with open_llama(path, **OPTIONS) as llama:
                stream = llama.stream("x", GREEDY, max_tokens=None, capacity=1)
                await stream.__aenter__()  # and never left
                scope.cancel()
                await trio.sleep_forever()

    async def main() -> None:
        for road in (normal, error, cancelled):
            await road()
        # trio's own cached worker threads die after 10 seconds; ours are what is native.
        before = descriptors(), native_objects()
        for _ in range(3):
            for road in (normal, error, cancelled):
                await road()
        assert (descriptors(), native_objects()) == before

    run(main)


PHASES = {
    "loading": """
        async with open_llama(path, n_ctx=256, threads=1, progress=lambda v: interrupt()):
            pass
    """,
    "idle": """
        async with open_llama(path, n_ctx=256, threads=1) as llama:
            interrupt()
            await trio.sleep(60)
    """,
    "receiving": """
        async with open_llama(path, n_ctx=256, threads=1, max_streams=1) as llama:
            async with llama.stream("x", capacity=1, max_tokens=None) as parked:
                async with llama.stream("y" * 200) as stream:
                    interrupt()
                    while True:
                        await stream.receive()
                        await parked.receive()
    """,
    "another task": """
        async def consume(llama):
            while True:
                await llama.generate("x", max_tokens=20)
        async with open_llama(path, n_ctx=256, threads=1) as llama:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(consume, llama)
                await trio.sleep(0.01)
                interrupt()
                await trio.sleep(60)
    """,
    "the end of the body": """
        async with open_llama(path, n_ctx=256, threads=1) as llama:
            async with llama.stream("x", capacity=1) as stream:
                await stream.receive()
            interrupt()
    """,
    "leaving": """
        async with open_llama(path, n_ctx=256, threads=1) as llama:
            stream = llama.stream("x")
            await stream.__aenter__()
            release = stream.release
            stream.release = lambda: (release(), interrupt())
    """,
    "leaving, and again while it closes": """
        async with open_llama(path, n_ctx=256, threads=1) as llama:
            aclose = llama._core.aclose
            calls = []
            def interrupted():
                calls.append(1)
                if len(calls) < 4:
                    interrupt()
                return aclose()
            llama._core.aclose = interrupted
    """,
    "leaving by an error": """
        async with open_llama(path, n_ctx=256, threads=1) as llama:
            stream = llama.stream("x")
            await stream.__aenter__()
            release = stream.release
            stream.release = lambda: (release(), interrupt())
            raise KeyError
    """,
}


@pytest.mark.promise("S5", "S6")
@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_leaves_cleanly(path: Path, run_isolated: Any, phase: str) -> None:
    run_isolated(
        """
        import os, signal, sys, trio
        from triollama import _engine as engine, open_llama

        path, body = sys.argv[1:]

        def interrupt():
            os.kill(os.getpid(), signal.SIGINT)

        scope = {"path": path, "interrupt": interrupt, "trio": trio, "open_llama": open_llama}
        exec("async def main():\\n" + body, scope)
        def only_interrupts(error):
            if isinstance(error, BaseExceptionGroup):
                return all(only_interrupts(e) for e in error.exceptions)
            return isinstance(error, KeyboardInterrupt)
        try:
            trio.run(scope["main"])
        except BaseException as error:
            assert only_interrupts(error), repr(error)
        else:
            raise SystemExit("nobody was interrupted")
        assert not engine.live_objects(), engine.live_objects()
        """,
        path,
        PHASES[phase],
    )


@pytest.mark.promise("S12", "S5")
def test_a_native_engine_that_dies_tells_everybody_why(tiny: Tiny, run_isolated: Any) -> None:
    """A decode fails as by an assertion of llama.cpp: the engine is lost, the process is not."""
    run_isolated(
        """
        import sys, trio
        from triollama import GenerationParams, _engine as engine, open_llama

        path = sys.argv[1]
        params = GenerationParams(max_tokens=None, ignore_eos=True)
        causes = []

        async def consume(llama):
            try:
                await llama.generate("x", params)
            except trio.BrokenResourceError as error:
                causes.append(str(error.__cause__))

        async def main():
            async with open_llama(path, n_ctx=64, max_streams=2, threads=1) as llama:
                async with llama.stream("x", params, capacity=1) as parked:
                    await parked.receive()
                    async with trio.open_nursery() as nursery:
                        llama._core.engine._decoder.fail_at(5)
                        for _ in range(4):
                            nursery.start_soon(consume, llama)
                    try:
                        while True:
                            await parked.receive()
                    except trio.BrokenResourceError as error:
                        causes.append(str(error.__cause__))
                try:
                    llama.stream("x")
                except trio.BrokenResourceError as error:
                    causes.append(str(error))

        trio.run(main)
        assert len(causes) >= 3, causes
        assert all("asked for" in cause for cause in causes), causes
        assert not engine.live_objects(), engine.live_objects()
        """,
        tiny("llama"),
    )


# What only the fake can do on demand


@pytest.mark.promise("S5")
def test_nobody_spins_while_the_engine_is_closed() -> None:
    """An engine that takes a thousand steps of other tasks to close."""

    class Slow(FakeEngine):
        async def aclose(self) -> None:
            for _ in range(1000):
                await trio.lowlevel.cancel_shielded_checkpoint()
            await super().aclose()

    class Steps(trio.abc.Instrument):
        def __init__(self) -> None:
            self.counts: Counter[str] = Counter()

        def after_task_step(self, task: trio.lowlevel.Task) -> None:
            self.counts[task.name] += 1

    async def main() -> None:
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        ended: list[Any] = []

        async def wait(stream: Stream) -> None:
            await stream.ended()
            ended.append(stream.finish_reason)

        async def embed(llama: Llama) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await llama.embed("x" * 1000)
            ended.append("closed")

        async with (
            trio.open_nursery() as nursery,
            open_fake_llama(Slow(prompt_token_seconds=1.0)) as llama,
        ):
            stream = llama.stream("x", max_tokens=None)
            await stream.__aenter__()
            nursery.start_soon(wait, stream, name="ended")
            nursery.start_soon(embed, llama, name="embed")
            await trio.testing.wait_all_tasks_blocked()
        assert set(ended) == {"cancelled", "closed"}
        assert steps.counts["ended"] < 10
        assert steps.counts["embed"] < 10

    fake_run(main)


def test_cancelling_a_fork_does_not_wait_for_the_copy() -> None:
    """An engine that never has time for it."""

    class Slow(FakeEngine):
        def fork_sequence(self, source: int, target: int, n: int) -> FakeReply:
            return FakeReply(0)

    async def main() -> None:
        async with open_fake_llama(Slow(lambda prompt: "Yes.")) as llama:
            chat = llama.conversation(system="It is so. " * 20)
            await chat.say("Is it so?")
            with trio.move_on_after(1) as scope:
                await chat.fork("branch")
            assert scope.cancelled_caught
            assert "branch" not in llama.conversations
            with trio.move_on_after(1) as scope:
                await llama.conversation(system="It is so. " * 20).say("And here?")  # shares that
            assert scope.cancelled_caught
            assert (await chat.say("And now?")).text == "Yes."

    fake_run(main)


def test_a_cancelled_stream_of_the_fake_ends_by_itself_not_within_the_call() -> None:
    async def main() -> None:
        async with open_fake_llama(FakeEngine()) as llama, llama.stream("x") as stream:
            await stream.receive()
            stream.cancel()
            assert stream.finish_reason is None
            await stream.ended()
            assert stream.finish_reason == "cancelled"

    fake_run(main)


def fake_run(main: Callable[[], Any]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.promise("S12")
def test_when_the_engine_dies_everybody_learns_why() -> None:
    async def main() -> None:
        fake = FakeEngine(max_streams=1)
        causes: list[str] = []

        async def consume(llama: Llama) -> None:
            with pytest.raises(trio.BrokenResourceError) as caught:
                await llama.generate("x", max_tokens=None)
            causes.append(str(caught.value.__cause__))

        async with open_fake_llama(fake) as llama, trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(consume, llama)
            await trio.sleep(0.1)
            fake.die("boom")
        assert causes == ["boom"] * 3

        async with open_fake_llama(FakeEngine()) as llama:
            llama._core.engine.die("boom")  # type: ignore[attr-defined]
            with pytest.raises(trio.BrokenResourceError, match="boom"):
                llama.stream("x")

    fake_run(main)


@pytest.mark.promise("S12")
def test_a_scripted_failure_ends_its_stream_alone() -> None:
    def reply(prompt: str) -> Reply | str:
        if prompt == "bad":
            return Reply("par", error=ParameterError("scripted"))
        return "all of it"

    async def main() -> None:
        async with open_fake_llama(FakeEngine(reply)) as llama:
            async with llama.stream("bad") as stream:
                with pytest.raises(ParameterError, match="scripted"):
                    async for _ in stream:
                        pass
                assert (stream.text, stream.finish_reason) == ("par", "error")
            completion = await llama.generate("good")
            assert (completion.text, completion.finish_reason) == ("all of it", "eos")

    fake_run(main)


@pytest.mark.promise("S28")
def test_the_fakes_time_is_trios() -> None:
    async def main() -> None:
        fake = FakeEngine(
            lambda prompt: "0123456789",
            token_seconds=1.0,
            prompt_token_seconds=0.5,
            cancel_seconds=3.0,
            load_seconds=7.0,
        )
        start = trio.current_time()
        async with open_fake_llama(fake) as llama:
            assert trio.current_time() - start == 7.0
            completion = await llama.generate("abcd")
            assert completion.usage.first_token_seconds == 2.0
            assert completion.usage.seconds == 12.0
            with trio.move_on_after(5.5):
                async with llama.stream("abcd") as stream:
                    async for _ in stream:
                        pass
            assert stream.text == "0123"
            now = trio.current_time()
            await stream.ended()
            assert trio.current_time() - now == 3.0

    fake_run(main)


@pytest.mark.promise("S28")
def test_loading_a_fake_can_fail_and_be_cancelled() -> None:
    async def main() -> None:
        with pytest.raises(ModelNotFoundError):
            async with open_fake_llama(FakeEngine(load_error=ModelNotFoundError("no"))):
                pytest.fail("opened")
        with trio.move_on_after(1) as scope:
            async with open_fake_llama(FakeEngine(load_seconds=9)):
                pytest.fail("opened")
        assert scope.cancelled_caught
        assert trio.current_time() < 10_000

    fake_run(main)


def test_warming_up_needs_no_file_and_says_nothing_of_templates(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "model.gguf"
    copy.write_bytes(tiny("llama", chat_template=None).read_bytes())

    async def main() -> None:
        async with open_llama(copy, **OPTIONS) as llama:
            copy.unlink()  # its fingerprint cannot be read any more
            await llama.warm_up()
            assert "chat template" not in caplog.text
            for _ in range(2):
                llama.conversation()
            assert caplog.text.count("the model has no chat template") == 1

    run(main)


@pytest.mark.promise("S20")
def test_how_many_threads_compute_changes_no_token_of_an_exact_stream(path: Path) -> None:
    found: list[tuple[int, ...]] = []

    async def main() -> None:
        async with open_llama(path, **{**OPTIONS, "deterministic": True}) as llama:
            for n in (None, 1, 2, 3):
                params = GenerationParams(max_tokens=24, seed=1, threads=n, batch_threads=n)
                reply = await llama.generate("Once upon a time there was", params)
                found.append(tuple(reply.tokens))

    run(main)
    assert len(found[0]) == 24
    assert set(found) == {found[0]}
