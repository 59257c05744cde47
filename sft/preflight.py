"""What can be known of a run before any accelerator is held: every check is made, whatever the others found."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sft import storage
from sft.adapter import base_tensors
from sft.architecture import Architecture, architecture
from sft.base import load_tokenizer, locate, read_template
from sft.batch import accumulation_steps
from sft.cluster import connect
from sft.config import TrainConfig
from sft.data import first_rows, plan_data
from sft.engine import BUCKET
from sft.errors import ModelError, RaysftError, StorageError
from sft.hardware import cpu_has_bfloat16
from sft.head import CHUNK
from sft.memory import GIB, GPUS, TIGHT, WITHOUT_BFLOAT16, Estimate, MemoryPlan, estimate, remedies
from sft.model import LoraPlan
from sft.nodes import Node, differences, nodes, versions
from sft.run import check_run, run_folder
from sft.start import start_of
from sft.survey import Survey

State = Literal["ok", "warning", "fault"]

LOOKED_AT = 1000
"""Rows that are read, of all sources together."""

UNKNOWN_SHARE = 0.5
"""Share of trained tokens that is assumed where no row could be read."""

ACCELERATORS = {
    "T4": "T4",
    "A10G": "A10G",
    "L4": "L4",
    "A100-40G": "A100 40 GB",
    "A100-80G": "A100 80 GB",
    "H100": "H100",
    "H200": "H200",
}
"""Cards by the names that Ray gives them in a node's resources."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found, in a line; `remedy` says what to do about a warning or a fault."""

    check: str
    state: State
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a run fits a card. Rule: `changes` make it fit, in this order; empty where it fits or none would do."""

    card: str
    gib: float
    verdict: Literal["fits", "tight", "too small"]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Preflight:
    """All findings; the memory of one worker in bytes, None where the base's sizes are not known."""

    findings: tuple[Finding, ...]
    memory: Estimate | None
    trained_share: float
    verdicts: tuple[Verdict, ...]

    @property
    def sound(self) -> bool:
        """Whether no check found a fault."""
        return all(finding.state != "fault" for finding in self.findings)


@dataclass
class _Known:
    """What checks have found out so far, for the later ones."""

    base: Path | None = None
    template: str | None = None
    start: LoraPlan | None = None
    share: float = UNKNOWN_SHARE
    nodes: list[Node] = field(default_factory=list)
    memory: Estimate | None = None
    verdicts: tuple[Verdict, ...] = ()


Check = Callable[[], Iterator[Finding]]


def preflight(config: TrainConfig, further: Sequence[tuple[str, Check]] = ()) -> Preflight:
    """Makes all checks of a run. Holds no accelerator, trains nothing, and leaves nothing behind.

    Args:
        config: the run.
        further: checks of what this room knows nothing of, by name.
    """
    known = _Known()
    checks: list[tuple[str, Check]] = [
        ("config", lambda: _config(config)),
        ("base", lambda: _base(config, known)),
        ("template", lambda: _template(config, known)),
        ("adapter", lambda: _adapter(config, known)),
        ("data", lambda: _data(config, known)),
        ("storage", lambda: _storage(config)),
        *further,
        ("cluster", lambda: _cluster(config, known)),
        ("memory", lambda: _memory(config, known)),
    ]
    findings = [finding for name, check in checks for finding in _made(name, check)]
    return Preflight(tuple(findings), known.memory, known.share, known.verdicts)


def _made(name: str, check: Check) -> list[Finding]:
    try:
        return list(check())
    except RaysftError as error:
        first, _, rest = str(error).partition("\n")
        return [Finding(name, "fault", first, " ".join(rest.split()))]
    except Exception as error:  # one check's fault must not hide the others
        return [Finding(name, "fault", f"the check itself failed ({type(error).__name__}: {error})")]


