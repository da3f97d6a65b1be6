"""Every public callable, called with arguments of wrong kinds, extremes, and in wrong order.

    python tests/hostile/campaign.py [--seed 0] [--worlds 200] [--calls 40] [--only REGEX] [-v]

What is public: the names of ``triollama`` and of its modules, and the methods and properties of
what they give, on the fake engine and on tiny models. A call may do what it says, or raise an error
that is ours, is named by its docstring, or is Python's own about its signature. Anything else is a
fault: an error of another type, a call that a cancelled scope does not end, the end of the process.
Seeded: a fault names the seed of its world, and ``--seed N --worlds 1`` makes that one alone.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import gc
import inspect
import linecache
import logging
import math
import os
import random
import re
import resource
import sys
import tempfile
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy
import trio
import triollama
from triollama import GenerationParams, chat, files, lowlevel, models, params, sync, testing, tuning
from triollama.answers import structured
from triollama.testing import FakeEngine, make_tiny_model, open_fake_llama

MODULES = (triollama, sync, lowlevel, chat, files, models, params, testing, tuning)
PACKAGE = os.path.dirname(triollama.__file__)

HANGS = 120.0
"""Seconds after which a call that a scope has cancelled hangs."""

SPARED = {
    # They break what they are called on: that is what they are for.
    "Context.abort_at", "Context.abort", "Decoder.fail_at", "FakeEngine.die",
    # Megabytes into the user's cache.
    "models.default_model", "models.cache_dir",
    # No end, and none is promised.
    "Conversations.written",
}  # fmt: skip

FOR_USERS = {
    # Of these the rest is what our own files have of each other.
    "Conversations": ("__iter__", "__len__", "__getitem__", "__contains__", "set_adapters"),
    "Adapters": ("__iter__", "__len__"),
}

TRIO = (
    trio.ClosedResourceError,
    trio.BusyResourceError,
    trio.BrokenResourceError,
    trio.EndOfChannel,
)


class Odd:
    """Of no kind at all."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "<Odd>"


class Answer(msgspec.Struct):
    city: str


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def round_about() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


WRONG: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: True, lambda: False, lambda: Ellipsis,
    lambda: 0, lambda: -1, lambda: 1, lambda: 2**31, lambda: -(2**31) - 1, lambda: 2**63,
    lambda: 10**5000, lambda: 1.5, lambda: -0.0, lambda: math.nan, lambda: math.inf,
    lambda: -math.inf, lambda: 1e308, lambda: 1j,
    lambda: "", lambda: "text", lambda: "\ud800", lambda: "a\0b", lambda: "é" * 5000,
    lambda: "{{ 1/0 }}", lambda: "{% for %}", lambda: "..", lambda: "no/such/folder/x",
    lambda: b"", lambda: b"\xff\xfe", lambda: bytearray(b"abc"), lambda: memoryview(b"abc"),
    lambda: [], lambda: [None], lambda: ["a", 1], lambda: [1, 2, 3], lambda: [-1], lambda: [2**40],
    lambda: [[1], [2]], lambda: nested(5000), round_about, lambda: (), lambda: (1, "a"),
    lambda: {}, lambda: {"role": "user"}, lambda: {"role": 5, "content": []}, lambda: {1: 2},
    lambda: {"role": "user", "content": "hi"}, lambda: [{"role": "user", "content": "hi"}],
    lambda: [{"role": "assistant", "content": nested(500)}], lambda: {"a": Odd()},
    set, lambda: {1, 2}, lambda: frozenset({"a"}), lambda: range(5), lambda: iter([1, 2]),
    lambda: (i for i in "ab"), Odd, lambda: Odd, lambda: int, lambda: list[int], lambda: print,
    lambda: (lambda: None), lambda: (lambda *a, **k: "x"), lambda: os, lambda: ValueError("x"),
    lambda: numpy.zeros(3), lambda: numpy.zeros((2, 3), numpy.float32), lambda: numpy.arange(4),
    lambda: numpy.array("a"), lambda: numpy.float32(2), lambda: numpy.int64(3), lambda: Path("x"),
    lambda: Path("/"), object, lambda: type, lambda: Answer, lambda: Answer("Rome"),
)  # fmt: skip


