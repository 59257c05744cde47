"""The part of a run's config that says who else is told of its progress."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from sft.section import Section


class MlflowSection(Section):
    """An MLflow tracking server, or a folder or database of MLflow's."""

    tracking_uri: str | None = Field(None, description="Where runs are tracked; null takes MLFLOW_TRACKING_URI.")
    experiment: str = Field("raysft", min_length=1, description="Experiment; made where it does not exist.")

    @field_validator("tracking_uri")
    @classmethod
    def _no_secret(cls, address: str | None) -> str | None:
        # The config is written into the run's folder and into its bundle.
        if address is not None and urlsplit(address).password is not None:
            raise ValueError(
                "must not hold a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return address


class WandbSection(Section):
    """Weights & Biases; the key comes from WANDB_API_KEY or the user's login."""

    project: str = Field("raysft", min_length=1, description="Project.")
    entity: str | None = Field(None, description="User or team; null takes the login's own.")
    mode: Literal["online", "offline"] = Field("online", description="offline writes files to be synchronised later.")


class TrackingSection(Section):
    """Trackers beside the run's own metrics.jsonl and report.html."""

    tensorboard: bool = Field(False, description="Write TensorBoard event files into the run's folder.")
    mlflow: MlflowSection | None = Field(None, description="Log to MLflow.")
    wandb: WandbSection | None = Field(None, description="Log to Weights & Biases.")
