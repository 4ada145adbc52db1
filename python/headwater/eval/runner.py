"""Runs policies over windows and retrieval prompts, and gathers what reports are made of."""

import time
import zlib
from dataclasses import asdict, dataclass, field
from typing import Callable, Iterator, List, Optional, Sequence

import torch

from headwater.eval.items import Item
from headwater.eval.model import EvalModel, Sample
from headwater.eval.policies import Policy


@dataclass(frozen=True)
class Window:
    """Tokens of a text, the last `targets` of which are scored."""

    set: str
    name: str
    ids: Sequence[int]
    targets: int


@dataclass
class Result:
    """Of one window or one question."""

    policy: str
    tokens: int  # nominal length
    set: str  # "ppl:TEXT" or a task
    name: str
    group: str  # window, or context of the question
    nll: float  # mean, nats a token
    correct: Optional[bool] = None  # of questions
    density: Optional[float] = None
    attention_ms: Optional[float] = None
    prefill_ms: Optional[float] = None


@dataclass
class Recall:
    """Of the sampled rows of one prompt."""

    policy: str
    tokens: int
    set: str
    name: str
    recall: list  # [layers][query heads * rows]
    error: list  # [layers]


@dataclass
class Settings:
    seed: int = 1
    recall_prompts: int = 1  # of a set and length
    recall_rows: int = 64  # of a prompt
    # Several questions of a context share its cache and attend exactly: quick, but a policy that drops what they ask for
    # does not show it. Else every question is prefilled with its context.
    share_context: bool = False
    limit_s: float = float("inf")  # of one policy


@dataclass
class Records:
    results: List[Result] = field(default_factory=list)
    recalls: List[Recall] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)  # what was left out, and why

    def as_dict(self) -> dict:
        return asdict(self)


def sample_rows(tokens: int, count: int, seed: int, name: str) -> torch.Tensor:
    """int64 ascending positions, at most `count`, even over the prompt; the same for every policy."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {tokens} {name}".encode()))
    return torch.randperm(tokens, generator=draw)[:count].sort().values


class Progress:
    """Lines with the time that is left, by what tokens cost so far."""

    def __init__(self, work: float, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._work, self._done = work, 0.0
        self._say, self._clock = say, clock
        self._start = clock()

    def step(self, work: float, text: str) -> None:
        self._done += work
        elapsed = self._clock() - self._start
        left = elapsed / self._done * max(0.0, self._work - self._done) if self._done else 0.0
        self._say(f"{text}: {elapsed:.0f} s, about {left:.0f} s left")

    def skip(self, work: float) -> None:
        """Work that will not be done."""
        self._work -= work


def cost(tokens: int) -> float:
    """Of a prompt, in tokens of a short one: linear layers and attention."""
    return tokens * (1 + tokens / 32768)


class Runner:
    """Measures on one model; `save` is called after every policy and length, and when a run is broken off."""

    def __init__(self, model: EvalModel, settings: Settings, say: Callable[[str], None], save: Callable[[Records], None]):
        self._model, self._settings = model, settings
        self._say, self._save = say, save
        self.records = Records()
        self.failed = False  # a policy at a length; the notes say why

    def run(self, policies: dict, prompts: dict) -> None:
        """policies: by label, "dense" first where it is there; prompts: lists of Window and Item by length."""
        work = sum(self._work(policy, length, prompt) for policy in policies.values()
                   for length, some in prompts.items() for prompt in some)
        progress = Progress(work, self._say)
        try:
            for label, policy in policies.items():
                deadline = time.monotonic() + self._settings.limit_s
                for length in sorted(prompts):
                    try:
                        self._run_length(label, policy, length, prompts[length], deadline, progress)
                    except (RuntimeError, NotImplementedError, ValueError, OSError) as error:
                        self.failed = True
                        self._note(f"{label}, {length} tokens: {type(error).__name__}: {error}")
                    self._save(self.records)
        except KeyboardInterrupt:
            self.records.notes.append("broken off; what was done until then stands here")
            self._save(self.records)
            raise

    def _whole(self, policy: Policy, item: Item) -> bool:
        """Whether each question is prefilled with its context. What follows a cached context attends exactly, so that dense
        attention gives the same either way."""
        share = self._settings.share_context or policy.name == "dense"
        return not share or len(item.questions) == 1

    def _work(self, policy: Policy, length: int, prompt) -> float:
        passes = len(prompt.questions) if isinstance(prompt, Item) and self._whole(policy, prompt) else 1
        return cost(length) * passes

    def _run_length(self, label: str, policy: Policy, length: int, prompts: Sequence, deadline: float,
                    progress: Progress) -> None:
        sampled, left_out = {}, 0
        for number, prompt in enumerate(prompts, 1):
            name = prompt.set if isinstance(prompt, Window) else prompt.task
            if time.monotonic() > deadline:
                left_out += 1
                progress.skip(self._work(policy, length, prompt))
                continue
            sampled[name] = sampled.get(name, 0) + 1
            if sampled[name] <= self._settings.recall_prompts:
                self._measure_recall(label, policy, length, name, prompt)
            found = self._window if isinstance(prompt, Window) else self._item
            self.records.results += found(label, policy, length, prompt)
            progress.step(self._work(policy, length, prompt), f"{label}, {length} tokens, {prompt.name} ({number} of {len(prompts)})")
        if left_out:
            self._note(f"{label}, {length} tokens: {left_out} of {len(prompts)} prompts left out, its "
                       f"{self._settings.limit_s:g} s are over")

    def _note(self, text: str) -> None:
        self.records.notes.append(text)
        self._say(text)

    def _measure_recall(self, label: str, policy: Policy, length: int, set_name: str, prompt) -> None:
        ids = prompt.ids if isinstance(prompt, Window) else prompt.context_ids
        sample = Sample(sample_rows(len(ids), self._settings.recall_rows, self._settings.seed, prompt.name)
                        .to(self._model.device))
        self._model.prefill(ids, policy, sample=sample)
        self.records.recalls.append(Recall(label, length, set_name, prompt.name,
                                           [layer.flatten().tolist() for layer in sample.recall], sample.error))

    def _window(self, label: str, policy: Policy, length: int, window: Window) -> Iterator[Result]:
        one = self._model.prefill(window.ids, policy)
        nll = self._model.score_last(one, window.ids, window.targets)
        yield Result(label, length, window.set, window.name, window.name, float(nll.double().mean()), None, one.density(),
                     one.attention_ms(), one.prefill_ms)

    def _item(self, label: str, policy: Policy, length: int, item: Item) -> Iterator[Result]:
        one = None
        for number, question in enumerate(item.questions):
            asked = question.prompt_ids
            whole = self._whole(policy, item)
            if one is None or whole:
                ids = item.context_ids
                if whole:
                    ids, asked = [*ids, *asked], []
                one = self._model.prefill(ids, policy, keep_cache=True)
                costs = (one.density(), one.attention_ms(), one.prefill_ms)
            nll, correct = self._model.score_answer(one, asked, question.answer_ids)
            yield Result(label, length, item.task, f"{item.name}#{number}", item.name, nll, correct, *costs)
