"""Verify a mesh: the same batch on it and on one device, compared in loss, gradient norm and every
gradient leaf.

  python -m jaxpar.verify --config=configs/tiny.py --cpu_devices=8 --mesh.fsdp=4 --mesh.tensor=2
  [--json=FILE]

Computes in float32, so that what differs is an error and not rounding. The reference is the first
device of the same machine, with one microbatch and without sequence parallelism. Exits with 1 if a
relative error is above --tolerance.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Column, Table

from jaxpar import cli, program
from jaxpar.config import Config, ConfigError, MemoryConfig, MeshConfig, ParallelConfig
from jaxpar.data.batches import Batch, load_batch, place
from jaxpar.data.corpus import open_corpus
from jaxpar.estimate import counts
from jaxpar.estimate.memory import peak_memory
from jaxpar.sharding import make_mesh
from jaxpar.step import init_state, loss_and_gradients
from jaxpar.tree import named_leaves

TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Result:
    """Loss (nats a token), gradient norm and gradient leaves of one batch, on the host."""

    loss: float
    grad_norm: float
    gradients: dict[str, np.ndarray]


def reference_config(config: Config) -> Config:
    """The plainest form of the same computation: one microbatch, nothing sharded, nothing
    recomputed."""
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, microbatches=1),
        parallel=ParallelConfig(sequence_parallel=False),
        memory=MemoryConfig(),
    )


def in_float32(config: Config) -> Config:
    return dataclasses.replace(
        config, precision=dataclasses.replace(config.precision, compute="float32")
    )


def run_batch(config: Config, mesh: Mesh, batch: Batch) -> Result:
    """Loss and gradients of the freshly initialised model on `mesh`.

    Args:
      config: the run; its microbatches decide how the batch is cut.
      mesh: six axes.
      batch: int32 arrays of the whole batch, [M, B, S] for any M.
    """
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: init_state(config).model)()
        losses, gradients = jax.jit(lambda model, batch: loss_and_gradients(model, batch, config))(
            model, place(batch, config, mesh)
        )
        gradients = named_leaves(program.to_network(gradients, config))
        leaves = {name: np.asarray(g, np.float64) for name, g in gradients.items()}
    norm = float(np.sqrt(sum(np.sum(g**2) for g in leaves.values())))
    return Result(float(losses.objective), norm, leaves)


def relative_error(value: Any, reference: Any) -> float:
    """Norm of the difference over the norm of the reference; not-a-number counts as infinite."""
    difference = float(np.linalg.norm(np.subtract(value, reference)))
    error = difference / max(float(np.linalg.norm(reference)), 1e-30) if difference else 0.0
    return error if np.isfinite(error) else float("inf")


def compare(result: Result, reference: Result, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """The comparison as `--json` writes it."""

    def scalar(name: str) -> dict[str, float]:
        value, expected = getattr(result, name), getattr(reference, name)
        return {
            "reference": expected,
            "mesh": value,
            "relative_error": relative_error(value, expected),
        }

    report: dict[str, Any] = {"loss": scalar("loss"), "grad_norm": scalar("grad_norm")}
    report["gradients"] = {
        name: relative_error(result.gradients[name], expected)
        for name, expected in reference.gradients.items()
    }
    errors = [
        report["loss"]["relative_error"],
        report["grad_norm"]["relative_error"],
        *report["gradients"].values(),
    ]
    return report | {"tolerance": tolerance, "equal": max(errors) <= tolerance}


def print_report(report: dict[str, Any], mesh: MeshConfig) -> None:
    """A table for the terminal: every quantity with its relative error."""
    table = Table(
        Column("quantity or gradient", no_wrap=True), "one device", str(mesh), "relative error"
    )
    for name in ("loss", "grad_norm"):
        row = report[name]
        table.add_row(
            name, f"{row['reference']:.7g}", f"{row['mesh']:.7g}", f"{row['relative_error']:.1e}"
        )
    for name, error in report["gradients"].items():
        table.add_row(name, "", "", f"{error:.1e}")
    Console().print(table)
    verdict = "equal" if report["equal"] else "DIFFERENT"
    print(f"{verdict} within a relative error of {report['tolerance']:g}, in float32")


def to_json(report: Any, indent: int | None = None) -> str:
    """JSON, which has no NaN and no infinity: they become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(item) for name, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(report), indent=indent, allow_nan=False)


def check_request(config: Config, mesh: Mesh) -> None:
    """Refuses what compares nothing, and what the machine cannot hold, before an array is made.

    Raises:
      ConfigError: what to ask for instead.
    """
    sizes, plain = MeshConfig(*mesh.devices.shape), reference_config(config)
    if mesh.size == 1 and (config.train, config.memory) == (plain.train, plain.memory):
        raise ConfigError(
            "the mesh is one device, so there is nothing to compare; give it axes, on devices that "
            "you have or simulate: --cpu_devices=8 --mesh.fsdp=4 --mesh.tensor=2"
        )
    host = 2 * 8 * counts.parameter_count(config.model)  # both gradients, in float64
    if mesh.devices.flat[0].platform == "cpu":
        host += max(
            _gradient_bytes(plain, MeshConfig()), mesh.size * _gradient_bytes(config, sizes)
        )
    parameters = f"{counts.parameter_count(config.model):,} parameters"
    cli.check_memory(host, f"verify of {parameters} in float32 on {sizes}")


def _gradient_bytes(config: Config, mesh: MeshConfig) -> int:
    """Of a device that computes a gradient and has no optimizer."""
    peak = peak_memory(config, mesh)
    return peak.total - peak.optimizer


def main(argv: list[str] | None = None) -> int:
    request = cli.parse(
        argv,
        __doc__ or "",
        json=cli.Option(
            None,
            "write the comparison as JSON to this file; - is standard output, and nothing else",
        ),
        tolerance=cli.Option(TOLERANCE, "largest relative error that counts as equal"),
    )
    output, tolerance = request.options["json"], request.options["tolerance"]
    if not 0 <= tolerance < math.inf:
        raise ConfigError(
            f"--tolerance={tolerance} must be finite and not negative (default: {TOLERANCE})"
        )
    if output != "-":
        cli.check_output("json", output)
    config = in_float32(request.config)
    corpus = open_corpus(config.data, vocab_size=config.model.vocab_size, seed=config.train.seed)
    mesh = cli.start(request, config)
    if jax.process_count() > 1:
        raise ConfigError(
            "verify compares with one device of the same process; run it in one, for example with "
            "--cpu_devices"
        )
    check_request(config, mesh)
    batch = load_batch(config, corpus.train)
    reference = run_batch(
        reference_config(config), make_mesh(MeshConfig(), jax.devices()[:1]), batch
    )
    result = run_batch(config, mesh, batch)
    report = compare(result, reference, tolerance)
    if output == "-":
        print(to_json(report))
    else:
        print_report(report, MeshConfig(*mesh.devices.shape))
        if output:
            Path(output).write_text(to_json(report, indent=2) + "\n")
    return 0 if report["equal"] else 1


if __name__ == "__main__":
    cli.run(main)
