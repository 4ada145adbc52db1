"""What a client sends and gets, as plain typed values."""

from dataclasses import dataclass, field
from typing import Dict, List, Mapping, Optional, Sequence, Tuple, Union

from google.protobuf.duration_pb2 import Duration

from headwater.errors import HeadwaterError
from headwater.v1 import decode_pb2, prefill_pb2, types_pb2

KV_DTYPES = {"": types_pb2.KV_DTYPE_UNSPECIFIED, "f32": types_pb2.KV_DTYPE_F32, "f16": types_pb2.KV_DTYPE_F16,
             "bf16": types_pb2.KV_DTYPE_BF16}
PARTITIONS = {"": types_pb2.PARTITION_UNSPECIFIED, "contiguous": types_pb2.PARTITION_CONTIGUOUS,
              "zigzag": types_pb2.PARTITION_ZIGZAG, "striped": types_pb2.PARTITION_STRIPED}
STRATEGIES = {"": types_pb2.STRATEGY_UNSPECIFIED, "ring": types_pb2.STRATEGY_RING,
              "allgather": types_pb2.STRATEGY_ALLGATHER, "sparse": types_pb2.STRATEGY_SPARSE}
_PARTITION_NAMES = {value: name for name, value in PARTITIONS.items()}
_STRATEGY_NAMES = {value: name for name, value in STRATEGIES.items()}
_FINISH_REASONS = {decode_pb2.FINISH_REASON_LENGTH: "length", decode_pb2.FINISH_REASON_STOP: "stop",
                   decode_pb2.FINISH_REASON_CONTEXT: "context"}


def seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def to_duration(value: float) -> Duration:
    return Duration(seconds=int(value), nanos=int((value - int(value)) * 1e9))


def _choice(table: Mapping[str, int], name: str, value: str) -> int:
    if value not in table:
        raise ValueError(f"{name} is {value!r}; known are {', '.join(repr(key) for key in table if key)}")
    return table[value]


@dataclass(frozen=True)
class PrefillOptions:
    """Everything of a request but its id and tokens; see prefill.proto for the fields' meaning and limits.

    An empty policy is the workers' default. At most one of min_recall, max_density and time_budget_s: the quality.
    """

    model: str = ""
    tenant: str = ""
    priority: int = 0
    deadline_s: Optional[float] = None
    policy: str = ""
    policy_parameters: Mapping[str, float] = field(default_factory=dict)
    min_recall: Optional[float] = None
    max_density: Optional[float] = None
    time_budget_s: Optional[float] = None
    decode_node: str = ""
    decode_pool: str = ""
    kv_dtype: str = ""
    top_logprobs: int = 0
    world_size: int = 0
    partition: str = ""
    strategy: str = ""
    block_tokens: int = 0
    explain: bool = False  # the progress that brings a plan has its PlanExplanation

    def to_request(self, request_id: str, token_ids: Sequence[int]) -> prefill_pb2.PrefillRequest:
        if self.decode_node and self.decode_pool:
            raise ValueError("decode_node and decode_pool exclude each other")
        if sum(bound is not None for bound in (self.min_recall, self.max_density, self.time_budget_s)) > 1:
            raise ValueError("min_recall, max_density and time_budget_s exclude each other")
        request = prefill_pb2.PrefillRequest(
            request_id=request_id, model=self.model, tenant=self.tenant, priority=self.priority, token_ids=token_ids,
            kv_dtype=_choice(KV_DTYPES, "kv_dtype", self.kv_dtype), top_logprobs=self.top_logprobs,
            world_size=self.world_size, partition=_choice(PARTITIONS, "partition", self.partition),
            strategy=_choice(STRATEGIES, "strategy", self.strategy), block_tokens=self.block_tokens, explain=self.explain)
        if self.deadline_s is not None:
            request.deadline.CopyFrom(to_duration(self.deadline_s))
        if self.policy or self.policy_parameters:
            request.policy.name = self.policy
            request.policy.parameters.update(self.policy_parameters)
        if self.min_recall is not None:
            request.quality.min_recall = self.min_recall
        elif self.max_density is not None:
            request.quality.max_density = self.max_density
        elif self.time_budget_s is not None:
            request.quality.time_budget.CopyFrom(to_duration(self.time_budget_s))
        if self.decode_node:
            request.decode_node = self.decode_node
        elif self.decode_pool:
            request.decode_pool = self.decode_pool
        return request


def _optional(message, name: str):
    return getattr(message, name) if message.HasField(name) else None


