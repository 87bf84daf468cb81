"""XLA's settings: its options, simulated devices, and where it keeps compiled programs.

Options travel with each compilation, so they also reach the compiler of GPUs that are not there.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import jax

from jaxpar.config import CompileConfig

PRESET: dict[str, dict[str, bool]] = {
    "gpu": {
        # Collectives run while matmuls do. On in the jax that this was written with, off in older
        # ones, and so said here; recommended by
        # https://docs.jax.dev/en/latest/gpu_performance_tips.html.
        "xla_gpu_enable_latency_hiding_scheduler": True,
    },
    "cpu": {
        # The optimizer's state is updated where it lies. Without it XLA copies both of Adam's
        # moments, because it does not see that they are read before they are overwritten;
        # docs/xla_options.md has the bytes.
        "xla_cpu_copy_insertion_use_region_analysis": True,
    },
}
"""What jaxpar asks of XLA for all its programs, by platform. docs/xla_options.md has what these and
other options
change: on GPUs XLA's own defaults cover all but 1% of the bytes that layers gather and reduce."""

ONCE: dict[str, dict[str, int]] = {"cpu": {"xla_backend_optimization_level": 1}}
"""What it asks besides for a program that runs once: to be compiled in half the time.
docs/xla_options.md."""


def options(
    config: CompileConfig, devices: Iterable[jax.Device], *, once: bool = False
) -> dict[str, bool | int]:
    """`compiler_options` of `jax.jit` for a program on `devices`; what the user's `XLA_FLAGS` name
    is left to them. `once`: it is to run only once."""
    platforms = {"gpu" if device.platform == "cuda" else device.platform for device in devices}
    if not config.preset or len(platforms) != 1:
        return {}
    platform = platforms.pop()
    asked = PRESET.get(platform, {}) | (ONCE.get(platform, {}) if once else {})
    named = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in asked.items() if name not in named}


def keep_compiled(config: CompileConfig, cache: Path) -> None:
    """Turns on jax's persistent compilation cache: a program that was compiled before is read from
    a file.

    Args:
      config: `cache` is `auto` (a folder of `cache`, unless jax was told one), `none`, or a folder.
      cache: the user's cache folder.
    """
    if config.cache == "none":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if config.cache != "auto" or "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = cache / "compiled" if config.cache == "auto" else Path(config.cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", 0.2
    )  # the small programs of a start count too


THREADS = 16
"""Threads of a simulated device: collectives of its program that may wait at the same time."""


def simulate_devices(count: int, platforms: str = "cpu") -> None:
    """Gives this process `count` devices on the CPU. To be called before jax looks for devices.

    Args:
      count: devices; where there are several, each takes `THREADS` threads of XLA's pool.
      platforms: those that jax may use, as in `JAX_PLATFORMS`.
    """
    jax.config.update("jax_platforms", platforms)
    jax.config.update("jax_num_cpu_devices", count)
    # XLA's pool has as many threads as there are devices or cores, and a collective holds one until
    # the other devices join it. Those that do not depend on each other start in any order, so that
    # the pool can be full of collectives whose partners find no thread: tiny.py on data=3 x
    # tensor=2 hung in 4 of 5 runs on 2 cores, and in none of 8 with 4 or 16 threads a device. The
    # other way, `xla_cpu_enable_concurrency_optimized_scheduler=false`, makes the order likelier to
    # agree, and every step slower.
    if count > 1:
        threads = max(THREADS * count, int(os.environ.get("PJRT_NPROC", "0")))
        os.environ["PJRT_NPROC"] = str(threads)
