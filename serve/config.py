"""The configuration of the serving application. All faults of a file are reported at once.

Every field is an option of `python -m jobs.serve`; its description is the help text.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

OWN_ENGINE_KEYS = {
    "dtype": "engine.dtype",
    "max_model_len": "engine.max_model_len",
    "max_loras": "engine.max_loras",
    "max_lora_rank": "engine.max_lora_rank",
    "max_cpu_loras": "engine.resident_versions",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "enforce_eager": "engine.enforce_eager",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "tool_call_parser": "engine.tool_call_parser",
    "enable_auto_tool_choice": "engine.tool_call_parser",
    "reasoning_parser": "engine.reasoning_parser",
    "model": "base",
    "served_model_name": "base_id",
}
"""Engine arguments that have a key of their own here, and that key."""

FIXED_ENGINE_KEYS = (
    "chat_template",
    "chat_template_content_format",
    "default_chat_template_kwargs",
    "enable_lora",
    "tokenizer",
    "trust_request_chat_template",
)
"""Engine arguments that nobody may set: adapters, and the same prompt ids as in training, hang on them."""


class Section(BaseModel):
    """Base of every config model: frozen, and unknown keys are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class EngineSection(Section):
    """The vLLM engine of each replica."""

    use_gpu: bool = Field(False, description="Run the engine on GPUs rather than on CPU.")
    accelerator_type: str | None = Field(None, description="GPU type to ask Ray for, such as A100; null takes any.")
    tensor_parallel_size: int = Field(1, gt=0, description="GPUs that share one copy of the model.")
    cpus_per_replica: float = Field(1.0, gt=0, description="Logical CPUs that a replica on CPU reserves.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of the base weights; auto is bfloat16 where the hardware multiplies it, else float32."
    )
    max_model_len: int = Field(2048, ge=16, description="Longest prompt and answer together, in tokens.")
    max_loras: int = Field(4, gt=0, description="Adapter versions that one batch can mix; each takes memory.")
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(
        16, description="Highest rank that the engine can hold; versions above it are refused."
    )
    resident_versions: int = Field(
        32, gt=0, description="Adapter versions kept in host memory beside the slots; wanted ones are kept beyond it."
    )
    kv_cache_gib: int = Field(1, gt=0, description="Memory for the KV cache of a replica on CPU, in GiB.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of GPU memory that the engine takes.")
    enforce_eager: bool = Field(True, description="Skip graph compilation: slower answers, a quicker start.")
    tool_call_parser: str | None = Field(
        None, description="vLLM's parser for the tool calls of this family, such as hermes; null serves no tools."
    )
    reasoning_parser: str | None = Field(
        None, description="vLLM's parser for the reasoning of this family, such as qwen3; null leaves it in the answer."
    )
    extra: dict[str, Any] = Field({}, description="Further vLLM engine arguments, as vLLM names them.")

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        faults = []
        if self.accelerator_type is not None and not self.use_gpu:
            faults.append(f"accelerator_type {self.accelerator_type} needs use_gpu: true")
        if self.tensor_parallel_size > 1 and not self.use_gpu:
            faults.append(f"tensor_parallel_size {self.tensor_parallel_size} needs use_gpu: true; use 1 on CPU")
        faults += [f"extra.{key}: set {own}" for key, own in OWN_ENGINE_KEYS.items() if key in self.extra]
        faults += [f"extra.{key}: is not yours to set; leave it out" for key in FIXED_ENGINE_KEYS if key in self.extra]
        if faults:
            raise ValueError("; ".join(faults))
        return self


class ScalingSection(Section):
    """How many copies run, and how much each takes on."""

    min_replicas: int = Field(1, gt=0, description="Engine replicas that always run.")
    max_replicas: int = Field(1, gt=0, description="Engine replicas under load; Serve scales between the two.")
    max_ongoing_requests: int = Field(64, gt=0, description="Requests that one engine replica works on at a time.")
    gateway_replicas: int = Field(1, gt=0, description="HTTP gateways in front of the engines.")
    drain_s: float = Field(
        60.0, gt=0, description="Longest time that a replica which is to stop goes on with its requests, in seconds."
    )
    stall_s: float = Field(
        60.0, gt=0, description="Longest silence of an engine with work to do; then its replica is replaced."
    )

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class HttpSection(Section):
    """Where the endpoint listens."""

    host: str = Field("127.0.0.1", description="Address to listen on; by default this machine only.")
    port: int = Field(8000, gt=0, le=65535, description="Port to listen on.")


