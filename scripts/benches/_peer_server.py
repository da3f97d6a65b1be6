"""xllamacpp's server, in its own environment:

    PEER_PYTHON _peer_server.py MODEL PORT STREAMS CELLS THREADS

Serves until it is ended. No prompt of the benchmark begins as another does, so it keeps none.
"""

from __future__ import annotations

import sys
import threading

import xllamacpp


def main() -> None:
    model = sys.argv[1]
    port, streams, cells, threads = map(int, sys.argv[2:])
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.port = port
    params.n_ctx = cells
    params.n_parallel = streams
    params.kv_unified = True
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.n_gpu_layers = 0
    server = xllamacpp.Server(params)  # listens from here on
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
