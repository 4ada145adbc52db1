"""A causal language model of transformers whose attention is a policy's. Batch 1.

Works with models whose attention goes through transformers' registry with plain causal masks and the softmax scale
1 / sqrt(head_dim): Llama, Mistral without a window, Qwen2, Qwen3.
"""

import math
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from headwater.eval.attention import Stats, exact_rows, recall_and_error
from headwater.eval.policies import Policy

IMPLEMENTATION = "headwater_eval"
LOGIT_ROWS = 512  # of one slice


class ModelError(ValueError):
    """The model is not there, or is of a kind that cannot be measured."""


def find_model(name: str) -> Path:
    """A directory with a config.json: a path, or a name under one of the directories of HW_MODELS (colon-separated)."""
    folders = [folder for folder in os.environ.get("HW_MODELS", "").split(":") if folder]
    for path in (Path(name), *(Path(folder) / name for folder in folders)):
        if (path / "config.json").is_file():
            return path
    raise ModelError(f"model {name}: no directory with a config.json, and none of that name under HW_MODELS "
                     f"({':'.join(folders) or 'not set'})")


@dataclass
class Sample:
    """Asks a pass for recall and errors on rows (int64 [rows]) of every layer. Such a pass is not timed."""

    rows: torch.Tensor
    recall: List[torch.Tensor] = field(default_factory=list)  # f32 [query heads, rows], a layer each
    error: List[float] = field(default_factory=list)  # relative, a layer each


@dataclass
class Pass:
    """One prompt through the model."""

    policy: Policy
    sample: Optional[Sample] = None
    stats: List[Stats] = field(default_factory=list)  # a layer each
    hidden: Optional[torch.Tensor] = None  # [tokens, width], after the last norm
    cache: Any = None
    prefill_ms: float = 0.0
    inputs: Dict[int, torch.Tensor] = field(default_factory=dict)  # of layers that were asked for, [tokens, width]
    _spans: list = field(default_factory=list)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Of one layer: shapes as in headwater.eval.attention. Fewer queries than keys go on after a prompt, exactly."""
        if len(q) < len(k):
            positions = torch.arange(len(k) - len(q), len(k), device=q.device)
            return exact_rows(q, k, v, positions).to(q.dtype)
        with self._timed(q):
            out, stats = self.policy.attend(layer, q, k, v)
        self.stats.append(stats)
        if self.sample is not None:
            recall, error = recall_and_error(q, k, v, out, stats, self.sample.rows)
            self.sample.recall.append(recall.cpu())
            self.sample.error.append(error)
        return out

    @contextmanager
    def _timed(self, q: torch.Tensor):
        if q.is_cuda:
            span = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            span[0].record()
            yield
            span[1].record()
            self._spans.append(span)
        else:
            start = time.perf_counter()
            yield
            self._spans.append((time.perf_counter() - start) * 1e3)

    def attention_ms(self) -> float:
        """Sum over the layers of the policy's time. Synchronised by prefill()."""
        return sum(span if isinstance(span, float) else span[0].elapsed_time(span[1]) for span in self._spans)

    def density(self) -> float:
        """Mean over the layers."""
        return sum(stats.density() for stats in self.stats) / len(self.stats)


def _attention(module, query, key, value, attention_mask, scaling=None, headwater_pass: Optional[Pass] = None,
               sliding_window=None, **_):
    """What transformers calls: query [1, heads, tokens, head_dim], key and value [1, KV heads, keys, head_dim]. Returns
    [1, tokens, heads, head_dim]."""
    if headwater_pass is None or len(query) != 1 or attention_mask is not None or sliding_window is not None:
        raise ModelError("this model's attention has a batch, a mask or a window; only plain causal attention is measured")
    if scaling is not None and not math.isclose(scaling, query.shape[3] ** -0.5, rel_tol=1e-6):
        raise ModelError(f"softmax scale {scaling}; 1 / sqrt({query.shape[3]}) is wanted")
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    return headwater_pass.attend(module.layer_idx, q, k, v).unsqueeze(0), None


