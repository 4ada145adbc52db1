"""What a choice of settings costs and loses on a model, beside dense attention."""

import functools
import math
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Union

import torch

from headwater.calibrate.file import load
from headwater.calibrate.search import DENSE, THRESHOLDS, WINDOWS, Measured, Setting
from headwater.eval import policies
from headwater.eval.attention import Stats
from headwater.eval.items import Item
from headwater.eval.model import EvalModel
from headwater.eval.runner import Window

EXACT_LAST = 256  # tokens of a text: the policy's default


def is_text(set_name: str) -> bool:
    return set_name.startswith("ppl:")


def scored(prompt: Union[Window, Item]) -> tuple:
    """(set, token ids, [(first, behind the last)] of the answers). The questions of a context follow it in one prompt, each after
    the answers of those before."""
    if isinstance(prompt, Window):
        return prompt.set, prompt.ids, []
    ids, spans = list(prompt.context_ids), []
    for question in prompt.questions:
        ids += question.prompt_ids
        spans.append((len(ids), len(ids) + len(question.answer_ids)))
        ids += question.answer_ids
    return prompt.task, ids, spans


class Trial:
    """Policy headwater on one choice of settings, as headwater.eval takes policies. The last `exact` tokens attend to all."""

    name = "headwater"

    def __init__(self, thresholds: Sequence[float], windows: Sequence[int], model: dict, exact: int):
        from headwater import ops

        self._run = ops.PatternPolicy("headwater", {"dense_below_tokens": 0, "dense_last_tokens": exact}, thresholds=thresholds,
                                      windows=windows, **model)

    def attend(self, layer, q, k, v):
        if layer == 0:
            self._run.begin(len(q))
        out, found = self._run.attention(layer, q, k, v)
        return out, Stats(self.name, found.density)


class Meter:
    """What choices of settings lose on prompts beside dense attention."""

    def __init__(self, model: EvalModel, found: Sequence[Union[Window, Item]], per_unit: int):
        config = model.model.config
        self.kv_heads, self.layers = config.num_key_value_heads, config.num_hidden_layers
        self._shape = {"layers": self.layers, "q_heads": config.num_attention_heads, "kv_heads": self.kv_heads,
                       "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads}
        self._model, self._prompts, self._per_unit = model, found, per_unit
        self.units = self.layers * self.kv_heads // per_unit
        self._exact: List[torch.Tensor] = []  # hidden states that give the answers
        self._first = True
        self.dense = self._measure(lambda exact: policies.make("dense"))[0]
        for name, loss in self.dense.items():
            if not math.isfinite(loss):
                raise ValueError(f"dense attention's loss on {name} is {loss}")

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
        found = list(zip(made.flat_thresholds(), made.flat_windows()))[::self._per_unit]
        for threshold, window in found:
            if (threshold, window) != DENSE and not (threshold in THRESHOLDS and window in WINDOWS):
                raise ValueError(f"{path}: threshold {threshold} with window {window} is no setting of this search")
        return found

    def __call__(self, settings: Sequence[Setting]) -> Measured:
        """Nats a token. Texts: NLL in excess of dense attention's. Answers, which are too few tokens for that: KL divergence from
        dense attention's distributions."""
        nll, divergence, density = self._measure(functools.partial(Trial, *self.tables(settings), self._shape))
        loss = {name: divergence[name] if name in divergence else nll[name] - self.dense[name] for name in nll}
        return Measured(loss, density)

    def _measure(self, make: Callable[[int], policies.Policy]) -> tuple:
        """Means by set, in nats a token: NLL of all, divergence of answers; and the mean density. `make` is given how many of the
        last tokens attend to all: questions do, as in serving the end of a prompt does, and what is decoded. The first call is
        dense attention's."""
        first, number, densities = self._first, 0, []
        self._first = False
        made: Dict[int, policies.Policy] = {}
        losses: Dict[str, List[float]] = {}
        divergences: Dict[str, List[float]] = {}
        for prompt in self._prompts:
            name, ids, spans = scored(prompt)
            exact = EXACT_LAST if isinstance(prompt, Window) else len(ids) - len(prompt.context_ids)
            if exact not in made:
                made[exact] = make(exact)
            one = self._model.prefill(ids, made[exact])
            densities.append(one.density())
            if isinstance(prompt, Window):
                nll = self._model.score_last(one, ids, prompt.targets)
                losses.setdefault(name, []).append(float(nll.double().mean()))
                continue
            for begin, end in spans:
                hidden = one.hidden[begin - 1:end - 1]
                if first:
                    self._exact.append(hidden.clone())
                divergence, loss = self._model.divergence(hidden, self._exact[number], ids[begin:end])
                divergences.setdefault(name, []).append(divergence)
                losses.setdefault(name, []).append(loss)
                number += 1
        means = [{name: sum(each) / len(each) for name, each in sums.items()} for sums in (losses, divergences)]
        return (*means, sum(densities) / len(densities))
