"""Nobody's object goes while it is used, and the process ends well whatever it is doing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from triollama import GenerationParams
from triollama import _engine as engine
from triollama.errors import BusyError, ClosedError, TriollamaError

HERE = Path(__file__).parent
GREEDY = GenerationParams(temperature=0.0)
GRAMMAR = GenerationParams(temperature=0.0, grammar="root ::= [a-z ]+", dry_multiplier=0.5)


@pytest.fixture
def adapter_path(tiny, tmp_path: Path) -> Path:
    with engine.Trainer(tiny("llama"), rank=2, threads=1) as trainer:
        trainer.save_adapter(tmp_path / "adapter.gguf")
    return tmp_path / "adapter.gguf"


def test_arguments_that_close_what_they_are_given_to(tiny, adapter_path, run_isolated) -> None:
    run_isolated((HERE / "closing.py").read_text(), tiny("llama"), adapter_path)


def close(owner: Any) -> None:
    """As soon as nobody is inside."""
    while True:
        with suppress(BusyError):
            return owner.close()


def race(call: Callable[[], object], *owners: Any) -> None:
    """Closes them while another thread makes some calls, which may only be told so."""
    begun = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                with suppress(BusyError):
                    call()
                begun.set()
        except ClosedError:
            pass
        except BaseException as error:
            errors.append(error)
        finally:
            begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    for owner in owners:
        close(owner)
    thread.join()
    assert errors == []


LOGITS = np.random.default_rng(0).normal(size=4096).astype(np.float32)

READERS: dict[str, Callable[[engine.Vocab], Callable[[], object]]] = {
    "tokenize": lambda vocab: lambda: vocab.tokenize("Once upon a time " * 100),
    "detokenize": lambda vocab: lambda: vocab.detokenize([5, 6, 7] * 1000),
    "sample": lambda vocab: bound(engine.Sampler(vocab, GRAMMAR), "sample", LOGITS[: len(vocab)]),
    "accept": lambda vocab: bound(engine.Sampler(vocab, GRAMMAR), "accept", 5, False),
    "load_state": lambda vocab: load_state(engine.Sampler(vocab, GRAMMAR)),
    "forced": lambda vocab: bound(engine.Sampler(vocab, GRAMMAR), "forced"),
    "is_grammar_done": lambda vocab: bound(engine.Sampler(vocab, GRAMMAR), "is_grammar_done"),
    "clone": lambda vocab: bound(engine.Sampler(vocab, GRAMMAR), "clone"),
    "upstream": lambda vocab: bound(
        engine.UpstreamSampler(vocab, GRAMMAR), "sample", LOGITS[: len(vocab)]),
}  # fmt: skip


def bound(owner: Any, name: str, *arguments: Any) -> Callable[[], object]:
    return lambda: getattr(owner, name)(*arguments)


def load_state(sampler: engine.Sampler) -> Callable[[], object]:
    for _ in range(100):
        sampler.accept(5, False)
    return bound(sampler, "load_state", sampler.save_state())


@pytest.mark.parametrize("name", READERS)
def test_a_model_is_not_closed_under_who_reads_it(tiny, name: str) -> None:
    for _ in range(5):
        model = engine.Model(tiny("llama", n_vocab=4000))
        race(READERS[name](model.vocab), model)


def test_a_decoder_closes_while_others_submit(tiny) -> None:
    model = engine.Model(tiny("llama"))
    tokens = [5 + i % 100 for i in range(20_000)]
    params = GREEDY.replace(repetition_lookback=-1, dry_multiplier=0.5)
    for _ in range(5):
        context = engine.Context(
            model, n_ctx=32768, n_batch=64, n_ubatch=64, n_seq_max=1, n_threads=1)  # fmt: skip
        decoder = engine.Decoder(context, max_queue=1000)
        sampler = engine.Sampler(model.vocab, params, n_ctx=32768)
        race(lambda d=decoder, s=sampler: d.submit(tokens, sampler=s), decoder, context)
    close(model)


def test_a_closed_decoder_takes_nothing_that_came_too_late(tiny) -> None:
    with (
        engine.Model(tiny("llama")) as model,
        engine.Context(model, n_ctx=64, n_seq_max=1, n_threads=1) as context,
    ):
        decoder = engine.Decoder(context)

        def tokens() -> Any:
            yield 5
            decoder.close()
            yield 6

        with pytest.raises(ClosedError, match="closed"):
            decoder.submit(tokens(), sampler=engine.Sampler(model.vocab, GREEDY))


def test_two_threads_keep_their_reasons_apart(tiny, tmp_path: Path) -> None:
    """What a call raises names its own failure, not that of a call at the same time."""
    data = tiny("llama").read_bytes()
    for wrong in ("brokenone", "brokentwo"):
        (tmp_path / wrong).write_bytes(data.replace(b"llama", wrong[-5:].encode(), 1))
    found: dict[str, set[bool]] = {"brokenone": set(), "brokentwo": set()}

    def load(name: str) -> None:
        for _ in range(50):
            with pytest.raises(TriollamaError) as caught:
                engine.Model(tmp_path / name)
            found[name].add(f"'{name[-5:]}'" in str(caught.value))

    threads = [threading.Thread(target=load, args=(name,)) for name in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"brokenone": {True}, "brokentwo": {True}}


COMPUTING = """
import atexit, os, sys, threading
from triollama import GenerationParams
from triollama import _engine as engine
from triollama.errors import ClosedError

