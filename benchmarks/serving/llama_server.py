"""llama.cpp's own server over one GGUF file: `python llama_server.py FILE PORT SLOTS CONTEXT THREADS`.

Runs in an environment that has xllamacpp, and knows nothing of smolforge.
"""

from __future__ import annotations

import sys
import threading

import xllamacpp


def main() -> None:
    """Serve until killed."""
    file, port, slots, context, threads = sys.argv[1], *map(int, sys.argv[2:6])
    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.hostnames, settings.port = ["127.0.0.1"], port
    settings.n_parallel, settings.n_ctx = slots, slots * context
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    print(server.listening_address, file=sys.stderr, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
