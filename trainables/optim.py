"""Optimizers and learning-rate schedules."""

import math

import torch
from torch import nn

from trainables.settings import TrialSettings

# Share of the run over which the warm-up-stable-decay schedule goes to zero.
WSD_DECAY_SHARE = 0.3


def make_optimizer(model: nn.Module, settings: TrialSettings) -> torch.optim.Optimizer:
    """Return the optimizer of ``settings`` over the parameters of ``model``.

    Weight decay is applied to tensors of two and more dimensions only: not to batch-norm scales, shifts and biases.
    """
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    free = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)
    return torch.optim.Adam(groups, lr=settings.lr)


def lr_at(step: int, steps_per_epoch: int, settings: TrialSettings) -> float:
    """Return the learning rate of a step.

    It rises linearly over the warm-up, and what follows depends on the schedule: ``constant`` stays,
    ``cosine`` follows half a cosine to 0 (Loshchilov & Hutter, ICLR 2017, eq. 5, one cycle), ``wsd`` stays and then
    falls linearly to 0 over the last 30 % of all steps (Hu et al., MiniCPM, 2024, sec. 4.2).

    Args:
        step: steps taken so far, from 0.
        steps_per_epoch: steps in one epoch.
        settings: the trial's settings.
    """
    total = settings.max_epochs * steps_per_epoch
    warmup = settings.warmup_epochs * steps_per_epoch
    factor = 1.0
    if settings.schedule == "cosine":
        progress = max(0.0, step - warmup) / max(1.0, total - warmup)
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif settings.schedule == "wsd":
        factor = min(1.0, (total - step) / (WSD_DECAY_SHARE * total))
    return settings.lr * factor * min(1.0, (step + 1) / max(1.0, warmup))
