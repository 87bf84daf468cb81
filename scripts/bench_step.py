"""Times the training step of a config on this device, beside a plain PyTorch Llama of the same shape and batch.

  python scripts/bench_step.py --config=configs/tiny.py [--config.precision.compute=float32] [--contenders=jaxpar,eager]

Contenders run in turn, each round in a process of its own (its memory and its start are its own), `--rounds` times; the
first round compiles, the later ones find what it kept. Given are medians, and ratios to `eager` of the same run.
`--breakdown` times the parts of jaxpar's step alone beside the roofline of the device: its measured matmul rate and
copy bandwidth.
"""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
CONTENDERS = ("jaxpar", "eager", "compile")


def worker(name: str, argv: list[str], steps: int, begin: float) -> dict[str, Any]:
    """Runs one contender in this process. `begin`: when the process was asked for, on the clock of `time.time`."""
    return (jaxpar_worker if name == "jaxpar" else torch_worker)(name, argv, steps, begin)


def jaxpar_worker(name: str, argv: list[str], steps: int, begin: float) -> dict[str, Any]:
    from jaxpar import cli, counts, data, hardware
    from jaxpar.config import MeshConfig

    request = cli.parse(argv, __doc__ or "")
    config = request.config
    mesh = cli.start(request, config)
    import jax
    import numpy as np
    from jax.sharding import NamedSharding

    from jaxpar.compile import compile_train_step
    from jaxpar.step import batch_spec, init_state

    start = time.perf_counter()
    with jax.set_mesh(mesh):
        step = compile_train_step(config, mesh)
        compiling = time.perf_counter() - start
        state = jax.jit(lambda: init_state(config))()
        tokens, targets = random_batch(config)
        shape = (config.train.microbatches, -1, config.data.sequence_length)
        positions = np.broadcast_to(np.arange(shape[2], dtype=np.int32), tokens.shape)
        fields = [x.reshape(shape) for x in (tokens, targets, positions, np.ones_like(tokens))]
        batch = data.global_batch(data.Batch(*fields), NamedSharding(mesh, batch_spec(config)), zigzag=False)
        state, values = step(state, batch)
        first_loss = float(values["loss"])
        first = time.time() - begin
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            state, values = step(state, batch)
            jax.block_until_ready(values)
            seconds.append(time.perf_counter() - start)
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
        memory=stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
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
    tokens, targets = (torch.from_numpy(x).to(device).long() for x in random_batch(config))
    parts = list(zip(tokens.chunk(config.train.microbatches), targets.chunk(config.train.microbatches), strict=True))
    assert len(parts) == 1, "the PyTorch step takes one microbatch"

    def run() -> float:
        loss = float(step(*parts[0]))  # waits for the device
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


def random_batch(config) -> tuple[Any, Any]:
    """Token ids and targets, int32 [B, S]: one document a row."""
    import numpy as np

    size = (config.train.batch_size, config.data.sequence_length + 1)
    raw = np.random.default_rng(0).integers(config.model.vocab_size, size=size, dtype=np.int32)
    return raw[:, :-1].copy(), raw[:, 1:].copy()


