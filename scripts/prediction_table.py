"""Writes docs/predictions.md: what `plan` predicts beside what XLA's GPU compiler says, for GPUs
that are not there.

  make test ARGS="--co -q"     # once: puts the GPU compiler into .venv/gpu-compiler
  python scripts/prediction_table.py [--only=WORD] [--output=FILE] [--cache=FILE]

Compiles one configuration after the other in a process of its own; --cache keeps what was compiled.
"""

import dataclasses
import json
import math
import runpy
import statistics
import sys
from pathlib import Path
from typing import Any

from arguments import ROOT
from pages import page_parser, table, write, written

from jaxpar.config import Config, MeshConfig
from jaxpar.estimate.counts import step_flops
from jaxpar.estimate.hardware import find
from jaxpar.estimate.memory import RESERVE, peak_memory
from jaxpar.estimate.ranking import best_of_each_mesh, rank
from jaxpar.estimate.traffic import by_axes, transfers
from jaxpar.report.apart import CompileFailed, Target, check_gpu_compiler, compile_report
from jaxpar.validation import resolve, validate_mesh

SMALL = 2 * 2**20
"""Bytes a step under which traffic over some axes is bookkeeping: norm scales, losses, counts."""

M100 = dict(vocab_size=50304, dim=768, layers=12, heads=12, kv_heads=12, head_dim=64, ffn_dim=2048)
B1 = dict(vocab_size=50304, dim=2048, layers=24, heads=16, kv_heads=16, head_dim=128, ffn_dim=5632)
B3 = dict(vocab_size=50304, dim=2560, layers=32, heads=20, kv_heads=20, head_dim=128, ffn_dim=6912)


@dataclasses.dataclass(frozen=True)
class Case:
    """A file of configs/ changed by groups of fields, on a mesh of absent GPUs."""

    name: str
    config: Config
    mesh: MeshConfig
    gpu: str

    def key(self) -> str:
        return json.dumps(
            [dataclasses.asdict(self.config), dataclasses.asdict(self.mesh), self.gpu]
        )


def case(
    file: str,
    batch: int,
    mesh: dict[str, int],
    *,
    remat: str = "full",
    gpu: str = "h100",
    microbatches: int = 1,
    **groups: Any,
) -> Case:
    """`batch` is the sequences of a microbatch on one device."""
    raw = runpy.run_path(str(ROOT / "configs" / f"{file}.py"))["get_config"]()
    sizes = MeshConfig(**mesh)
    size = batch * microbatches * sizes.batch_shards
    groups = (
        dict(train=dict(batch_size=size, microbatches=microbatches), memory=dict(remat=remat))
        | groups
    )
    for group, fields in groups.items():
        raw[group].update(fields)
    config = resolve(raw)
    validate_mesh(config, sizes)
    name = {json.dumps(M100): "124M", json.dumps(B1): "1.3B", json.dumps(B3): "3B"}.get(
        json.dumps(groups.get("model")), file
    )
    return Case(name, config, sizes, gpu)


