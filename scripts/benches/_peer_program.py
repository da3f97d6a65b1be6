"""Runs in a peer's own environment: measures it at one number of streams.

    PEER_PYTHON _peer_program.py PEER MODEL N_STREAMS N_PROMPT N_GEN THREADS

Prints tokens a second, prompts included, from the first request to the end of the last, after a
round that is not measured. Standard library and the peer alone: nothing of ours is there.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

# What our side has by default, except that a text may not end early.
SAMPLING: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.0,
    "repeat_penalty": 1.1,
}


def prompt(seed: int, n: int) -> list[int]:
    return [2, *(1000 + (seed * 7919 + i * 104729) % 200_000 for i in range(n - 1))]


def xllamacpp(model: str, n: int, n_prompt: int, n_gen: int, threads: int) -> Callable[[], int]:
    """Upstream's server within the process: requests from as many threads as there are streams,
    answers in pieces to a callback."""
    import xllamacpp as peer

    params = peer.CommonParams()
    params.model.path = model
    params.n_ctx = 2048 * 16
    params.n_parallel = 16
    params.kv_unified = True
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    params.warmup = False
    server = peer.Server(params)

    def one(seed: int, counts: list[int]) -> None:
        tokens = 0

        def on_piece(piece: dict[str, Any]) -> bool:
            nonlocal tokens
            if "choices" not in piece:
                raise RuntimeError(f"xllamacpp: {piece}")
            tokens = piece.get("usage", {}).get("completion_tokens", 0)
            return False

        request = {
            **SAMPLING,
            "prompt": prompt(seed, n_prompt),
            "n_predict": n_gen,
            "repeat_last_n": 64,
            "samplers": ["penalties", "top_k", "top_p", "temperature"],
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "seed": 42,
        }
        server.handle_completions(request, on_piece)
        counts.append(tokens)

    def together() -> int:
        counts: list[int] = []
        running = [threading.Thread(target=one, args=(seed, counts)) for seed in range(n)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if counts != [n_gen] * n:
            raise RuntimeError(f"xllamacpp gave {counts} tokens where {n_gen} each were asked for")
        return n * (n_prompt + n_gen)

    together()
    return together


def llama_cpp_python(
    model: str, n: int, n_prompt: int, n_gen: int, threads: int
) -> Callable[[], int]:
    """One context, and no way to share it: one generation after the other, as its server does."""
    from llama_cpp import Llama

    llama = Llama(
        model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False
    )

    sampling = {("temp" if name == "temperature" else name): x for name, x in SAMPLING.items()}

    def one(seed: int) -> int:
        tokens = prompt(seed, n_prompt)
        text = b""
        made = 0
        for token in llama.generate(tokens, reset=True, **sampling):
            text += llama.detokenize([token])
            made += 1
            if made == n_gen:
                break
        return n_prompt + made

    one(99)
    return lambda: sum(one(seed) for seed in range(n))


PEERS = {"xllamacpp": xllamacpp, "llama-cpp-python": llama_cpp_python}


def main() -> None:
    name, model, *numbers = sys.argv[1:]
    run = PEERS[name](model, *map(int, numbers))
    start = time.perf_counter()
    tokens = run()
    seconds = time.perf_counter() - start
    print(json.dumps({"speed": tokens / seconds, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