def _config(config: TrainConfig) -> Iterator[Finding]:
    train, workers = config.train, config.scaling.workers.max
    steps = accumulation_steps(train.global_batch_size, workers, train.micro_batch_size)
    goes_on = check_run(config)
    yield Finding(
        "config",
        "ok",
        f"run {config.name}{', which goes on from its last checkpoint' if goes_on else ''}: "
        f"{train.global_batch_size} rows a step = {workers} worker(s) x {steps} micro-batch(es) of up to "
        f"{train.micro_batch_size}, ZeRO stage {config.deepspeed.zero_stage}",
    )
    held = workers * steps * train.micro_batch_size
    if held >= 2 * train.global_batch_size:
        yield Finding(
            "config",
            "warning",
            f"micro-batches have room for {held} rows, and a step has {train.global_batch_size}",
            "lower train.micro_batch_size, or raise train.global_batch_size",
        )


def _base(config: TrainConfig, known: _Known) -> Iterator[Finding]:
    folder = locate(config.model.base, weights=False)
    known.base = folder
    text = f"{config.model.id} in {folder}"
    if not any(folder.glob("*.safetensors")):
        if Path(config.model.base).exists():
            raise ModelError(f"{folder}: holds no .safetensors weights; convert the checkpoint to safetensors")
        remedy = f"to fetch them before: hf download {config.model.base}"
        yield Finding("base", "warning", f"{text}: its weights are fetched when the run starts", remedy)
        return
    tensors = base_tensors(folder).values()
    size = sum(tensor.end - tensor.begin for tensor in tensors)
    yield Finding("base", "ok", f"{text}, {size / 1e9:.2f} GB in {len(tensors)} weights")


def _template(config: TrainConfig, known: _Known) -> Iterator[Finding]:
    if known.base is None:
        return
    data = config.data
    made = load_tokenizer(
        known.base.absolute(),
        read_template(config.model.chat_template),
        history=data.mask.history,
        quick=data.tokenizer == "auto",
    )
    ends = ", ".join(made.template.stop_tokens)
    known.template = made.template.fingerprint
    yield Finding("template", "ok", f"proven to be masked exactly; an answer ends with {ends}")


def _adapter(config: TrainConfig, known: _Known) -> Iterator[Finding]:
    address = config.model.adapter
    if address is None or known.base is None or known.template is None:
        return
    if config.model.adapter_version is not None:
        yield Finding("adapter", "warning", f"{address} is read when the run starts", "see that it is in the registry")
        return
    start = start_of(config, known.base, known.template)
    if start is not None:
        known.start = start.lora
        yield Finding("adapter", "ok", f"goes on from {address}, of rank {start.lora.rank}")


