"""headwater.eval's texts, readers of retrieval prompts and generators. Skipped where NumPy or tokenizers is not installed."""

import base64
import json
import struct
import sys
import tempfile
import unittest
import zlib
from pathlib import Path

try:
    import numpy
    import tokenizers
except ImportError as error:
    print(f"skipped: {error.name} is not installed")
    sys.exit(77)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))
from headwater.eval import items, prompts, texts  # noqa: E402


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A token a byte, token 256 is <bos>, put before every text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    vocab["<bos>"] = len(vocab)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return tokenizer


TOKENIZER = byte_tokenizer()


def read(*rows) -> list:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.jsonl"
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
        return list(items.read_items(path, TOKENIZER))


def packed(ids) -> str:
    return base64.b64encode(numpy.array(ids, "<u2").tobytes()).decode()


def text(ids) -> str:
    return TOKENIZER.decode([one for one in ids if one != 256])


class ReaderTest(unittest.TestCase):
    def test_token_ids(self):
        key, pairs = read({"prompt_ids_u16_b64": packed([0, 8191, 5]), "answer_ids": [1, 2], "length": 5},
                          {"kind": "words", "context_ids_u16_b64": packed([7]), "length": 9,
                           "questions": [{"question_ids": [1], "answer_ids": [2]}, {"question_ids": [3], "answer_ids": [4]}]})
        self.assertEqual(key, items.Item("set", "set:1", [0, 8191, 5], [items.Question([], [1, 2])], 5))
        self.assertEqual((pairs.task, pairs.name, pairs.context_ids, pairs.tokens()), ("set_words", "set:3", [7], 9))
        self.assertEqual(pairs.questions[1], items.Question([3], [4]))

    def test_ruler(self):
        one, = read({"index": 0, "input": "A is 5 and 6. A is", "outputs": ["5", "6"], "length": 1})
        self.assertEqual(one.context_ids[0], 256)
        self.assertEqual(text(one.context_ids), "A is 5 and 6. A is")
        self.assertEqual((one.questions[0].prompt_ids, text(one.questions[0].answer_ids)), ([], " 5, 6"))
        self.assertEqual(one.tokens(), 1 + 18 + 5)

    def test_infinitebench(self):
        one, = read({"id": 0, "context": "noise", "input": "What is it?", "answer": ["7", "seven"], "options": []})
        question, = one.questions
        self.assertEqual((text(one.context_ids), text(question.prompt_ids), text(question.answer_ids)),
                         ("noise", "\n\nWhat is it?\n\nAnswer:", " 7"))
        self.assertNotIn(256, question.prompt_ids)

    def test_what_is_none_of_these_is_refused_with_its_line(self):
        for row in ({"input": "x"}, {"input": "x", "outputs": []}, {"input": "x", "outputs": [" "]}, [],
                    {"prompt_ids_u16_b64": "!", "answer_ids": [1]}, {"prompt_ids_u16_b64": packed([1]), "answer_ids": []}):
            with self.subTest(row), self.assertRaisesRegex(ValueError, r"set.jsonl:3: not a retrieval prompt"):
                read({"input": "x", "outputs": ["y"]}, row)

    def test_items_go_to_the_smallest_length_that_holds_them(self):
        some = [items.Item("t", str(n), [1] * n, [items.Question([], [1])]) for n in (3, 4, 8)]
        found = items.by_length(some, [4, 8])
        self.assertEqual({length: [one.name for one in group] for length, group in found.items()},
                         {4: ["3"], 8: ["4"], None: ["8"]})