class AccessSection(Section):
    """Who may ask."""

    keys: str | None = Field(
        None, description="File of API keys, one a line as `python -m jobs.keys create` prints them; read on change."
    )
    open: bool = Field(False, description="Answer other machines although no API key is configured.")


class Rates(Section):
    """What one API key may use. Where a key says nothing, the server's own rates hold; null sets no limit."""

    requests_per_minute: int | None = Field(None, gt=0, description="Requests a minute of one API key.")
    tokens_per_minute: int | None = Field(
        None, gt=0, description="Tokens a minute of one API key, prompts and answers together."
    )
    concurrency: int | None = Field(None, gt=0, description="Requests of one API key at a time.")


class LimitsSection(Rates):
    """Rates of an API key that names none of its own, and the limits of the whole server."""

    total_concurrency: int | None = Field(
        None, gt=0, description="Requests at a time, all keys together; by default twice what the engines work on."
    )
    body_s: float = Field(30.0, gt=0, description="Longest time for a client to send its request, in seconds.")
    first_token_s: float = Field(120.0, gt=0, description="Longest wait for a stream's first token, in seconds.")
    total_s: float = Field(600.0, gt=0, description="Longest time for a whole answer, in seconds.")


class TrafficSection(Section):
    """Copies of requests for shadow versions."""

    shadow_concurrency: int = Field(
        8, gt=0, description="Shadow copies that run at a time; a request beyond them is answered, but not copied."
    )


class Ceiling(Section):
    """How high a number of a new version may be. Without a key there is no limit; several keys all hold."""

    at_most: float | None = Field(None, ge=0, description="Never above this.")
    above_before: float | None = Field(
        None, ge=0, description="Not further than this above that of the version before."
    )
    times_before: float | None = Field(None, gt=0, description="Not above so many times that of the version before.")

    @property
    def given(self) -> bool:
        """Whether there is a limit."""
        return self != Ceiling()


class LiveCheck(Section):
    """A checker of live answers, and how low their mean score may be."""

    aliases: list[str] = Field(["*"], min_length=1, description="Aliases whose answers are checked, or patterns.")
    check: dict[str, Any] = Field(description="A checker as a suite has it, such as {kind: json}; without a reference.")
    at_least: float | None = Field(None, ge=0, le=1, description="The mean score is never below this.")
    below_before: float | None = Field(
        None, ge=0, le=1, description="It is not further than this below that of the version before."
    )

    @model_validator(mode="after")
    def _can_be_used(self) -> Self:
        if self.at_least is None and self.below_before is None:
            raise ValueError("give at_least, below_before or both")
        self.checker()
        return self

    def checker(self) -> Any:
        """The checker itself, of evals.

        Raises:
            ValueError: there is no such checker, or it needs a row's reference.
        """
        from evals.checkers import AnyChecker  # it takes a second, which a server without any saves

        made: Any = TypeAdapter(AnyChecker).validate_python(self.check)
        fault = made.fault(None)
        if fault:
            raise ValueError(f"check: {made.kind} {fault}; live answers have none")
        return made


