"""llama.cpp's loss on windows of tokens, as JSON: `python llama_loss.py FILE.gguf WINDOWS.npz THREADS [KIND]`.

Runs in an environment that has llama_cpp, and knows nothing of smolforge. WINDOWS holds the `tokens` and `targets` of
all windows behind each other, and their `lengths`. With KIND (q4_0) llama.cpp rounds the file first, next to it.
"""

from __future__ import annotations

import json
import sys

import llama_cpp
import numpy as np


def quantize(file: str, kind: str) -> str:
    """The file that llama.cpp makes of another: matrices of `kind`, embedding and head of Q8_0."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.output_tensor_type = params.token_embedding_type = llama_cpp.GGML_TYPE_Q8_0
    made = f"{file}.{kind}"
    if llama_cpp.llama_model_quantize(file.encode(), made.encode(), params):
        raise SystemExit(f"llama.cpp does not round {file} to {kind}")
    return made


def main() -> None:
    """Score all windows."""
    file, windows, threads = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
    if len(sys.argv) > 4:
        file = quantize(file, sys.argv[4])
    ends = np.cumsum(windows["lengths"])
    model = llama_cpp.Llama(
        file, n_ctx=int(max(windows["lengths"])), n_batch=512, n_threads=threads, n_threads_batch=threads,
        logits_all=True, verbose=False,
    )  # fmt: skip
    nats = 0.0
    for start, end in zip([0, *ends], ends, strict=False):
        wanted = windows["targets"][start:end]
        model.reset()
        model.eval(windows["tokens"][start:end].tolist())
        for row, target in enumerate(wanted):
            logits = model.scores[row].astype(np.float64)
            nats += float(logits.max() + np.log(np.exp(logits - logits.max()).sum()) - logits[target])
    print(json.dumps({"nats": nats}))


if __name__ == "__main__":
    main()
