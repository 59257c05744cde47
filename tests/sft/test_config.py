from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sft.config import TrainConfig, read_config
from sft.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
LEAST: dict[str, Any] = {
    "name": "support",
    "storage": "runs",
    "model": {"base": "some/model"},
    "data": {"sources": [{"path": "rows.jsonl"}]},
}


def faults(changes: dict[str, Any], unknown: tuple[str, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_config(TrainConfig, None, {**LEAST, **changes}, unknown)
    return caught.value.faults


def mixture(section: dict[str, Any], **source: Any) -> dict[str, Any]:
    return {"data": {"sources": [{"path": "rows.jsonl", **source}], "mixture": section}}


def test_least_config_and_its_defaults() -> None:
    config = read_config(TrainConfig, None, LEAST)
    assert (config.model.id, config.data.sources[0].label, config.deepspeed.zero_stage) == ("model", "rows.jsonl", 0)


def test_overrides_win_and_leave_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**LEAST, "train": {"epochs": 3, "seed": 5}}))
    config = read_config(TrainConfig, path, {"train": {"learning_rate": "3e-4"}})
    assert (config.train.epochs, config.train.seed, config.train.learning_rate) == (3, 5, 3e-4)


def test_all_faults_come_at_once() -> None:
    assert faults(
        {"name": "Bad Name", "train": {"epochs": 0, "lerning_rate": 1}, "lora": {"rank": "x"}, "rays": 1},
        unknown=("--train.sed",),
    ) == (
        "name: String should match pattern '^[a-z0-9][a-z0-9._-]{0,62}$', got 'Bad Name'",
        "lora.rank: Input should be a valid integer, unable to parse string as an integer, got 'x'",
        "train.epochs: Input should be greater than 0, got 0",
        "train.lerning_rate: no such key; did you mean train.learning_rate?",
        "rays: no such key; did you mean ray?",
        "--train.sed: no such option; did you mean train.seed?",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"base": "m", "quantization": "nf4"}, "deepspeed": {"zero_stage": 3}}, "cannot shard a 4-bit base"),
        ({"deepspeed": {"offload_parameters": True}}, "offload_parameters needs zero_stage 3"),
        ({"deepspeed": {"offload_optimizer": True}}, "offload_optimizer needs zero_stage 1, 2 or 3"),
        ({"model": {"base": "m", "attention": "flash_attention_2"}}, "use sdpa on CPU"),
        (
            {
                "model": {"base": "m", "attention": "flash_attention_2", "dtype": "float32"},
                "scaling": {"use_gpu": True},
            },
            "flash_attention_2 does not compute in float32: use dtype bfloat16, or sdpa",
        ),
        ({"alias": "live"}, "alias needs a registry"),
        ({"train": {"global_batch_size": 1}, "scaling": {"num_workers": 2}}, "every worker needs a row"),
        (
            {"train": {"global_batch_size": 3}, "scaling": {"num_workers": {"min": 1, "max": 4}}},
            "smaller than scaling.num_workers 4: every worker needs a row",
        ),
        ({"scaling": {"num_workers": {"min": 3, "max": 2}}}, "scaling.num_workers: min 3 is above max 2"),
        ({"scaling": {"num_workers": {"min": 3}}}, "scaling.num_workers.max: is missing and has no default"),
        ({"scaling": {"num_workers": 0}}, "scaling.num_workers: Input should be greater than 0, got 0"),
        ({"train": {"learning_rate": 1e-5, "min_learning_rate": 1e-4}}, "is above learning_rate"),
        ({"data": {"sources": []}}, "name at least one source"),
        ({"data": {"sources": [{"path": "a/x.jsonl"}, {"path": "b/x.jsonl"}]}}, "two sources are called x.jsonl"),
        (
            {"data": {"sources": [{"path": "x.csv", "format": "alpaca", "columns": {"answer": "a", "output": "b"}}]}},
            "columns: answer is no field of format alpaca; allowed: cluster, input, instruction, output, system, task",
        ),
        ({"deepspeed": {"zero_stage": 4}}, "Input should be 0, 1, 2 or 3"),
        (mixture({"mode": "temperature"}), "data.mixture: mode temperature needs `temperature`"),
        (mixture({"temperature": 2}), "temperature is not read in mode proportional"),
        (mixture({"temperature": 0.5}), "Input should be greater than or equal to 1"),
        (mixture({"mode": "explicit", "cap": 5}, weight=1), "cap is not read in mode explicit"),
        (mixture({"mode": "explicit", "weights": {"t": 1}}, weight=1), "read only with mode explicit and over task"),
        (mixture({"mode": "explicit", "over": "task", "weights": {"t": 0}}), "Input should be greater than 0"),
        (mixture({}, weight=1), "the weight of rows.jsonl is not read in mode proportional"),
        (mixture({"mode": "explicit"}), "mixture.mode explicit needs a weight for rows.jsonl"),
    ],
)
def test_combinations_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    assert words in "\n".join(faults(changes))


