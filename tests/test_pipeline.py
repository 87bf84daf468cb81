"""A pipeline computes what one device computes, on any schedule and with every other axis; and
skips what is idle.

The harness is that of `test_parity`: float32, loss to 1e-6, every gradient leaf to 1e-5.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import test_parity
from test_parity import (
    check,
    first_batch,
    initial_parameters,
    make_config,
    text,  # noqa: F401  (a fixture)
)

from jaxpar import program, verify
from jaxpar import train as command
from jaxpar.checkpoint import Checkpointer, Position, restore_state
from jaxpar.compile import abstract_state
from jaxpar.config import ConfigError, MeshConfig, configure
from jaxpar.data.batches import Batch, abstract_batch, place
from jaxpar.report.hlo import computations_of
from jaxpar.sharding import make_mesh
from jaxpar.step import init_state, loss_and_gradients, make_eval_step, make_train_step
from jaxpar.tree import named_leaves
from jaxpar.validation import resolve, validate_mesh

ROOT = Path(__file__).parents[1]


def pipeline_config(path, *, layers=4, microbatches=4, chunks=1, model=None, train=None, **groups):
    """About 16 sequences, at least one a microbatch."""
    batch = microbatches * max(1, 16 // microbatches)
    parallel = dict(chunks=chunks, **groups.pop("parallel", {}))
    return make_config(
        path,
        microbatches=microbatches,
        model={**test_parity.MODEL, "init_std": 0.1, "layers": layers, **(model or {})},
        train=dict(batch_size=batch, microbatches=microbatches, **(train or {})),
        parallel=parallel,
        **groups,
    )


TIED = dict(model=dict(tie_embeddings=True))

FAST = {
    "1f1b, sequence parallel, tied": (
        dict(pipeline=2, fsdp=2, tensor=2),
        dict(model=dict(tie_embeddings=True, qk_norm=True)),
    ),
    "per step, no sequence parallelism": (
        dict(pipeline=2, data=2, tensor=2),
        dict(
            microbatches=1,
            sequence_parallel=False,
            parallel=dict(gather="per_step"),
            model=dict(qk_norm=True),
        ),
    ),
    "chunks, ring, full remat": (
        dict(pipeline=2, sequence=2),
        dict(chunks=2, parallel=dict(context="ring"), memory=dict(remat="full")),
    ),
    "gpipe": (dict(pipeline=4), dict(microbatches=3, parallel=dict(schedule="gpipe"))),
}

SLOW = {
    **{
        f"p={p} v={v} M={M} {schedule}": (
            dict(pipeline=p),
            dict(layers=max(8, p * v), chunks=v, microbatches=M, parallel=dict(schedule=schedule)),
        )
        for p in (2, 4, 8)
        for v in (1, 2, 4)
        for M in (1, 3, p, 4 * p)
        for schedule in ("1f1b", "gpipe")
        if not (v > 1 and (M % p or schedule == "gpipe"))
    },
    "fsdp per layer": (dict(pipeline=2, fsdp=4), dict()),
    "fsdp per step, chunks": (
        dict(pipeline=2, fsdp=4),
        dict(chunks=2, parallel=dict(gather="per_step")),
    ),
    "fsdp per layer, gpipe": (
        dict(pipeline=2, fsdp=4),
        dict(parallel=dict(schedule="gpipe"), **TIED),
    ),
    "data, ZeRO-1": (dict(pipeline=2, data=4), dict(parallel=dict(optimizer_sharding="data"))),
    "data x fsdp, chunks": (dict(pipeline=2, data=2, fsdp=2), dict(chunks=2)),
    "expert as batch": (dict(pipeline=2, expert=2, fsdp=2), dict()),
    "tensor, chunks": (dict(pipeline=2, tensor=4), dict(chunks=2)),
    "tensor without sequence parallelism, gpipe": (
        dict(pipeline=2, tensor=4),
        dict(
            sequence_parallel=False,
            parallel=dict(schedule="gpipe"),
            model=dict(tie_embeddings=True, qk_norm=True),
        ),
    ),
    "all-gather": (dict(pipeline=2, sequence=4), dict()),
    "ring, zigzag": (
        dict(pipeline=2, sequence=4),
        dict(parallel=dict(context="ring", zigzag=True)),
    ),
    "ulysses, chunks": (
        dict(pipeline=2, sequence=4),
        dict(chunks=2, parallel=dict(context="ulysses")),
    ),
    "ring, gpipe": (
        dict(pipeline=2, sequence=4),
        dict(parallel=dict(context="ring", schedule="gpipe")),
    ),
    **{
        f"remat {remat}, {schedule}": (
            dict(pipeline=2, fsdp=2, tensor=2),
            dict(memory=dict(remat=remat), parallel=dict(schedule=schedule)),
        )
        for remat in ("none", "dots", "attention", "full", "value,up")
        for schedule in ("1f1b", "gpipe")
    },
    "unpacked": (dict(pipeline=2, sequence=2, tensor=2), dict(data=dict(packing=False), **TIED)),
    "tied, chunks": (dict(pipeline=4, tensor=2), dict(layers=8, chunks=2, **TIED)),
}


@pytest.mark.parametrize("case", FAST)
def test_mesh(text, case):  # noqa: F811
    sizes, groups = FAST[case]
    check(pipeline_config(text, **groups), sizes)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_every_mesh(text, case):  # noqa: F811
    sizes, groups = SLOW[case]
    check(pipeline_config(text, **groups), sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [(), ("--config.parallel.chunks=2", "--config.parallel.context=ring")], ids=str
)
def test_all_five_axes_on_32_devices(tmp_path, flags):
    """Through the command, in a process of its own: `verify` compares with one device."""
    (tmp_path / "text.txt").write_text(
        "".join(f"{n} and {n} make {2 * n}.\n<|endoftext|>\n" for n in range(600))
    )
    (tmp_path / "cfg.py").write_text(
        "from jaxpar.config import configure\n"
        "def get_config():\n"
        f"    return configure(model=dict({test_parity.MODEL}, layers=4),\n"
        "        data=dict(source='text.txt', tokenizer='bytes', sequence_length=32),\n"
        "        train=dict(batch_size=16, microbatches=4, z_loss=1e-3), "
        "memory=dict(remat='full'))\n"
    )
    mesh = [f"--mesh.{axis}=2" for axis in ("pipeline", "data", "fsdp", "sequence", "tensor")]
    argv = [
        sys.executable,
        "-m",
        "jaxpar.verify",
        "--config=cfg.py",
        "--cpu_devices=32",
        "--json=-",
        *mesh,
        *flags,
    ]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    run = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["equal"] and report["loss"]["relative_error"] <= 1e-6


def test_initialisation_does_not_depend_on_stages(text):  # noqa: F811
    config = pipeline_config(text, layers=8, chunks=2)
    one = initial_parameters(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    other = initial_parameters(config, make_mesh(MeshConfig(pipeline=4, fsdp=2)))
    assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_device_holds_its_share_of_layers_and_vocabulary(text, chunks):  # noqa: F811
    sizes = MeshConfig(pipeline=2, fsdp=2, tensor=2)
    config = pipeline_config(text, chunks=chunks)
    state = named_leaves(abstract_state(config, make_mesh(sizes)))
    for name, leaf in state.items():
        if leaf.ndim > 1 and "scale" not in name:
            held = math.prod(leaf.sharding.shard_shape(leaf.shape))
            assert held * sizes.devices == math.prod(leaf.shape), name


@pytest.mark.parametrize(("chunks", "schedule"), [(1, "gpipe"), (2, "1f1b")])
def test_evaluation(text, chunks, schedule):  # noqa: F811
    config = pipeline_config(text, chunks=chunks, parallel=dict(schedule=schedule))
    sums = []
    for sizes in (MeshConfig(), MeshConfig(pipeline=2, fsdp=2, tensor=2)):
        mesh = make_mesh(sizes, jax.devices()[: sizes.devices])
        with jax.set_mesh(mesh):
            model = jax.jit(lambda: init_state(config).model)()
            batch = Batch(
                *(x.reshape(4, 4, -1) for x in first_batch(verify.reference_config(config)))
            )
            placed = place(batch, config, mesh)
            sums.append([float(x) for x in jax.jit(make_eval_step(config))(model, placed)])
    assert sums[1] == pytest.approx(sums[0], rel=1e-6)


def test_a_pipeline_of_chunks_resumes_without_and_back(text, tmp_path):  # noqa: F811
    """Pipeline 4 x 2 chunks -> pipeline 1 -> pipeline 4 x 2 chunks, bit for bit, and in the order
    of the network."""
    config = pipeline_config(text, layers=8, chunks=2)
    meshes = [make_mesh(MeshConfig(pipeline=4, fsdp=2)), make_mesh(MeshConfig(), jax.devices()[:1])]

    def leaves(state) -> dict[str, np.ndarray]:
        return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}

    with jax.set_mesh(meshes[0]):
        mesh = meshes[0]
        state = command.start_state(config, None)
        batch = Batch(*(x.reshape(4, 4, -1) for x in first_batch(verify.reference_config(config))))
        placed = place(batch, config, mesh)
        state, _ = jax.jit(make_train_step(config))(state, placed)
        state = program.to_network(state, config)
        expected = leaves(state)
    first = expected["model.layers.mlp.gate"]
    assert len({layer.tobytes() for layer in first}) == 8
    for n, mesh in enumerate(
        (*meshes, meshes[1], meshes[0])
    ):  # each saves what the one before saved
        with jax.set_mesh(mesh):
            if n:
                state = command.start_state(config, tmp_path / str(n - 1) / "checkpoints" / "1")
                state = program.to_network(state, config)
            saver = Checkpointer(tmp_path / str(n), config)
            saver.save(1, state, position=Position(1, 16, 0))
            saver.close()
    with jax.set_mesh(meshes[1]):
        found = leaves(
            restore_state(tmp_path / "3" / "checkpoints" / "1", abstract_state(config, meshes[1]))
        )
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert leaf.tobytes() == found[name].tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "model"),
    [
        ("adafactor", dict(layers=8)),
        ("muon", dict(layers=8)),
        ("adamw", dict(layers=8, dim=8, heads=2, kv_heads=2)),
    ],
    ids=["adafactor", "muon", "as many layers as dim"],
)
def test_state_of_any_optimizer_has_the_order_of_the_network(text, optimizer, model):  # noqa: F811
    """Adafactor also keeps sums over rows and columns, those of each layer by itself."""
    config = pipeline_config(
        text, chunks=2, optimizer=dict(name=optimizer, warmup_steps=0), model=model
    )
    found = []
    for sizes in (MeshConfig(), MeshConfig(pipeline=2, fsdp=2)):
        mesh = make_mesh(sizes, jax.devices()[: sizes.devices])
        validate_mesh(config, sizes)
        with jax.set_mesh(mesh):
            state = command.start_state(config, None)
            batch = Batch(
                *(x.reshape(4, 4, -1) for x in first_batch(verify.reference_config(config)))
            )
            state, _ = jax.jit(make_train_step(config))(state, place(batch, config, mesh))
            found.append(
                {
                    n: np.asarray(x)
                    for n, x in named_leaves(program.to_network(state, config)).items()
                }
            )
    assert found[0].keys() == found[1].keys()
    for name, leaf in found[0].items():
        assert verify.relative_error(found[1][name], leaf) < 1e-3, name


@pytest.mark.slow
def test_training_goes_on_from_a_pipeline_on_other_meshes(tmp_path, capsys):
    """The losses of the command are those of an unbroken run without a pipeline, and it tells its
    bubble."""
    (tmp_path / "text.txt").write_text(
        "".join(f"{n} and {n} make {2 * n}.\n<|endoftext|>\n" for n in range(600))
    )
    (tmp_path / "cfg.py").write_text(
        "from jaxpar.config import configure\n"
        "def get_config():\n"
        "    return configure(model=dict(vocab_size=320, dim=32, layers=8, heads=4, kv_heads=2, "
        "ffn_dim=64),\n"
        f"        data=dict(source={str(tmp_path / 'text.txt')!r}, tokenizer='bytes', "
        "sequence_length=32),\n"
        "        train=dict(batch_size=8, microbatches=4, eval_every=2, eval_batches=1),\n"
        "        optimizer=dict(learning_rate=3e-3, warmup_steps=2, schedule='constant'), "
        "log=dict(every=1),\n"
        "        precision=dict(compute='float32'))\n"
    )

    def train(workdir: str, steps: int, *flags: str) -> list[float]:
        argv = [
            f"--config={tmp_path / 'cfg.py'}",
            f"--workdir={tmp_path / workdir}",
            f"--config.train.steps={steps}",
        ]
        assert command.main([*argv, "--config.log.progress=false", *flags]) == 0
        rows = (
            json.loads(line)
            for line in (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()
        )
        return [row.get("loss", row.get("eval_loss")) for row in rows]

    whole = train("whole", 6, "--mesh.data=2", "--mesh.fsdp=4", "--config.train.microbatches=1")
    staged = ("--mesh.pipeline=4", "--mesh.fsdp=2", "--config.parallel.chunks=2")
    train("staged", 2, *staged)
    assert "pipeline  1f1b, 4 stages x 2 chunks, 4 microbatches" in (out := capsys.readouterr().out)
    assert "bubble (p - 1) / (v M + p - 1) = 27.3%" in out
    train("staged", 4, "--mesh.fsdp=8", "--config.train.microbatches=1")
    found = train("staged", 6, *staged)
    np.testing.assert_allclose(found, whole, rtol=2e-5)


def dot_flops(hlo: str) -> list[tuple[int, int]]:
    """(ticks, operations of matmuls in one) of every loop of the entry of a compiled module."""
    computations, entry = computations_of(hlo)

    def inside(name: str) -> int:
        found, sizes = 0, {}
        for line in computations[name]:
            if shape := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]", line):
                sizes[shape[1]] = [int(n) for n in shape[2].split(",") if n]
            if dot := re.search(
                r" dot\((?:\S+ )?%?([\w.\-]+), .*lhs_contracting_dims=\{([\d,]+)\}", line
            ):
                contracted = math.prod(sizes[dot[1]][int(d)] for d in dot[2].split(","))
                found += 2 * math.prod(sizes[shape[1]]) * contracted
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", line):
                found += inside(called) * (int(trips[1]) if trips else 1)
        return found

    loops = []
    for line in computations[entry]:
        if " while(" in line:
            trips, body = (
                re.search(r'known_trip_count":\{"n":"(\d+)"', line),
                re.search(r"body=%?([\w.\-]+)", line),
            )
            loops.append((int(trips[1]), inside(body[1])))
    return [loop for loop in loops if loop[1]]


@pytest.mark.parametrize(("chunks", "remat"), [(1, "none"), (2, "full")])
def test_ticks_of_forward_alone_cost_no_backward(text, chunks, remat):  # noqa: F811
    """Operations of the matmuls in each of the three loops, to the last one. `F`: of a chunk's
    layers, forward."""
    p, M = 4 // chunks, 6
    sizes = MeshConfig(pipeline=p)
    config = pipeline_config(
        text, layers=8, chunks=chunks, microbatches=M, memory=dict(remat=remat)
    )
    mesh = make_mesh(sizes, jax.devices()[:p])
    with jax.set_mesh(mesh):
        model = abstract_state(config, mesh).model
        batch = abstract_batch(config, mesh)
        step = jax.jit(lambda model, batch: loss_and_gradients(model, batch, config))
        loops = dot_flops(step.lower(model, batch).compile().as_text())
    m, tokens, depth = config.model, 2 * 32, config.model.layers // (p * chunks)
    projections = m.dim * m.head_dim * (2 * m.heads + 2 * m.kv_heads) + 3 * m.dim * m.ffn_dim
    matmuls, scores = (
        2 * tokens * projections * depth,
        2 * 2 * tokens * 32 * m.heads * m.head_dim * depth,
    )
    F = matmuls + scores
    padded = -(-tokens // config.loss.chunk) * config.loss.chunk
    head = 3 * 2 * padded * m.dim * m.vocab_size // p
    # the chunk again, twice as much for its gradients, and what a layer computes again in its own
    # backward pass: the scores as always, or with full remat all but `down`
    again = scores // 2 if remat == "none" else F - 2 * tokens * m.dim * m.ffn_dim * depth
    B = F + 2 * F + again
    phases = [len(phase) for phase in program.timetable("1f1b", p, M, chunks).phases]
    # XLA of jax 0.12 computes the scores of a layer that it computes again a second time for their
    # gradient
    twice = scores // 2 if remat == "full" else 0
    assert loops in [list(zip(phases, (F, F + head + b, b), strict=True)) for b in (B, B + twice)]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_collectives_keep_their_order(text, schedule):  # noqa: F811
    """The same every time: with nothing to order them, a ring and a shift of the pipeline take each
    other's data."""
    config = pipeline_config(text, parallel=dict(context="ring", schedule=schedule))
    mesh = make_mesh(MeshConfig(pipeline=2, sequence=4))
    batch = Batch(*(x.reshape(4, 4, -1) for x in first_batch(verify.reference_config(config))))
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: init_state(config).model)()
        step = jax.jit(lambda model, batch: loss_and_gradients(model, batch, config))
        results = [
            jax.device_get(step(model, place(batch, config, mesh))[0].objective) for _ in range(15)
        ]
    np.testing.assert_allclose(results, results[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("groups", "sizes", "words"),
    [
        (
            dict(model=dict(layers=2)),
            dict(pipeline=4),
            ("model.layers=2", "mesh.pipeline=4", "{1, 2}", "{4}"),
        ),
        (
            dict(model=dict(layers=1)),
            dict(pipeline=2),
            ("model.layers=1", "mesh.pipeline=2", "model.layers in {2}"),
        ),
        (
            dict(
                model=dict(layers=12),
                parallel=dict(chunks=2),
                train=dict(microbatches=4, batch_size=8),
            ),
            dict(pipeline=4),
            (
                "model.layers=12",
                "mesh.pipeline x parallel.chunks = 8",
                "{1, 2, 3, 6}",
                "parallel.chunks in {1, 3}",
            ),
        ),
        (
            dict(
                model=dict(layers=8),
                parallel=dict(chunks=2),
                train=dict(microbatches=6, batch_size=12),
            ),
            dict(pipeline=4),
            (
                "train.microbatches=6",
                "mesh.pipeline=4",
                "parallel.chunks=2",
                "{4, 8}",
                "parallel.chunks=1",
            ),
        ),
        (
            dict(
                model=dict(layers=8),
                parallel=dict(chunks=2, schedule="gpipe"),
                train=dict(microbatches=4),
            ),
            dict(pipeline=4),
            ("parallel.chunks=2", "parallel.schedule=1f1b", "parallel.chunks=1"),
        ),
        (
            dict(model=dict(layers=6, vocab_size=322)),
            dict(pipeline=3, tensor=2),
            ("model.vocab_size=322", "mesh.pipeline x mesh.tensor = 6", "{318, 324}"),
        ),
        (dict(train=dict(microbatches=0)), dict(), ("train.microbatches=0", "at least 1")),
        (dict(parallel=dict(chunks=0)), dict(), ("parallel.chunks=0", "at least 1")),
        (
            dict(parallel=dict(schedule="1f2b")),
            dict(),
            ("'1f2b'", "gpipe, 1f1b", "Did you mean 1f1b?"),
        ),
        (
            dict(memory=dict(offload="residual")),
            dict(pipeline=2),
            ("memory.offload=residual", "mesh.pipeline=2"),
        ),
    ],
)
def test_what_cannot_be_is_refused(groups, sizes, words):
    settings = dict(model=dict(vocab_size=320), **{k: v for k, v in groups.items() if k != "model"})
    settings["model"] = {"vocab_size": 320, **groups.get("model", {})}
    with pytest.raises(ConfigError) as error:
        validate_mesh(resolve(configure(**settings)), MeshConfig(**sizes))
    for word in words:
        assert word in str(error.value), (word, str(error.value))


def test_the_reference_has_no_chunks(text):  # noqa: F811
    plain = verify.reference_config(pipeline_config(text, chunks=2))
    assert (plain.parallel.chunks, dataclasses.asdict(plain)["train"]["microbatches"]) == (1, 1)
