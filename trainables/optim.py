"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainables.settings import TrialSettings

# Share of the run over which the warm-up-stable-decay schedule goes to zero.
WSD_DECAY_SHARE = 0.3
# As in airbench94_muon (Jordan, 2024). Five gained nothing in benchmarks.recipes, short: 29.9 % against 29.9 %, n = 3.
NEWTON_SCHULZ_STEPS = 3
# How many numbers an optimizer keeps for each weight.
STATE_COPIES = {"sgd": 1, "adam": 2, "adamw": 2, "muon": 1}


class Muon(torch.optim.Optimizer):
    """Muon for convolution weights, AdamW for all other parameters (Jordan et al., Muon, 2024).

    A convolution's weight (O, I, h, w) is the matrix (O, I * h * w). With the scale of Liu et al. (Muon is Scalable for
    LLM Training, 2025, eq. 4) updates have the size of AdamW's, so that one learning rate and weight decay serve both.

    Args:
        convolutions: weights (O, I, h, w).
        groups: what AdamW trains, in parameter groups.
        lr: learning rate.
        weight_decay: decoupled weight decay of the convolutions.
    """

    def __init__(
        self, convolutions: list[nn.Parameter], groups: list[dict[str, Any]], lr: float, weight_decay: float
    ) -> None:
        super().__init__([{"params": convolutions}, *groups], {"lr": lr})
        # torch's Muon takes matrices only, which in channels_last are no views of the weights: step() keeps both equal.
        self._matrices = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in convolutions]
        self._convolutions = convolutions
        self._muon = torch.optim.Muon(
            self._matrices,
            lr=lr,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
            ns_steps=NEWTON_SCHULZ_STEPS,
        )
        self._adamw = torch.optim.AdamW(groups, lr=lr, fused=_can_fuse(convolutions[0]))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step along the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part, groups in ((self._muon, self.param_groups[:1]), (self._adamw, self.param_groups[1:])):
            for inner, outer in zip(part.param_groups, groups, strict=True):
                inner["lr"] = outer["lr"]
        for weight, matrix in zip(self._convolutions, self._matrices, strict=True):
            matrix.copy_(weight.flatten(1))
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        self._muon.step()
        self._adamw.step()
        for weight, matrix in zip(self._convolutions, self._matrices, strict=True):
            weight.copy_(matrix.view_as(weight))
            matrix.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])
        inner = [*self._muon.param_groups, *self._adamw.param_groups]
        for outer, group in zip(self.param_groups, inner, strict=True):
            outer["lr"] = group["lr"]


def make_optimizer(model: nn.Module, settings: TrialSettings) -> torch.optim.Optimizer:
    """Return the optimizer of ``settings`` over the parameters of ``model``, which are on their device.

    Weight decay is applied to tensors of two and more dimensions only: not to batch-norm scales, shifts and biases.
    """
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim >= 2]
    free = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, free]
    fused = _can_fuse(parameters[0])
    match settings.optimizer:
        case "muon":
            convolutions = [p for p in decayed if p.ndim == 4]
            rest = {"params": [p for p in decayed if p.ndim != 4], "weight_decay": settings.weight_decay}
            return Muon(convolutions, [rest, free], settings.lr, settings.weight_decay)
        case "sgd":
            sgd = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=fused)
            for parameter in parameters:  # left to torch, it would be uninitialized memory if fp16 skips the first step
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return sgd
        case "adam" | "adamw":
            kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
            return kind(groups, lr=settings.lr, fused=fused)


def _can_fuse(parameter: nn.Parameter) -> bool:
    return parameter.device.type in ("cpu", "cuda")


def lr_at(step: int, steps_per_epoch: int, settings: TrialSettings) -> float:
    """Return the learning rate of a step.

    It rises linearly over the warm-up, and what follows depends on the schedule: ``constant`` stays, ``linear`` falls
    to 0 (with a long warm-up: one-cycle, Smith & Topin, 2017), ``cosine`` follows half a cosine to 0 (Loshchilov &
    Hutter, ICLR 2017, eq. 5, one cycle), ``wsd`` stays and then falls linearly to 0 over the last 30 % of all steps (Hu
    et al., MiniCPM, 2024, sec. 4.2).

    Args:
        step: steps taken so far, from 0.
        steps_per_epoch: steps in one epoch.
        settings: the trial's settings.
    """
    total = settings.max_epochs * steps_per_epoch
    warmup = settings.warmup_epochs * steps_per_epoch
    progress = max(0.0, step - warmup) / max(1.0, total - warmup)
    match settings.schedule:
        case "constant":
            factor = 1.0
        case "linear":
            factor = 1 - progress
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            factor = min(1.0, (total - step) / (WSD_DECAY_SHARE * total))
    return settings.lr * factor * min(1.0, (step + 1) / max(1.0, warmup))
