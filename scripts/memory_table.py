"""Writes docs/memory.md: what XLA's GPU compiler says a training step holds and sends, on GPUs that
are not there.

  make test ARGS="--co -q"     # once: puts the GPU compiler into .venv/gpu-compiler
  python scripts/memory_table.py [--only=WORD] [--output=FILE]

A case that fails or takes longer than --timeout seconds leaves its row empty and says why under its
table.
"""

import dataclasses
import runpy
import sys
from collections.abc import Callable
from typing import Any

from arguments import ROOT
from pages import page_parser, table, write, written

from jaxpar.config import Config, MeshConfig
from jaxpar.estimate import counts, memory, timing
from jaxpar.report.apart import CompileFailed, Target, check_gpu_compiler, compile_report
from jaxpar.validation import resolve, validate_mesh

POLICIES = ("none", "dots", "attention", "full")


@dataclasses.dataclass(frozen=True)
class Case:
    """A run, on a mesh of absent GPUs."""

    config: Config
    mesh: MeshConfig
    gpu: str


def case(config: str, mesh: dict[str, int], *, gpu: str = "h100", **groups: Any) -> Case:
    """A file of configs/, changed by `groups`."""
    raw = runpy.run_path(str(ROOT / "configs" / f"{config}.py"))["get_config"]()
    for group, fields in groups.items():
        raw[group].update(fields)
    resolved, sizes = resolve(raw), MeshConfig(**mesh)
    validate_mesh(resolved, sizes)
    return Case(resolved, sizes, gpu)


class Runner:
    """Compiles cases."""

    def __init__(self, timeout: float, only: str):
        self.timeout, self.only, self.failed = timeout, only, []

    def __call__(self, name: str, asked: Case) -> dict[str, Any] | None:
        """The figures of a case, in bytes, or None; then `failed` tells why."""
        if self.only not in name:
            return None
        target = Target.absent(asked.gpu, asked.mesh.devices)
        try:
            report = compile_report(asked.config, asked.mesh, target, self.timeout)
        except CompileFailed as error:
            why = str(error).splitlines()[-1].strip()[:200]
            print(f"{name}: {why}", file=sys.stderr)
            self.failed.append(f"{name}: {why}")
            return None
        found, sent = report["memory"], {}
        for row in report["collectives"]:
            sent[row["op"]] = sent.get(row["op"], 0) + row["bytes"]
        seconds = report["compile_seconds"]
        print(
            f"{name}: peak {gib(found['peak'])} GiB, compiled in {seconds:.0f} s", file=sys.stderr
        )
        return found | {"sent": sent}


def kept_bytes(asked: Case) -> int:
    """Bytes of the named activations of all layers that remat keeps on a device."""
    sizes = memory.activation_bytes(asked.config, asked.mesh)
    return asked.config.model.layers * sum(sizes[name] for name in asked.config.memory.kept)


def again(asked: Case) -> float:
    """FLOPs that remat computes again, of those of the model."""
    return sum(timing.recomputed(asked.config).values()) / counts.step_flops(asked.config).per_token


def gib(count: float) -> str:
    return f"{count / 2**30:.1f}"


def policies(run: Runner) -> str:
    """Llama 3 8B under each policy."""
    rows = []
    memories = [dict(remat=policy) for policy in POLICIES]
    memories += [
        dict(remat="full", offload="residual"),
        dict(remat="full", offload="residual,optimizer"),
    ]
    for fields in memories:
        name = " ".join(f"{field}={value}" for field, value in fields.items())
        asked = case("llama3_8b", dict(fsdp=8), train=dict(batch_size=8), memory=fields)
        if found := run(f"policies {name}", asked):
            sizes = (kept_bytes(asked), found["temporary"], found["peak"], found["host"])
            rows.append([f"`{name}`", *map(gib, sizes), f"{again(asked):.1%}"])
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
    a40 = dict(gpu="a40")
    zero = dict(parallel=dict(optimizer_sharding="data"))
    runs = [
        ("246M, 128 x 256", 35.37, 17.7, case("seed_246m", {}, **a40, **small)),
        ("246M, 256 x 256, DDP 2", 35.86, 17.9, case("seed_246m", dict(data=2), **a40, **double)),
        (
            "246M, 256 x 256, DDP 2, ZeRO",
            35.37,
            17.7,
            case("seed_246m", dict(data=2), **a40, **double, **zero),
        ),
        ("7.26B, 2 x 256, FSDP 2", 36.33, 31.0, case("seed_7b", dict(fsdp=2), **a40, **large)),
        (
            "246M, 4 x 10,000, tensor 2",
            30.85,
            15.4,
            case("seed_246m", dict(tensor=2), **a40, **long),
        ),
    ]
    rows = []
    for name, measured, target, asked in runs:
        if found := run(f"article {name}", asked):
            peak, fields = found["peak"] / 1e9, asked.config
            how = f"`{fields.memory.remat}`, {fields.precision.params} parameters"
            verdict = "yes" if peak <= target else "NO"
            rows.append([name, measured, target, f"{peak:.2f}", verdict, how])
    return table("run on A40s | measured, GB | target, GB | compiled peak, GB | met | with", rows)


