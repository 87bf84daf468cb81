"""Writes docs/memory.md: what XLA's GPU compiler says a training step holds and sends, on GPUs that
are not there.

  make test ARGS="--co -q"     # once: puts the GPU compiler into .venv/gpu-compiler
  PYTHONPATH=.:.venv/gpu-compiler JAX_PLATFORMS=cpu python scripts/memory_table.py [--only=WORD] [--output=FILE]

Every compilation runs in a process of its own, because XLA aborts where it meets what it cannot do.
A case that fails or takes longer than --timeout seconds leaves its row empty and says why under its
table.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
POLICIES = ("none", "dots", "attention", "full")


def case(
    config: str, mesh: dict[str, int], *, gpu: str = "h100", topology: str = "1x1x8", **groups: Any
) -> dict:
    """What one process compiles: a file of configs/, changed by `groups`, for a mesh of absent
    GPUs."""
    return dict(config=config, mesh=mesh, gpu=gpu, topology=topology, groups=groups)


def compile_case(spec: dict) -> dict[str, Any]:
    """Compiles one case in this process."""
    import jax

    from jaxpar.compile import absent_gpus, abstract_state, compile_train_step
    from jaxpar.config import MeshConfig
    from jaxpar.estimate import counts, hardware, memory, timing
    from jaxpar.report.hlo import collectives
    from jaxpar.sharding import make_mesh
    from jaxpar.validation import resolve, validate_mesh

    raw = runpy.run_path(str(ROOT / "configs" / f"{spec['config']}.py"))["get_config"]()
    for group, fields in spec["groups"].items():
        raw[group].update(fields)
    config, sizes = resolve(raw), MeshConfig(**spec["mesh"])
    validate_mesh(config, sizes)
    target = hardware.find(spec["gpu"]).target
    mesh = make_mesh(sizes, absent_gpus(target, spec["topology"]))
    state = abstract_state(config, mesh)
    begin = time.perf_counter()
    compiled = compile_train_step(config, mesh)
    seconds = time.perf_counter() - begin
    stats = compiled.memory_analysis()
    assert stats is not None
    sent: dict[str, int] = {}
    for c in collectives(compiled.as_text(), mesh):
        sent[c.kind] = sent.get(c.kind, 0) + c.bytes * c.count
    optimizer = [leaf.sharding.spec for leaf in jax.tree.leaves(state.optimizer)]
    return dict(
        peak=stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes,
        temp=stats.temp_size_in_bytes,
        host=stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes,
        sent=sent,
        seconds=seconds,
        params=str(jax.tree.leaves(state.model)[0].dtype),
        zero=any("data" in str(spec) for spec in optimizer),
        kept=config.model.layers
        * sum(
            size
            for name, size in memory.activation_bytes(config, sizes).items()
            if name in config.memory.kept
        ),
        again=sum(timing.recomputed(config).values()) / counts.step_flops(config).per_token,
    )


class Runner:
    """Compiles cases, one process each."""

    def __init__(self, timeout: float, only: str):
        self.timeout, self.only, self.failed = timeout, only, []

    def __call__(self, name: str, spec: dict) -> dict[str, Any] | None:
        """The figures of a case, or None; then `failed` tells why."""
        if self.only not in name:
            return None
        command = [sys.executable, __file__, f"--one={json.dumps(spec)}"]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=self.timeout, env=os.environ
            )
        except subprocess.TimeoutExpired:
            return self._fail(name, f"took longer than {self.timeout:.0f} s")
        if run.returncode:
            last = [line for line in run.stderr.splitlines() if line.strip()]
            return self._fail(name, last[-1][:200] if last else f"exit code {run.returncode}")
        result = json.loads(run.stdout.splitlines()[-1])
        print(
            f"{name}: peak {gib(result['peak'])} GiB, compiled in {result['seconds']:.0f} s",
            file=sys.stderr,
        )
        return result

    def _fail(self, name: str, why: str) -> None:
        print(f"{name}: {why}", file=sys.stderr)
        self.failed.append(f"{name}: {why}")


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def table(header: str, rows: list[list[Any]]) -> str:
    lines = [header.split("|"), ["---"] * (header.count("|") + 1), *rows]
    return "\n".join("| " + " | ".join(str(cell).strip() for cell in line) + " |" for line in lines)


def policies(run: Runner) -> str:
    """Llama 3 8B under each policy."""
    rows = []
    memories = [dict(remat=policy) for policy in POLICIES]
    memories += [
        dict(remat="full", offload="residual"),
        dict(remat="full", offload="residual,optimizer"),
    ]
    for memory in memories:
        name = " ".join(f"{field}={value}" for field, value in memory.items())
        found = run(
            f"policies {name}",
            case("llama3_8b", dict(fsdp=8), train=dict(batch_size=8), memory=memory),
        )
        if found:
            more = f"{found['again']:.1%}"
            rows.append(
                [
                    f"`{name}`",
                    gib(found["kept"]),
                    gib(found["temp"]),
                    gib(found["peak"]),
                    gib(found["host"]),
                    more,
                ]
            )
    return table(
        "memory | kept, GiB | temporary, GiB | peak, GiB | in host memory, GiB | FLOPs more", rows
    )


def article(run: Runner) -> str:
    """The five runs of the article that jaxpar grew from."""
    half = dict(
        memory=dict(remat="dots"), precision=dict(params="bfloat16", grad_reduce="bfloat16")
    )
    small = dict(train=dict(batch_size=128), **half)
    double = dict(train=dict(batch_size=256), **half)
    long = dict(
        model=dict(vocab_size=50258),
        data=dict(sequence_length=10_000),
        train=dict(batch_size=4),
        **half,
    )
    large = dict(train=dict(batch_size=2), memory=dict(remat="full"), precision=half["precision"])
    one, two = dict(gpu="a40", topology="1x1x1"), dict(gpu="a40", topology="1x1x2")
    zero = dict(parallel=dict(optimizer_sharding="data"))
    runs = [
        ("246M, 128 x 256", 35.37, 17.7, case("seed_246m", {}, **one, **small)),
        ("246M, 256 x 256, DDP 2", 35.86, 17.9, case("seed_246m", dict(data=2), **two, **double)),
        (
            "246M, 256 x 256, DDP 2, ZeRO",
            35.37,
            17.7,
            case("seed_246m", dict(data=2), **two, **double, **zero),
        ),
        ("7.26B, 2 x 256, FSDP 2", 36.33, 31.0, case("seed_7b", dict(fsdp=2), **two, **large)),
        (
            "246M, 4 x 10,000, tensor 2",
            30.85,
            15.4,
            case("seed_246m", dict(tensor=2), **two, **long),
        ),
    ]
    rows = []
    for name, measured, target, spec in runs:
        if found := run(f"article {name}", spec):
            peak = found["peak"] / 1e9
            remarks = [f"`{spec['groups']['memory']['remat']}`", f"{found['params']} parameters"]
            verdict = "yes" if peak <= target else "NO"
            rows.append([name, measured, target, f"{peak:.2f}", verdict, ", ".join(remarks)])
    return table("run on A40s | measured, GB | target, GB | compiled peak, GB | met | with", rows)


def peer(run: Runner) -> str:
    """The cases of MaxText 0.2.5."""
    eight, hosts = dict(topology="1x1x8"), dict(topology="8x1x8")

    def sized(
        config: str, sequences: int, mesh: dict[str, int], remat: str = "full", **more: Any
    ) -> dict:
        train = dict(batch_size=sequences, microbatches=more.pop("microbatches", 1))
        precision = dict(grad_reduce="bfloat16")  # the peer's
        return case(
            config, mesh, train=train, memory=dict(remat=remat), precision=precision, **more
        )

    zero = dict(optimizer_sharding="data")
    four = dict(model=dict(layers=4), data=dict(sequence_length=4096))
    runs: list[tuple[str, tuple, dict]] = [
        (
            "Llama 3 8B, fsdp 8, 1 x 8192",
            (23.3, 28_628, 15_316, ""),
            sized("llama3_8b", 8, dict(fsdp=8), **eight),
        ),
        (
            "Llama 3 8B, fsdp 64",
            (7.9, 28_628, 15_316, ""),
            sized("llama3_8b", 64, dict(fsdp=64), **hosts),
        ),
        (
            "Llama 3 70B, fsdp 8 x tensor 8",
            (44.6, 937_333, 428_469, ""),
            sized("llama3_70b", 64, dict(fsdp=8, tensor=8), **hosts),
        ),
        (
            "Llama 3 70B, fsdp 64",
            (37.1, 265_128, 134_568, ""),
            sized("llama3_70b", 64, dict(fsdp=64), **hosts),
        ),
        (
            "Llama 2 7B, fsdp 8, 2 x 4096",
            (19.3, 25_205, 12_853, ""),
            sized("llama2_7b", 16, dict(fsdp=8), **eight),
        ),
        (
            "Llama 2 7B, pipeline 4 x fsdp 2, 2 x 4096, 8 microbatches",
            (18.9, 51_976, 26_113, ""),
            sized(
                "llama2_7b",
                16,
                dict(pipeline=4, fsdp=2),
                microbatches=8,
                parallel=dict(gather="per_step"),
                **eight,
            ),
        ),
        (
            "4 layers of Llama 2 7B, data 8, 4 microbatches",
            (20.2, "", "", 6_676),
            sized("llama2_7b", 32, dict(data=8), microbatches=4, **four, **eight),
        ),
        (
            "the same, ZeRO-1",
            (11.7, 4_088, 500, 6_176),
            sized("llama2_7b", 32, dict(data=8), microbatches=4, parallel=zero, **four, **eight),
        ),
    ]
    rows = []
    for name, (peak, gathered, scattered, reduced), spec in runs:
        if found := run(f"peer {name}", spec):
            mib = {kind: f"{count / 2**20:,.0f}" for kind, count in found["sent"].items()}
            ratio = found["peak"] / 2**30 / peak
            rows.append(
                [
                    name,
                    peak,
                    gib(found["peak"]),
                    f"{ratio:.2f}",
                    *_pair(gathered, mib.get("all-gather")),
                    *_pair(scattered, mib.get("reduce-scatter")),
                    *_pair(reduced, mib.get("all-reduce")),
                ]
            )
    header = "case | peak, GiB: MaxText | jaxpar | ratio | all-gather, MiB: MaxText | jaxpar | reduce-scatter, MiB: MaxText"
    return table(header + " | jaxpar | all-reduce, MiB: MaxText | jaxpar", rows)


def _pair(theirs: Any, ours: str | None) -> list[str]:
    return [f"{theirs:,}" if theirs else "", ours or "0"]


TEXT = """\
# Memory