def _fallback(value: int) -> str:
    """"dense_recall"; "" for none."""
    if value == types_pb2.ATTENTION_FALLBACK_UNSPECIFIED:
        return ""
    if value not in types_pb2.AttentionFallback.values():
        return f"fallback_{value}"
    return types_pb2.AttentionFallback.Name(value)[len("ATTENTION_FALLBACK_"):].lower()


@dataclass(frozen=True)
class AttentionGroup:
    """One KV head of one layer (kv_head None: all of them); see AttentionGroup in types.proto."""

    layer: int
    kv_head: Optional[int]
    density: float
    recall: Optional[float]
    recall_p1: Optional[float]
    threshold: Optional[float]
    window_blocks: Optional[int]
    rounds: int
    fallback: str  # "": none
    note: str
    forced_density: Optional[float] = None
    no_room_tiles: int = 0

    @classmethod
    def from_proto(cls, group: types_pb2.AttentionGroup) -> "AttentionGroup":
        return cls(layer=group.layer, density=group.density, rounds=group.rounds, fallback=_fallback(group.fallback),
                   note=group.note, no_room_tiles=group.no_room_tiles, **{name: _optional(group, name) for name in (
                       "kv_head", "recall", "recall_p1", "threshold", "window_blocks", "forced_density")})


@dataclass(frozen=True)
class AttentionReport:
    """How much of the attention was read and what recall was measured (None: not); groups are empty where it was dense."""

    policy: str
    density: float
    recall_mean: Optional[float] = None
    recall_p1: Optional[float] = None
    sampled_queries: int = 0
    groups: List[AttentionGroup] = field(default_factory=list)
    fallback: str = ""
    wait_s: float = 0.0

    @classmethod
    def from_proto(cls, report: types_pb2.AttentionReport) -> "AttentionReport":
        return cls(policy=report.policy, density=report.density, recall_mean=_optional(report, "recall_mean"),
                   recall_p1=_optional(report, "recall_p1"), sampled_queries=report.sampled_queries,
                   groups=[AttentionGroup.from_proto(group) for group in report.groups],
                   fallback=_fallback(report.fallback), wait_s=seconds(report.wait))

    def fallbacks(self) -> Dict[str, int]:
        """Groups by reason."""
        counts: Dict[str, int] = {}
        for group in self.groups:
            if group.fallback:
                counts[group.fallback] = counts.get(group.fallback, 0) + 1
        return counts

    def __str__(self) -> str:
        text = f"{self.policy}, density {self.density:.4f}"
        if self.recall_mean is not None:
            text += f", recall {self.recall_mean:.4f} (p1 {self.recall_p1 or 0:.4f}) of {self.sampled_queries} queries a layer"
        if self.fallback:
            text += f"; {self.fallback}"
        for reason, count in sorted(self.fallbacks().items()):
            text += f"; {reason} {count} of {len(self.groups)} groups"
        return text


@dataclass(frozen=True)
class PlanCandidate:
    """One plan that came into question; cost_s: predicted seconds by part (PlanCost in types.proto), None: not predicted."""

    world_size: int
    partition: str  # "": it does not fit
    strategy: str
    cost_s: Optional[Dict[str, float]]
    chosen: bool
    note: str

    @classmethod
    def from_proto(cls, candidate: types_pb2.PlanCandidate) -> "PlanCandidate":
        cost = {part.name[:-len("_s")]: getattr(candidate.cost, part.name) for part in types_pb2.PlanCost.DESCRIPTOR.fields}
        return cls(world_size=candidate.world_size, partition=_PARTITION_NAMES.get(candidate.partition, ""),
                   strategy=_STRATEGY_NAMES.get(candidate.strategy, ""), chosen=candidate.chosen, note=candidate.note,
                   cost_s=cost if candidate.HasField("cost") else None)


@dataclass(frozen=True)
class PlanExplanation:
    """How the coordinator chose a plan; str() is one line a candidate."""

    summary: str
    density: float  # expected
    candidates: List[PlanCandidate]

    @classmethod
    def from_proto(cls, explanation: types_pb2.PlanExplanation) -> "PlanExplanation":
        return cls(summary=explanation.summary, density=explanation.density,
                   candidates=[PlanCandidate.from_proto(candidate) for candidate in explanation.candidates])

    def __str__(self) -> str:
        lines = [f"{self.summary} (density {self.density:.4f} expected)"]
        for plan in self.candidates:
            cost = "" if plan.cost_s is None else " ".join(f"{part} {value:.3g} s" for part, value in plan.cost_s.items()) + ": "
            lines.append(f"{'*' if plan.chosen else ' '} {plan.world_size} {plan.partition} {plan.strategy} {cost}{plan.note}")
        return "\n".join(lines)


