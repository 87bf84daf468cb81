"""Writes docs/xla_options.md: what each XLA option changes in the compiled step of Llama 3 8B, on
GPUs that are absent, and what jaxpar's options for CPUs change on this machine.

  make test ARGS="--co -q"     # once: puts the GPU compiler into .venv/gpu-compiler
  python scripts/xla_options_table.py [--only=gpu | --only=cpu] [--output=FILE]

A collective is covered where its schedule has a matmul or attention between its start and its end:
that is what the compiler arranges, not what a GPU takes.
"""

import argparse
import dataclasses
import json
import os
import platform
import re
import runpy
import sys
import time
from typing import Any

from arguments import ROOT
from pages import page_parser, table, write, written

from jaxpar.config import Config, MeshConfig, from_mapping
from jaxpar.estimate import counts
from jaxpar.report import hlo
from jaxpar.report.apart import Target, check_gpu_compiler, compile_report, run_apart
from jaxpar.validation import resolve

PIPELINED = [
    f"xla_gpu_enable_pipelined_{kind}=true"
    for kind in ("all_gather", "reduce_scatter", "all_reduce")
]
COMBINE = [
    f"xla_gpu_{kind}_combine_threshold_bytes=536870912" for kind in ("all_gather", "reduce_scatter")
]
CASES: list[tuple[str, list[str], str]] = [
    ("XLA's own defaults", [], ""),
    ("latency-hiding scheduler off", ["xla_gpu_enable_latency_hiding_scheduler=false"], "yes: on"),
    (f"`{PIPELINED[0]}`", PIPELINED[:1], "no"),
    ("`..._pipelined_all_gather`, `_reduce_scatter` and `_all_reduce`", PIPELINED, "no"),
    (
        "`xla_gpu_enable_while_loop_double_buffering=true`",
        ["xla_gpu_enable_while_loop_double_buffering=true"],
        "no",
    ),
    ("gathers and scatters combined up to 512 MiB", COMBINE, "no"),
    (
        "`xla_gpu_enable_triton_gemm=false`",
        ["xla_gpu_enable_triton_gemm=false"],
        "no: the autotuner picks",
    ),
]


TENSOR_CASES = [("XLA's own defaults", []), ("the three pipelined options", PIPELINED)]


def configured(name: str, **groups: Any) -> Config:
    """A file of configs/, changed by groups of fields."""
    raw = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    raw.update(groups)
    return resolve(raw)


def compiled(options: argparse.Namespace, flags: list[str], *, tensor: bool = False) -> dict:
    """The account, with text, of a step compiled with XLA's defaults but for `flags`: Llama 3 8B on
    fsdp 8, or with `tensor` Llama 3 70B on fsdp 8 x tensor 8."""
    name, mesh = "llama3_8b", MeshConfig(fsdp=8)
    if tensor:
        name, mesh = "llama3_70b", MeshConfig(fsdp=8, tensor=8)
    changed = dict(train=dict(batch_size=8 * mesh.tensor), memory=dict(remat="full"))
    config = configured(name, **changed, compile=dict(preset=False))
    target = Target.absent("h100", mesh.devices)
    return compile_report(config, mesh, target, options.timeout, xla_flags=flags, text=True)


def in_loops(text: str) -> tuple[float, float]:
    """MiB of one turn of the loops over layers that asynchronous collectives send with and without
    work beside them."""
    mib = {True: 0.0, False: 0.0}
    computations, entry = hlo.computations_of(text)
    for name, lines in computations.items():
        started: dict[str, tuple[int, float]] = {}
        for at, line in enumerate(lines if name != entry else ()):
            made = hlo.INSTRUCTION.match(line)
            if not made:
                continue
            if made[3].endswith("-start"):
                size = max((array.bytes for array in hlo.arrays(made[2])), default=0)
                started[made[1]] = at, size / 2**20
            elif made[3].endswith("-done"):
                for operand in hlo.operands_of(made[4]):
                    if operand in started:
                        begin, size = started.pop(operand)
                        beside = lines[begin + 1 : at]
                        mib[any(re.search("gemm|cublas|fmha", row) for row in beside)] += size
    return mib[True], mib[False]