class GeneratorTest(unittest.TestCase):
    def make(self, task, **changes):
        return prompts.make_items(task, TOKENIZER, **{"length": 4000, "count": 2, "seed": 1, "questions": 3, **changes})

    def test_the_seed_decides(self):
        for task in prompts.TASKS:
            with self.subTest(task):
                self.assertEqual(self.make(task), self.make(task))
                self.assertNotEqual(self.make(task), self.make(task, seed=2))
                self.assertNotEqual(*(one.context_ids for one in self.make(task)))

    def test_they_hold_their_answers_and_fill_their_length(self):
        for task in prompts.TASKS:
            for length in (4000, 20000):
                for one in self.make(task, length=length):
                    with self.subTest(one.name):
                        context = text(one.context_ids)
                        self.assertEqual(one.context_ids[0], 256)
                        self.assertEqual(len(one.questions), 1 if task == "passkey" else 3)
                        self.assertEqual(len({tuple(question.prompt_ids) for question in one.questions}), len(one.questions))
                        longest = max(len(q.prompt_ids) + len(q.answer_ids) for q in one.questions)
                        self.assertLessEqual(len(one.context_ids) + longest, length)
                        self.assertGreater(len(one.context_ids) + longest, length - 120)
                        for question in one.questions:
                            self.assertEqual(context.count(text(question.answer_ids)), 2 if task == "passkey" else 1)

    def test_keys_are_made_of_words_that_are_tokens_where_there_are_many(self):
        self.assertIn("anchor", prompts.vocabulary(TOKENIZER))
        letters = "abcdefghij"
        words = [f"wo{x}{y}{z}" for x in letters for y in letters for z in letters]
        tokens = [*("\u0120" + word for word in words), "\u0120Big", "inner", "\u0120a1b2"]
        vocab = {token: i for i, token in enumerate(tokens)}
        many = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
        self.assertEqual(prompts.vocabulary(many), words)

    def test_depths_of_pass_keys_are_even(self):
        made = self.make("passkey", count=4)
        depths = [text(one.context_ids).index("The pass key is") / 4000 for one in made]
        for depth, wanted in zip(depths, (0.125, 0.375, 0.625, 0.875)):
            self.assertAlmostEqual(depth, wanted, delta=0.03)

    def test_hay_is_a_piece_of_the_text(self):
        hay = TOKENIZER.encode("".join(f"{i}." for i in range(3000)), add_special_tokens=False).ids
        context = text(self.make("passkey", count=1, text_ids=hay)[0].context_ids)
        self.assertTrue(context[:500] in text(hay))

    def test_a_length_that_holds_none(self):
        with self.assertRaisesRegex(ValueError, "40 tokens hold no prompt"):
            self.make("numbers", length=40)


class TextTest(unittest.TestCase):
    def test_windows_end_alike_and_do_not_share_targets(self):
        self.assertEqual(texts.window_ends(100, 40, 10, 3), [40, 70, 100])
        self.assertEqual(texts.window_ends(55, 40, 10, 8), [40, 55])
        self.assertEqual(texts.window_ends(45, 40, 10, 8), [40])
        self.assertEqual(texts.window_ends(39, 40, 10, 8), [])
        tokens = list(range(100))
        self.assertEqual(texts.window(tokens, 70, 5, [900]), [900, 66, 67, 68, 69])
        self.assertEqual(texts.window(tokens, 70, 40, [])[-5:], texts.window(tokens, 70, 6, [])[-5:])

    def test_novels_of_a_lazy_load_file(self):
        def vector(lines, version):
            head = b"X\n" + struct.pack(">iii", version, 0, 0) + (struct.pack(">i", 5) + b"UTF-8" if version == 3 else b"")
            body = b"".join(struct.pack(">Ii", 0x40009, len(line.encode())) + line.encode() for line in lines)
            return head + struct.pack(">Ii", 16, len(lines)) + body

        books = ((["ONE BOOK", "", "text é"], 3), (["", "Two"], 2))
        entries = [zlib.compress(vector(lines, version)) for lines, version in books]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.rdb"
            path.write_bytes(b"".join(struct.pack(">I", len(entry)) + entry for entry in entries))
            self.assertEqual(texts.read_novels(path), {"onebook": "ONE BOOK\n\ntext é", "two": "\nTwo"})
            path.write_bytes(struct.pack(">I", 0) + zlib.compress(b"X\n" + bytes(40)))
            with self.assertRaisesRegex(texts.TextError, "type 0"):
                texts.read_novels(path)

    def test_a_file_and_what_is_absent(self):
        self.assertEqual(texts.read_text(__file__)[0], "eval_prompts_test")
        with self.assertRaisesRegex(texts.TextError, "text /no/such: no such file"):
            texts.read_text("/no/such")
        with self.assertRaisesRegex(texts.TextError, "text nonsuch: no such file, and"):
            texts.read_text("nonsuch")


if __name__ == "__main__":
    unittest.main()
