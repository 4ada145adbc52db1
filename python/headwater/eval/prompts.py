"""Retrieval prompts made from a seed: a pass key in text, numbers scattered in text, contexts full of key-value pairs.

The same seed, tokenizer, length and text give the same prompts. Lengths are in tokens, context, question and answer
together, and are not exceeded.
"""

import random
import uuid
from typing import Callable, List, Sequence

from headwater.eval.items import Item, Question, encode_plain

TASKS = ("passkey", "numbers", "words", "uuids")
SCATTERED = 32  # numbers in a context
RESERVE = 8  # tokens for what joins at seams
_WORDS = ("amber brisk calm dusty early faint gentle hollow idle jolly keen lunar mellow narrow olive plain quiet "
          "rapid silent tidy upper vivid warm young zesty bitter copper damp eager frosty anchor basket candle drum "
          "engine forest garden harbor island jacket kettle ladder meadow needle orchard pillow quarry river saddle "
          "tunnel umbrella valley window yard bridge castle desert ember fountain granite").split()
_FILLER = ("The road follows the river for a while and then turns towards the hills. ",
           "Nobody at the station could say when the next train would leave. ",
           "In the afternoon the rain stopped and the market opened again.\n",
           "He wrote the letter twice, and sent neither. ")


def vocabulary(tokenizer) -> List[str]:
    """Words that a key may be made of: lower-case ones that are a token each, so that keys seldom share one; a few built-in
    ones where the tokenizer has not many."""
    words = {token[1:] for token in tokenizer.get_vocab() if token[:1] in ("\u0120", "\u2581")}
    found = sorted(word for word in words if 4 <= len(word) <= 10 and word.isascii() and word.isalpha() and word.islower())
    return found if len(found) >= 500 else _WORDS


def filler(draw: random.Random, characters: int) -> str:
    """Text of a few sentences in random order, for where there is none better."""
    parts = []
    size = 0
    while size < characters:
        parts.append(draw.choice(_FILLER))
        size += len(parts[-1])
    return "".join(parts)


def make_items(task: str, tokenizer, *, length: int, count: int, seed: int, questions: int = 8,
               text_ids: Sequence[int] = ()) -> List[Item]:
    """`count` items of a task. text_ids: tokens of a long text that a pass key and numbers are hidden in; filler without."""
    make = {"passkey": _passkey, "numbers": _numbers, "words": _words, "uuids": _uuids}[task]
    result = []
    for i in range(count):
        draw = random.Random(f"{seed} {task} {length} {i}")
        maker = _Maker(tokenizer, draw, length, text_ids)
        depth = (i + 0.5) / count
        context, asked = make(maker, depth, questions)
        result.append(Item(f"own_{task}", f"own_{task}:{length}:{i}", context, asked, length))
    return result


