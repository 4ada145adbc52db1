"""Turns the byte-level BPE tokenizer of a GGUF file into Hugging Face's tokenizer.json and tokenizer_config.json."""

from gguf_fields import ConversionError, Fields

# Token types of GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# tokenizer.ggml.pre -> (pre-tokenizer, whether a whole word in the vocabulary is taken before any merge).
PRE_TOKENIZERS = {
    "gpt-2": ([_byte_level(True)], False),
    "smollm": ([{"type": "Digits", "individual_digits": True}, _byte_level(True)], False),
    "llama-bpe": ([_split(LLAMA3_PATTERN), _byte_level(False)], True),
}


def _added_tokens(tokens: list, types: list) -> list:
    return [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[index] != USER_DEFINED,
        }
        for index, token in enumerate(tokens)
        if types[index] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]


def _bos_processor(token: str, index: int) -> dict:
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _checked_merges(merges: list, vocabulary: dict) -> list:
    for index, merge in enumerate(merges):
        parts = merge.split(" ")
        if len(parts) != 2 or not all(parts):
            raise ConversionError(f"tokenizer.ggml.merges[{index}] is {merge!r}, not two tokens with a space between")
        for piece in (parts[0], parts[1], parts[0] + parts[1]):
            if piece not in vocabulary:
                raise ConversionError(f"tokenizer.ggml.merges[{index}] uses {piece!r}, which is no token")
    return merges


def _special(fields: Fields, name: str, tokens: list):
    index = fields.integer(f"tokenizer.ggml.{name}_token_id", default=None)
    if index is not None and not 0 <= index < len(tokens):
        raise ConversionError(f"tokenizer.ggml.{name}_token_id is {index}; the vocabulary has {len(tokens)} tokens")
    return index


def convert(fields: Fields) -> tuple:
    """Returns (tokenizer.json, tokenizer_config.json, ids) as dictionaries; ids has bos, eos, pad, unk (None if absent)."""
    model = fields.string("tokenizer.ggml.model")
    if model != "gpt2":
        raise ConversionError(f"tokenizer.ggml.model is {model!r}; only byte-level BPE ('gpt2') can be converted")
    pre = fields.string("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ConversionError(f"tokenizer.ggml.pre is {pre!r}; known are {', '.join(sorted(PRE_TOKENIZERS))}")
    if fields.boolean("tokenizer.ggml.add_space_prefix", default=False):
        raise ConversionError("tokenizer.ggml.add_space_prefix is true, which byte-level BPE here does not support")
    if fields.boolean("tokenizer.ggml.add_eos_token", default=False):
        raise ConversionError("tokenizer.ggml.add_eos_token is true: prompts would end with the end-of-text token")

    tokens = fields.array("tokenizer.ggml.tokens", str)
    types = fields.array("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise ConversionError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ConversionError(f"tokenizer.ggml.tokens has {len(tokens) - len(vocabulary)} duplicates")
    merges = _checked_merges(fields.array("tokenizer.ggml.merges", str), vocabulary)
    ids = {name: _special(fields, long, tokens)
           for name, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}
    add_bos = fields.boolean("tokenizer.ggml.add_bos_token", default=pre == "llama-bpe")
    if add_bos and ids["bos"] is None:
        raise ConversionError("tokenizer.ggml.add_bos_token is true and tokenizer.ggml.bos_token_id is missing")

    pre_tokenizers, ignore_merges = PRE_TOKENIZERS[pre]
    added = _added_tokens(tokens, types)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
        "post_processor": _bos_processor(tokens[ids["bos"]], ids["bos"]) if add_bos else None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
    }
    for name, index in ids.items():
        if index is not None:
            config[f"{name}_token"] = tokens[index]
    template = fields.string("tokenizer.chat_template", default=None)
    if template is not None:
        config["chat_template"] = template
    return tokenizer, config, ids