def cases() -> list[Case]:
    """From 100M to 405B, 1 to 1024 GPUs, every axis, every policy."""
    found = []
    half = dict(params="bfloat16", grad_reduce="bfloat16")
    for remat in ("none", "dots", "attention", "full"):
        found.append(case("llama3_8b", 1, dict(fsdp=8), remat=remat))
        found.append(case("llama2_7b", 2, dict(fsdp=4, tensor=2), remat=remat))
        found.append(case("seed_246m", 64, {}, remat=remat, gpu="a40"))
        found.append(
            case("llama2_7b", 8, {}, remat=remat, model=M100, data=dict(sequence_length=1024))
        )
    for remat in ("none", "attention"):
        found.append(
            case(
                "llama2_7b", 4, dict(data=8), remat=remat, model=B1, data=dict(sequence_length=2048)
            )
        )
        found.append(case("llama3_8b", 1, dict(fsdp=2, sequence=4), remat=remat))
    zero = dict(optimizer_sharding="data")
    found += [
        case(
            "llama2_7b",
            2,
            dict(data=8),
            model=B1,
            data=dict(sequence_length=2048),
            parallel=zero,
            microbatches=4,
        ),
        case("llama2_7b", 2, dict(data=2, fsdp=4), model=B3, microbatches=4),
        case(
            "llama2_7b",
            2,
            dict(data=2, fsdp=4),
            model=B3,
            microbatches=4,
            parallel=zero,
            remat="dots",
        ),
        case(
            "llama2_7b", 2, dict(fsdp=8), model=B3, microbatches=2, parallel=dict(gather="per_step")
        ),
        case("llama2_7b", 1, dict(tensor=8), model=B3 | dict(heads=24, kv_heads=24, head_dim=128)),
        case("llama2_7b", 1, dict(fsdp=2), model=B3, gpu="a100-40gb"),
        case("llama2_7b", 2, dict(fsdp=8), microbatches=2, gpu="a100-80gb", precision=half),
        case("seed_7b", 1, dict(fsdp=2), gpu="a40", precision=half),
        case("llama3_8b", 1, dict(fsdp=64)),
        case("llama3_8b", 1, dict(data=8, fsdp=8), remat="attention"),
        case("llama3_8b", 2, dict(fsdp=4, tensor=2), microbatches=2),
        case("llama3_8b", 1, dict(fsdp=4, sequence=2), parallel=dict(context="ring")),
        case("llama3_8b", 1, dict(fsdp=4, sequence=2), parallel=dict(context="ulysses")),
        case("llama3_8b", 1, dict(fsdp=2, sequence=2, tensor=2)),
        case("llama3_8b", 1, dict(fsdp=4, tensor=2), parallel=dict(sequence_parallel=False)),
        case("llama3_8b", 4, dict(fsdp=8), gpu="b200", remat="attention"),
        case("llama3_70b", 1, dict(fsdp=64)),
        case("llama3_70b", 1, dict(fsdp=8, tensor=8)),
        case("llama3_70b", 1, dict(fsdp=16, tensor=4), remat="attention"),
        case("llama3_70b", 1, dict(data=4, fsdp=64)),
        case("llama3_70b", 1, dict(fsdp=64), gpu="h200", remat="attention"),
        case("llama3_405b", 1, dict(fsdp=1024)),
        case("llama3_405b", 1, dict(fsdp=128, tensor=8)),
        case("llama3_405b", 1, dict(data=2, fsdp=128, tensor=4), microbatches=2),
        case("llama3_405b", 8, dict(fsdp=128, tensor=8)),
        case("llama3_70b", 8, dict(fsdp=8, tensor=8)),
        case("llama3_8b", 8, dict(fsdp=8), microbatches=4),
    ]
    return found + pipelined()


def pipelined() -> list[Case]:
    """2, 4 and 8 stages, 1 and 2 chunks, with every other axis."""

    def found(
        file: str,
        batch: int,
        mesh: dict[str, int],
        microbatches: int,
        chunks: int = 1,
        **groups: Any,
    ) -> Case:
        parallel = dict(chunks=chunks) | groups.pop("parallel", {})
        return case(file, batch, mesh, microbatches=microbatches, parallel=parallel, **groups)

    small = dict(model=B1, data=dict(sequence_length=2048))
    per_step, zero = dict(gather="per_step"), dict(optimizer_sharding="data")
    return [
        found("llama2_7b", 2, dict(pipeline=2), 4, **small),
        found("llama2_7b", 2, dict(pipeline=4, data=2), 8, remat="none", **small),
        found("llama2_7b", 2, dict(pipeline=4, data=2), 8, 2, parallel=zero, **small),
        found("llama2_7b", 1, dict(pipeline=8), 8, remat="attention", **small),
        found("llama2_7b", 1, dict(pipeline=2, fsdp=4), 4, model=B3),
        found("llama2_7b", 1, dict(pipeline=2, fsdp=4), 4, model=B3, parallel=per_step),
        found(
            "llama2_7b",
            1,
            dict(pipeline=2, data=2, fsdp=2),
            4,
            2,
            model=B3,
            parallel=per_step,
            remat="none",
        ),
        found(
            "llama2_7b", 1, dict(pipeline=2, fsdp=4), 4, model=B3, parallel=dict(schedule="gpipe")
        ),
        found("llama3_8b", 1, dict(pipeline=8), 16),
        found("llama3_8b", 1, dict(pipeline=8), 16, 2),
        found("llama3_8b", 1, dict(pipeline=2, tensor=4), 8, remat="none"),
        found(
            "llama3_8b", 1, dict(pipeline=4, tensor=2), 8, 2, parallel=dict(sequence_parallel=False)
        ),
        found("llama3_8b", 1, dict(pipeline=2, sequence=4), 4),
        found("llama3_8b", 1, dict(pipeline=2, fsdp=2, tensor=2), 8, 4),
        found("llama3_8b", 1, dict(pipeline=4, fsdp=2), 8, 2, remat="attention"),
        found("llama3_70b", 1, dict(pipeline=4, fsdp=2, tensor=8), 16),
        found("llama3_70b", 1, dict(pipeline=8, tensor=8), 32, 2),
        found("llama3_70b", 1, dict(pipeline=2, fsdp=32), 4, remat="attention"),
        found("llama3_405b", 1, dict(pipeline=2, fsdp=64, tensor=8), 4),
        found("llama3_8b", 1, dict(pipeline=4, tensor=2), 8, remat="none"),
    ]