Written on {date}, with jax {jax} and its CUDA compiler {plugin}, by

    PYTHONPATH=.:.venv/gpu-compiler JAX_PLATFORMS=cpu python scripts/memory_table.py

for GPUs that were not there. Every figure is a **prediction of XLA's GPU compiler**, for a device and a step: peak =
arguments + results - donated + temporary buffers. Not in it: NCCL's buffers and the CUDA context (1 to 2 GiB).
Attention is cuDNN's, with packed documents, on the H100s; what its calls work in is not known without a GPU, and not in
these figures. On the A40s it is XLA's, which computes the scores of {queries} queries at a time, and again in the
backward pass.

## What `memory.remat` keeps: Llama 3 8B, 8 H100, fsdp=8, one sequence of 8192 a device

{policies}

`kept` is the arithmetic of `memory.activation_bytes`: the named activations of all layers. `FLOPs more` counts the
matmuls that a policy computes again against those of the model (causal attention counted once). `memory.offload` copies
over PCIe while the step computes; a host holds the figure of each of its devices. What it costs in time is not
predicted here.

## Against the article

Memory that https://github.com/ASzot/training-parallelism measured, in GB of 10^9 bytes, and at most half of it as the
target (31 GB for 7.26B). The tensor-parallel run has a vocabulary of 50258, because 50257 is odd.

