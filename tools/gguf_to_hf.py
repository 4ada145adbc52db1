#!/usr/bin/env python3
"""Converts a Llama-architecture GGUF file to a Hugging Face model directory.

    gguf_to_hf.py MODEL.gguf OUTPUT_DIR [--dtype bf16]

Writes config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json. Quantised
tensors are dequantised, and the row order of the query and key projections, which GGUF keeps in pairs for its rotary
embedding, is turned back to Hugging Face's halves. Needs the PyPI packages gguf and numpy.

OUTPUT_DIR appears when it is complete, and must not exist before. Anything that the output could not express
(another architecture, rope scaling, sliding windows, experts, an unknown tensor) is refused by name.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

import gguf_tokenizer
from gguf_fields import ConversionError, Fields
from safetensors_file import SafetensorsWriter

DTYPES = {"bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16"), "f32": ("F32", "float32")}


def read_config(fields: Fields) -> dict:
    """Builds config.json from the metadata, without the token ids and the embedding tie."""
    architecture = fields.string("general.architecture")
    if architecture != "llama":
        raise ConversionError(f"general.architecture is {architecture!r}; only 'llama' can be converted")
    for key in ("llama.expert_count", "llama.attention.sliding_window"):
        if fields.integer(key, default=0):
            raise ConversionError(f"field {key} is {fields.integer(key)}; only dense models can be converted")
    scaling = fields.string("llama.rope.scaling.type", default="none")
    if scaling != "none":
        raise ConversionError(f"llama.rope.scaling.type is {scaling!r}; only unscaled rotary embeddings can be converted")
    hidden = fields.positive("llama.embedding_length")
    heads = fields.positive("llama.attention.head_count")
    kv_heads = fields.positive("llama.attention.head_count_kv", default=heads)
    if heads % kv_heads != 0:
        raise ConversionError(f"llama.attention.head_count {heads} is not a multiple of head_count_kv {kv_heads}")
    head_dim = fields.positive("llama.attention.key_length", default=None)
    if head_dim is None:
        if hidden % heads != 0:
            raise ConversionError(f"llama.embedding_length {hidden} is not a multiple of head_count {heads}")
        head_dim = hidden // heads
    value_dim = fields.positive("llama.attention.value_length", default=head_dim)
    rope_dim = fields.positive("llama.rope.dimension_count", default=head_dim)
    if value_dim != head_dim or rope_dim != head_dim or head_dim % 2 != 0:
        raise ConversionError(f"key length {head_dim}, value length {value_dim} and rope dimensions {rope_dim} "
                              "must be equal and even")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": fields.positive("llama.feed_forward_length"),
        "num_hidden_layers": fields.positive("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": fields.positive("llama.context_length"),
        "rms_norm_eps": shortest_f32(fields.real("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": shortest_f32(fields.real("llama.rope.freq_base", default=10000.0)),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }


def shortest_f32(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def expected_tensors(config: dict, vocab_size: int, tied: bool) -> dict:
    """Maps each GGUF tensor name to (Hugging Face name, shape, heads to unpermute or 0), in the order of the output."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    q_rows, kv_rows = heads * config["head_dim"], kv_heads * config["head_dim"]
    tensors = {"token_embd.weight": ("model.embed_tokens.weight", (vocab_size, hidden), 0)}
    for layer in range(config["num_hidden_layers"]):
        for gguf_name, hf_name, shape, permuted in (
            ("attn_norm", "input_layernorm", (hidden,), 0),
            ("attn_q", "self_attn.q_proj", (q_rows, hidden), heads),
            ("attn_k", "self_attn.k_proj", (kv_rows, hidden), kv_heads),
            ("attn_v", "self_attn.v_proj", (kv_rows, hidden), 0),
            ("attn_output", "self_attn.o_proj", (hidden, q_rows), 0),
            ("ffn_norm", "post_attention_layernorm", (hidden,), 0),
            ("ffn_gate", "mlp.gate_proj", (inner, hidden), 0),
            ("ffn_up", "mlp.up_proj", (inner, hidden), 0),
            ("ffn_down", "mlp.down_proj", (hidden, inner), 0),
        ):
            tensors[f"blk.{layer}.{gguf_name}.weight"] = (f"model.layers.{layer}.{hf_name}.weight", shape, permuted)
    tensors["output_norm.weight"] = ("model.norm.weight", (hidden,), 0)
    if not tied:
        tensors["output.weight"] = ("lm_head.weight", (vocab_size, hidden), 0)
    return tensors


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Turns rotary pairs (2i, 2i+1) of each head's rows back to halves (i, i + head_dim / 2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def dequantized(tensor, shape: tuple) -> np.ndarray:
    from gguf.quants import dequantize  # here so that --help needs no package

    try:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
    except NotImplementedError as error:
        raise ConversionError(f"tensor {tensor.name} is {tensor.tensor_type.name}, which cannot be dequantised") from error
    if not np.isfinite(values).all():
        raise ConversionError(f"tensor {tensor.name} has values that are not finite")
    return values


