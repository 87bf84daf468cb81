"""Gives a run up when too many of its updates in a row are not finite."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class NonFinite(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


class Watchdog:
    """Counts skipped updates in a row.

    Args:
      limit: how many in a row raise `NonFinite`.
      skipped: how many the run has skipped before.
      windows: the window indices of the batch of a step, for the report.
    """

    def __init__(self, limit: int, skipped: int, windows: Callable[[int], list[int]]):
        self._limit, self._skipped, self._windows, self._in_a_row = limit, skipped, windows, 0

    def check(self, step: int, metrics: Mapping[str, Any] | None) -> None:
        """Takes the metrics of a finished step, on the host; None where there is none."""
        if metrics is None:
            return
        skipped = int(metrics["skipped"])
        # With a loss scale an overflow only says that it was too large.
        searching = metrics.get("loss_scale", 1) > 1
        self._in_a_row = self._in_a_row + 1 if skipped > self._skipped and not searching else 0
        self._skipped = skipped
        if self._in_a_row >= self._limit:
            raise NonFinite(_non_finite_report(step, self._in_a_row, metrics, self._windows(step)))


def _non_finite_report(
    step: int, in_a_row: int, metrics: Mapping[str, Any], batch: list[int]
) -> str:
    by_layer = {
        name if norms.ndim == 0 else f"{name}[{layer}]": float(norm)
        for name, norms in metrics["gradient_norms"].items()
        for layer, norm in enumerate(np.atleast_1d(norms))
    }
    largest = sorted(
        by_layer.items(), key=lambda item: -math.inf if math.isnan(item[1]) else -item[1]
    )[:8]
    bad = sum(not math.isfinite(norm) for norm in by_layer.values())
    return "\n".join(
        [
            f"step {step}: loss {float(metrics['loss'])}, gradient norm "
            f"{float(metrics['grad_norm'])}; the "
            f"last {in_a_row} updates were not finite and were skipped (train.max_nonfinite_steps)",
            f"windows of the training data in its batch: {', '.join(map(str, batch))}",
            f"largest gradients ({bad} of {len(by_layer)} not finite):",
            *(f"  {name}: {norm:.4g}" for name, norm in largest),
            "try a lower optimizer.learning_rate, a longer optimizer.warmup_steps, or "
            "precision.compute=float32",
        ]
    )
