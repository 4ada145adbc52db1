#!/usr/bin/env python3
"""Times llama.cpp's prefill, for bench/cpu_prefill.py.

    llama_cpp_bench.py --model HF_DIR --cache DIR < RUNS

RUNS is a JSON list of {"tokens", "threads", "weights": "f16"|"bf16", "flash_attn": bool, "n_ubatch", "repeat"}; each is
answered by one JSON line with "tokens_per_s" (median), "peak_rss_bytes" (of this process so far), "next_token" (the
likeliest, to compare runs by) and "version". Each run has a context of its own, one untimed prefill and then `repeat` timed ones.
The logits of the last token alone are computed. GGUF files are written once into --cache from the HF weights.

Needs the PyPI packages llama-cpp-python (built for this CPU) and gguf.
"""

import argparse
import ctypes
import json
import random
import resource
import statistics
import sys
import time
from pathlib import Path

import hf_to_gguf


class BenchError(Exception):
    pass


def prompt(tokens: int, vocabulary: int):
    dice = random.Random(1)
    return (ctypes.c_int32 * tokens)(*(dice.randrange(vocabulary) for _ in range(tokens)))


def prefill_seconds(llama_cpp, context, ids, vocabulary: int) -> tuple:
    """Returns (seconds, likeliest next token) of one prefill into an empty cache."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    # Without a list of wanted logits, llama.cpp computes the last token's.
    batch = llama_cpp.llama_batch_get_one(ids, len(ids))
    begin = time.perf_counter()
    status = llama_cpp.llama_decode(context, batch)
    llama_cpp.llama_synchronize(context)
    seconds = time.perf_counter() - begin
    if status != 0:
        raise BenchError(f"llama_decode of {len(ids)} tokens returned {status}")
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return seconds, max(range(vocabulary), key=lambda token: logits[token])


def time_run(llama_cpp, model, run: dict) -> dict:
    tokens = run["tokens"]
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = (tokens + 255) // 256 * 256
    parameters.n_batch = tokens
    parameters.n_ubatch = run["n_ubatch"]
    parameters.n_threads = parameters.n_threads_batch = run["threads"]
    parameters.flash_attn_type = (llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if run["flash_attn"]
                                  else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED)
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise BenchError(f"no context for {run}")
    try:
        ids = prompt(tokens, vocabulary)
        timed = [prefill_seconds(llama_cpp, context, ids, vocabulary) for _ in range(run["repeat"] + 1)][1:]
    finally:
        llama_cpp.llama_free(context)
    return {**run, "tokens_per_s": round(tokens / statistics.median(seconds for seconds, _ in timed), 2),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "next_token": timed[0][1], "version": llama_cpp.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="HF_DIR")
    parser.add_argument("--cache", type=Path, required=True)
    arguments = parser.parse_args()
    runs = json.load(sys.stdin)
    try:
        import llama_cpp.llama_cpp as api
        from llama_cpp import __version__

        api.__version__ = __version__
    except ImportError as error:
        print(f"llama_cpp_bench: {error}", file=sys.stderr)
        return 1
    silent = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(silent, ctypes.c_void_p(0))
    api.llama_backend_init()
    models = {}
    try:
        for run in runs:
            weights = run["weights"]
            if weights not in models:
                path = arguments.cache / f"{arguments.model.name}.{weights}.gguf"
                if not path.is_file():
                    hf_to_gguf.convert(arguments.model, path, weights)
                models[weights] = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
                if not models[weights]:
                    raise BenchError(f"llama.cpp cannot load {path}")
            print(json.dumps(time_run(api, models[weights], run)), flush=True)
    except BenchError as error:
        print(f"llama_cpp_bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
