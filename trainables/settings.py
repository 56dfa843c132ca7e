"""The hyperparameters of one trial: validated, frozen, and their defaults stated once."""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Optimizer = Literal["sgd", "adam", "adamw", "muon"]
Schedule = Literal["wsd", "cosine", "linear", "constant"]
Augmentation = Literal["none", "flip", "crop", "flip+crop"]
Setup = Literal["plain", "augmentation", "saliency", "saliency_control", "gradcam", "gradcam_control"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]

# Images have 32 pixels a side; the network halves them three times, and is to have more than one position left.
MIN_RESOLUTION, MAX_RESOLUTION = 12, 32


class TrialSettings(BaseModel):
    """Everything that decides what one trial trains, apart from the images.

    Two trials with equal settings, trained on the same images, the same kind of device and as many CPU threads, are the
    same trial.

    Raises:
        pydantic.ValidationError: on an unknown name, a wrong type or a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # Optimization
    optimizer: Optimizer = Field(
        "sgd", description="sgd: Nesterov momentum 0.9; adam; adamw; muon for the convolutions, with adamw for the rest"
    )
    lr: float = Field(0.1, gt=0, le=100, description="peak learning rate")
    weight_decay: float = Field(
        5e-4, ge=0, le=1, description="L2 penalty (adamw, muon: decoupled); norms and biases are left out"
    )
    batch_size: int = Field(128, ge=2, le=65536, description="images a step")
    max_epochs: int = Field(10, ge=1, le=100_000, description="epochs of a trial that is not stopped early")
    schedule: Schedule = Field(
        "wsd",
        description="learning rate after warm-up: wsd is stable, then linear to 0 over the last 30 %; linear to 0 with "
        "a warm-up of a quarter of the epochs is one-cycle",
    )
    warmup_epochs: float = Field(0.5, ge=0, description="epochs of linear warm-up from 0")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay a step of an average of the weights that is validated and kept in their place; 0: none",
    )

    # What is minimized
    setup: Setup = Field(
        "augmentation",
        description="plain: images as they are; augmentation: augmented ones; saliency: Saliency Guided Training; "
        "gradcam: Visual Attention Consistency; the controls: a random mask, maps that are not compared",
    )

    # Images
    resolution: str = Field(
        "32",
        description="pixels a side; several, as 16,24,32, each for an equal share of the epochs (progressive resizing)",
    )
    augmentation: Augmentation = Field(
        "flip+crop",
        description="flip: horizontal, with probability 1/2; crop: random, padding 4; not given, it is none for all "
        "setups but augmentation",
    )
    cutout: int = Field(0, ge=0, le=32, description="side of a square that is blackened, in pixels of 32; 0: none")
    normalize: bool = Field(True, description="standardize channels with the mean and std of the training images")

    # Regularization
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that all classes have in common")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout probability before the linear head")

    # Network
    width: int = Field(64, ge=1, le=1024, description="channels of the first ResNet-18 stage; 64 is the published one")

    # Arithmetic and chance
    precision: Precision = Field(
        "auto", description="auto: bf16 autocast where the hardware multiplies it, fp16 on older CUDA, else fp32"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="initialization, order of images, augmentation, dropout")

    @model_validator(mode="before")
    @classmethod
    def _setup_decides(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("setup", "augmentation") != "augmentation":
            return {"augmentation": "none", **values}
        return values

    @field_validator("resolution")
    @classmethod
    def _resolution_is_list(cls, value: str) -> str:
        sizes = value.split(",")
        if not {*sizes} <= {str(size) for size in range(MIN_RESOLUTION, MAX_RESOLUTION + 1)}:
            raise ValueError(
                f"resolution {value!r}: must be one or more whole numbers from {MIN_RESOLUTION} to {MAX_RESOLUTION} "
                "with commas between them, as in '16,24,32'"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "TrialSettings":
        if self.setup == "plain" and (self.augmentation != "none" or self.cutout):
            given = f"cutout {self.cutout}" if self.cutout else f"augmentation {self.augmentation}"
            raise ValueError(f"setup plain is without augmentation, but {given} was given: take setup augmentation")
        if self.warmup_epochs > self.max_epochs:
            raise ValueError(f"warmup_epochs ({self.warmup_epochs:g}) must not exceed max_epochs ({self.max_epochs})")
        if (count := len(self.resolutions)) > self.max_epochs:
            raise ValueError(f"resolution ({self.resolution}) has {count} sizes, max_epochs is only {self.max_epochs}")
        return self

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The sizes of ``resolution``, in pixels a side, in the order of training."""
        return tuple(int(size) for size in self.resolution.split(","))

    def resolution_at(self, epoch: int) -> int:
        """Return the pixels a side of the images of an epoch, counted from 1."""
        return self.resolutions[(epoch - 1) * len(self.resolutions) // self.max_epochs]

    def key(self) -> str:
        """Return 10 hexadecimal digits that depend on every setting: the trial's id."""
        canonical = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:10]
