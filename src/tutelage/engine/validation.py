"""Evaluation while training: when, which checkpoint is best, and when to stop early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tutelage.engine.loop import Trainer

Evaluate = Callable[["Trainer"], dict[str, float]]


@dataclass(frozen=True)
class Validation:
    """Attributes:
    evaluate: gives metrics on validation data.
    every: epochs between evaluations; the last step is always evaluated.
    best: (metric, higher is better): which evaluation is kept as the best checkpoint.
    """

    evaluate: Evaluate
    every: int = 1
    best: tuple[str, bool] | None = None

    def run(self, trainer: Trainer) -> bool:
        """Evaluate; whether this is the best so far.

        Raises:
            ValueError: the early-stop metric is not among those evaluated.
        """
        metrics = self.evaluate(trainer)
        progress = trainer.progress
        progress.metrics = metrics
        trainer.events.emit("evaluation", trainer, metrics)
        self._check_patience(trainer, metrics)
        if self.best is None or self.best[0] not in metrics:
            return False
        value = metrics[self.best[0]] if self.best[1] else -metrics[self.best[0]]
        if progress.best is not None and value <= progress.best:
            return False
        progress.best, progress.best_step = value, trainer.step
        return True

    def _check_patience(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        early, progress = trainer.config.early_stop, trainer.progress
        if early is None:
            return
        if early.metric not in metrics:
            raise ValueError(
                f"train.early_stop.metric {early.metric!r} is not evaluated; there are {sorted(metrics)}"
            )
        value = metrics[early.metric] * (1 if trainer.task.higher_is_better[early.metric] else -1)
        better = progress.early_best is None or value > progress.early_best
        progress.early_best = value if better else progress.early_best
        progress.stale = 0 if better else progress.stale + 1
        progress.stopped_early = progress.stale >= early.patience
