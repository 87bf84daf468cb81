"""Writes docs/xla_options.md: what each XLA option changes in the compiled step of Llama 3 8B, on
GPUs that are absent, and what jaxpar's options for CPUs change on this machine.

  PYTHONPATH=.:.venv/gpu-compiler JAX_PLATFORMS=cpu python scripts/xla_options_table.py [--only=gpu
  | --only=cpu]

A collective is covered where its schedule has a matmul or attention between its start and its end:
that is what the compiler arranges, not what a GPU takes.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

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


def compile_case(tensor: bool) -> dict[str, float]:
    """Compiles a step in this process: Llama 3 8B on fsdp 8, or with `tensor` Llama 3 70B on fsdp 8
    x tensor 8."""
    from jaxpar.compile import absent_gpus, compile_train_step
    from jaxpar.config import MeshConfig
    from jaxpar.estimate.hardware import find
    from jaxpar.report.hlo import collectives
    from jaxpar.sharding import make_mesh
    from jaxpar.validation import resolve

    name, sizes, topology = ("llama3_8b", MeshConfig(fsdp=8), "1x1x8")
    if tensor:
        name, sizes, topology = "llama3_70b", MeshConfig(fsdp=8, tensor=8), "8x1x8"
    raw = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    batch = dict(batch_size=8 * sizes.tensor)
    raw.update(dict(train=batch, memory=dict(remat="full"), compile=dict(preset=False)))
    mesh = make_mesh(sizes, absent_gpus(find("h100").target, topology))
    compiled = compile_train_step(resolve(raw), mesh)
    stats = compiled.memory_analysis()
    assert stats is not None
    covered, bare = in_loops(compiled.as_text())
    scattered = sum(
        c.bytes * c.count
        for c in collectives(compiled.as_text(), mesh)
        if c.kind == "reduce-scatter"
    )
    peak = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return dict(
        peak=peak + stats.temp_size_in_bytes, covered=covered, bare=bare, scattered=scattered
    )


def in_loops(text: str) -> tuple[float, float]:
    """MiB of one turn of the loops over layers that asynchronous collectives send with and without
    work beside them."""
    from jaxpar.report.hlo import ITEMSIZE

    sizes = "|".join(ITEMSIZE)
    mib = {True: 0.0, False: 0.0}
    for body in re.split(r"\n(?=%|ENTRY)", text):
        started: dict[str, tuple[int, float]] = {}
        lines = body.splitlines()
        if lines[0].startswith("ENTRY"):
            continue
        for at, line in enumerate(lines):
            made = re.match(
                r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z\-]+)-(start|done)\((.*)", line
            )
            if not made:
                continue
            name, result, _, end, operands = made.groups()
            if end == "start":
                shapes = re.findall(rf"\b({sizes})\[([\d,]*)\]", result)
                parts = [
                    ITEMSIZE[dtype] * math.prod(int(n) for n in dims.split(",") if n)
                    for dtype, dims in shapes
                ]
                started[name] = at, max(parts, default=0) / 2**20
            elif found := [
                name for name in re.findall(r"%([\w.\-]+)", operands) if name in started
            ]:
                begin, size = started.pop(found[0])
                mib[
                    any(re.search("gemm|cublas|fmha", between) for between in lines[begin + 1 : at])
                ] += size
    return mib[True], mib[False]


GPU_TEXT = """\
# XLA's options

## On GPUs

Written on {date}, with jax {jax} and its CUDA compiler, by

    PYTHONPATH=.:.venv/gpu-compiler JAX_PLATFORMS=cpu python scripts/xla_options_table.py

for Llama 3 8B on 8 H100s that were absent (fsdp=8, one sequence of 8192 a device, `memory.remat=full`). These are
**predictions of the compiler**: the schedule that it arranges and the memory it sets aside. Times on a GPU: not
measured.

{table}

*covered* and *bare*: MiB that the collectives of one turn of the loops over layers, forward and backward, carry with
and without a matmul between their start and their end. `compile.preset=false` takes XLA's defaults;
an option that `XLA_FLAGS` names is left to it.
Pipelining covers the last percent for memory; double buffering makes a turn of two layers and covers the same share;
combining leaves less to overlap. Pipelining also takes hold of what tensor parallelism sends, and then computes some of
it twice. Llama 3 70B on 64 H100s (fsdp 8 x tensor 8, 64 sequences of 8192):

{tensor}

"""
CPU_TEXT = """\
## On CPUs

Measured on {date}, {machine}, Python {python}, jax {jax}, by the same script with `--only=cpu`: the step of
[`configs/cpu_bench.py`](../configs/cpu_bench.py), {parameters:,.1f}M parameters in float32, each in its own process.

