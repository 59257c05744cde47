from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

from sft.architecture import architecture
from sft.errors import ModelError
from sft.head import CHUNK
from sft.memory import GIB, Estimate, MemoryPlan, adapter_parameters, base_weights, estimate, remedies
from sft.model import LoraPlan, LossModel, ModelPlan, build_model
from sft.reference import keep_start

QWEN2_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
LLAMA3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "attention_bias": False,
}
MISTRAL_7B = {**LLAMA3_8B, "model_type": "mistral", "vocab_size": 32000}
GEMMA2_9B = {
    "model_type": "gemma2",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 256000,
}
PHI4 = {
    "model_type": "phi3",
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "vocab_size": 100352,
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
PLAN = MemoryPlan(
    dtype="float32",
    quantization="none",
    attention="sdpa",
    gradient_checkpointing=False,
    rank=8,
    target_modules="all-linear",
    dropout=0.0,
    zero_stage=0,
    offload_optimizer=False,
    offload_parameters=False,
    workers=1,
    micro_batch_size=1,
    max_length=128,
    packed=True,
    trained_share=0.5,
    gpu=False,
    bucket=0,
    logits_at_once=CHUNK,
    fused=True,
)
QLORA_7B = replace(
    PLAN, dtype="bfloat16", quantization="nf4", gpu=True, gradient_checkpointing=True, rank=16, max_length=2048
)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (QWEN2_7B, 7_615_616_512),
        (LLAMA3_8B, 8_030_261_248),
        (MISTRAL_7B, 7_241_732_096),
        (GEMMA2_9B, 9_241_705_984),
        (PHI4, 14_659_507_200),
    ],
    ids=["qwen2.5-7b", "llama-3-8b", "mistral-7b", "gemma-2-9b", "phi-4"],
)
def test_published_models_have_the_published_number_of_parameters(config: dict[str, Any], parameters: int) -> None:
    assert architecture(config).parameters == parameters


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
        Qwen2Config(**SMALL, tie_word_embeddings=True),
        Qwen3Config(**SMALL, head_dim=24),
        Gemma2Config(**SMALL, head_dim=32),
        Phi3Config(**SMALL),
    ],
    ids=lambda config: str(config.model_type),
)
def test_parameters_are_counted_exactly(config: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert architecture(config.to_dict()).parameters == sum(p.numel() for p in model.parameters())


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ModelError, match="model type mamba are not known; known are gemma, "):
        architecture({"model_type": "mamba"})
    with pytest.raises(ModelError, match="llama has no intermediate_size"):
        architecture({"model_type": "llama", "hidden_size": 8})


Make = Callable[..., LossModel]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(sizes: dict[str, Any], plan: MemoryPlan) -> LossModel:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
        model = build_model(
            ModelPlan(
                base=tmp_path / "base",
                base_id="tiny",
                dtype=plan.dtype,
                quantization=plan.quantization,
                attention=plan.attention,
                gradient_checkpointing=plan.gradient_checkpointing,
                lora=LoraPlan(plan.rank, 8, plan.dropout, plan.target_modules),
            )
        ).train()
        # Branches are for CPUs alone, and only take less than this; the estimate is of whole rows, as on a GPU.
        model._branches = False
        model.model.get_base_model().set_attn_implementation(plan.attention)
        return model

    return made


@dataclass
class Measured:
    """Bytes: what autograd held for the backward pass at most, and what the whole step allocated at most."""

    saved: int
    peak: int


def batch(plan: MemoryPlan) -> tuple[Tensor, Tensor, Tensor]:
    """A pack of two documents, its last tokens trained."""
    ids = torch.arange(plan.tokens)[None] % 500
    labels = ids.clone()
    labels[:, : int(plan.tokens * (1 - plan.trained_share))] = -100
    first = torch.arange(plan.tokens - 8)
    return ids, labels, torch.cat([first, torch.arange(8)])[None]


