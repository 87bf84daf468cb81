"""Times the training step of a config on this device, beside a plain PyTorch Llama of the same
shape and batch.

  python scripts/bench_step.py --config=configs/tiny.py [--config.precision.compute=float32]
  [--contenders=jaxpar,eager]

Contenders are jaxpar, eager and compile (PyTorch's `torch.compile`); NAME@PYTHON runs one with the
interpreter of another environment, so that versions of jax stand in one table. They run in turn,
each round in a process of its own (its memory and its start are its own), `--rounds` times; the
first round compiles, the later ones find what it kept. Given are medians, and ratios to `eager` of
the same run. `--breakdown` adds the parts of jaxpar's step: breakdown.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arguments import ROOT, parser

if TYPE_CHECKING:
    from jaxpar.config import Config
    from jaxpar.data.batches import Batch

CONTENDERS = ("jaxpar", "eager", "compile")


def worker(name: str, argv: list[str], steps: int, begin: float) -> dict[str, Any]:
    """Runs one contender in this process. `begin`: when the process was asked for, on the clock of
    `time.time`."""
    library = "jax" if name == "jaxpar" else "torch"
    result = (jaxpar_worker if name == "jaxpar" else torch_worker)(name, argv, steps, begin)
    return dict(version=f"{library} {importlib.metadata.version(library)}", **result)


def jaxpar_worker(name: str, argv: list[str], steps: int, begin: float) -> dict[str, Any]:
    from jaxpar import cli
    from jaxpar.config import MeshConfig
    from jaxpar.data.batches import place
    from jaxpar.estimate import counts, hardware

    request = cli.parse(argv, __doc__ or "")
    config = request.config
    mesh = cli.start(request, config)
    import jax

    from jaxpar.compile import compile_train_step
    from jaxpar.train import start_state

    clock = time.perf_counter()
    with jax.set_mesh(mesh):
        step = compile_train_step(config, mesh)
        compiling = time.perf_counter() - clock
        state = start_state(config, None)
        batch = place(random_batch(config), config, mesh)
        state, values = step(state, batch)
        first_loss = float(values["loss"])
        first = time.time() - begin
        seconds = []
        for _ in range(steps):
            clock = time.perf_counter()
            state, values = step(state, batch)
            jax.block_until_ready(values)
            seconds.append(time.perf_counter() - clock)
    device = jax.devices()[0]
    stats, flops = device.memory_stats() or {}, counts.step_flops(config)
    peak = hardware.peak_flops(device.device_kind, config.precision.compute)
    compiled = step.memory_analysis()
    assert compiled is not None
    return dict(
        first=first,
        compile=compiling,
        seconds=seconds,
        loss=(first_loss, float(values["loss"])),
        memory=stats.get("peak_bytes_in_use")
        or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        compiled_memory=compiled.argument_size_in_bytes
        + compiled.output_size_in_bytes
        - compiled.alias_size_in_bytes
        + compiled.temp_size_in_bytes,
        device=device.device_kind,
        parameters=counts.parameter_count(config.model),
        mesh=str(MeshConfig(*mesh.devices.shape)),
        tokens=flops.tokens,
        flops=(flops.per_step, flops.per_step_square),
        peak=peak and peak * mesh.size,
        config=dataclasses.asdict(config),
    )


def torch_worker(name: str, argv: list[str], steps: int, begin: float) -> dict[str, Any]:
    import torch
    from torch_llama import make_step

    from jaxpar import cli

    config = cli.parse(argv, __doc__ or "").config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = make_step(dataclasses.asdict(config), device, compiled=name == "compile")
    assert config.train.microbatches == 1, "the PyTorch step takes one microbatch"
    tokens, targets, *_ = random_batch(config)
    parts = [torch.from_numpy(field[0]).to(device).long() for field in (tokens, targets)]

    def run() -> float:
        loss = float(step(*parts))  # waits for the device
        if device == "cuda":
            torch.cuda.synchronize()
        return loss

    losses, first, seconds = [run()], time.time() - begin, []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(run())
        seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    memory = memory or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(first=first, seconds=seconds, loss=(losses[0], losses[-1]), memory=memory)


def random_batch(config: Config) -> Batch:
    """Random ids, one document a row; numpy int32 [M, b, S]."""
    from jaxpar.data.batches import load_batch
    from jaxpar.data.corpus import open_corpus

    data = dataclasses.replace(config.data, source="synthetic")
    return load_batch(config, open_corpus(data, vocab_size=config.model.vocab_size, seed=0).train)


def run_all(argv: list[str], contenders: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Every contender once a round, in turn."""
    results: dict[str, list[dict]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | dict(
            XDG_CACHE_HOME=cache, TORCHINDUCTOR_CACHE_DIR=f"{cache}/inductor", PYTHONPATH=str(ROOT)
        )
        for _ in range(rounds):
            for name in contenders:
                program, _, python = name.partition("@")
                command = [
                    python or sys.executable,
                    __file__,
                    f"--worker={program}",
                    f"--steps={steps}",
                    f"--begin={time.time()}",
                ]
                run = subprocess.run(
                    [*command, *argv], env=environment, capture_output=True, text=True
                )
                if run.returncode:
                    sys.exit(f"{name}: {run.stderr[-2000:]}")
                results[name].append(json.loads(run.stdout.splitlines()[-1]))
                print(
                    f"{name}: {statistics.median(results[name][-1]['seconds']):.4f} s a step",
                    file=sys.stderr,
                )
    ours = results["jaxpar"][0]
    seconds = {
        name: statistics.median(t for run in runs for t in run["seconds"])
        for name, runs in results.items()
    }
    baseline = seconds.get("eager")
    rows = {
        name: dict(
            seconds=seconds[name],
            tokens_per_second=ours["tokens"] / seconds[name],
            ratio=baseline and baseline / seconds[name],
            mfu=[ours["peak"] and flops / seconds[name] / ours["peak"] for flops in ours["flops"]],
            memory=max(run["memory"] for run in runs),
            first_step=[
                runs[0]["first"],
                statistics.median(run["first"] for run in runs[1:] or runs),
            ],
            version=runs[0]["version"],
            compile=[run.get("compile") for run in runs],
            compiled_memory=runs[0].get("compiled_memory"),
            loss=runs[0]["loss"],
        )
        for name, runs in results.items()
    }
    return dict(
        date=datetime.date.today().isoformat(),
        device=ours["device"]
        if ours["peak"]
        else f"{os.cpu_count()} CPU cores ({platform.machine()})",
        python=platform.python_version(),
        command="python scripts/bench_step.py " + " ".join(a for a in argv if "--workdir" not in a),
        parameters=ours["parameters"],
        mesh=ours["mesh"],
        config=ours["config"],
        contenders=rows,
    )


def report(result: dict[str, Any]) -> str:
    """The table of a result, in Markdown."""
    config = result["config"]
    m = config["model"]
    lines = [
        f"`{result['command']}`",
        "",
        f"{result['date']}, {result['device']}, Python {result['python']}. "
        f"{result['parameters'] / 1e6:,.1f}M parameters "
        f"(dim {m['dim']}, {m['layers']} layers, vocabulary {m['vocab_size']}), "
        f"{config['train']['batch_size']} x {config['data']['sequence_length']} tokens, "
        f"{config['precision']['compute']}, remat {config['memory']['remat']}, {result['mesh']}.",
        "",
        "| | tokens/s | against eager | MFU, causal / square | peak, MB | first step, s: cold / "
        "cached | compile, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["contenders"].items():
        program = name.partition("@")[0]
        label = {"eager": "PyTorch, eager", "compile": "`torch.compile`"}.get(
            program, program
        ) + f", {row['version']}"
        compiling = f"{row['compile'][0]:.1f}" if row["compile"][0] else ""
        mfu = " / ".join("not known" if x is None else f"{x:.1%}" for x in row["mfu"])
        cold, cached = row["first_step"]
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        lines.append(
            f"| {label} | {row['tokens_per_second']:,.0f} | {ratio} | {mfu} | "
            f"{row['memory'] / 1e6:,.0f} | "
            f"{cold:.1f} / {cached:.1f} | {compiling} |"
        )
    if parts := result.get("breakdown"):
        lines += ["", *breakdown_table(parts, result["contenders"]["jaxpar"]["seconds"])]
    return "\n".join(lines) + "\n"


def breakdown_table(parts: dict[str, Any], total: float) -> list[str]:
    """Lines of the table of the parts of a step of `total` seconds, as breakdown.py gives them."""
    rows = [
        (name, alone, f"{1e3 * least:,.1f}" if least else "")
        for name, alone, least in parts["rows"]
    ]
    rows.append(("the rest", total - sum(alone for _, alone, _ in rows), ""))
    return [
        f"Roofline: {parts['rate'] / 1e12:.3g} TFLOP/s of matmul, {parts['bandwidth'] / 1e9:,.0f} "
        "GB/s of copy.",
        "",
        "| part of a step | ms, alone | ms at the roofline | share of the step |",
        "| --- | --- | --- | --- |",
        *(
            f"| {name} | {1e3 * alone:,.1f} | {least} | {alone / total:.0%} |"
            for name, alone, least in rows
        ),
    ]


def main() -> None:
    from jaxpar import cli

    flags = parser(f"{__doc__}\nFurther flags are those of jaxpar.train, as --config=FILE.")
    flags.add_argument("--contenders", default=",".join(CONTENDERS), help="which, with commas")
    flags.add_argument("--rounds", type=int, default=3, help="processes of each")
    flags.add_argument("--steps", type=int, default=10, help="timed in each")
    flags.add_argument("--breakdown", action="store_true", help="the parts of jaxpar's step too")
    flags.add_argument("--json", type=Path, help="file for the results")
    flags.add_argument("--worker", help=argparse.SUPPRESS)  # what the processes are started with
    flags.add_argument("--begin", type=float, help=argparse.SUPPRESS)
    own, rest = flags.parse_known_args()
    rest.append("--workdir=unused")
    if own.worker:
        print(json.dumps(worker(own.worker, rest, own.steps, own.begin)))
        return
    try:
        cli.parse(rest, __doc__ or "")
    except cli.ConfigError as error:
        flags.error(str(error))
    result = run_all(rest, own.contenders.split(","), own.rounds, own.steps)
    if own.breakdown:
        command = [sys.executable, str(ROOT / "scripts" / "breakdown.py"), *rest[:-1]]
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        result["breakdown"] = json.loads(run.stdout.splitlines()[-1])
    print(report(result))
    if own.json:
        own.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