class Compiled:
    """Reports of compiled runs, kept in a file if there is one."""

    def __init__(self, file: Path | None, timeout: float):
        self._file, self._timeout = file, timeout
        self._kept: dict[str, Any] = json.loads(file.read_text()) if file and file.exists() else {}

    def __call__(self, found: Case) -> dict[str, Any]:
        """Memory and its parts, bytes by axes, seconds of compilation.

        Raises:
          CompileFailed: there are none.
        """
        key = found.key()
        if key not in self._kept:
            target = Target.absent(found.gpu, found.mesh.devices)
            report = compile_report(found.config, found.mesh, target, self._timeout)
            sent: dict[str, int] = {}
            for row in report["collectives"]:
                axes = "+".join(row["axes"])
                sent[axes] = sent.get(axes, 0) + row["bytes"]
            self._kept[key] = dict(
                memory=report["memory"], sent=sent, seconds=report["compile_seconds"]
            )
            if self._file:
                self._file.write_text(json.dumps(self._kept))
        return self._kept[key]


def against_compiler(compiled: Compiled, only: str) -> str:
    """The table of peaks and traffic, and its summary."""
    rows, errors, traffic, failed = [], [], [], []
    for found in cases():
        if only not in found.name:
            continue
        name = f"{found.name}, {found.mesh}, {found.config.memory.remat}"
        try:
            report = compiled(found)
        except CompileFailed as error:
            failed.append(f"Left out: {name}: {str(error).splitlines()[-1]}")
            continue
        predicted, peak = peak_memory(found.config, found.mesh).total, report["memory"]["peak"]
        sent, counted = report["sent"], by_axes(transfers(found.config, found.mesh), listed=True)
        off = {
            axes: counted.get(axes, 0) / max(sent.get(axes, 0), 1) - 1
            for axes in {*sent, *counted}
            if max(sent.get(axes, 0), counted.get(axes, 0)) > SMALL
        }
        errors.append(predicted / peak - 1)
        traffic += off.values()
        print(f"{name}: {errors[-1]:+.1%}", file=sys.stderr)
        gpus, remat = f"{found.mesh.devices} {found.gpu}", found.config.memory.remat
        cells = [found.name, gpus, str(found.mesh), remat, settings(found)]
        worst = ", ".join(f"{axes} {value:+.1%}" for axes, value in sorted(off.items()))
        rows.append([*cells, gib(predicted), gib(peak), f"{errors[-1]:+.1%}", worst])
    if not rows:
        return "\n\n".join(failed)
    head = (
        "model | GPUs | mesh | remat | with | predicted peak, GiB | compiled, GiB | off | "
        "bytes by axes, off"
    )
    sizes = sorted(map(abs, errors))
    summary = (
        f"{len(rows)} configurations. Peak: median of the absolute errors "
        f"**{statistics.median(sizes):.1%}**, 90th "
        f"percentile **{sizes[math.ceil(0.9 * len(sizes)) - 1]:.1%}**, largest {sizes[-1]:.1%}. "
        "Bytes by axes: largest "
        f"error of {len(traffic)} **{max(map(abs, traffic), default=0):.1%}**."
    )
    return "\n\n".join([summary, table(head, rows), *failed])


PUBLISHED = {
    (
        "llama3_8b",
        8,
    ): "torchtitan: 5,762 to 8,532 tokens/s (bf16 to fp8); Megatron-Bridge, fp8: 14,451",
    ("llama3_70b", 64): "Megatron-Bridge, fp8: 1,602 tokens/s; torchtitan, 256 GPUs: 597 to 652",
    (
        "llama3_405b",
        1024,
    ): "Megatron-Bridge, fp8: 292 tokens/s; torchtitan, fp8, 512 GPUs: 100 to 128",
}
"""Of others on H100s, per GPU: torchtitan's `benchmarks/`, Megatron-Bridge's performance summary
25.11."""


