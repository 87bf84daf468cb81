"""Writes docs/xla_options.md: what each XLA option changes in the compiled step of Llama 3 8B, on GPUs that are absent.

  PYTHONPATH=.:.venv/gpu-compiler JAX_PLATFORMS=cpu python scripts/xla_options_table.py

A collective is covered where its schedule has a matmul or attention between its start and its end: that is what the
compiler arranges, not what a GPU takes.
"""

import datetime
import importlib.metadata
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

PIPELINED = [f"xla_gpu_enable_pipelined_{kind}=true" for kind in ("all_gather", "reduce_scatter", "all_reduce")]
COMBINE = [f"xla_gpu_{kind}_combine_threshold_bytes=536870912" for kind in ("all_gather", "reduce_scatter")]
CASES: list[tuple[str, list[str], str]] = [
    ("XLA's own defaults", [], ""),
    ("latency-hiding scheduler off", ["xla_gpu_enable_latency_hiding_scheduler=false"], "yes: on"),
    (f"`{PIPELINED[0]}`", PIPELINED[:1], "no: see below"),
    ("`..._pipelined_all_gather`, `_reduce_scatter` and `_all_reduce`", PIPELINED, "no: see below"),
    ("`xla_gpu_enable_while_loop_double_buffering=true`", ["xla_gpu_enable_while_loop_double_buffering=true"], "no"),
    ("gathers and scatters combined up to 512 MiB", COMBINE, "no"),
    ("`xla_gpu_enable_triton_gemm=false`", ["xla_gpu_enable_triton_gemm=false"], "no: the autotuner picks"),
]


def compile_case() -> dict[str, float]:
    """Compiles the step in this process."""
    from jaxpar.compile import absent_gpus, compile_train_step
    from jaxpar.config import MeshConfig
    from jaxpar.hardware import target
    from jaxpar.sharding import make_mesh
    from jaxpar.validation import resolve

    raw = runpy.run_path(str(ROOT / "configs" / "llama3_8b.py"))["get_config"]()
    raw.update(dict(train=dict(batch_size=8), memory=dict(remat="full"), compile=dict(gpu_preset=False)))
    mesh = make_mesh(MeshConfig(fsdp=8), absent_gpus(target("h100"), "1x1x8"))
    compiled = compile_train_step(resolve(raw), mesh)
    stats = compiled.memory_analysis()
    assert stats is not None
    covered, bare = in_loops(compiled.as_text())
    peak = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return dict(peak=peak + stats.temp_size_in_bytes, covered=covered, bare=bare)


def in_loops(text: str) -> tuple[float, float]:
    """MiB of one turn of the loops over layers that asynchronous collectives send with and without work beside them."""
    from jaxpar.hlo import ITEMSIZE

    sizes = "|".join(ITEMSIZE)
    mib = {True: 0.0, False: 0.0}
    for body in re.split(r"\n(?=%|ENTRY)", text):
        started: dict[str, tuple[int, float]] = {}
        lines = body.splitlines()
        if lines[0].startswith("ENTRY"):
            continue
        for at, line in enumerate(lines):
            made = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z\-]+)-(start|done)\((.*)", line)
            if not made:
                continue
            name, result, _, end, operands = made.groups()
            if end == "start":
                shapes = re.findall(rf"\b({sizes})\[([\d,]*)\]", result)
                parts = [ITEMSIZE[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in shapes]
                started[name] = at, max(parts, default=0) / 2**20
            elif found := [name for name in re.findall(r"%([\w.\-]+)", operands) if name in started]:
                begin, size = started.pop(found[0])
                mib[any(re.search("gemm|cublas|fmha", between) for between in lines[begin + 1 : at])] += size
    return mib[True], mib[False]


TEXT = """\
# XLA's options

Written on {date}, with jax {jax} and its CUDA compiler, by

    PYTHONPATH=.:.venv/gpu-compiler JAX_PLATFORMS=cpu python scripts/xla_options_table.py

for Llama 3 8B on 8 H100s that were absent (fsdp=8, one sequence of 8192 a device, `memory.remat=full`). These are
**predictions of the compiler**: the schedule that it arranges and the memory it sets aside. Times on a GPU: not
measured.

{table}

*covered* and *bare*: MiB that the collectives of one turn of the loops over layers, forward and backward, carry with
and without a matmul between their start and their end. `compile.gpu_preset=false` takes XLA's defaults;
an option that `XLA_FLAGS` names is left to it.
"""


def main() -> None:
    if "--one" in sys.argv:
        print(json.dumps(compile_case()))
        return
    rows = ["| option | peak, GiB | covered, MiB | bare, MiB | in the preset |", "| --- | --- | --- | --- | --- |"]
    for name, flags, verdict in CASES:
        environment = os.environ | {"XLA_FLAGS": " ".join(f"--{flag}" for flag in flags)}
        command = [sys.executable, __file__, "--one"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr[-2000:])
        got = json.loads(run.stdout.splitlines()[-1])
        rows.append(f"| {name} | {got['peak'] / 2**30:.2f} | {got['covered']:,.0f} | {got['bare']:,.0f} | {verdict} |")
        print(rows[-1], file=sys.stderr)
    page = TEXT.format(
        date=datetime.date.today().isoformat(), jax=importlib.metadata.version("jax"), table="\n".join(rows)
    )
    (ROOT / "docs" / "xla_options.md").write_text(page)


if __name__ == "__main__":
    main()
