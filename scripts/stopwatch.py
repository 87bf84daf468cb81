"""Times a call on the device, for the scripts that measure."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def seconds(function: Callable, *operands: Any, repeats: int) -> float:
    """Median time of a call, after one that compiles."""
    jax.block_until_ready(function(*operands))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*operands))
        times.append(time.perf_counter() - start)
    return statistics.median(times)