@contextmanager
def watched(model: LossModel) -> Iterator[Callable[[], int]]:
    """Counts what autograd saves, each storage once while anything needs it, the model's weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}
    now = most = 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal now, most
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.place, self.size = storage.data_ptr(), storage.nbytes()
            if self.place not in weights:
                held[self.place] = held.get(self.place, 0) + 1
                now += self.size if held[self.place] == 1 else 0
                most = max(most, now)

        def __del__(self) -> None:
            nonlocal now
            if self.place not in weights:
                held[self.place] -= 1
                now -= self.size if held[self.place] == 0 else 0

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        yield lambda: most


def measure(model: LossModel, plan: MemoryPlan) -> Measured:
    inputs = batch(plan)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # as in the second micro-batch of a step
    with watched(model) as most:
        model(*inputs).backward()
    now = peak = 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(*inputs).backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return Measured(most(), peak)


CASES = [
    (SMALL, PLAN),
    (SMALL, replace(PLAN, dtype="bfloat16")),
    (SMALL, replace(PLAN, attention="eager", dtype="bfloat16")),
    (SMALL, replace(PLAN, gradient_checkpointing=True)),
    (SMALL, replace(PLAN, target_modules=["q_proj", "v_proj"], max_length=200)),
    ({**SMALL, "num_key_value_heads": 4, "intermediate_size": 512}, replace(PLAN, dropout=0.1, fused=False)),
    (
        {**SMALL, "hidden_size": 128, "num_hidden_layers": 6},
        replace(PLAN, gradient_checkpointing=True, dtype="bfloat16"),
    ),
    ({**SMALL, "vocab_size": 30_000}, replace(PLAN, trained_share=0.25)),
    (SMALL, replace(PLAN, quantization="nf4", dtype="bfloat16", rank=4, fused=False)),
    (SMOLLM2, replace(PLAN, max_length=64)),
    (SMOLLM2, replace(PLAN, gradient_checkpointing=True, max_length=64, trained_share=0.1)),
]


@pytest.mark.parametrize(("sizes", "plan"), CASES, ids=[str(number) for number in range(len(CASES))])
def test_activations_and_logits_are_near_the_measured_peak(sizes: dict[str, Any], plan: MemoryPlan, make: Make) -> None:
    found = estimate(architecture(LlamaConfig(**sizes).to_dict()), plan)
    got = measure(make(sizes, plan), plan)
    if not plan.gradient_checkpointing:
        # Of the logits nothing is kept: their gradient is made with them.
        assert found.kept == pytest.approx(got.saved, rel=0.04)
    assert found.kept + max(found.layer, found.logits) == pytest.approx(got.peak, rel=0.15)


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        replace(PLAN, dtype="bfloat16", target_modules=["q_proj", "down_proj"], rank=3),
        replace(PLAN, quantization="nf4", dtype="bfloat16"),
    ],
    ids=["float32", "bfloat16", "nf4"],
)
def test_weights_adapter_gradients_and_optimizer_are_exact(plan: MemoryPlan, make: Make) -> None:
    model = make(SMALL, plan)
    base = architecture(LlamaConfig(**SMALL).to_dict())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert adapter_parameters(base, plan) == sum(parameter.numel() for parameter in trained)
    held = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            held += parameter.nbytes
            if (state := getattr(parameter, "quant_state", None)) is not None:
                inner = state.state2
                parts = (state.absmax, state.code, state.offset, inner.absmax, inner.code)
                held += sum(part.nbytes for part in parts)
    assert base_weights(base, plan) == held
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [slot[name] for slot in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    found = estimate(base, plan)
    assert found.adapter == sum(parameter.nbytes for parameter in trained)
    assert found.gradients == sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    assert found.optimizer == sum(moment.nbytes for moment in moments)


def test_a_preference_stage_keeps_the_adapter_that_it_goes_on_from(make: Make) -> None:
    plan = replace(PLAN, keeps_start=True)
    model = make(SMALL, plan)
    keep_start(model.model)
    held = sum(parameter.nbytes for name, parameter in model.named_parameters() if "lora_" in name)
    base = architecture(LlamaConfig(**SMALL).to_dict())
    found, alone = estimate(base, plan), estimate(base, PLAN)
    assert found.adapter == held == 2 * alone.adapter
    assert (found.gradients, found.optimizer) == (alone.gradients, alone.optimizer)


def test_stages_shard_what_they_say() -> None:
    base = architecture(QWEN2_7B)
    plan = replace(PLAN, dtype="bfloat16", gpu=True, workers=4)
    alone = estimate(base, plan)
    one, three = (estimate(base, replace(plan, zero_stage=stage)) for stage in (1, 3))
    assert alone.weights == one.weights == 2 * base.parameters
    assert three.weights == 2 * base.parameters // 4
    assert three.adapter == alone.adapter // 4
    assert one.gradients == alone.gradients // 4
    # The moments and the optimizer's own copy of the weights, a quarter of each.
    assert one.optimizer == three.optimizer == alone.optimizer * 3 // 2 // 4
    assert three.gathered == 2_000_000_000
    full = estimate(base, replace(plan, full=True))
    assert (full.weights, full.adapter, full.optimizer) == (4 * base.parameters, 0, 8 * base.parameters)
    offloaded = replace(plan, zero_stage=3, offload_optimizer=True, offload_parameters=True)
    assert (estimate(base, offloaded).weights, estimate(base, offloaded).optimizer) == (0, 0)


def gib(found: Estimate) -> float:
    return round(found.total / GIB, 1)


def test_a_7b_on_one_card_of_24_gb() -> None:
    base = architecture(QWEN2_7B)
    assert 10 < gib(estimate(base, QLORA_7B)) < 15
    plain = replace(QLORA_7B, quantization="none", max_length=1024)
    assert 16 < gib(estimate(base, plain)) < 21
    assert gib(estimate(base, replace(plain, gradient_checkpointing=False, micro_batch_size=4))) > 24


def fits(capacity: float) -> Callable[[Estimate], bool]:
    return lambda found: found.total <= capacity * GIB


def test_remedies_come_in_the_order_of_their_cost() -> None:
    base = architecture(QWEN2_7B)
    large = replace(QLORA_7B, quantization="none", gradient_checkpointing=False, micro_batch_size=4)
    assert remedies(large, base, fits(1000)) == []
    found = remedies(large, base, fits(19))
    assert found is not None
    assert [words for words, _ in found] == [
        "model.gradient_checkpointing: true",
        "train.micro_batch_size: 1",
    ]
    assert [words for words, _ in remedies(large, base, fits(16)) or []][2:] == ["model.quantization: nf4"]
    assert remedies(large, base, fits(1)) is None
    many = architecture({**QWEN2_7B, "num_hidden_layers": 280})
    last = (remedies(large, many, fits(24)) or [])[-1]
    assert last[0] == "deepspeed.zero_stage: 3 with model.quantization: none and scaling.num_workers: 8"
    assert (last[1].zero_stage, last[1].workers, last[1].quantization) == (3, 8, "none")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_on_a_gpu_is_near_the_estimate(make: Make) -> None:
    plan = replace(PLAN, dtype="bfloat16", gpu=True, max_length=2048)
    found = estimate(architecture(LlamaConfig(**SMOLLM2).to_dict()), plan)
    model = make(SMOLLM2, plan).cuda()
    inputs = [tensor.cuda() for tensor in batch(plan)]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    torch.cuda.reset_peak_memory_stats()
    model(*inputs).backward()
    wanted = found.total - found.overhead - found.optimizer
    assert torch.cuda.max_memory_allocated() == pytest.approx(wanted, rel=0.15)