class EvalModel:
    """A loaded model, its attention replaced. Not thread-safe."""

    def __init__(self, model: torch.nn.Module):
        """Takes over a causal language model of transformers that is on its device."""
        AttentionInterface.register(IMPLEMENTATION, _attention)
        model.set_attn_implementation(IMPLEMENTATION)
        self.model = model.eval()
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, path: Path, device: str, dtype: torch.dtype) -> "EvalModel":
        AttentionInterface.register(IMPLEMENTATION, _attention)
        transformers_logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=IMPLEMENTATION,
                                                     local_files_only=True)
        return cls(model.to(device))

    def policy_values(self) -> dict:
        """What policies may want of the model: headwater.eval.policies.make()."""
        rotary = getattr(self.model.base_model, "rotary_emb", None)
        return {"rope_frequencies": tuple(rotary.inv_freq.double().tolist())} if rotary is not None else {}

    @property
    def max_tokens(self) -> int:
        return self.model.config.max_position_embeddings

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], policy: Policy, *, keep_cache: bool = False,
                sample: Optional[Sample] = None, keep_inputs: Sequence[int] = ()) -> Pass:
        """The whole prompt (token ids) and the logits of its last token, timed; synchronises. keep_inputs: layers."""
        one = Pass(policy, sample, cache=DynamicCache() if keep_cache else None)
        tokens = torch.tensor([list(ids)], device=self.device)
        self._synchronize()
        start = time.perf_counter()
        with self._keeping(one, keep_inputs):
            one.hidden = self._forward(tokens, one)
        self._head(one.hidden[-1:])
        self._synchronize()
        one.prefill_ms = (time.perf_counter() - start) * 1e3
        return one

    @torch.inference_mode()
    def prefill_from(self, layer: int, inputs: torch.Tensor, policy: Policy) -> Pass:
        """A prompt from a layer on, by what prefill() kept of its inputs."""
        one = Pass(policy)
        base = self.model.base_model
        layers, base.layers = base.layers, base.layers[layer:]
        try:
            one.hidden = base(inputs_embeds=inputs[None], use_cache=False, headwater_pass=one).last_hidden_state[0]
        finally:
            base.layers = layers
        return one

    @contextmanager
    def _keeping(self, one: Pass, layers: Sequence[int]):
        def hook(layer: int):
            def keep(_, args, more):
                one.inputs[layer] = (args[0] if args else more["hidden_states"])[0]
            return keep

        hooks = [self.model.base_model.layers[layer].register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for one_hook in hooks:
                one_hook.remove()

    @torch.inference_mode()
    def score_last(self, one: Pass, ids: Sequence[int], targets: int) -> torch.Tensor:
        """Negative log-likelihood in nats, f32 [targets], of the last tokens of the prompt `ids` that made `one`."""
        wanted = torch.tensor(list(ids[-targets:]), device=self.device)
        return self._nll(one.hidden[-targets - 1:-1], wanted)[0]

    @torch.inference_mode()
    def score_answer(self, one: Pass, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> tuple:
        """(mean NLL in nats, whether every token is the argmax) of an answer after the cached prompt and `prompt_ids`, which
        attend exactly. The cache is left as it was."""
        more = [*prompt_ids, *answer_ids[:-1]]
        hidden = one.hidden[-1:]
        if more:
            tokens = torch.tensor([more], device=self.device)
            hidden = torch.cat([hidden, self._forward(tokens, one)])
            one.cache.crop(-len(more))
        nll, hits = self._nll(hidden[-len(answer_ids):], torch.tensor(list(answer_ids), device=self.device))
        return float(nll.mean()), bool(hits.all())

    @torch.inference_mode()
    def divergence(self, hidden: torch.Tensor, exact: torch.Tensor, wanted: Sequence[int]) -> tuple:
        """Of rows of hidden states [rows, width] beside those of dense attention, means over the rows in nats: (KL divergence
        of the next token's distribution from dense attention's, NLL of `wanted`)."""
        targets = torch.tensor(list(wanted), device=self.device)
        kl, nll = 0.0, 0.0
        for rows, others, target in zip(hidden.split(LOGIT_ROWS), exact.split(LOGIT_ROWS), targets.split(LOGIT_ROWS)):
            found, true = (torch.log_softmax(self._head(x).float(), dim=-1) for x in (rows, others))
            kl += float((true.exp() * (true - found)).sum(dtype=torch.float64))
            nll -= float(found.gather(1, target[:, None]).sum(dtype=torch.float64))
        return kl / len(targets), nll / len(targets)

    def _forward(self, tokens: torch.Tensor, one: Pass) -> torch.Tensor:
        output = self.model.base_model(input_ids=tokens, past_key_values=one.cache, use_cache=one.cache is not None,
                                       headwater_pass=one)
        return output.last_hidden_state[0]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.get_output_embeddings()(hidden)

    def _nll(self, hidden: torch.Tensor, wanted: torch.Tensor) -> tuple:
        """(NLL f32, argmax is the wanted token) of rows of hidden states, a slice of logits at a time."""
        nll, hits = [], []
        for rows, target in zip(hidden.split(LOGIT_ROWS), wanted.split(LOGIT_ROWS)):
            logits = self._head(rows).float()
            nll.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
            hits.append(logits.argmax(dim=-1) == target)
        return torch.cat(nll), torch.cat(hits)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
