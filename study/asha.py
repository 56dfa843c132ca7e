"""ASHA that tells its decisions and can go on from them."""

from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler


def trial_name(trial: Trial) -> str:
    """Return the trial's id in the run directory: the name of its folder."""
    return str(trial.relative_logdir or trial.custom_dirname)


class RecordingASHA(AsyncHyperBandScheduler):
    """Asynchronous successive halving (Li et al., MLSys 2020) over epochs, as Ray Tune has it.

    At each rung a trial goes on if its objective is at least the (1 - 1 / reduction_factor) quantile of those that
    reached the rung before it. Ray Tune keeps neither the reasons of its decisions nor, on restore, its rungs.

    Args:
        max_epochs: epochs after which a trial is done.
        grace_period: epochs of the first rung.
        reduction_factor: one trial in so many goes on, for so many times as long.
        history: what each trial was judged by in earlier attempts: objective by rung (in epochs), by trial id.

    Attributes:
        decision: the one on the last result, as the event log has it: ``rung`` (epoch), ``cutoff`` (None for the first
            trial there) and ``stop``; None where there was no rung.
    """

    def __init__(
        self,
        *,
        max_epochs: int,
        grace_period: int,
        reduction_factor: float,
        history: Mapping[str, Mapping[float, float]],
    ) -> None:
        super().__init__(
            time_attr="epoch", max_t=max_epochs, grace_period=grace_period, reduction_factor=reduction_factor
        )
        self.decision: dict[str, Any] | None = None
        self._stopped: set[str] = set()
        for name, values in history.items():
            for milestone, recorded in self._brackets[0]._rungs:
                if milestone in values:
                    recorded[name] = values[milestone]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Let a trial that goes on from an earlier attempt own what it recorded there."""
        super().on_trial_add(tune_controller, trial)
        for _, recorded in self._brackets[0]._rungs:
            if trial_name(trial) in recorded:
                recorded[trial.trial_id] = recorded.pop(trial_name(trial))

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide as Ray Tune does, and keep the decision for the log."""
        self.decision = None
        if trial.trial_id in self._stopped:  # its worker died before Ray Tune acted on it
            return str(TrialScheduler.STOP)
        epoch, bracket = result["epoch"], self._brackets[0]
        # The rung at which Ray Tune is about to judge: the highest that was reached and not yet recorded.
        rungs = ((m, dict(r)) for m, r in bracket._rungs if epoch >= m and trial.trial_id not in r)
        rung, recorded = next(rungs, (None, {}))
        action = str(super().on_trial_result(tune_controller, trial, result))
        if rung is not None and epoch < self._max_t:
            cutoff = bracket.cutoff(recorded)
            self.decision = {
                "rung": rung,
                "cutoff": None if cutoff is None else float(cutoff),
                "stop": action == TrialScheduler.STOP,
            }
            if self.decision["stop"]:
                self._stopped.add(trial.trial_id)
        return action