{article}

## Against the best JAX peer

MaxText 0.2.5's training step through the same compiler (jax 0.12.0.1, cuDNN attention, whose workspace is not in its
peak, full remat, AdamW in float32), beside jaxpar with `memory.remat=full` and gradients reduced in bfloat16 as there.
Bytes: results of all-gathers, inputs of reduce-scatters and all-reduces. The peer's sequences in the last two cases are
not known: there jaxpar has one of 4096 a microbatch and device. The peer's ZeRO-1 gathers parameters in float32.

{peer}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--one", help="compile this case (JSON) and print its figures; what the subprocesses run"
    )
    parser.add_argument("--only", default="", help="only the cases whose name has this word")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds a compilation may take"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "memory.md", help="the page to write"
    )
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compile_case(json.loads(options.one))))
        return
    run = Runner(options.timeout, options.only)
    sections: dict[str, Callable[[Runner], str]] = dict(
        policies=policies, article=article, peer=peer
    )
    filled = {}
    for name, section in sections.items():
        run.failed.clear()
        filled[name] = section(run) + "".join(f"\n\nLeft out: {reason}" for reason in run.failed)
    page = TEXT.format(
        date=datetime.date.today().isoformat(),
        jax=importlib.metadata.version("jax"),
        plugin=importlib.metadata.version("jax-cuda12-plugin"),
        queries=512,
        **filled,
    )
    print(page)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(page)


if __name__ == "__main__":
    main()