class GuardSection(Section):
    """When a new version is taken back: limits on what it does for clients. Without any limit nothing is watched."""

    watch_s: float = Field(600.0, gt=0, description="How long a promoted version is watched; a canary always is.")
    check_s: float = Field(5.0, gt=0, description="How often the limits are looked at, in seconds.")
    min_requests: int = Field(50, gt=0, description="Requests, streams or checked answers before a limit is judged.")
    error_rate: Ceiling = Field(Ceiling(), description="Share of requests that failed by no fault of their client.")
    first_token_p95_s: Ceiling = Field(Ceiling(), description="95th percentile of streams' times to the first token.")
    total_p95_s: Ceiling = Field(Ceiling(), description="95th percentile of the times of whole answers.")
    checkers: dict[str, LiveCheck] = Field({}, description="Checkers of live answers, by name.")
    sample: float = Field(0.25, gt=0, le=1, description="Share of the answers that checkers get to see.")

    @property
    def active(self) -> bool:
        """Whether there is any limit."""
        return bool(self.checkers) or any(
            limit.given for limit in (self.error_rate, self.first_token_p95_s, self.total_p95_s)
        )


class CapsSection(Section):
    """How large a request may be."""

    body_bytes: int = Field(4 * 2**20, gt=0, description="Bytes of a request's body.")
    messages: int = Field(1000, gt=0, description="Messages of a conversation.")
    prompts: int = Field(32, gt=0, description="Prompts of one completion request.")
    n: int = Field(16, gt=0, description="Answers to one prompt.")
    max_tokens: int | None = Field(
        None, gt=0, description="Tokens of an answer that a request may ask for; by default engine.max_model_len."
    )
    stop: int = Field(4, gt=0, description="Stop texts.")
    stop_chars: int = Field(256, gt=0, description="Characters of a stop text.")
    logit_bias: int = Field(300, gt=0, description="Entries of logit_bias and of each list of token ids or bad words.")
    tools: int = Field(128, gt=0, description="Tools of a request.")
    schema_chars: int = Field(
        16 * 2**10,
        gt=0,
        description="Characters of a JSON schema, regex or grammar; 16 Ki can take the engine a second to compile.",
    )
    schema_depth: int = Field(32, gt=0, description="Levels of nesting in a JSON schema.")


class LogSection(Section):
    """The access log: one JSON line a request."""

    access_file: str | None = Field(
        None, description="File for the lines, on each gateway's node; by default the replica's standard output."
    )
    prompts: bool = Field(False, description="Also write what clients ask; answers are never written.")
    shadow_file: str | None = Field(
        None, description="File for requests that were shadowed, with both answers; by default none are kept."
    )


class RaySection(Section):
    """Which Ray cluster to use."""

    address: str | None = Field(
        None, description="auto or an address joins a running cluster; null joins a job's own, else starts one."
    )
    num_cpus: int | None = Field(None, gt=0, description="Logical CPUs of a Ray that is started here.")


class ServeConfig(Section):
    """A serving application, whole."""

    registry: str = Field(min_length=1, description="Registry of adapters: a folder, s3://, gs:// or az://.")
    base: str = Field(min_length=1, description="Folder of the base checkpoint, or a Hugging Face model id.")
    base_id: str | None = Field(None, description="The base model's id for users; by default the last part of `base`.")
    engine: EngineSection = EngineSection()
    scaling: ScalingSection = ScalingSection()
    http: HttpSection = HttpSection()
    access: AccessSection = AccessSection()
    limits: LimitsSection = LimitsSection()
    caps: CapsSection = CapsSection()
    traffic: TrafficSection = TrafficSection()
    guard: GuardSection = GuardSection()
    log: LogSection = LogSection()
    ray: RaySection = RaySection()

    @model_validator(mode="after")
    def _id_is_plain(self) -> Self:
        if not self.id or any(mark in self.id for mark in ":@") or not self.id.isprintable():
            raise ValueError(f"base_id {self.id!r} must be printable and without ':' and '@', which versions use")
        return self

    @property
    def max_tokens(self) -> int:
        """How long an answer a request may ask for, in tokens."""
        return min(self.caps.max_tokens or self.engine.max_model_len, self.engine.max_model_len)

    @property
    def total_concurrency(self) -> int:
        """How many requests all gateways together take at a time."""
        engines = self.scaling.max_ongoing_requests * self.scaling.max_replicas
        return self.limits.total_concurrency or 2 * engines

    @property
    def id(self) -> str:
        """The base model's id."""
        return self.base_id or self.base.rstrip("/").rsplit("/", 1)[-1]