def _data(config: TrainConfig, known: _Known) -> Iterator[Finding]:
    plan = plan_data(config.data, known.base or Path(), pairs=config.on_pairs)
    size = sum(file.size for file in plan.files)
    text = f"{len(plan.files)} file(s), {size / 1e6:,.1f} MB"
    if known.base is None:
        yield Finding("data", "warning", f"{text}; no row was masked, for there is no base model")
        return
    plan = dataclasses.replace(plan, template=read_template(config.model.chat_template))
    counted = Survey()
    for table in first_rows(plan, -(-LOOKED_AT // len(plan.sources))):
        counted.add(table)
    if counted.tokens:
        known.share = counted.trained_tokens / counted.tokens
    counted.check(config.data.max_bad_fraction)
    bad = counted.total.faults.total()
    told = f"{text}; of the first {counted.rows:,} rows {counted.kept:,} are kept, {known.share:.0%} of tokens trained"
    if bad:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counted.total.faults.most_common())
        remedy = "python -m jobs.inspect_data --quarantine FILE names the rows"
        yield Finding("data", "warning", f"{told}; {bad} cannot be used ({reasons})", remedy)
    else:
        yield Finding("data", "ok", told)


def _storage(config: TrainConfig) -> Iterator[Finding]:
    root = run_folder(config).address.rsplit("/", 1)[0]
    local = "://" not in root
    absent = [folder for folder in (Path(root), *Path(root).parents) if local and not folder.exists()]
    address, content = f"{root}/.preflight-{secrets.token_hex(8)}", secrets.token_bytes(64)
    storage.write(address, content)
    try:
        if storage.read(address) != content:
            raise StorageError(f"{address}: what is read is not what was written; is this one storage for all nodes?")
    finally:
        storage.delete(address)
        with suppress(OSError):
            for folder in absent:
                folder.rmdir()
    yield Finding("storage", "ok", f"{root} can be written, read and deleted")
    if local and _joins(config):
        remedy = "use s3:// or gs://, or a folder that all nodes mount"
        yield Finding("storage", "warning", f"{root} is a folder: all nodes of the cluster must see it", remedy)


def _joins(config: TrainConfig) -> bool:
    return config.ray.address is not None or "RAY_ADDRESS" in os.environ


def _cluster(config: TrainConfig, known: _Known) -> Iterator[Finding]:
    scaling = config.scaling
    each = {"CPU": scaling.cpus_per_worker, **({"GPU": 1.0} if scaling.use_gpu else {})}
    if not _joins(config):
        yield _here(config)
        return
    connect(config.ray.address, num_cpus=config.ray.num_cpus, needed_cpus=0)
    known.nodes = nodes()
    yield from _versions(known.nodes, each)
    yield _room(config, known.nodes, each)


def _here(config: TrainConfig) -> Finding:
    """A run that starts a Ray of its own has this machine alone; its CPUs are logical, its GPUs are not."""
    import torch

    if not config.scaling.use_gpu:
        return Finding("cluster", "ok", f"a Ray is started here, on {os.cpu_count()} CPU(s), for no address is set")
    found, wanted = torch.cuda.device_count(), config.scaling.workers.min
    if found < wanted:
        remedy = "name a cluster in ray.address, submit the run as a job, or set scaling.use_gpu false"
        return Finding("cluster", "fault", f"the run needs {wanted} GPU(s), and this machine has {found}", remedy)
    return Finding("cluster", "ok", f"a Ray is started here, with {found} GPU(s), for no address is set")


def _versions(found: Sequence[Node], each: dict[str, float]) -> Iterator[Finding]:
    own = versions()
    same = 0
    for node in found:
        differing = differences(node, own)
        same += not differing
        if differing:
            holds = node.room(each) > 0
            remedy = "install the same set on all nodes" + ("" if holds else "; no worker fits this one")
            text = f"node {node.name}: {'; '.join(differing)}"
            yield Finding("versions", "fault" if holds else "warning", text, remedy)
    if same:
        named = ", ".join(f"{package} {number}" for package, number in own.items())
        yield Finding("versions", "ok", f"{same} of {len(found)} node(s) have {named}")


def _room(config: TrainConfig, found: Sequence[Node], each: dict[str, float]) -> Finding:
    wanted = config.scaling.workers.min
    asked = f"{wanted} worker(s) of {', '.join(f'{amount:g} {name}' for name, amount in each.items())}"
    rooms = [node.room(each) for node in found]
    total = {name: sum(node.resources.get(name, 0.0) for node in found) for name in each}
    has = f"the cluster of {len(found)} node(s) has {', '.join(f'{n:g} {name}' for name, n in total.items())}"
    if sum(rooms) < wanted:
        return Finding(
            "cluster",
            "fault",
            f"{asked} are asked for; {has}, which holds {sum(rooms)}; the run would wait "
            f"{config.scaling.resource_timeout_s:g} s",
            "lower scaling.num_workers or cpus_per_worker, or add nodes; where an autoscaler adds them, go on",
        )
    if total["CPU"] - wanted * each["CPU"] < 1:
        remedy = "lower scaling.cpus_per_worker, or add a CPU node"
        return Finding("cluster", "fault", f"{asked} leave no CPU for reading the data; {has}", remedy)
    return Finding("cluster", "ok", f"{asked} fit; {has}")


def _memory(config: TrainConfig, known: _Known) -> Iterator[Finding]:
    if known.base is None:
        return
    base = architecture(json.loads((known.base / "config.json").read_bytes()))
    plan = memory_plan(config, known.share, known.start)
    known.memory = found = estimate(base, plan)
    text = f"{base.parameters / 1e9:.2f}B parameters, {found.total / GIB:.1f} GiB for each of {plan.workers} worker(s)"
    if not plan.gpu:
        yield _machine(found, plan, text, known)
        return
    wide = plan if config.model.dtype == "bfloat16" else dataclasses.replace(plan, dtype="float32")
    known.verdicts = tuple(
        _verdict(card, gib, base, wide if card in WITHOUT_BFLOAT16 else plan) for card, gib in GPUS.items()
    )
    own = {ACCELERATORS[name] for name in _accelerators(known.nodes) if name in ACCELERATORS}
    small = [verdict for verdict in known.verdicts if verdict.card in own and verdict.verdict != "fits"]
    for verdict in small:
        remedy = f"set {', '.join(verdict.changes)}" if verdict.changes else "take a larger card, or more workers"
        state: State = "fault" if verdict.verdict == "too small" else "warning"
        yield Finding("memory", state, f"{text}: {verdict.verdict} on the cluster's {verdict.card}", remedy)
    if not small:
        where = f"; fits the cluster's {', '.join(sorted(own))}" if own else ""
        yield Finding("memory", "ok", text + where)


def _machine(found: Estimate, plan: MemoryPlan, text: str, known: _Known) -> Finding:
    """CPU workers share a machine's memory."""
    if known.nodes:
        room = sum(node.resources.get("memory", 0.0) for node in known.nodes)
    else:
        room = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    needed = found.total * plan.workers
    if needed > TIGHT * room:
        remedy = "lower train.micro_batch_size or data.max_length, or set model.gradient_checkpointing true"
        return Finding("memory", "fault", f"{text}, {needed / GIB:.1f} of {room / GIB:.1f} GiB", remedy)
    return Finding("memory", "ok", f"{text}, {needed / GIB:.1f} of {room / GIB:.1f} GiB together")


def _accelerators(found: Sequence[Node]) -> set[str]:
    prefix = "accelerator_type:"
    return {name.removeprefix(prefix) for node in found for name in node.resources if name.startswith(prefix)}


def _verdict(card: str, gib: float, base: Architecture, plan: MemoryPlan) -> Verdict:
    total = estimate(base, plan).total / GIB
    if total <= TIGHT * gib:
        return Verdict(card, gib, "fits")
    changes = remedies(plan, base, lambda found: found.total <= TIGHT * gib * GIB) or []
    words = tuple(words for words, _ in changes)
    return Verdict(card, gib, "tight" if total <= gib else "too small", words)


def memory_plan(config: TrainConfig, trained_share: float, start: LoraPlan | None = None) -> MemoryPlan:
    """What a run's memory depends on.

    Args:
        config: the run.
        trained_share: share of the tokens that are trained.
        start: of the adapter that it goes on from, where that is known.
    """
    model, train, engine, lora = config.model, config.train, config.deepspeed, config.lora
    dtype = model.dtype
    if dtype == "auto":  # every GPU that is worth training on multiplies bfloat16
        dtype = "bfloat16" if config.scaling.use_gpu or cpu_has_bfloat16() else "float32"
    return MemoryPlan(
        dtype=dtype,
        quantization=model.quantization,
        attention=model.attention,
        gradient_checkpointing=model.gradient_checkpointing,
        rank=start.rank if start else lora.rank,
        target_modules=start.target_modules if start else lora.target_modules,
        dropout=lora.dropout,
        zero_stage=engine.zero_stage,
        offload_optimizer=engine.offload_optimizer,
        offload_parameters=engine.offload_parameters,
        workers=config.scaling.workers.min,
        micro_batch_size=train.micro_batch_size,
        max_length=config.data.max_length,
        packed=train.layout == "packed",
        trained_share=trained_share,
        gpu=config.scaling.use_gpu,
        bucket=BUCKET,
        dora=lora.dora,
        full=train.method == "full",
        logits_at_once=CHUNK,
        fused=_fused(config),
        documents=2 if config.on_pairs else 1,
        keeps_start=config.on_pairs and config.model.adapter is not None,
    )


def _fused(config: TrainConfig) -> bool:
    """Whether the adapter's layers are `sft.lora_linear`'s, which keep less than PEFT's."""
    lora = config.lora
    plain = not (lora.dropout or lora.dora or lora.init.startswith("pissa"))
    return plain and config.model.quantization == "none" and config.deepspeed.zero_stage < 3