def _explanation(event) -> Optional[PlanExplanation]:
    return PlanExplanation.from_proto(event.explanation) if event.HasField("explanation") else None


@dataclass(frozen=True)
class Progress:
    """State of a prefill. Before the first layer is done all counts are 0; queue_position counts requests ahead."""

    request_id: str
    queue_position: int = 0
    epoch: int = 0
    layers_done: int = 0
    num_layers: int = 0
    tokens_per_second: float = 0.0
    density: float = 0.0
    recall: Optional[float] = None  # mean over the queries sampled so far; None: none was
    bytes_acked: int = 0
    bytes_total: int = 0
    eta_s: float = 0.0
    explanation: Optional[PlanExplanation] = None  # with a plan, where PrefillOptions.explain asks for it

    @classmethod
    def from_accepted(cls, event: prefill_pb2.PrefillAccepted) -> "Progress":
        return cls(request_id=event.request_id, queue_position=event.queue_position, explanation=_explanation(event))

    @classmethod
    def from_progress(cls, event: prefill_pb2.PrefillProgress) -> "Progress":
        return cls(request_id=event.request_id, epoch=event.epoch, layers_done=event.layers_done,
                   num_layers=event.num_layers, tokens_per_second=event.tokens_per_second, density=event.density,
                   recall=_optional(event.attention, "recall_mean"), bytes_acked=event.bytes_acked,
                   bytes_total=event.bytes_total, eta_s=seconds(event.eta), explanation=_explanation(event))


@dataclass(frozen=True)
class PrefillResult:
    """A finished prefill: the cache `session_id` is committed at `decode_node`, ready for Client.generate()."""

    request_id: str
    session_id: str
    decode_node: str
    decode_address: str
    num_tokens: int
    first_token: int
    top_logprobs: List[Tuple[int, float]]
    stages_s: Dict[str, float]
    tokens_per_second: float
    density: float
    attention: AttentionReport
    kv_bytes: int
    kv_blocks: int
    kv_blocks_resent: int
    kv_stream_resumes: int
    kv_digest: str
    world_size: int
    partition: str
    strategy: str
    exchange_bytes: int  # K/V that the ranks got from each other
    exchange_bytes_allgather: int  # what strategy "allgather" would have brought them
    worker_ids: List[str]
    retries: int
    resume_layer: int  # the first that the last epoch computed
    trace_id: str  # W3C Trace Context; logs of all processes name it

    @classmethod
    def from_completed(cls, event: prefill_pb2.PrefillCompleted) -> "PrefillResult":
        return cls(
            request_id=event.request_id, session_id=event.session_id, decode_node=event.decode_node,
            decode_address=event.decode_address, num_tokens=event.num_tokens, first_token=event.first_token,
            top_logprobs=[(entry.token_id, entry.logprob) for entry in event.top_logprobs],
            stages_s={stage.name: seconds(getattr(event.stages, stage.name))
                      for stage in types_pb2.StageTimes.DESCRIPTOR.fields},
            tokens_per_second=event.tokens_per_second, density=event.density,
            attention=AttentionReport.from_proto(event.attention), kv_bytes=event.kv_bytes,
            kv_blocks=event.kv_blocks, kv_blocks_resent=event.kv_blocks_resent,
            kv_stream_resumes=event.kv_stream_resumes, kv_digest=event.kv_digest, world_size=event.plan.world_size,
            partition=_PARTITION_NAMES.get(event.plan.partition, ""),
            strategy=_STRATEGY_NAMES.get(event.plan.strategy, ""), exchange_bytes=event.exchange_bytes,
            exchange_bytes_allgather=event.exchange_bytes_allgather, worker_ids=list(event.plan.worker_ids),
            retries=event.retries, resume_layer=event.resume_layer, trace_id=event.trace_id)


@dataclass(frozen=True)
class GeneratedToken:
    """One token of Client.generate(); finish_reason is "length", "stop" or "context" on the last one, else ""."""

    token_id: int
    position: int
    finish_reason: str
    top2_logit_gap: float
    elapsed_s: float

    @classmethod
    def from_response(cls, response: decode_pb2.GenerateResponse) -> "GeneratedToken":
        return cls(token_id=response.token_id, position=response.position,
                   finish_reason=_FINISH_REASONS.get(response.finish_reason, ""),
                   top2_logit_gap=response.top2_logit_gap, elapsed_s=seconds(response.elapsed))


@dataclass(frozen=True)
class BatchItem:
    """The end of one item of Client.batch(): its index in the requests, and a result or the error that ended it."""

    index: int
    outcome: Union[PrefillResult, HeadwaterError]

    @property
    def ok(self) -> bool:
        return isinstance(self.outcome, PrefillResult)