def breakdown(argv: list[str]) -> dict[str, Any]:
    """Seconds of the parts of one step, each compiled and run alone, and the least that the device could take."""
    from jaxpar import cli

    request = cli.parse(argv, __doc__ or "")
    config = request.config
    mesh = cli.start(request, config)
    import jax
    import jax.numpy as jnp
    import optax

    from jaxpar import counts, loss
    from jaxpar.attention import TokenInfo
    from jaxpar.model import Context, rope_angles
    from jaxpar.optimizer import make_optimizer
    from jaxpar.step import enter, init_state

    assert mesh.size == 1, "the breakdown is of one device"
    dtype, m = jnp.dtype(config.precision.compute), config.model
    B, S, L = config.train.batch_size // config.train.microbatches, config.data.sequence_length, m.layers

    def timed(function: Callable, *arrays: Any, donate: bool = False) -> float:
        run = jax.jit(function, donate_argnums=0 if donate else ())
        result = jax.block_until_ready(run(*arrays))
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            result = jax.block_until_ready(run(result, *arrays[1:]) if donate else run(*arrays))
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    with jax.set_mesh(mesh):
        size = 8192 if mesh.devices.flat[0].platform == "gpu" else 1024
        square = jnp.ones((size, size), dtype)
        rate = 2 * size**3 / timed(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32).astype(dtype), square)
        long = jnp.ones(2**28 if size == 8192 else 2**25, jnp.float32)
        bandwidth = 2 * long.nbytes / timed(lambda a: a + 1, long)
        model = jax.jit(lambda: init_state(config).model)()
        optimizer = make_optimizer(config)
        state = jax.jit(optimizer.init)(model)
        gradients = jax.tree.map(jnp.ones_like, model)
        x = jnp.ones((B, S, m.dim), dtype)
        positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        info = TokenInfo(positions, jnp.ones_like(positions))

        def update(carry: tuple) -> tuple:
            model, state = carry
            changes, state = optimizer.update(gradients, state, model)
            return optax.apply_updates(model, changes), state

        def head(x, w):
            layout = model.layout
            sums = loss.cross_entropy(x, w, positions, layout.rules, config.loss.chunk, 0.0, layout.sum_dtype)
            return sums.objective

        def one_layer(layer, x):
            context = Context(info, info, rope_angles(positions, m), jnp.zeros((), jnp.int32))
            return layer(x, context)[0].astype(jnp.float32).sum()

        def core(q, k, v):
            from jaxpar import attention

            layout = model.layout
            o = attention.attend(q, k, v, info, info, layout.rules, layout.attention)
            return o.astype(jnp.float32).sum()

        layer = jax.tree.map(lambda w: w[0], enter(model, config).layers)
        q, k = (jnp.ones((B, S, heads, m.head_dim), dtype) for heads in (m.heads, m.kv_heads))
        flops, tokens = counts.step_flops(config), B * S
        attention = timed(jax.grad(core, argnums=(0, 1, 2)), q, k, k) * L
        layers = timed(jax.grad(one_layer, argnums=(0, 1)), layer, x) * L
        head_flops = 6 * m.dim * m.vocab_size * tokens
        rows = [
            ("attention", attention, flops.attention * tokens / rate),
            ("matmuls and the rest of the layers", layers - attention, (flops.matmul * tokens - head_flops) / rate),
            ("head and loss", timed(jax.grad(head, argnums=(0, 1)), x, model.head_weight()), head_flops / rate),
            (
                "optimizer",
                timed(update, (model, state), donate=True),
                28 * counts.parameter_count(m) / bandwidth,
            ),
        ]
    return dict(rate=rate, bandwidth=bandwidth, rows=rows)


