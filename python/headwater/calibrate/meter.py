"""What a choice of settings costs and loses on a model, beside dense attention."""

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Union

import torch

from headwater.calibrate.file import load
from headwater.calibrate.search import DENSE, START, THRESHOLDS, WINDOWS, Measured, Setting
from headwater.eval import policies
from headwater.eval.attention import Stats
from headwater.eval.items import Item
from headwater.eval.model import EvalModel, Pass
from headwater.eval.runner import Window

EXACT_LAST = 256  # tokens of a text that attend to all: the policy's default


def is_text(set_name: str) -> bool:
    return set_name.startswith("ppl:")


def is_own(set_name: str) -> bool:
    """Made here: what is asked for, not what will be served."""
    return set_name.startswith("own_")


@dataclass
class Prompt:
    """What is measured on, with what dense attention makes of it."""

    set: str
    ids: List[int]
    exact: int  # last tokens that attend to all
    targets: int = 0  # of a text
    answers: list = field(default_factory=list)  # (first, behind the last)
    dense_nll: float = math.nan  # nats a token, of targets or answers
    dense_hidden: List[torch.Tensor] = field(default_factory=list)  # of the answers
    floor: float = 0.0  # what the policy's own kernels lose where all blocks are listed: roundings that differ from dense attention's
    # Of the pass that rank() stands on: inputs of layers, and densities of all.
    inputs: Dict[int, torch.Tensor] = field(default_factory=dict)
    densities: List[float] = field(default_factory=list)

    @classmethod
    def of(cls, given: Union[Window, Item]) -> "Prompt":
        """The questions of a context follow it in one prompt, each after the answers of those before. They attend to all, and so
        do the last EXACT_LAST tokens before the first answer: as in serving the end of a prompt and what is decoded."""
        if isinstance(given, Window):
            return cls(given.set, list(given.ids), EXACT_LAST, given.targets)
        ids, answers = list(given.context_ids), []
        for question in given.questions:
            ids += question.prompt_ids
            answers.append((len(ids), len(ids) + len(question.answer_ids)))
            ids += question.answer_ids
        exact_from = max(0, min(len(given.context_ids), answers[0][0] - EXACT_LAST))
        return cls(given.task, ids, len(ids) - exact_from, answers=answers)

    def take_dense(self, model: EvalModel, one: Pass) -> None:
        """Measures dense attention's pass."""
        if not self.answers:
            self.dense_nll = self._nll(model, one)
            return
        self.dense_hidden = [one.hidden[begin - 1:end - 1].clone() for begin, end in self.answers]
        self.dense_nll = _mean(model.divergence(hidden, hidden, self.ids[begin:end])[1]
                               for hidden, (begin, end) in zip(self.dense_hidden, self.answers))

    def loss(self, model: EvalModel, one: Pass) -> float:
        """Nats a token, beyond `floor`. Of a text: NLL in excess of dense attention's. Of answers, which are too few tokens for
        that: KL divergence from dense attention's distributions, which roundings alone keep above 0."""
        if not self.answers:
            return self._nll(model, one) - self.dense_nll - self.floor
        return _mean(model.divergence(one.hidden[begin - 1:end - 1], exact, self.ids[begin:end])[0]
                     for exact, (begin, end) in zip(self.dense_hidden, self.answers)) - self.floor

    def _nll(self, model: EvalModel, one: Pass) -> float:
        return float(model.score_last(one, self.ids, self.targets).double().mean())


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


class Trial:
    """Policy headwater on one choice of settings, as headwater.eval takes policies. The last `exact` tokens attend to all."""

    name = "headwater"

    def __init__(self, thresholds: Sequence[float], windows: Sequence[int], model: dict, device, exact: int):
        from headwater import ops

        self._run = ops.PatternPolicy("headwater", {"dense_below_tokens": 0, "dense_last_tokens": exact}, device=device,
                                      thresholds=thresholds, windows=windows, **model)
        self._last = model["layers"]

    def attend(self, layer, q, k, v):
        if layer <= self._last:  # a prompt's first, which need not be 0
            self._run.begin(len(q))
        self._last = layer
        out, found = self._run.attention(layer, q, k, v)
        return out, Stats(self.name, found.density)