class World:
    """A folder, some objects to call, and right values for arguments of some names."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder = folder
        self.chance = chance
        self.objects: list[Any] = []
        self.closers = contextlib.ExitStack()
        self.n_files = 0

    def path(self) -> Path:
        """Of a file that is there, or of one that is not."""
        there = [path for path in self.folder.iterdir() if path.is_file()]
        if there and self.chance.random() < 0.5:
            return self.chance.choice(there)
        self.n_files += 1
        return self.folder / f"new {self.n_files}"

    def of_kind(self, *kinds: type) -> Any:
        found = [one for one in self.objects if isinstance(one, kinds)]
        return self.chance.choice(found) if found else None

    def right(self, name: str) -> Any:
        """A value that an argument of this name may have, as far as we know."""
        chance = self.chance
        given: dict[str, Callable[[], Any]] = {
            "path": self.path, "source": self.path, "target": self.path, "folder": self.path,
            "prompt": lambda: "Once upon", "text": lambda: "hello", "prompts": lambda: ["a", "b"],
            "tokens": lambda: [5, 6, 7], "given": lambda: "Once", "data": lambda: b"data",
            "params": lambda: GenerationParams(max_tokens=3), "max_tokens": lambda: 3,
            "messages": lambda: [{"role": "user", "content": "hi"}], "id": lambda: "a",
            "ids": lambda: ["a"], "title": lambda: "A title", "role": lambda: "user",
            "template": lambda: self.of_kind(chat.ChatTemplate) or "chatml",
            "model": lambda: self.of_kind(lowlevel.Model), "into": lambda: Answer,
            "context": lambda: self.of_kind(lowlevel.Context), "batch": lambda: lowlevel.Batch(4),
            "vocab": lambda: self.of_kind(lowlevel.Vocab),
            "sampler": lambda: self.of_kind(lowlevel.Sampler), "seq": lambda: 0,
            "trainer": lambda: self.of_kind(lowlevel.Trainer),
            "document": lambda: self.of_kind(files.Document),
            "conversation": lambda: self.of_kind(files.SavedConversation),
            "conversations": lambda: [self.of_kind(triollama.Conversation)],
            "adapter": lambda: self.of_kind(triollama.LoadedAdapter, lowlevel.Adapter),
            "adapters": lambda: [(self.of_kind(triollama.LoadedAdapter), 0.5)],
            "saved": lambda: self.of_kind(files.Document, files.SavedConversation),
            "dataset": lambda: self.of_kind(tuning.TrainingDataset),
            "config": lambda: tuning.TrainingConfig(rank=2, epochs=1),
            "conversation_id": lambda: "a", "key": lambda: b"k" * 32, "blob": lambda: b"kv",
            "vector": lambda: numpy.zeros((1, 4), numpy.float32), "rendered": self.rendered,
            "examples": lambda: list(getattr(self.of_kind(tuning.TrainingDataset), "train", ())),
            "n": lambda: chance.choice([0, 1, 2]), "index": lambda: 0, "token": lambda: 5,
            "capacity": lambda: 4, "priority": lambda: 1, "scale": lambda: 1.0,
            "fake": lambda: FakeEngine(lambda prompt: "x"), "arch": lambda: "llama",
            "reply": lambda: (lambda prompt: "an answer"), "format": lambda: "json",
            "name": lambda: "chatml", "progress": lambda: (lambda value: None),
        }  # fmt: skip
        return given[name]() if name in given else chance.choice(WRONG)()

    def rendered(self) -> Any:
        return chat.named("chatml").render([{"role": "user", "content": "hi"}])

    def wrong(self) -> Any:
        """Of any kind: often one of our own objects, where another belongs."""
        if self.objects and self.chance.random() < 0.25:
            return self.chance.choice(self.objects)
        return self.chance.choice(WRONG)()

    def note(self, found: Any) -> None:
        """What a call gave can be called too."""
        home = type(found).__module__
        ours = home.startswith("triollama") and not home.startswith("triollama.testing")
        if ours and len(self.objects) < 60:
            self.objects.append(found)

    def close(self) -> None:
        self.objects.clear()
        gc.collect()
        with contextlib.suppress(triollama.TriollamaError):
            self.closers.close()


# What there is to call


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in {
        "__getitem__", "__contains__", "__iter__", "__len__", "__repr__", "__enter__", "__exit__",
        "__next__", "__aenter__", "__aexit__", "__copy__", "__reduce__", "__eq__", "__hash__",
    }  # fmt: skip


def functions() -> list[tuple[str, Any]]:
    """The names of the modules that can be called. Neither errors, which nobody calls, nor what
    "is made by" another call, as its docstring says."""
    found = {}
    for module in MODULES:
        for name in module.__all__:
            one = getattr(module, name)
            if not callable(one) or not getattr(one, "__module__", "").startswith("triollama"):
                continue
            if inspect.isclass(one) and issubclass(one, BaseException):
                continue
            if "Made by" not in (inspect.getdoc(one) or ""):
                found[f"{module.__name__.removeprefix('triollama.')}.{name}"] = one
    return [(name, one) for name, one in found.items() if name not in SPARED]


def is_data(one: Any) -> bool:
    return isinstance(one, type) and issubclass(one, (msgspec.Struct, tuple))


def members(one: Any) -> list[str]:
    """Of an object, what our own classes have given it."""
    if type(one).__name__ in FOR_USERS:
        return list(FOR_USERS[type(one).__name__])
    found: list[str] = []
    for kind in type(one).__mro__:
        if kind.__module__.startswith("triollama"):
            found += [name for name in vars(kind) if is_public(name) and name not in found]
    return found


def signature_of(call: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(call)
    except (TypeError, ValueError):
        return None


FIELDS = GenerationParams.__struct_fields__


def arguments(world: World, call: Any) -> tuple[list[Any], dict[str, Any]]:
    """For a call: some right, some wrong, some left out; now and then too many."""
    chance = world.chance
    positional: list[Any] = []
    named: dict[str, Any] = {}
    signature = signature_of(call)
    # One wrong argument among right ones gets further than nothing but wrong ones.
    p_wrong = chance.choice([0.0, 0.15, 0.5, 1.0])

    def value(name: str) -> Any:
        return world.wrong() if chance.random() < p_wrong else world.right(name)

    if signature is None:
        return [world.wrong() for _ in range(chance.randrange(4))], {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional += [world.wrong() for _ in range(chance.choice([0, 0, 1, 3]))]
        elif parameter.kind is parameter.VAR_KEYWORD:
            for _ in range(chance.choice([0, 0, 1, 2])):
                named[chance.choice([*FIELDS, "nothing", "overflow", "tools"])] = world.wrong()
        elif name == "task_status":  # trio's own
            continue
        elif name != "path" and parameter.default is not parameter.empty and chance.random() < 0.6:
            continue  # without a path it would be the default model
        elif parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = value(name)
        elif len(positional) == list(signature.parameters).index(name):
            positional.append(value(name))
        elif parameter.kind is not parameter.POSITIONAL_ONLY:
            named[name] = value(name)
    if chance.random() < 0.03:
        positional.append(world.wrong())
    return positional, named


# What came of it


def shown(value: Any) -> str:
    """For the log, whatever it is."""
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}: no repr, {type(error).__name__}>"
    text = " ".join(text.split())
    return text if len(text) < 80 else f"{text[:60]}...({len(text)})"


def our_frames(error: BaseException) -> list[traceback.FrameSummary]:
    return [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(PACKAGE) or frame.filename.endswith(".pyx")
    ]


PYTHONS = re.compile(r"positional argument|unexpected keyword|unhashable|multiple values for")
SIGNATURE = re.compile(
    r"argument|expected .* got|takes|required|unexpected keyword|not iterable|"
    r"cannot be interpreted|"
    r"has incorrect type|neither copied nor pickled|cannot pickle|no default __reduce__|"
    r"unhashable|must be|abstract|comes from"
)


def is_fault(call: Any, error: BaseException) -> bool:
    """Whether nobody was told of such an error."""
    if isinstance(error, (triollama.TriollamaError, StopIteration, StopAsyncIteration, *TRIO)):
        return False
    text = f"{inspect.getdoc(call) or ''} {inspect.getdoc(type(call)) or ''}"
    text += inspect.getdoc(getattr(call, "__self__", None) or type(call)) or ""
    names = [kind.__name__ for kind in type(error).__mro__[:-3]]  # Exception and above: nobody's
    if any(name in text for name in names) or isinstance(error, FileNotFoundError):
        return False
    if re.search("truth value of an array|0-d array", str(error)):
        return False  # the array's own word
    frames = our_frames(error)
    if isinstance(error, TypeError):
        if not frames:
            return False  # of the call itself
        last = frames[-1]
        if last.filename.endswith(".py"):
            if PYTHONS.search(str(error)):
                return False
            return (
                not linecache.getline(last.filename, last.lineno or 0).strip().startswith("raise")
            )
        return not SIGNATURE.search(str(error))
    if isinstance(error, AttributeError) and "not writable" in str(error):
        return False
    if isinstance(error, KeyError):
        return getattr(call, "__name__", "") != "__getitem__"
    return True


class Campaign:
    def __init__(self, only: str = "", verbose: bool = False) -> None:
        self.only = re.compile(only)
        self.verbose = verbose
        self.faults: Counter[tuple[str, str, str]] = Counter()
        self.first: dict[tuple[str, str, str], str] = {}
        self.n_calls = 0
        self.n_refused = 0
        self.called: Counter[str] = Counter()

    def say(self, what: str) -> None:
        """Before the call is made: a crash shows which it was."""
        if self.verbose:
            os.write(1, f"{what}\n".encode("utf-8", "backslashreplace"))

    def note(self, name: str, call: Any, error: BaseException, what: str) -> None:
        self.n_refused += 1
        if isinstance(error, BaseExceptionGroup):
            for one in error.exceptions:
                self.note(name, call, one, what)
            return
        silent = not shown(error).partition("(")[2].strip(")") and not isinstance(
            error, (StopIteration, StopAsyncIteration, *TRIO)
        )
        if not silent and not is_fault(call, error):
            return
        frames = our_frames(error)
        place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "-"
        key = (name, type(error).__name__, place)
        self.faults[key] += 1
        self.first.setdefault(key, f"{what}\n        {shown(error)}")

    def choose(self, world: World) -> tuple[str, Any, bool] | None:
        """A name, what to call, and whether it is a property's setter."""
        chance = world.chance
        if chance.random() < 0.35 or not world.objects:
            name, call = chance.choice(FUNCTIONS)
            return (name, call, False) if self.only.search(name) else None
        one = chance.choice(world.objects)
        name = chance.choice(members(one))
        full = f"{type(one).__name__}.{name}"
        if full in SPARED or not self.only.search(full):
            return None
        member = inspect.getattr_static(type(one), name)
        if isinstance(member, (property, functools.cached_property)) or not callable(
            getattr(type(one), name, None)
        ):
            settable = getattr(member, "fset", None) is not None or (
                isinstance(member, types.GetSetDescriptorType) and chance.random() < 0.2
            )
            if settable and chance.random() < 0.7:
                return f"{full} =", functools.partial(setattr, one, name), True
            return full, functools.partial(getattr, one, name), False
        return full, getattr(one, name), False

    async def call(self, world: World, where: str) -> None:
        chosen = self.choose(world)
        if chosen is None:
            return
        name, call, sets = chosen
        if isinstance(call, functools.partial):
            positional, named = ([world.wrong()] if sets else []), {}
        else:
            positional, named = arguments(world, call)
        given = [shown(one) for one in positional]
        given += [f"{key}={shown(one)}" for key, one in named.items()]
        what = f"{where}: {name}({', '.join(given)})"
        self.say(what)
        self.n_calls += 1
        self.called[name] += 1
        try:
            found = call(*positional, **named)
            if not is_data(call):  # which takes what it is given, and looks at it where it is used
                world.note(found)
            if inspect.isawaitable(found):
                world.note(await self.awaited(found))
            elif hasattr(type(found), "__aenter__") and world.chance.random() < 0.5:
                await self.entered(world, found)
            elif isinstance(found, Iterator) and hasattr(found, "__next__"):
                for _ in zip(range(20), found, strict=False):
                    pass
        except trio.Cancelled:
            raise
        except (KeyboardInterrupt, SystemExit, AssertionError) as error:
            self.note(name, call, RuntimeError(repr(error)), what)
        except BaseException as error:
            self.note(name, call, error, what)

    async def awaited(self, found: Any) -> Any:
        with trio.move_on_after(0.3):
            return await found
        return None

    async def entered(self, world: World, found: Any) -> None:
        with trio.move_on_after(0.3):
            async with found as inner:
                world.note(inner)
                if hasattr(inner, "receive"):
                    for _ in range(world.chance.randrange(4)):
                        await inner.receive()


