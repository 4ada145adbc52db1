#!/usr/bin/env python3
"""What bench/prefill_bench.py compares prefill with, one JSON object a line on stdout; needs torch, and transformers 5.

    prefill_peers.py cudnn --tokens 65536 131072        cuDNN's dense causal attention alone, on structured inputs
    prefill_peers.py transformers --tokens 65536        LlamaForCausalLM of Llama-3-8B's shape, random bf16 weights

Both by CUDA events after warm-up, medians. transformers runs with sdpa, cuDNN's backend where it takes the call, logits of
the last token alone, and once with and once without its KV cache; ttft_s is the faster of the two.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LLAMA_3_8B = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=Q_HEADS,
                  num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, rms_norm_eps=1e-5, tie_word_embeddings=False)
SEED = 20261122


class PeerError(Exception):
    pass


def show(values: dict) -> None:
    print(json.dumps(values), flush=True)


def cudnn(lengths: list, repeat: int) -> None:
    import torch
    import torch.nn.functional as functional
    from structured_qkv import gen, t
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for n in lengths:
        heads_first = [x.transpose(0, 1)[None] for x in gen(n, Hq=Q_HEADS, Hk=KV_HEADS, D=HEAD_DIM)]

        def attend():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)

        ms = t(attend, repeat, 1)
        show({"tokens": n, "ms": ms, "tflops": 2.0 * Q_HEADS * HEAD_DIM * n * n / ms / 1e9, "torch": torch.__version__})
        del heads_first
        torch.cuda.empty_cache()


def random_llama(shape: dict, max_position: int, device: str):
    """Made on the device, without a copy on the host."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**shape, max_position_embeddings=max_position,
                         rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to_empty(device=device)
    # Its buffers are computed, not loaded: those of a meta model hold nothing.
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)
    return model.eval()


def check_attention_calls(run) -> None:
    """Runs once and makes sure that the peer runs as fast as it can: causal by flag, no mask, no repeated KV heads."""
    import torch

    original = torch.nn.functional.scaled_dot_product_attention
    calls = []

    def watched(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = watched
    try:
        run()
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    for call in calls:
        if call.get("attn_mask") is not None or not call.get("is_causal") or not call.get("enable_gqa"):
            raise PeerError(f"transformers' attention is not called as causal GQA without a mask: {sorted(call)}")
    if not calls:
        raise PeerError("transformers did not call scaled_dot_product_attention")


def timed(run, device: str) -> float:
    """Seconds of run(), which ends with a value on the host."""
    import torch

    if device == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def transformers_prefill(model, n: int, repeat: int, device: str) -> dict:
    import torch
    import transformers
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ids = torch.randint(0, model.config.vocab_size, (1, n), device=device)

    def prefill(use_cache: bool, backend):
        with torch.inference_mode(), sdpa_kernel(backend):
            output = model(ids, use_cache=use_cache, logits_to_keep=1)
            return int(output.logits[0, -1].argmax())

    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION] if device != "cpu" else [SDPBackend.FLASH_ATTENTION]
    for backend in backends:
        try:
            check_attention_calls(lambda: prefill(True, backend))
            break
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or backend is backends[-1]:
                raise
            print(f"{backend.name} does not take the call ({error}); trying the next", file=sys.stderr)
    seconds = {}
    for name, use_cache in (("kv_cache_s", True), ("no_cache_s", False)):
        prefill(use_cache, backend)
        seconds[name] = statistics.median(timed(lambda: prefill(use_cache, backend), device) for _ in range(repeat))
    peak = {"peak_device_bytes": torch.cuda.max_memory_allocated()} if device != "cpu" else {}
    return {"tokens": n, "ttft_s": min(seconds.values()), **seconds, **peak, "backend": backend.name.lower(),
            "version": transformers.__version__, "torch": torch.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["cudnn", "transformers"])
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("prefill_peers: no GPU", file=sys.stderr)
        return 1
    try:
        if arguments.peer == "cudnn":
            cudnn(arguments.tokens, arguments.repeat)
        else:
            model = random_llama(LLAMA_3_8B, max(arguments.tokens), "cuda")
            for n in arguments.tokens:
                torch.cuda.reset_peak_memory_stats()
                show(transformers_prefill(model, n, arguments.repeat, "cuda"))
    except (PeerError, RuntimeError) as error:
        print(f"prefill_peers: {arguments.peer}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