def settings(found: Case) -> str:
    """A device's share of a microbatch, and what else of a case is not the default."""
    train, parallel, mesh = found.config.train, found.config.parallel, found.mesh
    rows = train.batch_size // (train.microbatches * mesh.batch_shards)
    told = {
        f"{rows} x {found.config.data.sequence_length} tokens": True,
        f"{train.microbatches} microbatches": train.microbatches > 1,
        "gathered per step": parallel.gather == "per_step",
        "ZeRO-1": parallel.optimizer_sharding == "data",
        parallel.context: mesh.sequence > 1,
        f"{parallel.chunks} chunks": mesh.pipeline > 1 and parallel.chunks > 1,
        "gpipe": mesh.pipeline > 1 and parallel.schedule == "gpipe",
        "no sequence parallelism": mesh.tensor > 1 and not parallel.sequence_parallel,
        "bfloat16 parameters": found.config.precision.params == "bfloat16",
    }
    return ", ".join(text for text, here in told.items() if here)


def best_meshes(compiled: Compiled, only: str) -> str:
    """What `plan` takes for Llama 3, compiled, beside published results of others."""
    rows, gpu = [], find("h100")
    for (name, devices), published in PUBLISHED.items():
        if only not in name:
            continue
        config = resolve(runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]())
        for best in best_of_each_mesh(rank(config, gpu, devices))[:3]:
            try:
                peak = compiled(Case(name, best.config, best.mesh, "h100"))["memory"]["peak"]
            except CompileFailed as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            if peak + RESERVE <= gpu.memory_bytes:
                break
        tokens = step_flops(best.config).tokens / best.seconds / devices
        run = best.config
        how = f"{best.mesh}, {run.train.microbatches} microbatches, remat {run.memory.remat}"
        figures = [
            gib(best.peak.total),
            gib(peak),
            f"{best.seconds:.1f}",
            f"{tokens:,.0f}",
            f"{best.mfu(gpu):.0%}",
        ]
        rows.append([name, str(devices), how, *figures, published])
    head = (
        "config | H100s | best mesh | predicted peak, GiB | compiled, GiB | predicted step, s | "
        "predicted tokens/s a GPU | predicted MFU | published, by others, a GPU"
    )
    return table(head, rows) if rows else ""


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


TEXT = """\
# Predictions

Written on {date} with jax {jax} and its CUDA compiler {plugin}, by

    python scripts/prediction_table.py

for GPUs that were not there. **Nothing here was measured on a GPU.** "Predicted" is the arithmetic
of `jaxpar.plan`, "compiled" what XLA's GPU compiler says of the same step: peak = arguments +
results - donated + temporary buffers, of one device. In neither: the CUDA context and NCCL's
buffers (`plan` and `explain` keep 2 GiB free for them) and the workspace of cuDNN's attention.

## Memory and traffic, arithmetic against compiler

{compiler}

The arithmetic has five constants that stand for what XLA makes of a step
(`jaxpar/estimate/memory.py`); they were chosen on most of these configurations, so the errors are
not those of a blind test. The three rows before the pipelines were added after that: with many
sequences a device and `tensor`, gaps between buffers make the compiled peak larger. What a pipeline
holds follows from the program, but for two things that were read off these rows: GPipe has its
gradients three times, and two stages of one chunk have their activations twice, which
is the fifth constant.

Bytes are those of all collectives of a step on one device, by the axes they run over; axes with
less than 2 MiB a step (norm scales, sums of the loss) are left out. With chunks the embedding of a
pipeline stands in a branch that few ticks take; here it is counted in every tick on both sides,
because the compiled text does not say which.

## The best meshes for Llama 3 on H100s

{best}

The global batch is that of the config (1024 sequences of 8192 tokens). MFU counts causal attention
once. Times rest on shares of peaks that were not measured with jaxpar
(`jaxpar/estimate/hardware.py` lists them), and on the assumption that traffic which nothing waits
for runs beside the matmuls where the peak leaves XLA's scheduler room for it: they rank meshes, and
are upper bounds rather than promises.
`scripts/calibrate.py` measures those shares on a machine and writes them as a hardware file, which
`--hardware` takes; there was no GPU to run it on, only a CPU, where it was tried.
Mixture-of-experts models (Mixtral) are not built yet, so there is no row for one.
"""


def main() -> None:
    flags = page_parser(__doc__, "predictions.md", "the configs whose name has this word")
    flags.add_argument(
        "--cache", type=Path, help="keep what was compiled in this file, and read it from there"
    )
    options = flags.parse_args()
    names = {found.name for found in cases()} | {name for name, _ in PUBLISHED}
    if not any(options.only in name for name in names):
        flags.error(f"--only={options.only} is in none of {', '.join(sorted(names))}")
    check_gpu_compiler()
    compiled = Compiled(options.cache, options.timeout)
    page = TEXT.format(
        **written(),
        compiler=against_compiler(compiled, options.only),
        best=best_meshes(compiled, options.only),
    )
    write(page, options)


if __name__ == "__main__":
    main()