FUNCTIONS = functions()


# Worlds


def common(world: World, path: Path) -> None:
    """What needs no Llama."""
    template = chat.named("chatml")
    model = world.closers.enter_context(lowlevel.Model(path, vocab_only=True))
    saved = files.SavedConversation(id="a", messages=(files.Message(role="user", content="hi"),))
    document = files.Document(
        model=files.ModelIdentity(fingerprint=b"f" * 32), conversations=(saved,)
    )
    files.save_document(world.folder / "saved", document)
    (world.folder / "garbage").write_bytes(b"\0\1garbage" * 50)
    (world.folder / "lines.jsonl").write_text('{"text": "hello"}\n{"text": "more"}\n')
    data = tuning.prepare_training_data(
        ["hello world", "and more"] * 4, vocab=model.vocab, validation_split=0.25
    )
    world.objects += [
        template, chat.ChatTokenizer(model.vocab), model.vocab, model, saved, document, data,
        document.model, GenerationParams(max_tokens=3), structured(Answer),
        tuning.TrainingConfig(rank=2, epochs=1), tuning.Encoder(model.vocab, template),
        world.closers.enter_context(files.Journal(world.folder / "journal", document)),
        saved.messages[0], lowlevel.TextStream(["END"]), world.rendered(),
    ]  # fmt: skip


