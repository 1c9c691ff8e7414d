"""llama.cpp's own server for serving.py: `FOLDER PORT THREADS`, where xllamacpp is; serves until it is ended."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import xllamacpp

SLOTS, CONTEXT = 16, 512
"""Answers that are decoded together, and tokens that each may have."""


def main() -> None:
    folder, port, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chosen = xllamacpp.CommonParams()
    chosen.model.path, chosen.mmproj.path = str(folder / "model.gguf"), str(folder / "mmproj.gguf")
    chosen.port, chosen.n_parallel, chosen.n_ctx = port, SLOTS, SLOTS * CONTEXT  # it listens on this machine alone
    chosen.n_gpu_layers, chosen.warmup, chosen.verbosity = 0, False, 1
    chosen.cpuparams.n_threads = chosen.cpuparams_batch.n_threads = threads
    chosen.cache_type_k = chosen.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    chosen.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(chosen)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