NF4 = {"base": "m", "quantization": "nf4"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"train": {"method": "full"}, "lora": {"rank": 8, "dora": True, "plus_ratio": 16}},
            "train.method full trains no adapter and reads no lora.rank, lora.dora, lora.plus_ratio: leave it out",
        ),
        (
            {"train": {"method": "full"}, "model": NF4},
            "train.method full cannot train a 4-bit base: use model.quantization none, or train.method lora",
        ),
        (
            {"train": {"method": "full"}, "registry": "r", "alias": "live"},
            "train.method full makes no adapter that the engine can serve, so nothing can be published: leave registry "
            "and alias out and serve the run's model folder as `base`, or use train.method lora",
        ),
        (
            {"lora": {"dora": True}, "registry": "r"},
            "lora.dora makes no adapter that the engine can serve, so nothing can be published: leave registry and "
            "alias out and serve the run's model folder as `base`, or use lora.dora false",
        ),
        (
            {"lora": {"dora": True}, "model": NF4},
            "lora.dora with a 4-bit base would be merged into other weights than it was trained on: use "
            "model.quantization none, or lora.dora false",
        ),
        (
            {"lora": {"dora": True}, "deepspeed": {"zero_stage": 3}},
            "lora.dora needs whole base weights, which deepspeed.zero_stage 3 shards: use stage 0, 1 or 2",
        ),
        (
            {"lora": {"dora": True, "init": "pissa"}},
            "lora.init pissa does not go with lora.dora: use lora.init default, or lora.dora false",
        ),
        (
            {"lora": {"init": "pissa_niter_4"}, "model": NF4},
            "lora.init pissa_niter_4 starts from the base's own weights, which a 4-bit base has lost: use "
            "model.quantization none, or lora.init default",
        ),
        (
            {"lora": {"init": "pissa", "rank": 320}},
            "lora.init pissa doubles the bundle's rank to 640, and the engine serves at most 512: use lora.rank 256 or "
            "less",
        ),
    ],
)
def test_a_method_that_cannot_go_with_something_says_what_to_do(changes: dict[str, Any], told: str) -> None:
    assert faults(changes) == (told,)


def test_all_faults_of_methods_come_at_once() -> None:
    changes = {"lora": {"dora": True, "init": "pissa"}, "model": NF4, "deepspeed": {"zero_stage": 3}, "alias": "live"}
    (told,) = faults(changes)
    assert told.count(";") == 6
    assert all(words in told for words in ("4-bit base would", "has lost", "shards", "go with", "needs a registry"))


@pytest.mark.parametrize("init", ["olora", "pissa_niter_0", "pissa_niter_", "Pissa"])
def test_an_unknown_start_is_refused(init: str) -> None:
    assert "String should match pattern" in faults({"lora": {"init": init}})[0]


def test_which_runs_make_a_model_in_place_of_a_bundle() -> None:
    made = [
        read_config(TrainConfig, None, {**LEAST, **changes}).makes_model
        for changes in ({}, {"train": {"method": "full"}}, {"lora": {"dora": True}}, {"lora": {"init": "pissa"}})
    ]
    assert made == [False, True, True, False]


def test_a_source_that_is_held_out_needs_no_weight() -> None:
    sources = [{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "cluster": "games"}]
    data = {"sources": sources, "mixture": {"mode": "explicit"}, "hold_out": {"clusters": ["games"]}}
    assert read_config(TrainConfig, None, {**LEAST, "data": data}).data.mixture.mode == "explicit"


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "not valid YAML"), ("- a", "expected `key: value` lines"), ("", "name: is missing")],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_config(TrainConfig, path)
    with pytest.raises(ConfigError, match="there is no such file"):
        read_config(TrainConfig, tmp_path / "none.yaml")


def test_the_resolved_config_reads_back_as_itself() -> None:
    config = read_config(TrainConfig, None, LEAST)
    assert TrainConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_all_that_pairs_cannot_go_with_is_told_at_once() -> None:
    (told,) = faults(
        {
            "train": {"stage": "dpo", "method": "full", "neftune_alpha": 5},
            "data": {"sources": [{"path": "a.jsonl", "format": "alpaca"}], "mask": {"prompt_weight": 0.1}},
        }
    )
    assert told.split("; ") == [
        "train.stage dpo reads pairs, and a.jsonl is of another format: use format preference or auto",
        "train.stage dpo has no train.layout packed, for a pair is a row of its own: use padded",
        "train.stage dpo compares an adapter with its start: use train.method lora",
        "train.stage dpo measures against the base without noise: use train.neftune_alpha 0",
        "train.stage dpo compares answers to one prompt: use data.mask.prompt_weight 0",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preference": {"beta": 0.2}}, "preference is read by train.stage dpo: set it, or leave preference out"),
        ({"preference": {"label_smoothing": 0.5}}, "Input should be less than 0.5"),
        ({"data": {"sources": [{"path": "p", "format": "preference"}]}}, "p: format preference is read by train.stage"),
        (
            {"model": {"base": "m", "adapter": "runs/one/bundle"}, "lora": {"rank": 8, "dropout": 0.1}},
            "model.adapter brings its own shape and reads no lora.rank: leave it out",
        ),
        ({"model": {"base": "m", "adapter": "a"}, "train": {"method": "full"}}, "cannot start train.method full"),
        ({"model": {"base": "m", "adapter": "one@v2"}}, "one@v2 is a version: set the registry that it is in"),
    ],
)  # fmt: skip
def test_what_a_stage_and_a_start_need(changes: dict[str, Any], words: str) -> None:
    assert words in " ".join(faults(changes))


def test_a_run_on_pairs() -> None:
    config = read_config(TrainConfig, CONFIGS / "dpo-train.yaml")
    assert (config.on_pairs, config.preference.beta, config.model.adapter_version) == (True, 0.1, "support@v1")
    assert config.model.model_copy(update={"adapter": "runs/one@v1/bundle"}).adapter_version is None
