#!/usr/bin/env python3
"""Writes tests/demo/reference.json: what transformers generates for the demo's prompt, from the same weights.

    make_demo_reference.py MODEL_DIR OUTPUT.json

MODEL_DIR is the demo's converted model (tools/gguf_to_hf.py, bf16 weights). The prompts go through transformers twice:
with all arithmetic in f32 (the tokens that Headwater must give exactly when it computes in f32) and in bf16. For each
generated token the gap between the two best logits is kept: where a gap is small, another rounding may choose the other
token. Needs the PyPI packages torch and transformers, which nothing else in the project needs.
"""

import argparse
import hashlib
import json
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

from headwater import demo_prompt  # noqa: E402
from headwater.chat import ChatTokenizer  # noqa: E402

QUESTIONS = [demo_prompt.QUESTION, "What is the name of this license, and what does it let people do with the software?"]


def ids_hash(token_ids) -> str:
    """SHA-256 of the ids as 32-bit little-endian integers."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}I", *token_ids)).hexdigest()


def generate(model, prompt: list, max_new_tokens: int, stop: list) -> dict:
    import torch

    cache, current, tokens, gaps = None, prompt, [], []
    with torch.no_grad():
        while len(tokens) < max_new_tokens and (not tokens or tokens[-1] not in stop):
            output = model(torch.tensor([current]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            best = output.logits[0, -1].float().topk(2)
            tokens.append(int(best.indices[0]))
            gaps.append(round(float(best.values[0] - best.values[1]), 5))
            current = tokens[-1:]
    return {"token_ids": tokens, "top2_logit_gaps": gaps}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("output", type=Path, metavar="OUTPUT.json")
    arguments = parser.parse_args()
    import torch
    import transformers

    tokenizer = ChatTokenizer(arguments.model)
    document = demo_prompt.DOCUMENT.read_text(encoding="utf-8")
    prompts = [tokenizer.document_prompt(document, question, demo_prompt.DOCUMENT_TOKENS) for question in QUESTIONS]
    cases = [{"question": question, "prompt_tokens": len(prompt), "prompt_sha256": ids_hash(prompt)}
             for question, prompt in zip(QUESTIONS, prompts)]
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        model = transformers.LlamaForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
        for case, prompt in zip(cases, prompts):
            case[name] = generate(model, prompt, demo_prompt.MAX_NEW_TOKENS, tokenizer.stop_token_ids)
            case[name]["text"] = tokenizer.decode(case[name]["token_ids"])
            print(f"{name}: {case[name]['text']!r}, least gap {min(case[name]['top2_logit_gaps'])}")
    reference = {
        "weights_sha256": hashlib.sha256((arguments.model / "model.safetensors").read_bytes()).hexdigest(),
        "document_sha256": hashlib.sha256(document.encode()).hexdigest(),
        "document_tokens": demo_prompt.DOCUMENT_TOKENS,
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cases": cases,
    }
    arguments.output.write_text(json.dumps(reference, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
