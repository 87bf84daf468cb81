"""XLA's settings: its options for NVIDIA GPUs, and where it keeps compiled programs.

Options travel with each compilation, so they also reach the compiler of GPUs that are not there.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import jax

from jaxpar.config import CompileConfig

GPU_OPTIONS: dict[str, bool] = {
    # Collectives run while matmuls do. On in the jax that this was written with, off in older ones, and so said here;
    # recommended by https://docs.jax.dev/en/latest/gpu_performance_tips.html.
    "xla_gpu_enable_latency_hiding_scheduler": True,
}
"""What jaxpar asks of XLA on NVIDIA GPUs. docs/xla_options.md has what other options change, and why they are not here:
XLA's own defaults cover all but 1% of the bytes that layers gather and reduce."""


def options(config: CompileConfig, devices: Iterable[jax.Device]) -> dict[str, bool]:
    """`compiler_options` of `jax.jit` for a program on `devices`; what the user's `XLA_FLAGS` name is left to them."""
    if not config.gpu_preset or any(device.platform not in ("gpu", "cuda") for device in devices):
        return {}
    named = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    return {name: value for name, value in GPU_OPTIONS.items() if name not in named}


def keep_compiled(config: CompileConfig, cache: Path) -> None:
    """Turns on jax's persistent compilation cache: a program that was compiled before is read from a file.

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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)  # the small programs of a start count too
