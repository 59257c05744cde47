"""What a training worker needs of memory, part by part, before any accelerator is held. Pure arithmetic.

Sizes come from `sft.architecture`. What is counted is what this trainer does: float32 adapters on a frozen base,
logits only where a label is trained, whole micro-batches of the longest rows. docs/training.md says what is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sft.architecture import Architecture, Linear

GIB = 1 << 30

GPUS = {
    "T4": 14.6,
    "A10G": 22.0,
    "L4": 22.0,
    "RTX 4090": 23.6,
    "A100 40 GB": 39.4,
    "A100 80 GB": 79.1,
    "H100": 79.1,
    "H200": 139.8,
}
"""GiB that PyTorch finds on common cards, which is less than their names say."""

WITHOUT_BFLOAT16 = ("T4",)
"""Cards on which `dtype: auto` is float32."""

TIGHT = 0.92
"""Share of a card from which an estimate is too close to it to promise anything."""

BLOCK, SUPER_BLOCK = 64, 256
"""Numbers that share a scale in 4 bits, and scales that share one."""
NF4_TABLES = 4 * (16 + 256) + 4
"""Bytes that each 4-bit weight carries beside its scales: two code tables and an offset."""

LIVE_PARAMETERS = 1_000_000_000
"""Parameters that DeepSpeed keeps gathered at most under ZeRO-3 (stage3_max_live_parameters)."""

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run's memory depends on.

    Rule: with `full` the base's weights are trained, in float32, and there is no adapter. `trained_share` is the share
    of tokens that are trained. A micro-batch has `micro_batch_size` rows of `max_length` tokens; packed, they lie in
    one row; a pair is two `documents` of that length. `bucket` counts the numbers of a buffer through which DeepSpeed
    reduces gradients. With `logits_at_once` the loss is made of so many logits at a time; with `fused` an adapter keeps
    its input in the hidden states' type; with `keeps_start` the adapter is there twice, once as it was at the start.
    """

    dtype: Literal["bfloat16", "float32"]
    quantization: Literal["none", "nf4"]
    attention: str
    gradient_checkpointing: bool
    rank: int
    target_modules: Literal["all-linear"] | Sequence[str]
    dropout: float
    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    workers: int
    micro_batch_size: int
    max_length: int
    packed: bool
    trained_share: float
    gpu: bool
    bucket: int
    dora: bool = False
    full: bool = False
    logits_at_once: int | None = None
    fused: bool = False
    documents: int = 1
    keeps_start: bool = False

    @property
    def rows(self) -> int:
        """Documents of a micro-batch."""
        return self.micro_batch_size * self.documents

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch."""
        return self.rows * self.max_length

    @property
    def stream_bytes(self) -> int:
        """Bytes of a number in the hidden states; PEFT prepares a 4-bit base so that they are float32."""
        return 2 if self.dtype == "bfloat16" and self.quantization == "none" and not self.full else FLOAT


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one worker, by part.

    Rule: `kept` waits for the backward pass; then either `logits` or `layer` (what one layer's backward pass needs for
    a moment, its recomputation included) comes on top, so the larger of the two counts. `gathered` are the weights that
    ZeRO-3 puts together for use, and what 4-bit weights are unpacked to.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    gathered: int
    kept: int
    layer: int
    logits: int
    overhead: int

    @property
    def activations(self) -> int:
        """What forward and backward pass hold, logits apart."""
        return self.kept + self.layer

    @property
    def total(self) -> int:
        """The most that is held at any moment."""
        resident = self.weights + self.adapter + self.gradients + self.optimizer + self.gathered
        return resident + self.kept + max(self.layer, self.logits) + self.overhead

    def parts(self) -> dict[str, int]:
        """The parts by the names that people know."""
        return {
            "base weights": self.weights,
            "LoRA weights": self.adapter,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "gathered weights": self.gathered,
            "activations": self.activations,
            "logits": self.logits,
            "overhead": self.overhead,
        }


def estimate(base: Architecture, plan: MemoryPlan) -> Estimate:
    """Estimates one worker's memory, in bytes."""
    trained = base.parameters if plan.full else adapter_parameters(base, plan)
    sharded = plan.workers if plan.zero_stage == 3 else 1
    weights = 0 if plan.offload_parameters else base_weights(base, plan) // sharded
    copies = 2 if plan.keeps_start else 1
    adapter = 0 if plan.full or plan.offload_parameters else copies * FLOAT * trained // sharded
    saved = _layer_bytes(base, plan)
    kept = base.layers * (plan.tokens * base.hidden * plan.stream_bytes if plan.gradient_checkpointing else saved)
    # Gradients of the MLP's inputs and of the hidden states, each once as it comes and once as it goes.
    backward = 8 * plan.tokens * (base.intermediate + base.hidden)
    layer = backward + (saved if plan.gradient_checkpointing else 0)
    logits = _logits(base, plan)
    return Estimate(
        weights=weights,
        adapter=adapter,
        gradients=_gradients(trained, plan),
        optimizer=_optimizer(trained, plan),
        gathered=_gathered(base, plan),
        kept=kept + _masks(plan),
        layer=layer,
        logits=logits,
        overhead=_overhead(plan, kept + max(layer, logits)),
    )


