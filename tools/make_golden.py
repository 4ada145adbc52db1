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


def qwen3_yarn_config():
    # The ramp is pairs 3 to 9 of 32, and NUM_TOKENS is over the original length. Heads of a size that GPU kernels take.
    return transformers.Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 4.0,
                         "original_max_position_embeddings": 64})


def llama_linear_config():
    return transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})


def old_rope(kind, **fields):
    return {"rope_theta": 10000.0, "rope_scaling": {"rope_type": kind, **fields}}


def new_rope(kind, theta, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


def rope_cases():
    """Name, head_dim and fields of a config.json: what yarn and linear can state, and the borders of yarn's ramp."""
    qwen = {"factor": 4.0, "original_max_position_embeddings": 32768}
    short = {"factor": 40.0, "original_max_position_embeddings": 4096}
    oss = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
    limit = {"max_position_embeddings": 131072}
    return [
        ("linear", 128, limit | old_rope("linear", factor=4.0)),
        ("linear_not_whole", 64, limit | new_rope("linear", 500000.0, factor=2.5)),
        ("yarn_qwen", 128, limit | old_rope("yarn", **qwen) | {"rope_theta": 1000000.0}),
        ("yarn_limit_is_original", 128, limit | new_rope("yarn", 1000000.0, factor=4.0)),
        ("yarn_original_outside", 128,
         limit | {"original_max_position_embeddings": 8192} | new_rope("yarn", 1000000.0, **qwen)),
        ("yarn_not_truncated", 64, limit | new_rope("yarn", 150000.0, **oss, truncate=False)),
        ("yarn_truncated", 64, limit | new_rope("yarn", 150000.0, **oss, truncate=True)),
        ("yarn_betas", 64, limit | old_rope("yarn", **short, beta_fast=16, beta_slow=2.5)),
        ("yarn_betas_zero", 64, limit | old_rope("yarn", **short, beta_fast=0, beta_slow=0)),
        ("yarn_mscales", 64, limit | old_rope("yarn", **short, mscale=1.0, mscale_all_dim=0.5)),
        ("yarn_mscales_equal", 64, limit | old_rope("yarn", **short, mscale=0.707, mscale_all_dim=0.707)),
        ("yarn_mscale_alone", 64, limit | old_rope("yarn", **short, mscale=2.0)),
        ("yarn_mscale_all_dim_zero", 64, limit | old_rope("yarn", **short, mscale=2.0, mscale_all_dim=0)),
        ("yarn_attention_factor", 64, limit | old_rope("yarn", **short, attention_factor=1.3, mscale=1.0,
                                                       mscale_all_dim=0.5)),
        ("yarn_factor_null", 64, limit | old_rope("yarn", **(short | {"factor": None}))),
        ("yarn_factor_one", 64, limit | old_rope("yarn", **(qwen | {"factor": 1.0}))),
        ("yarn_ramp_from_pair_0", 64, limit | old_rope("yarn", **(short | {"original_max_position_embeddings": 64}))),
        ("yarn_ramp_of_no_width", 16,
         limit | new_rope("yarn", 10.0, **(short | {"original_max_position_embeddings": 16000}))),
        ("yarn_ramp_past_the_head", 16,
         limit | new_rope("yarn", 10.0, **(short | {"original_max_position_embeddings": 100000}))),
        ("yarn_ramp_before_the_head", 64,
         limit | old_rope("yarn", **(short | {"original_max_position_embeddings": 4}))),
    ]


def make_rope(path):
    """Frequencies and attention factors; a case a line."""
    lines = []
    for name, head_dim, fields in rope_cases():
        config = transformers.Qwen3Config.from_dict(json.loads(json.dumps(fields)) | {"head_dim": head_dim})
        rotary = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(config)
        lines.append(json.dumps({
            "name": name, "head_dim": head_dim, "config": fields,
            "attention_factor": rotary.attention_scaling,
            "inverse": [float(f"{value:.9g}") for value in rotary.inv_freq.tolist()]}))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    path.chmod(0o644)
    print(f"{path}: {path.stat().st_size} bytes")


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
    """The same configuration as transformers 4 writes it; linear scaling is from before `type` became `rope_type`."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] == "linear":
        rope["type"] = rope.pop("rope_type")
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
    make(arguments.output / "qwen3_yarn", qwen3_yarn_config(), transformers.Qwen3ForCausalLM, SEED + 5, spell_old=False)
    make(arguments.output / "llama_linear", llama_linear_config(), transformers.LlamaForCausalLM, SEED + 6,
         spell_old=True)
    make_rope(arguments.output / "rope.json")


if __name__ == "__main__":
    main()