path, scratch = sys.argv[1:3]
begun = threading.Event()
GREEDY = GenerationParams(temperature=0.0)

def in_background(call):
    def work():
        while True:
            call()
            begun.set()
    threading.Thread(target=work, daemon=True).start()
    begun.wait()

def opened(**options):
    return engine.Context(engine.Model(path), n_ctx=2048, **{"n_threads": 2, **options})

def filled(n):
    batch = engine.Batch(n)
    batch.extend([5] * n, 0)
    return batch

def decode(context, batch):
    context.memory.clear()
    context.decode(batch)

def decoding(**options):
    context, batch = opened(n_threads_batch=2, **options), filled(1024)
    in_background(lambda: decode(context, batch))
    return context

def driving():
    context = opened(n_seq_max=2)
    decoder = engine.Decoder(context)
    sampler = engine.Sampler(context.model.vocab, GREEDY.replace(ignore_eos=True))
    stream = decoder.submit([5], sampler=sampler, capacity=10**6, shift=True)
    while not stream.waiting:
        pass
    return decoder, stream
"""

ENDS = {
    "a decode": "context = decoding()",
    "a decode that logs": """
        import logging
        logging.basicConfig(level=logging.DEBUG, stream=open(os.devnull, "w"))
        context = decoding()""",
    "a decoder": "leaked = driving()",
    "a decoder in a cycle": "cycle = [driving()]; cycle.append(cycle)",
    "a trainer": """
        trainer = engine.Trainer(path, rank=2, threads=2)
        in_background(lambda: trainer.evaluate([5] * 256, [6] * 256))""",
    "a load": "in_background(lambda: engine.Model(path, progress=lambda done: None).close())",
    "quantising": """
        in_background(lambda: engine.quantize(path, os.path.join(scratch, "q.gguf"), "q8_0"))""",
    "a sampler": """
        import numpy
        vocab = engine.Model(path).vocab
        sampler = engine.Sampler(vocab, GREEDY.replace(grammar="root ::= [a-z ]+"))
        logits = numpy.zeros(len(vocab), numpy.float32)
        in_background(lambda: sampler.sample(logits))""",
    "a tokenizer": """
        vocab = engine.Model(path).vocab
        in_background(lambda: vocab.tokenize("Once upon a time " * 1000))""",
    "a saved state": """
        context = opened(n_threads_batch=2)
        decode(context, filled(1024))
        in_background(lambda: engine.save_sequence(context, 0))""",
    "everything at once": "several = [decoding(), driving(), decoding(), driving()]",
    "a thread that exits": """
        context = decoding()
        threading.Thread(target=lambda: driving()).start()""",
}


def indented(code: str) -> str:
    import textwrap

    return COMPUTING + textwrap.dedent(code).strip() + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("what", ENDS)
def test_the_process_ends_well_during(what: str, tiny, tmp_path: Path, run_isolated) -> None:
    for _ in range(8):
        done = run_isolated(indented(ENDS[what]), tiny("llama"), tmp_path)
        assert done.stderr == ""


def test_nothing_begins_once_the_interpreter_exits(tiny, tmp_path: Path, run_isolated) -> None:
    """What was registered after the engine runs before its end, and finds everything as it was."""
    code = (
        """
        import atexit
        atexit.register(lambda: last())
    """
        + COMPUTING.replace("\n", "\n        ")
        + """
        context = opened(n_threads=1)
        batch = filled(4)

        @atexit.register
        def first():
            decode(context, batch)
            print("decoded")

        def last():
            for call in (lambda: decode(context, batch), lambda: engine.Model(path),
                         lambda: context.model.vocab.tokenize("a"), opened):
                try:
                    call()
                except ClosedError as error:
                    print("exiting" in str(error))
            context.close()
            print(context.is_closed)
    """
    )
    done = run_isolated(code, tiny("llama"), tmp_path)
    assert done.stdout.split() == ["decoded", *["True"] * 5]


def test_a_forked_child_ends_without_its_parents_threads(
    tiny, tmp_path: Path, run_isolated
) -> None:
    code = """
        held = driving(), decoding()
        for _ in range(5):
            child = os.fork()
            if child == 0:
                sys.exit(7)         # runs what is registered for the exit, as a fresh process would
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    """
    run_isolated(indented(code), tiny("llama"), tmp_path)


@pytest.mark.skipif(
    "san.so" in os.environ.get("LD_PRELOAD", ""), reason="what a sanitizer compiles needs more room"
)
def test_a_thread_without_room_for_llama_cpp_is_refused(tiny, tmp_path: Path, run_isolated) -> None:
    """Python allows stacks of 32 KiB; what is too small is said, and what is not works."""
    code = """
        import sys, threading
        from triollama import GenerationParams
        from triollama import _engine as engine
        from triollama.errors import EngineError

        path, folder = sys.argv[1:]

        def load():
            with engine.Model(path):
                pass

        def train():
            with engine.Trainer(path, rank=2, threads=1) as trainer:
                trainer.forward_backward([5] * 20, [6] * 20)
                trainer.save_adapter(folder + "/adapter.gguf")

        def generate():
            from triollama.sync import Llama
            with Llama(path, n_ctx=64) as llama:
                llama.generate("Once upon a time", max_tokens=3, grammar='root ::= [a-z ]+')

        def tokenize():
            with engine.Model(path, vocab_only=True) as model:
                model.vocab.tokenize("a" * 1000)

        def quantise():
            engine.quantize(path, folder + "/quantised.gguf", "q8_0")

        def outcome(call, size):
            found = []

            def work():
                try:
                    call()
                    found.append("done")
                except EngineError as error:
                    assert "threading.stack_size" in str(error), error
                    found.append("refused")

            threading.stack_size(size << 10)
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return found

        for call in (load, tokenize, train, generate, quantise):
            for size in (32, 64, 128):
                assert outcome(call, size) == ["refused"], (call, size)
            assert outcome(call, 256) == ["done"], call
    """
    run_isolated(code, tiny("qwen2"), tmp_path)  # whose words std::regex finds


def test_our_threads_leave_signals_to_others(tiny, tmp_path: Path, run_isolated) -> None:
    """All that can be blocked, so that a signal reaches a thread of Python's."""
    code = """
        import signal
        held = driving(), decoding()
        ours = set()
        for task in os.listdir("/proc/self/task"):
            status = open(f"/proc/self/task/{task}/status").read()
            fields = dict(line.split(":\\t", 1) for line in status.splitlines())
            if fields["Name"].startswith("triollama"):
                ours.add(fields["Name"])
                blocked = int(fields["SigBlk"], 16)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1):
                    assert blocked >> (number - 1) & 1, (fields["Name"], number)
                assert not blocked >> (signal.SIGSEGV - 1) & 1
        print(sorted(ours))
    """
    done = run_isolated(indented(code), tiny("llama"), tmp_path)
    assert "triollama-steps" in done.stdout
    assert "triollama-cpu" in done.stdout


def test_a_small_stack_limit_is_not_ours(tiny, tmp_path: Path, run_isolated) -> None:
    """`ulimit -s 256` makes threads of 256 KiB, and a decode needs more."""
    code = """
        import resource, subprocess
        if len(sys.argv) == 3:
            def limit():
                resource.setrlimit(resource.RLIMIT_STACK, (256 << 10, 256 << 10))
            command = [sys.executable, __file__, path, scratch, "again"]
            sys.exit(subprocess.run(command, preexec_fn=limit).returncode)
        decoder, stream = driving()
        sizes = {}
        for task in os.listdir("/proc/self/task"):
            sizes[open(f"/proc/self/task/{task}/comm").read().strip()] = task
        assert "triollama-steps" in sizes
        decoder.close()
    """
    run_isolated(indented(code), tiny("llama"), tmp_path)
