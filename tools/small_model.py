"""Writes a small random model, for runs in which only shapes and times matter."""

import json
import random
import struct
from array import array
from pathlib import Path

HIDDEN, HEAD_DIM, Q_HEADS, KV_HEADS, INTERMEDIATE, VOCAB = 64, 32, 4, 2, 128, 256


def write_model(folder: Path, layers: int) -> None:
    """A small random Llama, as tests/support/tiny_model.h has it."""
    source = random.Random(1)
    tensors = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        for name, shape in {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
                            "self_attn.q_proj": (Q_HEADS * HEAD_DIM, HIDDEN), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
                            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "self_attn.o_proj": (HIDDEN, Q_HEADS * HEAD_DIM),
                            "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN),
                            "mlp.down_proj": (HIDDEN, INTERMEDIATE)}.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = shape
    header, data = {}, bytearray()
    for name, shape in tensors.items():
        begin = len(data)
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        deviation = 1.0 if name.startswith("model.embed") else 0.2  # uniform
        data += array("f", [1.0 if len(shape) == 1 else source.uniform(-deviation, deviation) for _ in range(count)]).tobytes()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": Q_HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "float32"}))
