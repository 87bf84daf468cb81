"""When a run is given up, and what it says then."""

import numpy as np
import pytest

from jaxpar.watchdog import NonFinite, Watchdog


def values(skipped: int, **more: float) -> dict:
    norms = {"head": np.float32(np.nan), "layers.norm": np.array([1.0, 2.0])}
    return dict(skipped=skipped, loss=np.nan, grad_norm=np.nan, gradient_norms=norms, **more)


def test_only_steps_in_a_row_count() -> None:
    watchdog = Watchdog(2, 5, lambda step: [10 * step, 10 * step + 1])
    for step, skipped in enumerate([5, 6, 6, 7, 7], 1):
        watchdog.check(step, values(skipped))
    watchdog.check(6, None)
    watchdog.check(7, values(8))
    with pytest.raises(NonFinite) as error:
        watchdog.check(8, values(9))
    text = str(error.value)
    assert text.startswith("step 8: loss nan, gradient norm nan; the last 2 updates were not")
    assert "windows of the training data in its batch: 80, 81\n" in text
    assert "largest gradients (1 of 3 not finite):\n  head: nan\n  layers.norm[1]: 2\n" in text


def test_a_loss_scale_that_is_searched_for_is_no_fault() -> None:
    watchdog = Watchdog(1, 0, lambda _: [])
    watchdog.check(1, values(1, loss_scale=65536.0))
    with pytest.raises(NonFinite):
        watchdog.check(2, values(2, loss_scale=1.0))