async def trios(world: World, llama: triollama.Llama) -> None:
    """What a Llama of trio's gives."""
    chats = [llama.conversation(id, system="Be brief.", max_tokens=4) for id in ("a", "b", "gone")]
    await chats[0].say("Hello")
    chats[2].close()
    rows = numpy.zeros((llama.model.n_layer - 1, llama.model.n_embd), numpy.float32)
    async with llama.stream("Once", max_tokens=3) as ended:
        await ended.ended()
    world.objects += [
        llama, llama, *chats, chats[0], llama.conversations, llama.adapters, llama.model,
        llama.vocab, await llama.load_control_vector(rows), ended, chats[1].stream("Hello"),
        llama.stream("Once", max_tokens=3), llama.map(["a", "b"], max_tokens=2),
        await llama.save(world.folder / "chats"), llama.statistics(), chats[0].messages[-1],
    ]  # fmt: skip


def scripts(world: World, path: Path) -> None:
    """What scripts and the low layer have."""
    llama = world.closers.enter_context(sync.Llama(path, n_ctx=128, threads=1))
    model = world.closers.enter_context(lowlevel.Model(path))
    context = world.closers.enter_context(lowlevel.Context(model, n_ctx=64, n_threads=1))
    batch = lowlevel.Batch(8)
    batch.extend([5, 6, 7], 0)
    talk = llama.chat("a", system="Be brief.", max_tokens=4)
    talk.say("Hello")
    world.objects += [
        llama, llama, talk, talk, llama.generate("Once", max_tokens=3), llama.score("hello"),
        llama.stream("Once", max_tokens=3), model, context, context.memory, batch, model.vocab,
        lowlevel.Sampler(model.vocab, GenerationParams(seed=1)),
    ]  # fmt: skip