GPU_TEXT = """\
# XLA's options

## On GPUs

Written on {date}, with jax {jax} and its CUDA compiler, by

    python scripts/xla_options_table.py

for Llama 3 8B on 8 H100s that were absent (fsdp=8, one sequence of 8192 a device,
`memory.remat=full`). These are **predictions of the compiler**: the schedule that it arranges and
the memory it sets aside. Times on a GPU: not measured.

{table}

*covered* and *bare*: MiB that the collectives of one turn of the loops over layers, forward and
backward, carry with and without a matmul between their start and their end. `compile.preset=false`
takes XLA's defaults; an option that `XLA_FLAGS` names is left to it. Pipelining covers the last
percent for memory; double buffering makes a turn of two layers and covers the same share; combining
leaves less to overlap. Pipelining also takes hold of what tensor parallelism sends, and then
computes some of it twice. Llama 3 70B on 64 H100s (fsdp 8 x tensor 8, 64 sequences of 8192):

{tensor}

"""
CPU_TEXT = """\
## On CPUs

Measured on {date}, {machine}, Python {python}, jax {jax}, by the same script: the step of
[`configs/cpu_bench.py`](../configs/cpu_bench.py), {parameters:,.1f}M parameters in float32, each in
its own process.

| `xla_cpu_copy_insertion_use_region_analysis` | temporary memory, MB | copies of the state, MB |
| --- | --- | --- |
| on: jaxpar's, for every program | {on[temporary]:,.0f} | {on[copied]:,.0f} |
| off: XLA's default | {off[temporary]:,.0f} | {off[copied]:,.0f} |

Without it the compiler does not see that AdamW's moments are read before they are overwritten.

| `xla_backend_optimization_level`, of what makes the first state | compile, s | run, s |
| --- | --- | --- |
| 1: jaxpar's, for programs that run once | {on[compile]:.2f} | {on[run]:.2f} |
| 3: XLA's default | {off[compile]:.2f} | {off[run]:.2f} |
"""


def compile_cpu(options: argparse.Namespace, *, preset: bool) -> dict[str, float]:
    """Memory of the step of cpu_bench.py, and seconds that its first state takes."""
    config = configured("cpu_bench", compile=dict(preset=preset, cache="none"))
    target = Target(cpu_devices=1)
    report = compile_report(config, MeshConfig(), target, options.timeout, text=True)
    copies = re.findall(r" = (f32\[[\d,]+\])\S* copy\(%state_", report["text"])
    request = {"config": dataclasses.asdict(config)}
    times, _ = run_apart([__file__, "--first_state"], request, target, options.timeout)
    return dict(
        times,
        temporary=report["memory"]["temporary"] / 1e6,
        copied=sum(array.bytes for copy in copies for array in hlo.arrays(copy)) / 1e6,
        parameters=counts.parameter_count(config.model) / 1e6,
    )


def first_state(config: Config) -> dict[str, float]:
    """Compiles and runs, in this process, what makes the first state."""
    import jax

    from jaxpar import xla
    from jaxpar.sharding import make_mesh
    from jaxpar.step import init_state

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        flags = xla.options(config.compile, mesh.devices.flat, once=True)
        lowered = jax.jit(lambda: init_state(config), compiler_options=flags).lower()
        begin = time.perf_counter()
        init = lowered.compile()
        middle = time.perf_counter()
        jax.block_until_ready(init())
    return dict(compile=middle - begin, run=time.perf_counter() - middle)


def main() -> None:
    flags = page_parser(__doc__, "xla_options.md", "the part on gpu or cpu")
    flags.add_argument("--first_state", action="store_true", help=argparse.SUPPRESS)
    options = flags.parse_args()
    if options.first_state:  # what `compile_cpu` runs apart
        config = from_mapping(Config, json.load(sys.stdin)["config"])
        print(json.dumps(first_state(config)))
        return
    sections = {"gpu": gpu_section, "cpu": cpu_section}
    if options.only not in ("", *sections):
        flags.error(f"--only={options.only} must be gpu or cpu")
    chosen = [options.only] if options.only else list(sections)
    if "gpu" in chosen:
        check_gpu_compiler()
    write("".join(sections[name](options) for name in chosen), options)


def cpu_section(options: argparse.Namespace) -> str:
    on, off = (compile_cpu(options, preset=preset) for preset in (True, False))
    return CPU_TEXT.format(
        **written(),
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()})",
        python=platform.python_version(),
        parameters=on["parameters"],
        on=on,
        off=off,
    )


def gpu_section(options: argparse.Namespace) -> str:
    rows = []
    for name, flags, verdict in CASES:
        got = compiled(options, flags)
        covered, bare = (f"{mib:,.0f}" for mib in in_loops(got["text"]))
        rows.append([name, f"{got['memory']['peak'] / 2**30:.2f}", covered, bare, verdict])
        print(*rows[-1], sep=" | ", file=sys.stderr)
    tensor = []
    for name, flags in TENSOR_CASES:
        got = compiled(options, flags, tensor=True)
        sent = sum(row["bytes"] for row in got["collectives"] if row["op"] == "reduce-scatter")
        peak = got["memory"]["peak"]
        tensor.append([name, f"{peak / 2**30:.1f}", f"{sent / 2**20:,.0f}"])
    return GPU_TEXT.format(
        **written(),
        table=table("option | peak, GiB | covered, MiB | bare, MiB | in the preset", rows),
        tensor=table("options | peak, GiB | reduce-scattered, MiB", tensor),
    )


if __name__ == "__main__":
    main()
