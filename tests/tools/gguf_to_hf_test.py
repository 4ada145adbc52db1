"""Tests of the GGUF converter on tiny models that are made here."""

import json
import struct
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

try:
    import gguf
    import numpy as np
except ImportError as error:
    print(f"SKIPPED: {error} (tools/venv.sh installs it)")
    sys.exit(77)

import gguf_to_hf  # noqa: E402
from gguf_fields import ConversionError  # noqa: E402
from safetensors_file import encode, to_bf16_bits  # noqa: E402

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
TOKENS = ["<|end|>", "<|start|>", "a", "b", "Ġ", "ab", "ba"]
TYPES = [3, 3, 1, 1, 1, 1, 4]


def rotary_pairs(weight, heads):
    """What llama.cpp's converter does to query and key projections, written out row by row."""
    rows = weight.shape[0] // heads
    result = np.empty_like(weight)
    for head in range(heads):
        for i in range(rows // 2):
            result[head * rows + 2 * i] = weight[head * rows + i]
            result[head * rows + 2 * i + 1] = weight[head * rows + rows // 2 + i]
    return result


class TinyModel:
    """Metadata and tensors of a valid file; tests spoil one thing each."""

    def __init__(self):
        random = np.random.default_rng(7)
        self.weights = {"model.embed_tokens.weight": random.standard_normal((len(TOKENS), HIDDEN)),
                        "model.norm.weight": random.standard_normal(HIDDEN)}
        self.tensors = {"token_embd.weight": self.weights["model.embed_tokens.weight"],
                        "output_norm.weight": self.weights["model.norm.weight"]}
        shapes = {("attn_q", "self_attn.q_proj"): (HEADS * HEAD_DIM, HIDDEN),
                  ("attn_k", "self_attn.k_proj"): (KV_HEADS * HEAD_DIM, HIDDEN),
                  ("attn_v", "self_attn.v_proj"): (KV_HEADS * HEAD_DIM, HIDDEN),
                  ("attn_output", "self_attn.o_proj"): (HIDDEN, HEADS * HEAD_DIM),
                  ("ffn_gate", "mlp.gate_proj"): (INNER, HIDDEN), ("ffn_up", "mlp.up_proj"): (INNER, HIDDEN),
                  ("ffn_down", "mlp.down_proj"): (HIDDEN, INNER), ("attn_norm", "input_layernorm"): (HIDDEN,),
                  ("ffn_norm", "post_attention_layernorm"): (HIDDEN,)}
        for layer in range(LAYERS):
            for (gguf_name, hf_name), shape in shapes.items():
                weight = random.standard_normal(shape)
                self.weights[f"model.layers.{layer}.{hf_name}.weight"] = weight
                heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(gguf_name)
                self.tensors[f"blk.{layer}.{gguf_name}.weight"] = rotary_pairs(weight, heads) if heads else weight
        self.quantised = {}
        self.architecture = "llama"
        self.fields = {
            "llama.block_count": LAYERS, "llama.context_length": 128, "llama.embedding_length": HIDDEN,
            "llama.feed_forward_length": INNER, "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS, "llama.rope.freq_base": 1e5,
            "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": len(TOKENS),
            "llama.rope.dimension_count": HEAD_DIM, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": TYPES,
            "tokenizer.ggml.merges": ["a b", "b a"], "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": "{{ messages }}",
        }

    def write(self, path):
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.fields.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_float32(key, value)
        for name, weight in self.tensors.items():
            kind = self.quantised.get(name)
            data = weight.astype(np.float32)
            if kind is None:
                writer.add_tensor(name, data)
            else:
                writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_safetensors(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        raw = data[8 + length + begin:8 + length + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype(np.float32)
        tensors[name] = values.reshape(entry["shape"])
    return tensors


class GgufToHfTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.model = TinyModel()

    def convert(self, dtype="f32"):
        self.model.write(self.folder / "m.gguf")
        gguf_to_hf.convert(self.folder / "m.gguf", self.folder / "out", dtype)
        return read_safetensors(self.folder / "out" / "model.safetensors")

    def assert_refused(self, message):
        with self.assertRaisesRegex(ConversionError, message):
            self.convert()
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["m.gguf"], "nothing is left behind")

    def test_weights_come_back_with_the_head_permutation_undone(self):
        tensors = self.convert()

        self.assertEqual(set(tensors), set(self.model.weights))
        for name, weight in self.model.weights.items():
            np.testing.assert_array_equal(tensors[name], weight.astype(np.float32), name)

    def test_f16_and_bf16_round_to_nearest(self):
        for dtype, bound in (("f16", 2**-11), ("bf16", 2**-8)):
            tensors = self.convert(dtype)
            for name, weight in self.model.weights.items():
                np.testing.assert_allclose(tensors[name], weight, rtol=bound, atol=1e-7, err_msg=name)
            (self.folder / "m.gguf").unlink()
            for path in sorted((self.folder / "out").iterdir()):
                path.unlink()
            (self.folder / "out").rmdir()

    def test_quantised_tensors_are_dequantised_before_the_permutation(self):
        name = "blk.1.attn_q.weight"
        self.model.quantised[name] = gguf.GGMLQuantizationType.Q8_0
        got = self.convert()["model.layers.1.self_attn.q_proj.weight"]
        wanted = self.model.weights["model.layers.1.self_attn.q_proj.weight"]
        self.assertLess(np.linalg.norm(got - wanted) / np.linalg.norm(wanted), 0.01)

    def test_config_has_what_the_metadata_says(self):
        self.convert("bf16")
        config = json.loads((self.folder / "out" / "config.json").read_text())
        wanted = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER, "head_dim": HEAD_DIM,
                  "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
                  "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True,
                  "torch_dtype": "bfloat16", "vocab_size": len(TOKENS), "bos_token_id": 1, "eos_token_id": 0}
        self.assertEqual({key: config[key] for key in wanted}, wanted)
        tokenizer_config = json.loads((self.folder / "out" / "tokenizer_config.json").read_text())
        self.assertEqual(tokenizer_config["chat_template"], "{{ messages }}")
        self.assertEqual((tokenizer_config["bos_token"], tokenizer_config["eos_token"]), ("<|start|>", "<|end|>"))

    def test_an_output_projection_of_its_own_unties_the_embeddings(self):
        self.model.tensors["output.weight"] = np.ones((len(TOKENS), HIDDEN))
        tensors = self.convert()
        self.assertEqual(tensors["lm_head.weight"].shape, (len(TOKENS), HIDDEN))
        self.assertIs(json.loads((self.folder / "out" / "config.json").read_text())["tie_word_embeddings"], False)

    def test_the_tokenizer_encodes(self):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            self.skipTest("the PyPI package tokenizers is absent")
        self.model.fields["tokenizer.ggml.add_bos_token"] = True
        self.convert()
        tokenizer = Tokenizer.from_file(str(self.folder / "out" / "tokenizer.json"))
        self.assertEqual(tokenizer.encode("ab<|end|> ba").ids, [1, 5, 0, 4, 6])
        self.assertEqual(tokenizer.decode([5, 4, 5]), "ab ab")

    def test_other_architectures_and_features_are_refused_by_name(self):
        self.model.architecture = "qwen2"
        self.assert_refused("general.architecture is 'qwen2'")
        self.model = TinyModel()
        self.model.fields["llama.rope.scaling.type"] = "yarn"
        self.assert_refused("llama.rope.scaling.type is 'yarn'")
        self.model = TinyModel()
        self.model.fields["llama.expert_count"] = 8
        self.assert_refused("llama.expert_count is 8")
        self.model = TinyModel()
        self.model.fields["tokenizer.ggml.pre"] = "falcon"
        self.assert_refused("tokenizer.ggml.pre is 'falcon'")
        self.model = TinyModel()
        self.model.fields["tokenizer.ggml.model"] = "llama"
        self.assert_refused("tokenizer.ggml.model is 'llama'")

    def test_missing_and_mistyped_fields_are_named(self):
        for key in ("llama.block_count", "llama.feed_forward_length", "llama.context_length",
                    "llama.attention.layer_norm_rms_epsilon", "tokenizer.ggml.merges", "tokenizer.ggml.pre"):
            self.model = TinyModel()
            del self.model.fields[key]
            self.assert_refused(f"no field {key}")
        self.model = TinyModel()
        self.model.fields["llama.block_count"] = "two"
        self.assert_refused("llama.block_count is 'two', not an integer")
        self.model = TinyModel()
        self.model.fields["llama.block_count"] = 0
        self.assert_refused("llama.block_count is 0")

    def test_tensors_that_do_not_fit_are_named(self):
        del self.model.tensors["blk.1.ffn_up.weight"]
        self.assert_refused("no tensor blk.1.ffn_up.weight")
        self.model = TinyModel()
        self.model.tensors["blk.0.attn_q.bias"] = np.ones(HIDDEN)
        self.assert_refused("blk.0.attn_q.bias")
        self.model = TinyModel()
        self.model.tensors["output_norm.weight"] = np.ones(HIDDEN + 1)
        self.assert_refused(r"output_norm.weight has shape \(65,\); the metadata asks for \(64,\)")
        self.model = TinyModel()
        self.model.tensors["output_norm.weight"][3] = np.nan
        self.assert_refused("output_norm.weight has values that are not finite")

    def test_bad_vocabularies_are_refused(self):
        self.model.fields["tokenizer.ggml.tokens"] = TOKENS[:-1] + ["ab"]
        self.assert_refused("1 duplicates")
        self.model = TinyModel()
        self.model.fields["tokenizer.ggml.merges"] = ["a b", "a a"]
        self.assert_refused(r"merges\[1\] uses 'aa'")
        self.model = TinyModel()
        self.model.fields["tokenizer.ggml.eos_token_id"] = 7
        self.assert_refused("eos_token_id is 7; the vocabulary has 7")

    def test_a_truncated_or_foreign_file_is_refused(self):
        self.model.write(self.folder / "whole.gguf")
        data = (self.folder / "whole.gguf").read_bytes()
        for size in (0, 3, 100, len(data) // 2, len(data) - 1000):
            (self.folder / "cut.gguf").write_bytes(data[:size])
            with self.assertRaises(ConversionError):
                gguf_to_hf.convert(self.folder / "cut.gguf", self.folder / "out", "f32")
        with self.assertRaisesRegex(ConversionError, "no such file"):
            gguf_to_hf.convert(self.folder / "none.gguf", self.folder / "out", "f32")

    def test_an_existing_output_is_kept(self):
        self.convert()
        with self.assertRaisesRegex(ConversionError, "exists already"):
            self.convert()


class RoundingTest(unittest.TestCase):
    def test_bf16_rounds_ties_to_even_and_keeps_specials(self):
        values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.0, np.inf, np.nan, 3.4e38], np.float32)
        bits = to_bf16_bits(values)
        self.assertEqual([hex(b) for b in bits], ["0x3f80", "0x3f80", "0x3f82", "0x3f81", "0x8000", "0x7f80", "0x7fc0", "0x7f80"])

    def test_overflow_is_an_error(self):
        with self.assertRaisesRegex(ValueError, "70000"):
            encode(np.array([1.0, 70000.0], np.float32), "F16")
        with self.assertRaisesRegex(ValueError, "does not fit bf16"):
            encode(np.array([1.0, 3.4e38], np.float32), "BF16")


if __name__ == "__main__":
    unittest.main()