def adapter_parameters(base: Architecture, plan: MemoryPlan) -> int:
    """Numbers of the LoRA adapter."""
    head = (base.hidden, base.vocabulary) if _adapts(plan, "lm_head", head=True) else None
    shapes = [(linear.inputs, linear.outputs) for linear in base.linears if _adapts(plan, linear.name)]
    each = [plan.rank * (inputs + outputs) + (outputs if plan.dora else 0) for inputs, outputs in shapes]
    return base.layers * sum(each) + (plan.rank * sum(head) + (head[1] if plan.dora else 0) if head else 0)


def base_weights(base: Architecture, plan: MemoryPlan) -> int:
    """Bytes of the whole base on one device."""
    if plan.quantization == "none":
        return base.parameters * plan.stream_bytes
    packed = 0
    for linear in base.linears:
        blocks = -(-linear.weights // BLOCK)
        packed += -(-linear.weights // 2) + blocks + FLOAT * -(-blocks // SUPER_BLOCK) + NF4_TABLES
    return base.layers * packed + FLOAT * base.other_parameters


def remedies(
    plan: MemoryPlan, base: Architecture, fits: Callable[[Estimate], bool]
) -> list[tuple[str, MemoryPlan]] | None:
    """Changes that make a plan fit, the cheapest first, each on top of the ones before.

    Returns:
        Changes and the plan after each; empty where the plan fits as it is, None where none of them is enough.
    """
    made: list[tuple[str, MemoryPlan]] = []
    if fits(estimate(base, plan)):
        return made
    for words, change in _changes(plan):
        plan = change(plan)
        made.append((words, plan))
        if fits(estimate(base, plan)):
            return made
    return None


def _changes(plan: MemoryPlan) -> list[tuple[str, Callable[[MemoryPlan], MemoryPlan]]]:
    found: list[tuple[str, Callable[[MemoryPlan], MemoryPlan]]] = []
    if not plan.gradient_checkpointing:
        words = "model.gradient_checkpointing: true"
        found.append((words, lambda before: replace(before, gradient_checkpointing=True)))
    if plan.micro_batch_size > 1:
        found.append(("train.micro_batch_size: 1", lambda before: replace(before, micro_batch_size=1)))
    shardable = plan.zero_stage == 3 or plan.quantization == "none"
    if plan.quantization == "none" and not plan.full and plan.zero_stage < 3:
        found.append(("model.quantization: nf4", lambda before: replace(before, quantization="nf4")))
    length = plan.max_length // 2
    while length >= 512:
        found.append((f"data.max_length: {length}", lambda before, length=length: replace(before, max_length=length)))  # type: ignore[misc]
        length //= 2
    if shardable:
        for workers in sorted({max(plan.workers, 2), 4, 8, 16}):
            if workers >= plan.workers:
                words = f"deepspeed.zero_stage: 3 with model.quantization: none and scaling.num_workers: {workers}"
                found.append((words, lambda before, workers=workers: _sharded(before, workers)))  # type: ignore[misc]
    return found


def _sharded(plan: MemoryPlan, workers: int) -> MemoryPlan:
    return replace(plan, quantization="none", zero_stage=3, workers=workers)


def _adapts(plan: MemoryPlan, name: str, *, head: bool = False) -> bool:
    if plan.full:
        return False
    return not head if isinstance(plan.target_modules, str) else name in plan.target_modules


def _layer_bytes(base: Architecture, plan: MemoryPlan) -> int:
    """What one layer's forward pass leaves for its backward pass."""
    stream = plan.stream_bytes
    adapted = [linear for linear in base.linears if _adapts(plan, linear.name)]
    norms = FLOAT * (base.norms * (base.hidden + 1) + (base.queries + base.keys if base.head_norms else 0))
    # A mask keeps kernels from reading grouped keys in place: they are repeated for every head.
    repeated = base.queries if plan.attention != "flash_attention_2" else base.keys
    attention = stream * (base.queries + 2 * repeated)
    length = plan.tokens if plan.packed else plan.max_length
    if plan.attention == "eager":
        attention += base.heads * length * (FLOAT + (stream if stream < FLOAT else 0))
    else:
        attention += stream * base.queries + FLOAT * base.heads
        attention += stream * length if plan.attention == "sdpa" else 0
    mlp = 3 * stream * base.intermediate
    inner = stream if plan.fused else FLOAT
    total = norms + attention + mlp + _inputs(base, plan, adapted) + inner * plan.rank * len(adapted)
    if plan.dora:
        total += sum(linear.outputs * (stream + FLOAT) for linear in adapted)
    return plan.tokens * total


def _inputs(base: Architecture, plan: MemoryPlan, adapted: Sequence[Linear]) -> int:
    """Bytes a token of what linear modules read and keep: for the adapter's gradient, or for the weight's own."""
    reading = base.linears if plan.full else adapted
    if plan.dropout and not plan.full:  # each adapter keeps what its own dropout left, and which numbers those are
        mask = 1 if plan.gpu else FLOAT
        return sum(linear.inputs * (FLOAT + mask) for linear in reading)
    if plan.stream_bytes < FLOAT and not plan.fused:  # each adapter makes a float32 copy of its own
        return sum(linear.inputs * FLOAT for linear in reading)
    widths = {linear.reads: linear.inputs for linear in reading}
    if plan.attention != "eager":
        widths.pop("context", None)  # attention itself keeps what it made
    return plan.stream_bytes * (sum(widths.values()) + (base.norms * base.hidden if plan.full else 0))


def _masks(plan: MemoryPlan) -> int:
    """The mask that all layers share, a byte for each pair of tokens."""
    if plan.attention == "flash_attention_2":
        return 0
    return plan.tokens**2 if plan.packed else plan.rows * plan.max_length**2


def _logits(base: Architecture, plan: MemoryPlan) -> int:
    """Log-probabilities with two gradients of theirs, in float32, at trained positions."""
    share = plan.trained_share
    if not plan.packed:  # a position is computed for all rows of a micro-batch where any is trained
        share *= plan.rows
    positions = min(share, 1.0) * plan.tokens
    if plan.logits_at_once is None:
        return int(3 * FLOAT * positions * base.vocabulary)
    at_once = min(plan.logits_at_once, positions * base.vocabulary)
    return int(2 * FLOAT * at_once + plan.stream_bytes * positions * base.hidden)


def _gradients(trained: int, plan: MemoryPlan) -> int:
    if plan.zero_stage == 0:
        return FLOAT * trained
    buffers = 2 if plan.zero_stage < 3 and plan.gpu else 1
    return FLOAT * (0 if plan.offload_optimizer else trained // plan.workers) + FLOAT * plan.bucket * buffers


def _optimizer(trained: int, plan: MemoryPlan) -> int:
    """AdamW's two moments; under ZeRO also the optimizer's own copy of the weights."""
    if plan.zero_stage == 0:
        return 2 * FLOAT * trained
    return 0 if plan.offload_optimizer else 3 * FLOAT * trained // plan.workers


def _gathered(base: Architecture, plan: MemoryPlan) -> int:
    if plan.zero_stage == 3:
        return min(base.parameters, LIVE_PARAMETERS) * plan.stream_bytes
    if plan.quantization == "nf4":
        return 2 * max(linear.weights for linear in base.linears)
    return 0


def _overhead(plan: MemoryPlan, dynamic: int) -> int:
    """Libraries and, on a GPU, the context, NCCL's buffers and what the allocator cannot use again."""
    if not plan.gpu:
        return int(0.7 * GIB)
    return int((0.8 + (0.4 if plan.workers > 1 else 0)) * GIB + 0.05 * dynamic)
