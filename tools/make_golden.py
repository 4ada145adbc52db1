#!/usr/bin/env python3
"""Makes the golden vectors of tests/model/golden: tiny random models and what transformers computes with them.

Needs torch, transformers and safetensors. Run from anywhere; the output is the same every time with the same
versions. tests/model/golden/README.md describes the files.
"""

import argparse
import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file

NUM_TOKENS = 167  # more than one attention tile, and no multiple of anything
VOCAB_SIZE = 256
SEED = 20240607


def llama_config():
    # A wavelength range that takes all three branches of llama3 scaling, and every bias that Llama can have.
    return transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, attention_bias=True, mlp_bias=True,
        rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 256})


def qwen2_config():
    return transformers.Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=[2, 3], rope_parameters={"rope_type": "default", "rope_theta": 1000000.0})


def qwen3_config():
    return transformers.Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, rms_norm_eps=1e-6,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0})


def wide_head_config(config_class, head_dim, q_heads, kv_heads, tied):
    """Heads of the sizes that GPU kernels take."""
    return config_class(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=q_heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=2048, rms_norm_eps=1e-6,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def randomise(model, generator):
    """Weights that make attention far from uniform, norms far from 1 and biases matter."""
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif name.endswith(".bias"):
            values = 0.5 * values
        elif "embed_tokens" in name:
            values = 0.5 * values
        else:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            values = gain * values / parameter.shape[1] ** 0.5
        parameter.data.copy_(values)


def old_spelling(config):
    """The same configuration as transformers 4 writes it."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("head_dim", None)
    config["transformers_version"] = "4.46.0"
    return config


def compute(model, tokens):
    with torch.no_grad():
        output = model(input_ids=tokens.unsqueeze(0), use_cache=True)
    vectors = {"tokens": tokens.to(torch.int32), "logits": output.logits[0, -1].contiguous()}
    for index, layer in enumerate(output.past_key_values.layers):
        # [1, kv_heads, tokens, head_dim] -> [tokens, kv_heads, head_dim]
        vectors[f"k.{index}"] = layer.keys[0].transpose(0, 1).contiguous()
        vectors[f"v.{index}"] = layer.values[0].transpose(0, 1).contiguous()
    return vectors


def make(directory, config, model_class, seed, spell_old):
    generator = torch.Generator().manual_seed(seed)
    config._attn_implementation = "eager"
    model = model_class(config).eval().to(torch.float32)
    randomise(model, generator)
    model.tie_weights()
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    config_path = directory / "config.json"
    written = json.loads(config_path.read_text())
    if spell_old:
        written = old_spelling(written)
    config_path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")

    # From the files, so that the vectors belong to what the tests read.
    model = model_class.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(0, config.vocab_size, (NUM_TOKENS,), generator=generator)
    vectors = compute(model, tokens)
    assert all(torch.isfinite(values.float()).all() for values in vectors.values())
    save_file(vectors, directory / "golden.safetensors", metadata={"transformers": transformers.__version__})
    for path in directory.iterdir():
        path.chmod(0o644)
    print(f"{directory}: {sum(f.stat().st_size for f in directory.iterdir())} bytes")


def main():
    default = pathlib.Path(__file__).resolve().parent.parent / "tests" / "model" / "golden"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make(arguments.output / "llama", llama_config(), transformers.LlamaForCausalLM, SEED, spell_old=True)
    make(arguments.output / "qwen2", qwen2_config(), transformers.Qwen2ForCausalLM, SEED + 1, spell_old=False)
    make(arguments.output / "qwen3", qwen3_config(), transformers.Qwen3ForCausalLM, SEED + 2, spell_old=False)
    make(arguments.output / "llama_d128", wide_head_config(transformers.LlamaConfig, 128, 4, 1, False),
         transformers.LlamaForCausalLM, SEED + 3, spell_old=False)
    make(arguments.output / "qwen3_d64", wide_head_config(transformers.Qwen3Config, 64, 6, 2, True),
         transformers.Qwen3ForCausalLM, SEED + 4, spell_old=False)


if __name__ == "__main__":
    main()