class _Maker:
    """Pieces of one prompt."""

    def __init__(self, tokenizer, draw: random.Random, length: int, text_ids: Sequence[int]):
        self.draw = draw
        self.length = length
        self.tokenizer = tokenizer
        self.prefix = tokenizer.encode("").ids
        self.text_ids = text_ids
        self.words = vocabulary(tokenizer)

    def ids(self, text: str) -> List[int]:
        return encode_plain(self.tokenizer, text)

    def question(self, prompt: str, answer: str) -> Question:
        return Question(self.ids(prompt), self.ids(answer))

    def room(self, asked: Sequence[Question]) -> int:
        """Tokens that prefix and questions leave to the context."""
        longest = max(len(one.prompt_ids) + len(one.answer_ids) for one in asked)
        room = self.length - len(self.prefix) - longest - RESERVE
        if room < 1:
            raise ValueError(f"{self.length} tokens hold no prompt of this kind")
        return room

    def hay(self, tokens: int) -> List[int]:
        """`tokens` tokens of text from a random place."""
        if len(self.text_ids) > tokens:
            first = self.draw.randrange(len(self.text_ids) - tokens)
            return list(self.text_ids[first:first + tokens])
        found = []
        while len(found) < tokens:
            found += self.ids(filler(self.draw, 2 * (tokens - len(found)) + 64))
        return found[:tokens]

    def hide(self, needles: Sequence[List[int]], depths: Sequence[float], room: int) -> List[int]:
        """Needles in text at their depths (0: the beginning, 1: the end)."""
        hay = self.hay(room - sum(len(needle) for needle in needles))
        places = sorted(zip((int(depth * len(hay)) for depth in depths), range(len(needles))))
        context, done = list(self.prefix), 0
        for place, which in places:
            context += hay[done:place] + needles[which]
            done = place
        return context + hay[done:]

    def names(self, count: int) -> List[str]:
        """Distinct made-up names."""
        words = self.words
        chosen = self.draw.sample(range(max(count, len(words) ** 2)), count)
        return [f"{words[i // len(words) % len(words)]}-{words[i % len(words)]}" +
                (f"-{i // len(words) ** 2}" if i >= len(words) ** 2 else "") for i in chosen]

    def pairs(self, lines: Callable[[int], List[tuple]], head: str, tail: str, ask: str, questions: int):
        """A context as full of (line, key, value) as fits, between head and tail; `ask` holds {} for the key."""
        probe = lines(1)[0]
        fewest = max(1, self.length // max(1, len(self.ids(probe[0])) * 2))
        many = lines(max(questions, 4 * fewest))
        room = self.room([self.question(ask.format(key), value) for _, key, value in many[-64:]])
        room -= len(self.ids(head)) + len(self.ids(tail))
        kept, size = [], 0
        for line, key, value in many:
            ids = self.ids(line)
            if size + len(ids) > room:
                break
            kept.append((ids, key, value))
            size += len(ids)
        if not kept:
            raise ValueError(f"{self.length} tokens hold no prompt of this kind")
        chosen = self.draw.sample(kept, min(questions, len(kept)))
        context = [*self.prefix, *self.ids(head), *(i for ids, _, _ in kept for i in ids), *self.ids(tail)]
        return context, [self.question(ask.format(key), value) for _, key, value in chosen]


def _passkey(maker: _Maker, depth: float, questions: int):
    key = str(maker.draw.randrange(10000, 100000))
    asked = [maker.question("\nWhat is the pass key? The pass key is ", key)]
    needle = maker.ids(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
    return maker.hide([needle], [depth], maker.room(asked)), asked


def _numbers(maker: _Maker, depth: float, questions: int):
    names = maker.names(SCATTERED)
    numbers = [str(maker.draw.randrange(10**6, 10**7)) for _ in names]
    chosen = maker.draw.sample(range(SCATTERED), min(questions, SCATTERED))
    asked = [maker.question(f"\nWhat is the special magic number for {names[i]}? The special magic number for {names[i]} is: ",
                            numbers[i]) for i in chosen]
    needles = [maker.ids(f"\nOne of the special magic numbers for {name} is: {number}.\n")
               for name, number in zip(names, numbers)]
    return maker.hide(needles, [maker.draw.random() for _ in names], maker.room(asked)), asked


def _words(maker: _Maker, depth: float, questions: int):
    def lines(count: int) -> List[tuple]:
        values = [str(maker.draw.randrange(10**5, 10**6)) for _ in range(count)]
        return [(f"{name}: {value}\n", name, value) for name, value in zip(maker.names(count), values)]

    return maker.pairs(lines, "Records:\n", "End of records.\n", "\nThe value of {} is: ", questions)


def _uuids(maker: _Maker, depth: float, questions: int):
    def one() -> str:
        return str(uuid.UUID(int=maker.draw.getrandbits(128)))

    def lines(count: int) -> List[tuple]:
        pairs = [(one(), one()) for _ in range(count)]
        return [(f' "{key}": "{value}",\n', key, value) for key, value in pairs]

    return maker.pairs(lines, "{\n", "}\n", '\nKey: "{}"\nCorresponding value: "', questions)
