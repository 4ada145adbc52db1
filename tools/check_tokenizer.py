#!/usr/bin/env python3
"""Checks that a converted tokenizer.json gives llama.cpp's token ids.

    check_tokenizer.py MODEL_DIR --gguf MODEL.gguf [--write FIXTURE]   against llama.cpp itself (PyPI llama-cpp-python)
    check_tokenizer.py MODEL_DIR --fixture FIXTURE                     against ids that the first form wrote

The 1,000 texts are lines of the GPL-3 as Debian ships it, C-like source, several scripts, digits, runs of white space,
and special tokens read as such and as plain text. A fixture line holds the text, or the line number in the GPL-3, and
the ids. Needs the PyPI package tokenizers. Exits with 77 (skipped) where something that is needed is absent.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

GPL3 = Path("/usr/share/common-licenses/GPL-3")
NUM_TEXTS = 1000
NUM_GPL_TEXTS = 450
SKIPPED = 77

# First and last code point of blocks with letters, marks, digits, symbols and punctuation.
BLOCKS = [
    (0x20, 0x7E), (0xA1, 0xFF), (0x100, 0x17F), (0x370, 0x373), (0x391, 0x3A1), (0x3B1, 0x3C9), (0x410, 0x44F),
    (0x5D0, 0x5EA), (0x621, 0x63A), (0x660, 0x669), (0x905, 0x939), (0x93E, 0x94D), (0x966, 0x96F), (0xE01, 0xE3A),
    (0x10D0, 0x10F0), (0x1E00, 0x1EF9), (0x2010, 0x2027), (0x2030, 0x205E), (0x2070, 0x2071), (0x2080, 0x208E),
    (0x20A0, 0x20BF), (0x2150, 0x218B), (0x2190, 0x21FF), (0x2460, 0x249B), (0x2500, 0x257F), (0x3001, 0x3020),
    (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x4FFF), (0x9F00, 0x9FA5), (0xAC00, 0xAD00), (0xFF01, 0xFF5E),
    (0x1D400, 0x1D454), (0x1F300, 0x1F320), (0x1F600, 0x1F64F), (0x20000, 0x20100),
]
SPACES = [" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \n", "\t\t", "    ", "\u00a0", "\u2003", "\u3000", "\u200b", "\x0b", "\x0c", "\x85"]
WORDS = ["the", "Prefill", "it's", "we'LL", "I'm", "they've", "x", "naïve", "KV", "don't", "'s", "'", "layer", "token's", "CamelCase", "snake_case"]
C_WORDS = ["int", "static const char*", "return", "if (", ") {", "};", "for (int i = 0; i < n; ++i)", "->", "::", "&&", "||", "#include <stdio.h>", "0x1F", "1e-6f",
           "/* note */", "// why", "\"%d\\n\"", "!=", "<<=", "x[i]", "(void)p;", "template <typename T>", "'\\0'", "~0u", "#define MAX(a, b)", "sizeof(*p)", "\\"]
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_start", "im_end|>", "<file_sep>", "<empty_output>"]


class Dice:
    """A small generator whose sequence depends on nothing but the seed."""

    def __init__(self, seed: int):
        self._state = seed

    def below(self, limit: int) -> int:
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self._state >> 33) % limit

    def pick(self, values):
        return values[self.below(len(values))]


def c_text(dice: Dice) -> str:
    return " " * dice.below(9) + "".join(dice.pick(C_WORDS) + dice.pick([" ", " ", "", "\t"]) for _ in range(2 + dice.below(8)))


def script_text(dice: Dice) -> str:
    def word():
        first, last = dice.pick(BLOCKS)
        return "".join(chr(first + dice.below(last - first + 1)) for _ in range(1 + dice.below(6)))
    return "".join(word() + dice.pick(["", " ", " ", ", "]) for _ in range(1 + dice.below(8)))


def digit_text(dice: Dice) -> str:
    digits = lambda: str(dice.below(10 ** (1 + dice.below(9))))
    return "".join(digits() + dice.pick([" ", ".", ",", "-", "e", "x", ":", "%", " $", "  "]) for _ in range(1 + dice.below(7)))


def space_text(dice: Dice) -> str:
    return "".join(dice.pick(SPACES) * (1 + dice.below(4)) + dice.pick(WORDS + [""]) for _ in range(1 + dice.below(8)))


def special_text(dice: Dice) -> str:
    return "".join(dice.pick(SPECIALS) + dice.pick(SPACES + WORDS + [""]) for _ in range(1 + dice.below(5)))


def entries() -> list:
    """The texts, as fixture entries without ids."""
    gpl = GPL3.read_text(encoding="utf-8").split("\n")
    filled = [number for number, line in enumerate(gpl) if line.strip()]
    result = [{"gpl3_line": number} for number in filled[:NUM_GPL_TEXTS]]
    dice = Dice(20)
    generators = [c_text, script_text, script_text, digit_text, space_text, special_text]
    seen = set()
    while len(result) < NUM_TEXTS:
        generator = generators[len(result) % len(generators)]
        text = generator(dice)
        if text in seen:
            continue
        seen.add(text)
        entry = {"text": text}
        if generator is special_text and dice.below(2):
            entry["plain"] = True  # special tokens are to be read as plain text
        result.append(entry)
    return result


def text_of(entry: dict, gpl: list) -> str:
    return entry["text"] if "text" in entry else gpl[entry["gpl3_line"]]


def llama_cpp_ids(gguf: Path, texts: list) -> list:
    from llama_cpp import Llama

    llama = Llama(model_path=str(gguf), vocab_only=True, verbose=False)
    return [llama.tokenize(text.encode(), add_bos=False, special=not plain) for text, plain in texts]


def converted_ids(model: Path, texts: list) -> list:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    result = []
    for text, plain in texts:
        tokenizer.encode_special_tokens = plain
        result.append(tokenizer.encode(text, add_special_tokens=False).ids)
    return result


def skip(reason: str) -> int:
    print(f"SKIPPED: {reason}")
    return SKIPPED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, help="the file that MODEL_DIR was converted from")
    source.add_argument("--fixture", type=Path, help="ids written before")
    parser.add_argument("--write", type=Path, metavar="FIXTURE", help="with --gguf: write the fixture")
    arguments = parser.parse_args()
    if not (arguments.model / "tokenizer.json").is_file():
        return skip(f"{arguments.model} has no tokenizer.json (make demo converts the model)")
    if not GPL3.is_file():
        return skip(f"{GPL3} is absent")
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        return skip("the PyPI package tokenizers is absent")

    gpl_text = GPL3.read_text(encoding="utf-8")
    gpl_hash = hashlib.sha256(gpl_text.encode()).hexdigest()
    gpl = gpl_text.split("\n")
    if arguments.gguf:
        chosen = entries()
        texts = [(text_of(entry, gpl), entry.get("plain", False)) for entry in chosen]
        wanted = llama_cpp_ids(arguments.gguf, texts)
    else:
        header, *chosen = [json.loads(line) for line in arguments.fixture.read_text(encoding="utf-8").splitlines()]
        if header["gpl3_sha256"] != gpl_hash:
            return skip(f"{GPL3} has another text than the fixture was made from")
        texts = [(text_of(entry, gpl), entry.get("plain", False)) for entry in chosen]
        wanted = [entry["ids"] for entry in chosen]
    got = converted_ids(arguments.model, texts)

    wrong = [index for index in range(len(texts)) if got[index] != wanted[index]]
    for index in wrong[:10]:
        print(f"text {index} {texts[index][0]!r}: llama.cpp {wanted[index]}, tokenizer.json {got[index]}")
    print(f"{len(texts) - len(wrong)} of {len(texts)} texts ({sum(map(len, wanted))} tokens) have llama.cpp's ids")
    if arguments.write and not wrong:
        lines = [json.dumps({"gpl3_sha256": gpl_hash}, separators=(",", ":"))]
        lines += [json.dumps({**entry, "ids": ids}, separators=(",", ":")) for entry, ids in zip(chosen, wanted)]
        arguments.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if wrong or len(texts) < NUM_TEXTS else 0


if __name__ == "__main__":
    sys.exit(main())
