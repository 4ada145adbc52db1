"""Retrieval prompts: a context, and questions about it whose answers are known. Readers of three kinds of JSONL.

An answer counts as right where each of its tokens is the argmax given the ones before it, which equals greedy decoding.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, List, Optional, Sequence

import numpy as np


@dataclass(frozen=True)
class Question:
    prompt_ids: Sequence[int]  # after the context; may be empty
    answer_ids: Sequence[int]  # at least one


@dataclass(frozen=True)
class Item:
    task: str
    name: str  # unique within a run
    context_ids: Sequence[int]
    questions: Sequence[Question]
    length: Optional[int] = None  # nominal, in tokens; None: of context and longest question

    def tokens(self) -> int:
        return self.length or len(self.context_ids) + max(
            len(question.prompt_ids) + len(question.answer_ids) for question in self.questions)


def read_items(path: Path, tokenizer) -> Iterator[Item]:
    """Items of a JSONL file, each line of one of these kinds:

    - token ids: prompt_ids_u16_b64 and answer_ids, or context_ids_u16_b64 and questions of question_ids and answer_ids
      (base64 of little-endian uint16); `length` and `kind` where they are there
    - RULER's: input, outputs (and answer_prefix); several outputs are one answer, joined by ", "
    - InfiniteBench's: context, input, answer (a text, or a list whose first is taken)

    tokenizer: a tokenizers.Tokenizer. ValueError names file and line.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _item(json.loads(line), path.stem, f"{path.stem}:{number}", tokenizer)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(f"{path}:{number}: not a retrieval prompt ({error!r})") from error


def _item(row: dict, task: str, name: str, tokenizer) -> Item:
    if "context_ids_u16_b64" in row:
        questions = [_question(one["question_ids"], one["answer_ids"]) for one in row["questions"]]
        task = f"{task}_{row['kind']}" if "kind" in row else task
        return _checked(Item(task, name, _ids(row["context_ids_u16_b64"]), questions, row.get("length")))
    if "prompt_ids_u16_b64" in row:
        return _checked(Item(task, name, _ids(row["prompt_ids_u16_b64"]), [_question([], row["answer_ids"])],
                             row.get("length")))
    if "outputs" in row:
        prompt = row["input"] + row.get("answer_prefix", "")
        return _text_item(task, name, prompt, "", ", ".join(_texts(row["outputs"])), tokenizer)
    answer = _texts(row["answer"])[0]
    return _text_item(task, name, row["context"], f"\n\n{row['input']}\n\nAnswer:", answer, tokenizer)


def _text_item(task: str, name: str, context: str, question: str, answer: str, tokenizer) -> Item:
    if not (question or context)[-1:].isspace():
        answer = " " + answer
    return _checked(Item(task, name, tokenizer.encode(context).ids,
                         [_question(encode_plain(tokenizer, question), encode_plain(tokenizer, answer))]))


def _texts(value) -> List[str]:
    values = [str(one) for one in (value if isinstance(value, list) else [value])]
    if not values or not all(one.strip() for one in values):
        raise ValueError(f"an answer of {value!r} is empty")
    return values


def _ids(text: str) -> List[int]:
    return np.frombuffer(base64.b64decode(text, validate=True), "<u2").tolist()


def _question(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Question:
    return Question([int(i) for i in prompt_ids], [int(i) for i in answer_ids])


def _checked(item: Item) -> Item:
    if not item.context_ids or not item.questions or not all(question.answer_ids for question in item.questions):
        raise ValueError("context, questions or an answer is empty")
    return item


def encode_plain(tokenizer, text: str) -> List[int]:
    """Token ids of a text that goes on: nothing is put before or after it."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def by_length(items: Sequence[Item], lengths: Sequence[int]) -> dict:
    """Items by the smallest of `lengths` that holds them; None: those that are too long for all."""
    result = {}
    for item in items:
        result.setdefault(min((length for length in lengths if length >= item.tokens()), default=None), []).append(item)
    return result