def peer(run: Runner) -> str:
    """The cases of MaxText 0.2.5."""

    def sized(
        config: str, sequences: int, mesh: dict[str, int], remat: str = "full", **more: Any
    ) -> Case:
        train = dict(batch_size=sequences, microbatches=more.pop("microbatches", 1))
        precision = dict(grad_reduce="bfloat16")  # the peer's
        return case(
            config, mesh, train=train, memory=dict(remat=remat), precision=precision, **more
        )

    zero = dict(optimizer_sharding="data")
    four = dict(model=dict(layers=4), data=dict(sequence_length=4096))
    runs: list[tuple[str, tuple, Case]] = [
        (
            "Llama 3 8B, fsdp 8, 1 x 8192",
            (23.3, 28_628, 15_316, ""),
            sized("llama3_8b", 8, dict(fsdp=8)),
        ),
        (
            "Llama 3 8B, fsdp 64",
            (7.9, 28_628, 15_316, ""),
            sized("llama3_8b", 64, dict(fsdp=64)),
        ),
        (
            "Llama 3 70B, fsdp 8 x tensor 8",
            (44.6, 937_333, 428_469, ""),
            sized("llama3_70b", 64, dict(fsdp=8, tensor=8)),
        ),
        (
            "Llama 3 70B, fsdp 64",
            (37.1, 265_128, 134_568, ""),
            sized("llama3_70b", 64, dict(fsdp=64)),
        ),
        (
            "Llama 2 7B, fsdp 8, 2 x 4096",
            (19.3, 25_205, 12_853, ""),
            sized("llama2_7b", 16, dict(fsdp=8)),
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
            ),
        ),
        (
            "4 layers of Llama 2 7B, data 8, 4 microbatches",
            (20.2, "", "", 6_676),
            sized("llama2_7b", 32, dict(data=8), microbatches=4, **four),
        ),
        (
            "the same, ZeRO-1",
            (11.7, 4_088, 500, 6_176),
            sized("llama2_7b", 32, dict(data=8), microbatches=4, parallel=zero, **four),
        ),
    ]
    rows = []
    for name, (peak, gathered, scattered, reduced), asked in runs:
        if found := run(f"peer {name}", asked):
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
    sent = (
        f"{kind}, MiB: MaxText | jaxpar" for kind in ("all-gather", "reduce-scatter", "all-reduce")
    )
    return table(f"case | peak, GiB: MaxText | jaxpar | ratio | {' | '.join(sent)}", rows)


def _pair(theirs: Any, ours: str | None) -> list[str]:
    return [f"{theirs:,}" if theirs else "", ours or "0"]


TEXT = """\
# Memory

Written on {date}, with jax {jax} and its CUDA compiler {plugin}, by

    python scripts/memory_table.py

for GPUs that were not there. Every figure is a **prediction of XLA's GPU compiler**, for a device
and a step: peak = arguments + results - donated + temporary buffers. Not in it: NCCL's buffers and
the CUDA context (1 to 2 GiB). Attention is cuDNN's, with packed documents, on the H100s; what its
calls work in is not known without a GPU, and not in these figures. On the A40s it is XLA's, which
computes the scores of {queries} queries at a time, and again in the backward pass.

## What `memory.remat` keeps: Llama 3 8B, 8 H100, fsdp=8, one sequence of 8192 a device

{policies}

`kept` is the arithmetic of `memory.activation_bytes`: the named activations of all layers. `FLOPs
more` counts the matmuls that a policy computes again against those of the model (causal attention
counted once). `memory.offload` copies over PCIe while the step computes; a host holds the figure of
each of its devices. What it costs in time is not predicted here.

## Against the article

Memory that https://github.com/ASzot/training-parallelism measured, in GB of 10^9 bytes, and at most
half of it as the target (31 GB for 7.26B). The tensor-parallel run has a vocabulary of 50258,
because 50257 is odd.

{article}

## Against the best JAX peer

MaxText 0.2.5's training step through the same compiler (jax 0.12.0.1, cuDNN attention, whose
workspace is not in its peak, full remat, AdamW in float32), beside jaxpar with `memory.remat=full`
and gradients reduced in bfloat16 as there. Bytes: results of all-gathers, inputs of reduce-scatters
and all-reduces. The peer's sequences in the last two cases are not known: there jaxpar has one of
4096 a microbatch and device. The peer's ZeRO-1 gathers parameters in float32.

{peer}
"""


def main() -> None:
    flags = page_parser(__doc__, "memory.md", "the cases whose name has this word")
    options = flags.parse_args()
    check_gpu_compiler()
    run = Runner(options.timeout, options.only)
    sections: dict[str, Callable[[Runner], str]] = dict(
        policies=policies, article=article, peer=peer
    )
    filled = {}
    for name, section in sections.items():
        run.failed.clear()
        filled[name] = section(run) + "".join(f"\n\nLeft out: {reason}" for reason in run.failed)
    page = TEXT.format(
        **written(),
        queries=512,
        **filled,
    )
    write(page, options)


if __name__ == "__main__":
    main()
