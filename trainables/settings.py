"""The hyperparameters of one trial: validated, frozen, and their defaults stated once."""

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Optimizer = Literal["sgd", "adam"]
Schedule = Literal["wsd", "cosine", "constant"]
Augmentation = Literal["none", "flip", "crop", "flip+crop"]
Precision = Literal["auto", "bf16", "fp32"]


class TrialSettings(BaseModel):
    """Everything that decides what one trial trains, apart from the images.

    Two trials with equal settings, trained on the same images and the same kind of device, are the same trial.

    Raises:
        pydantic.ValidationError: on an unknown name, a wrong type or a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # Optimization
    optimizer: Optimizer = Field("sgd", description="sgd has Nesterov momentum 0.9; adam has betas (0.9, 0.999)")
    lr: float = Field(0.1, gt=0, le=100, description="peak learning rate")
    weight_decay: float = Field(5e-4, ge=0, le=1, description="L2 penalty; norms and biases are left out")
    batch_size: int = Field(128, ge=2, le=65536, description="images a step")
    max_epochs: int = Field(10, ge=1, le=100_000, description="epochs of a trial that is not stopped early")
    schedule: Schedule = Field(
        "wsd", description="learning rate after warm-up: wsd is stable, then linear to 0 over the last 30 %"
    )
    warmup_epochs: float = Field(0.5, ge=0, description="epochs of linear warm-up from 0")

    # Regularization
    augmentation: Augmentation = Field("flip+crop", description="flip: random horizontal; crop: random, padding 4")
    normalize: bool = Field(True, description="standardize channels with the mean and std of the training images")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability before the linear head")

    # Network
    width: int = Field(64, ge=1, le=1024, description="channels of the first ResNet-18 stage; 64 is the published one")

    # Arithmetic and chance
    precision: Precision = Field("auto", description="auto is bf16 autocast where the hardware multiplies bf16")
    seed: int = Field(0, ge=0, lt=2**31, description="initialization, order of images, augmentation, dropout")

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrialSettings":
        if self.warmup_epochs > self.max_epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs:g}) must not exceed max_epochs ({self.max_epochs})")
        return self

    def key(self) -> str:
        """Return 8 hexadecimal digits that depend on every setting: the trial's id."""
        canonical = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]
