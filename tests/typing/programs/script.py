"""What a user might write: every line here must pass mypy --strict and pyright."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import triollama
from triollama import GenerationParams, TriollamaError
from triollama.errors import ContextFullError, ModelNotFoundError, ParameterError
from triollama.sync import Completion, Conversation, Llama, Stream, TurnStream


def show_progress(fraction: float) -> bool:
    print(f"{fraction:.0%}")
    return fraction < 2.0


def tell(llama: Llama, prompt: str) -> str:
    pieces: list[str] = []
    with llama.stream(prompt, max_tokens=20, temperature=0.0, stop=("\n",)) as stream:
        for piece in stream:
            pieces.append(piece.upper())
        reason: str | None = stream.finish_reason
    print(reason)
    return "".join(pieces)


def count(llama: Llama, text: str) -> int:
    tokens: list[int] = llama.tokenize(text)
    assert llama.detokenize(tokens) == text
    return len(tokens)


def embed(llama: Llama, texts: list[str]) -> npt.NDArray[np.float32]:
    table = llama.embed(texts, normalize=True)
    return table @ table.T


def first_logprob(llama: Llama, prompt: str) -> float:
    done: Completion = llama.generate(prompt, GenerationParams(max_tokens=1, logprobs=3))
    if done.logprobs is None:
        return 0.0
    return done.logprobs[0].logprob


class City(msgspec.Struct):
    name: str


def chat(llama: Llama, path: Path) -> str:
    talk: Conversation = llama.chat(system="Be brief.", temperature=0.2)
    reply: Completion = talk.say("Hello")
    city: City = talk.say("Where?", into=City)
    turn: TurnStream = talk.stream("And then?")
    said = [piece.strip() for piece in turn]
    branch = talk.fork()
    branch.rewind()
    adapter = llama.load_adapter(path)
    branch.set_adapters([(adapter, 0.5)])
    talk.save(path)
    (again,) = llama.restore(path)
    return reply.text + city.name + said[0] + again.messages[-1].content


def look(path: Path) -> int:
    found = triollama.models.inspect(triollama.models.get("hf:a/b/c.gguf") or path, streams=2)
    return sum(need.total for need in found.needs if need.fits)


def main(path: Path | str | None = None) -> None:
    logging.getLogger("triollama.llama_cpp").setLevel(logging.DEBUG)
    print(triollama.__version__, triollama.build_info()["commit"])
    params = GenerationParams(top_k=20).replace(seed=7)
    try:
        with Llama(path, n_ctx=1024, threads=2, progress=show_progress) as llama:
            print(tell(llama, "Once"), count(llama, "Once"), first_logprob(llama, "Once"))
            stream: Stream = llama.stream([1, 2, 3], params)
            stream.close()
    except ModelNotFoundError as error:
        print(error.path)
    except ContextFullError as error:
        print(error.needed - error.n_ctx)
    except ParameterError as error:
        print(error.parameter, error.value)
    except TriollamaError:
        raise


if __name__ == "__main__":
    main()