def training(world: World, path: Path) -> None:
    trainer = world.closers.enter_context(lowlevel.Trainer(path, rank=2))
    tuner = world.closers.enter_context(tuning.Tuner(path, n_ctx=64, threads=1))
    trainer.save_adapter(world.folder / "adapter.gguf")
    world.objects += [trainer, trainer, tuner, tuner]


async def one_world(campaign: Campaign, model: Path, seed: int, n_calls: int) -> None:
    chance = random.Random(seed)
    kind = ("fake", "native", "script", "training")[seed % 4]
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        world = World(Path(name), chance)
        try:
            with contextlib.suppress(trio.Cancelled):
                await _in_world(campaign, world, kind, model, seed, n_calls)
        finally:
            world.close()
            os.chdir("/")


async def _in_world(
    campaign: Campaign, world: World, kind: str, model: Path, seed: int, n_calls: int
) -> None:
    common(world, model)
    opened: Any = contextlib.nullcontext()
    if kind == "fake":
        opened = open_fake_llama(
            FakeEngine(
                lambda prompt: "An answer.",
                n_ctx=256,
                max_streams=2,
                max_queue=2,
                token_seconds=0.0,
                prompt_token_seconds=0.0,
            )
        )
    elif kind == "native":
        opened = triollama.open_llama(model, n_ctx=256, max_streams=2, max_queue=2, threads=1)
    elif kind == "script":
        scripts(world, model)
    else:
        training(world, model)
    async with opened as llama:
        if llama is not None:
            await trios(world, llama)
        for number in range(n_calls):
            faulthandler.dump_traceback_later(HANGS, exit=True)
            await campaign.call(world, f"seed {seed}, call {number}")
            faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback_later(HANGS, exit=True)
        for one in world.objects:  # who leaves in order leaves nothing open
            if isinstance(one, sync.Stream):
                one.close()
    faulthandler.cancel_dump_traceback_later()


def run(campaign: Campaign, seed: int, worlds: int, calls: int) -> None:
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda what: campaign.note(
        "unraisable", what.object, what.exc_value or RuntimeError(), shown(what.object)
    )
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "tiny.gguf")
        for number in range(seed, seed + worlds):
            trio.run(one_world, campaign, model, number, calls)
            gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first world")
    parser.add_argument("--worlds", type=int, default=200)
    parser.add_argument("--calls", type=int, default=40, help="in each world")
    parser.add_argument("-v", "--verbose", action="store_true", help="name each call before it")
    parser.add_argument("--only", default="", metavar="REGEX", help="call names that have it")
    options = parser.parse_args()
    found = Campaign(options.only, options.verbose)
    run(found, options.seed, options.worlds, options.calls)
    for key, count in found.faults.most_common():
        print(f"{count:5} {' '.join(key)}\n      {found.first[key]}")
    print(
        f"{found.n_calls} calls of {len(found.called)} callables, {found.n_refused} refused, "
        f"{sum(found.faults.values())} faults of {len(found.faults)} kinds"
    )
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
