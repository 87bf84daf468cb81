"""XLA's settings: its options for NVIDIA GPUs, and where it keeps compiled programs.

Options travel with each compilation, so they also reach the compiler of GPUs that are not there.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import jax

from jaxpar.config import CompileConfig

GPU_OPTIONS: dict[str, bool] = {
    # A layer's weights are gathered while the layer before it computes, and its gradients are scattered while the next
    # one does; without it the first gather of every layer waits. docs/xla_options.md has what each option changes.
    "xla_gpu_enable_pipelined_all_gather": True,
    "xla_gpu_enable_pipelined_reduce_scatter": True,
    "xla_gpu_enable_pipelined_all_reduce": True,
}
"""What differs from XLA's own defaults, which are good already: asynchronous collectives, the latency-hiding scheduler
and command buffers are on."""


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
