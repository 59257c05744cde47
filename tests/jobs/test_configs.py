from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from evals.gate import Gate
from generate.config import GenerateConfig
from jobs.demo import DemoConfig
from jobs.pipeline import PipelineConfig, check
from jobs.promises import PromisesConfig
from serve.config import ServeConfig
from sft.config import TrainConfig, read_config

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
MODELS: dict[str, type[BaseModel]] = {
    "train.yaml": TrainConfig,
    "serve.yaml": ServeConfig,
    "demo.yaml": DemoConfig,
    "generate.yaml": GenerateConfig,
    "gate.yaml": Gate,
    "pipeline.yaml": PipelineConfig,
    "promises.yaml": PromisesConfig,
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    kinds = [model for ending, model in MODELS.items() if path.name.endswith(ending)]
    assert len(kinds) == 1, f"{path.name} must end in one of {', '.join(MODELS)}"
    read_config(kinds[0], path)


def test_the_promised_configs_are_there() -> None:
    trains = {path.name: read_config(TrainConfig, path) for path in CONFIGS.glob("*-train.yaml")}
    seven = [config for config in trains.values() if "7B" in config.model.base]
    assert {config.model.quantization for config in seven if config.scaling.num_workers == 1} == {"none", "nf4"}
    assert any(config.deepspeed.zero_stage == 3 and config.scaling.workers.min > 1 for config in trains.values())
    assert all(config.scaling.use_gpu for config in seven)


def test_demo_files_exist_and_fit_together() -> None:
    root = CONFIGS.parents[1]
    demo = read_config(DemoConfig, CONFIGS / "demo.yaml")
    training = read_config(TrainConfig, root / demo.train)
    serving = read_config(ServeConfig, root / demo.serve)
    assert (root / demo.questions).is_file()
    assert all((root / source.path).is_file() for source in training.data.sources)
    assert training.scaling.num_workers == 2
    assert (serving.registry, serving.base, serving.id) == (training.registry, training.model.base, training.model.id)


def test_a_config_says_what_it_is_for() -> None:
    for path in CONFIGS.glob("*.yaml"):
        text = path.read_text()
        assert text.startswith("# "), path.name
        assert isinstance(yaml.safe_load(text), dict)


def test_the_pipeline_fits_the_demo_that_it_goes_on_from() -> None:
    demo = read_config(TrainConfig, CONFIGS / "demo-train.yaml")
    plan = check(read_config(PipelineConfig, CONFIGS / "support-pipeline.yaml"))
    assert (plan.registry, plan.config.alias) == (demo.registry, demo.alias)
    assert (plan.training.model, plan.training.storage == demo.storage) == (demo.model, False)