def write_tensors(reader, tensors: dict, path: Path, dtype: str, report) -> None:
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if len(stored) != len(reader.tensors):
        raise ConversionError("the GGUF file has two tensors of one name")
    unknown = sorted(set(stored) - set(tensors))
    if unknown:
        raise ConversionError(f"{len(unknown)} tensors have no place in a Llama checkpoint, first {unknown[0]}")
    shapes = {}
    for name, (hf_name, shape, _) in tensors.items():
        if name not in stored:
            raise ConversionError(f"the GGUF file has no tensor {name}")
        stored_shape = tuple(int(extent) for extent in reversed(stored[name].shape))
        if stored_shape != shape:
            raise ConversionError(f"tensor {name} has shape {stored_shape}; the metadata asks for {shape}")
        shapes[hf_name] = shape
    with SafetensorsWriter(path, shapes, dtype, {"format": "pt"}) as writer:
        for done, (name, (hf_name, shape, heads)) in enumerate(tensors.items(), start=1):
            values = dequantized(stored[name], shape)
            try:
                writer.write(hf_name, unpermute(values, heads) if heads else values)
            except ValueError as error:
                raise ConversionError(f"tensor {name}: {error}") from error
            report(done, len(tensors))


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_gguf(path: Path):
    try:
        import gguf
    except ImportError as error:
        raise ConversionError("the PyPI package gguf is missing: pip install gguf") from error
    if not path.is_file():
        raise ConversionError(f"no such file: {path}")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the reader raises whatever numpy raises on a damaged file
        raise ConversionError(f"{path} is no readable GGUF file: {error}") from error


def convert(source: Path, output: Path, dtype: str, report=lambda done, total: None) -> None:
    """Converts `source` into the new directory `output`; calls report(tensors done, total) as it goes.

    Raises ConversionError, and leaves no `output` behind then.
    """
    if output.exists():
        raise ConversionError(f"{output} exists already")
    reader = open_gguf(source)
    fields = Fields(reader)
    config = read_config(fields)
    tokenizer, tokenizer_config, ids = gguf_tokenizer.convert(fields)
    vocab_size = fields.positive("llama.vocab_size", default=len(tokenizer["model"]["vocab"]))
    if vocab_size < len(tokenizer["model"]["vocab"]):
        raise ConversionError(f"llama.vocab_size is {vocab_size} for {len(tokenizer['model']['vocab'])} tokens")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    safetensors_dtype, torch_dtype = DTYPES[dtype]
    token_ids = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if ids[name] is not None}
    config.update(vocab_size=vocab_size, tie_word_embeddings=tied, torch_dtype=torch_dtype, use_cache=True, **token_ids)
    tokenizer_config["model_max_length"] = config["max_position_embeddings"]

    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        write_tensors(reader, expected_tensors(config, vocab_size, tied), work / "model.safetensors",
                      safetensors_dtype, report)
        write_json(work / "config.json", config)
        write_json(work / "generation_config.json", {"do_sample": False, **token_ids})
        write_json(work / "tokenizer.json", tokenizer)
        write_json(work / "tokenizer_config.json", tokenizer_config)
        work.chmod(0o755)
        os.rename(work, output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="MODEL.gguf")
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="element type of the weights (default bf16)")
    arguments = parser.parse_args()
    visible = sys.stderr.isatty()

    def report(done, total):
        if visible:
            print(f"\r{done}/{total} tensors", end="" if done < total else "\n", file=sys.stderr)

    try:
        convert(arguments.source, arguments.output, arguments.dtype, report)
    except (ConversionError, OSError) as error:
        print(f"gguf_to_hf: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.output} ({arguments.dtype})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