| `xla_cpu_copy_insertion_use_region_analysis` | temporary memory, MB | copies of the state, MB |
| --- | --- | --- |
| on: jaxpar's, for every program | {on[temporary]:,.0f} | {on[copied]:,.0f} |
| off: XLA's default | {off[temporary]:,.0f} | {off[copied]:,.0f} |

Without it the compiler does not see that AdamW's moments are read before they are overwritten.

| `xla_backend_optimization_level`, of the program that makes the first state | compile, s | run, s |
| --- | --- | --- |
| 1: jaxpar's, for programs that run once | {on[compile]:.2f} | {on[run]:.2f} |
| 3: XLA's default | {off[compile]:.2f} | {off[run]:.2f} |
"""


def compile_cpu(preset: bool) -> dict[str, float]:
    """Compiles the step of cpu_bench.py in this process, and compiles and runs what makes its first
    state."""
    import jax

    from jaxpar import xla
    from jaxpar.compile import compile_train_step
    from jaxpar.config import MeshConfig
    from jaxpar.estimate import counts
    from jaxpar.report.hlo import ITEMSIZE
    from jaxpar.sharding import make_mesh
    from jaxpar.step import init_state
    from jaxpar.validation import resolve

    raw = runpy.run_path(str(ROOT / "configs" / "cpu_bench.py"))["get_config"]()
    raw.update(compile=dict(preset=preset, cache="none"))
    config, mesh = resolve(raw), make_mesh(MeshConfig(), jax.devices()[:1])
    step = compile_train_step(config, mesh)
    copies = re.findall(r" = (f32)\[([\d,]+)\]\S* copy\(%state_", step.as_text())
    copied = sum(ITEMSIZE[dtype] * math.prod(map(int, dims.split(","))) for dtype, dims in copies)
    stats = step.memory_analysis()
    assert stats is not None
    with jax.set_mesh(mesh):
        options = xla.options(config.compile, mesh.devices.flat, once=True)
        lowered = jax.jit(lambda: init_state(config), compiler_options=options).lower()
        begin = time.perf_counter()
        init = lowered.compile()
        compiled = time.perf_counter()
        jax.block_until_ready(init())
    return dict(
        temporary=stats.temp_size_in_bytes / 1e6,
        copied=copied / 1e6,
        compile=compiled - begin,
        run=time.perf_counter() - compiled,
        parameters=counts.parameter_count(config.model) / 1e6,
    )


def apart(flags: list[str], *arguments: str) -> dict[str, float]:
    """`compile_case` or `compile_cpu` in a process of its own, because XLA reads its flags once."""
    environment = os.environ | {"XLA_FLAGS": " ".join(f"--{flag}" for flag in flags)}
    run = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True
    )
    if run.returncode:
        sys.exit(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    if "--one" in sys.argv:
        print(json.dumps(compile_case("--tensor" in sys.argv)))
    elif "--one_cpu" in sys.argv:
        print(json.dumps(compile_cpu("--preset" in sys.argv)))
    else:
        page = ROOT / "docs" / "xla_options.md"
        before, heading, cpus = page.read_text().partition("## On CPUs")
        page.write_text(
            (before if "--only=cpu" in sys.argv else gpu_section())
            + (heading + cpus if "--only=gpu" in sys.argv else cpu_section())
        )


def cpu_section() -> str:
    on, off = apart([], "--one_cpu", "--preset"), apart([], "--one_cpu")
    return CPU_TEXT.format(
        date=datetime.date.today().isoformat(),
        machine=f"{os.cpu_count()} CPU cores ({platform.machine()})",
        python=platform.python_version(),
        jax=importlib.metadata.version("jax"),
        parameters=on["parameters"],
        on=on,
        off=off,
    )


def gpu_section() -> str:
    rows = [
        "| option | peak, GiB | covered, MiB | bare, MiB | in the preset |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, flags, verdict in CASES:
        got = apart(flags, "--one")
        rows.append(
            f"| {name} | {got['peak'] / 2**30:.2f} | {got['covered']:,.0f} | {got['bare']:,.0f} | "
            f"{verdict} |"
        )
        print(rows[-1], file=sys.stderr)
    tensor = ["| options | peak, GiB | reduce-scattered, MiB |", "| --- | --- | --- |"]
    for name, flags in TENSOR_CASES:
        got = apart(flags, "--one", "--tensor")
        tensor.append(f"| {name} | {got['peak'] / 2**30:.1f} | {got['scattered'] / 2**20:,.0f} |")
    return GPU_TEXT.format(
        date=datetime.date.today().isoformat(),
        jax=importlib.metadata.version("jax"),
        table="\n".join(rows),
        tensor="\n".join(tensor),
    )


if __name__ == "__main__":
    main()
