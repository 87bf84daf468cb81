"""Writes docs/predictions.md: what `plan` predicts beside what XLA's GPU compiler says, for GPUs that are not there.

  make test ARGS="--co -q"     # once: puts the GPU compiler into .venv/gpu-compiler
  PYTHONPATH=.:.venv/gpu-compiler python scripts/prediction_table.py [--only=WORD] [--output=FILE] [--cache=FILE]

Compiles one configuration after the other in a process of its own; --cache keeps what was compiled.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import runpy
import statistics
import sys
from pathlib import Path
from typing import Any

from jaxpar.apart import CompileFailed, Target, check_gpu_compiler, compile_report
from jaxpar.config import Config, MeshConfig
from jaxpar.hardware import find
from jaxpar.memory import peak_memory
from jaxpar.plan import best_of_each_mesh, rank
from jaxpar.traffic import by_axes, transfers
from jaxpar.validation import resolve, validate_mesh

ROOT = Path(__file__).parents[1]
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
        return json.dumps([dataclasses.asdict(self.config), dataclasses.asdict(self.mesh), self.gpu])


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
    groups = dict(train=dict(batch_size=size, microbatches=microbatches), memory=dict(remat=remat)) | groups
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
        found.append(case("llama2_7b", 8, {}, remat=remat, model=M100, data=dict(sequence_length=1024)))
    for remat in ("none", "attention"):
        found.append(case("llama2_7b", 4, dict(data=8), remat=remat, model=B1, data=dict(sequence_length=2048)))
        found.append(case("llama3_8b", 1, dict(fsdp=2, sequence=4), remat=remat))
    zero = dict(optimizer_sharding="data")
    found += [
        case("llama2_7b", 2, dict(data=8), model=B1, data=dict(sequence_length=2048), parallel=zero, microbatches=4),
        case("llama2_7b", 2, dict(data=2, fsdp=4), model=B3, microbatches=4),
        case("llama2_7b", 2, dict(data=2, fsdp=4), model=B3, microbatches=4, parallel=zero, remat="dots"),
        case("llama2_7b", 2, dict(fsdp=8), model=B3, microbatches=2, parallel=dict(gather="per_step")),
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
        case("llama3_70b", 1, dict(fsdp=72), gpu="gb200")
        if False
        else case("llama3_70b", 1, dict(fsdp=64), gpu="h200", remat="attention"),
        case("llama3_405b", 1, dict(fsdp=1024)),
        case("llama3_405b", 1, dict(fsdp=128, tensor=8)),
        case("llama3_405b", 1, dict(data=2, fsdp=128, tensor=4), microbatches=2),
    ]
    return found


class Compiled:
    """Reports of compiled cases, kept in a file if there is one."""

    def __init__(self, file: Path | None, timeout: float):
        self._file, self._timeout = file, timeout
        self._kept: dict[str, Any] = json.loads(file.read_text()) if file and file.exists() else {}

    def __call__(self, found: Case) -> dict[str, Any] | str:
        """Peak, its parts and bytes by axes; or why there are none."""
        key = found.key()
        if key not in self._kept:
            gpu = find(found.gpu)
            target = Target(gpu, gpu.topology(found.mesh.devices))
            try:
                report = compile_report(found.config, dataclasses.asdict(found.mesh), target, self._timeout)
            except CompileFailed as error:
                return str(error).splitlines()[-1]
            sent: dict[str, int] = {}
            for row in report["collectives"]:
                axes = "+".join(row["axes"])
                sent[axes] = sent.get(axes, 0) + row["bytes"]
            ops = [
                [row["op"], "+".join(row["axes"]), row["dtype"], row["size"], row["count"], row["source"]]
                for row in report["collectives"]
                if row["bytes"] > SMALL
            ]
            self._kept[key] = dict(memory=report["memory"], sent=sent, ops=ops, seconds=report["compile_seconds"])
            if self._file:
                self._file.write_text(json.dumps(self._kept))
        return self._kept[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only the cases whose name has this word")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a compilation may take")
    parser.add_argument("--cache", type=Path, help="keep what was compiled in this file, and read it from there")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "predictions.md", help="the page to write")
    options = parser.parse_args()
    check_gpu_compiler()
    compiled = Compiled(options.cache, options.timeout)
    for found in cases():
        if options.only not in found.name:
            continue
        report = compiled(found)
        peak = peak_memory(found.config, found.mesh)
        if isinstance(report, str):
            print(found.name, found.mesh, report)
            continue
        error = peak.total / report["memory"]["peak"] - 1
        print(
            f"{found.name:12} {found.mesh!s:32} {found.config.memory.remat:10} M{found.config.train.microbatches} {peak.total / 2**30:7.2f} {report['memory']['peak'] / 2**30:7.2f} {error:+.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