class Meter:
    """What choices of settings lose on prompts beside dense attention. start: a calibration file to read, see settings_of()."""

    def __init__(self, model: EvalModel, found: Sequence[Union[Window, Item]], per_unit: int, start: Optional[Path] = None):
        config = model.model.config
        self.kv_heads, self.layers = config.num_key_value_heads, config.num_hidden_layers
        self._shape = {"layers": self.layers, "q_heads": config.num_attention_heads, "kv_heads": self.kv_heads,
                       "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads}
        self._model, self._per_unit = model, per_unit
        self.units = self.layers * self.kv_heads // per_unit
        self._prompts = [Prompt.of(one) for one in found]
        self._base: Optional[List[Setting]] = None  # that rank() keeps inputs of, every `step` layers, and what it loses
        self._step, self._base_measured = 1, Measured({}, 1.0)
        self.start = self.settings_of(start) if start else None
        listed = self._trials([DENSE] * self.units)
        self._trials([START] * self.units)(EXACT_LAST)  # what it refuses comes before the passes
        for prompt in self._prompts:
            prompt.take_dense(model, model.prefill(prompt.ids, policies.make("dense")))
            prompt.floor = prompt.loss(model, model.prefill(prompt.ids, listed(prompt.exact)))
            if not math.isfinite(prompt.dense_nll + prompt.floor):
                raise ValueError(f"dense attention's loss on {prompt.set} is {prompt.dense_nll}, and {prompt.floor} more with all "
                                 "blocks listed")
        sets = {prompt.set: [one.dense_nll for one in self._prompts if one.set == prompt.set] for prompt in self._prompts}
        self.dense = {name: _mean(each) for name, each in sets.items()}
        firsts = {prompt.set: prompt for prompt in reversed(self._prompts)}
        self._ranking = [one for one in self._prompts if one.answers or firsts[one.set] is one]
        self._all_own = all(map(is_own, self.dense))

    def tables(self, settings: Sequence[Setting]) -> tuple:
        """(thresholds, windows), [layers * kv_heads] each."""
        each = [setting for setting in settings for _ in range(self._per_unit)]
        return [threshold for threshold, _ in each], [window for _, window in each]

    def settings_of(self, path: Path) -> List[Setting]:
        """Of a calibration file; ValueError where it is not of this model's shape, or has what the search does not know."""
        made = load(path)
        if (made.layers, made.kv_heads) != (self.layers, self.kv_heads):
            raise ValueError(f"{path} is for {made.layers} layers of {made.kv_heads} KV heads; the model has {self.layers} of "
                             f"{self.kv_heads}")
        each = list(zip(made.flat_thresholds(), made.flat_windows()))
        found = each[::self._per_unit]
        if [setting for setting in found for _ in range(self._per_unit)] != each:
            raise ValueError(f"{path}: heads of a layer differ; --unit head is wanted")
        for threshold, window in found:
            if (threshold, window) != DENSE and not (threshold in THRESHOLDS and window in WINDOWS):
                raise ValueError(f"{path}: threshold {threshold} with window {window} is no setting of this search")
        return found

    def __call__(self, settings: Sequence[Setting]) -> Measured:
        return self._measured(settings, self._prompts)

    def rank(self, base: Sequence[Setting], settings: Sequence[Setting]) -> Measured:
        """On one window of each text and all answers; the layers before the first where `settings` differs from `base` are not run
        again. What they gave is kept until another base comes, in at most half of the GPU's free memory."""
        if list(base) != self._base:
            self._base = None
            for prompt in self._ranking:
                prompt.inputs = {}
            self._step = self._layers_per_input()
            self._base_measured = self._measured(base, self._ranking, keep=range(self._step, self.layers, self._step))
            self._base = list(base)
        differing = [unit for unit, (one, other) in enumerate(zip(base, settings)) if one != other]
        if not differing:
            return self._base_measured
        layer = differing[0] * self._per_unit // self.kv_heads
        return self._measured(settings, self._ranking, first=layer - layer % self._step)

    def _layers_per_input(self) -> int:
        if self._model.device.type != "cuda":
            return 1
        torch.cuda.empty_cache()
        width = self._model.model.config.hidden_size * self._model.model.dtype.itemsize
        layer = sum(len(prompt.ids) for prompt in self._ranking) * width
        return max(1, math.ceil(2 * self.layers * layer / max(1, torch.cuda.mem_get_info(self._model.device)[0])))

    def _trials(self, settings: Sequence[Setting]) -> Callable[[int], Trial]:
        """By the number of last tokens that attend to all."""
        return functools.cache(functools.partial(Trial, *self.tables(settings), self._shape, self._model.device))

    def _measured(self, settings: Sequence[Setting], prompts: Sequence[Prompt], *, first: int = 0,
                  keep: Optional[Sequence[int]] = None) -> Measured:
        """first: the layer to begin with, by what a call with `keep` kept of it. The density is that of prompts not made here, each
        weighed by its pairs of tokens: attention's share of dense attention's work on all of them."""
        make = self._trials(settings)
        losses: Dict[str, List[float]] = {}
        work, dense_work = 0.0, 0
        for prompt in prompts:
            if first > 0:
                one = self._model.prefill_from(first, prompt.inputs[first], make(prompt.exact))
            else:
                one = self._model.prefill(prompt.ids, make(prompt.exact), keep_inputs=keep or ())
            of_layers = [*prompt.densities[:first], *(stats.density() for stats in one.stats)]
            if keep is not None:
                prompt.inputs, prompt.densities = one.inputs, of_layers
            losses.setdefault(prompt.set, []).append(prompt.loss(self._model, one))
            if self._all_own or not is_own(prompt.set):
                work += len(prompt.ids) ** 2 * _mean(of_layers)
                dense_work += len(prompt.ids) ** 2
        return Measured({name: _mean(each) for name, each in losses.items()}, work / dense_work)