def run_all(argv: list[str], contenders: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Every contender once a round, in turn."""
    results: dict[str, list[dict]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | dict(
            XDG_CACHE_HOME=cache, TORCHINDUCTOR_CACHE_DIR=f"{cache}/inductor", PYTHONPATH=str(ROOT)
        )
        for _ in range(rounds):
            for name in contenders:
                command = [sys.executable, __file__, f"--worker={name}", f"--steps={steps}", f"--begin={time.time()}"]
                run = subprocess.run([*command, *argv], env=environment, capture_output=True, text=True)
                if run.returncode:
                    sys.exit(f"{name}: {run.stderr[-2000:]}")
                results[name].append(json.loads(run.stdout.splitlines()[-1]))
                print(f"{name}: {statistics.median(results[name][-1]['seconds']):.4f} s a step", file=sys.stderr)
    ours = results["jaxpar"][0]
    seconds = {name: statistics.median(t for run in runs for t in run["seconds"]) for name, runs in results.items()}
    baseline = seconds.get("eager")
    rows = {
        name: dict(
            seconds=seconds[name],
            tokens_per_second=ours["tokens"] / seconds[name],
            ratio=baseline and baseline / seconds[name],
            mfu=[ours["peak"] and flops / seconds[name] / ours["peak"] for flops in ours["flops"]],
            memory=max(run["memory"] for run in runs),
            first_step=[runs[0]["first"], statistics.median(run["first"] for run in runs[1:] or runs)],
            compile=[run.get("compile") for run in runs],
            compiled_memory=runs[0].get("compiled_memory"),
            loss=runs[0]["loss"],
        )
        for name, runs in results.items()
    }
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "torch") if name in installed}
    return dict(
        date=datetime.date.today().isoformat(),
        device=ours["device"] if ours["peak"] else f"{os.cpu_count()} CPU cores ({platform.machine()})",
        versions={**versions, "python": platform.python_version()},
        command="python scripts/bench_step.py " + " ".join(a for a in argv if "--workdir" not in a),
        parameters=ours["parameters"],
        mesh=ours["mesh"],
        config=ours["config"],
        contenders=rows,
    )


def report(result: dict[str, Any]) -> str:
    """The table of a result, in Markdown."""
    config = result["config"]
    libraries = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    m = config["model"]
    lines = [
        f"`{result['command']}`",
        "",
        f"{result['date']}, {result['device']}, {libraries}. {result['parameters'] / 1e6:,.1f}M parameters (dim "
        f"{m['dim']}, {m['layers']} layers, vocabulary {m['vocab_size']}), "
        f"{config['train']['batch_size']} x {config['data']['sequence_length']} tokens, "
        f"{config['precision']['compute']}, remat {config['memory']['remat']}, {result['mesh']}.",
        "",
        "| | tokens/s | against eager | MFU, causal / square | peak memory, MB | first step, s: cold / cached |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["contenders"].items():
        label = {"eager": "PyTorch eager", "compile": "PyTorch `torch.compile`"}.get(name, name)
        mfu = " / ".join("not known" if x is None else f"{x:.1%}" for x in row["mfu"])
        cold, cached = row["first_step"]
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        lines.append(
            f"| {label} | {row['tokens_per_second']:,.0f} | {ratio} | {mfu} | {row['memory'] / 1e6:,.0f} | "
            f"{cold:.1f} / {cached:.1f} |"
        )
    if parts := result.get("breakdown"):
        total = result["contenders"]["jaxpar"]["seconds"]
        rest = total - sum(seconds for _, seconds, _ in parts["rows"])
        lines += [
            "",
            f"Roofline: {parts['rate'] / 1e12:.2f} TFLOP/s of matmul, {parts['bandwidth'] / 1e9:,.0f} GB/s of copy.",
            "",
            "| part of a step | ms, alone | ms at the roofline | share of the step |",
            "| --- | --- | --- | --- |",
            *(
                f"| {name} | {1e3 * seconds:,.1f} | {1e3 * least:,.1f} | {seconds / total:.0%} |"
                for name, seconds, least in parts["rows"]
            ),
            f"| what is not in them (remat, embedding, stacking, metrics) | {1e3 * rest:,.1f} | | {rest / total:.0%} |",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    own: dict[str, str] = {}
    rest = []
    names = ("worker", "steps", "begin", "rounds", "contenders", "breakdown", "json", "only_breakdown")
    for argument in sys.argv[1:]:
        name, _, value = argument.removeprefix("--").partition("=")
        if name in names:
            own[name] = value
        else:
            rest.append(argument)
    if not rest or "--help" in rest:
        sys.exit(f"{__doc__}\nFlags: {', '.join(f'--{name}' for name in names)}, and those of jaxpar.train.")
    rest.append("--workdir=unused")
    steps = int(own.get("steps", 10))
    if "worker" in own:
        print(json.dumps(worker(own["worker"], rest, steps, float(own["begin"]))))
        return
    if "only_breakdown" in own:
        print(json.dumps(breakdown(rest)))
        return
    contenders = own.get("contenders", ",".join(CONTENDERS)).split(",")
    result = run_all(rest, contenders, int(own.get("rounds", 3)), steps)
    if "breakdown" in own:
        run = subprocess.run(
            [sys.executable, __file__, "--only_breakdown", *rest[:-1]], capture_output=True, text=True, check=True
        )
        result["breakdown"] = json.loads(run.stdout.splitlines()[-1])
    print(report(result))
    if "json" in own:
        Path(own["json"]).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
