"""Every mesh computes what one device computes: loss, gradient norm and every gradient leaf, in
float32.

The harness is `jaxpar.verify`. Whatever changes a number of a training step has to enter here.
"""

import functools
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxpar import program, verify
from jaxpar.config import Config, MeshConfig, configure
from jaxpar.data.batches import Batch, load_batch
from jaxpar.data.corpus import open_corpus
from jaxpar.sharding import make_mesh
from jaxpar.step import init_state
from jaxpar.tree import named_leaves
from jaxpar.validation import resolve, validate_mesh

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5

MODEL = dict(vocab_size=320, dim=64, layers=2, heads=16, kv_heads=8, head_dim=8, ffn_dim=96)
ALL_MESHES = [
    dict(zip(("data", "fsdp", "sequence", "tensor"), sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=4)
    if sizes[0] * sizes[1] * sizes[2] * sizes[3] == 8
]
# Every pair of values of (sequence_parallel, tied embeddings, microbatches) occurs.
VARIANTS = [(True, False, 1), (True, True, 4), (False, False, 4), (False, True, 1)]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Short documents, several to a window."""
    stories = (Path(verify.__file__).parent / "assets" / "stories.txt").read_text()
    path = tmp_path_factory.mktemp("data") / "short.txt"
    path.write_text(
        "\n<|endoftext|>\n".join(stories[n * 400 : n * 400 + 5 + n * 7 % 60] for n in range(120))
    )
    return path


def make_config(
    text: Path, *, sequence_parallel=True, tied=False, microbatches=1, remat="none", **groups
) -> Config:
    settings = dict(
        model=dict(MODEL, tie_embeddings=tied, init_std=0.1),
        data=dict(source=str(text), tokenizer="bytes", sequence_length=32, validation_fraction=0.0),
        train=dict(batch_size=32, microbatches=microbatches, z_loss=1e-3),
        parallel=dict(sequence_parallel=sequence_parallel),
        memory=dict(remat=remat),
        loss=dict(chunk=24),
    )
    for group, fields in groups.items():
        settings[group] = {**settings.get(group, {}), **fields}
    return verify.in_float32(resolve(configure(**settings)))


@functools.cache
def first_batch(config: Config) -> Batch:
    corpus = open_corpus(config.data, vocab_size=config.model.vocab_size, seed=0)
    return load_batch(config, corpus.train)


def initial_parameters(config: Config, mesh: Mesh) -> dict[str, np.ndarray]:
    """The freshly initialised parameters by name, as a checkpoint holds them."""
    with jax.set_mesh(mesh):
        state = program.to_network(jax.jit(lambda: init_state(config))(), config)
        return {name: np.asarray(leaf) for name, leaf in named_leaves(state.model).items()}


@functools.cache
def reference(config: Config) -> verify.Result:
    assert config == verify.reference_config(config)
    return verify.run_batch(config, make_mesh(MeshConfig(), jax.devices()[:1]), first_batch(config))


def check(config: Config, sizes: dict[str, int]) -> None:
    """Holds `config` on a mesh against its plainest form on one device."""
    mesh = MeshConfig(**sizes)
    validate_mesh(config, mesh)
    plain = verify.reference_config(config)
    batch = first_batch(plain)
    assert (batch.segments.max(-1) > 1).any() or not config.data.packing, (
        "no window holds two documents"
    )
    result = verify.run_batch(config, make_mesh(mesh, jax.devices()[: mesh.devices]), batch)
    report = verify.compare(result, reference(plain), GRADIENT_TOLERANCE)
    assert report["equal"], {
        name: error for name, error in report["gradients"].items() if error > GRADIENT_TOLERANCE
    }
    assert report["loss"]["relative_error"] <= LOSS_TOLERANCE


@pytest.mark.parametrize(
    ("sizes", "variant"),
    [
        (dict(tensor=8), (True, False, 1)),
        (dict(sequence=8), (True, True, 4)),
        (dict(data=2, fsdp=4), (True, False, 4)),
        (dict(fsdp=2, sequence=2, tensor=2), (True, True, 4)),
        (dict(fsdp=2, sequence=2, tensor=2), (False, False, 4)),
        (dict(data=2, tensor=4), (False, True, 1)),
    ],
    ids=str,
)
def test_mesh_of_eight(text, sizes, variant):
    sequence_parallel, tied, microbatches = variant
    check(
        make_config(
            text, sequence_parallel=sequence_parallel, tied=tied, microbatches=microbatches
        ),
        sizes,
    )


@pytest.mark.parametrize(
    ("sizes", "parallel", "groups"),
    [
        (dict(data=2, fsdp=2, tensor=2), dict(gather="per_step"), dict(train=dict(microbatches=4))),
        (dict(data=4, tensor=2), dict(optimizer_sharding="data"), dict(train=dict(microbatches=2))),
        (
            dict(data=2, fsdp=2, sequence=2),
            dict(optimizer_sharding="data", gather="per_step"),
            dict(memory=dict(remat="full"), model=dict(MODEL, tie_embeddings=True, init_std=0.1)),
        ),
    ],
    ids=["per step", "ZeRO-1", "ZeRO-1 and per step, tied"],
)
def test_weights_gathered_elsewhere(text, sizes, parallel, groups):
    check(make_config(text, parallel=parallel, **groups), sizes)


# Both scales are shared by heads that lie on several devices; one microbatch and several, with and
# without sequence parallelism, and where weights are gathered.
@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        (dict(data=2, tensor=2), dict(sequence_parallel=False)),
        (dict(fsdp=2, sequence=2, tensor=2), dict(microbatches=4)),
        *(
            pytest.param(sizes, groups, marks=pytest.mark.slow)
            for sizes, groups in (
                (
                    dict(data=2, fsdp=2, tensor=2),
                    dict(
                        microbatches=2,
                        parallel=dict(optimizer_sharding="data", gather="per_step"),
                    ),
                ),
                (
                    dict(sequence=2, tensor=2),
                    dict(sequence_parallel=False, parallel=dict(context="ring")),
                ),
                (
                    dict(data=2, sequence=2),
                    dict(microbatches=2, parallel=dict(context="ulysses")),
                ),
                (
                    dict(fsdp=2, tensor=2),
                    dict(memory=dict(remat="dots", offload="residual,query,key")),
                ),
            )
        ),
    ],
    ids=str,
)
def test_qk_norm(text, sizes, groups):
    check(make_config(text, model=dict(MODEL, init_std=0.1, qk_norm=True), **groups), sizes)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("sizes", ALL_MESHES, ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_every_mesh_of_eight(text, sizes, variant):
    sequence_parallel, tied, microbatches = variant
    check(
        make_config(
            text, sequence_parallel=sequence_parallel, tied=tied, microbatches=microbatches
        ),
        sizes,
    )


@pytest.mark.parametrize(
    ("sizes", "model", "groups"),
    [
        # odd everything: three key-value heads, one layer, vocabulary and widths of 3 and 5
        (
            dict(fsdp=2, tensor=3),
            dict(vocab_size=273, dim=30, layers=1, heads=6, kv_heads=3, head_dim=10, ffn_dim=33),
            dict(data=dict(sequence_length=15), train=dict(batch_size=2)),
        ),
        # one sequence a device, a chunk larger than the tokens, full remat, the expert axis as one
        # more batch axis
        (
            dict(fsdp=2, expert=2, sequence=2),
            dict(layers=3, heads=4, kv_heads=1),
            dict(train=dict(batch_size=4), loss=dict(chunk=10_000), memory=dict(remat="full")),
        ),
        # unpacked documents, padded
        (
            dict(data=2, sequence=2, tensor=2),
            dict(rope_scaling=dict(factor=8.0)),
            dict(data=dict(packing=False)),
        ),
    ],
    ids=["odd sizes", "remat and expert", "unpacked"],
)
def test_unusual_sizes(text, sizes, model, groups):
    check(make_config(text, model={**MODEL, "init_std": 0.1, **model}, **groups), sizes)


@pytest.mark.parametrize(
    "memory",
    [
        *(dict(remat=remat) for remat in ("none", "dots", "attention", "full", "value,up")),
        dict(remat="dots", offload="residual,query,gate"),
    ],
    ids=lambda memory: "-".join(memory.values()),
)
def test_what_is_kept_changes_nothing(text, memory):
    check(make_config(text, microbatches=2, memory=memory), dict(fsdp=2, sequence=2, tensor=2))


@pytest.mark.parametrize(
    "microbatches", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 4)), 8]
)
def test_microbatches_change_nothing(text, microbatches):
    check(make_config(text, microbatches=microbatches), dict(data=2, fsdp=2))


def test_initialisation_does_not_depend_on_the_mesh(text):
    config = make_config(text)
    one = initial_parameters(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    for sizes in (dict(tensor=8), dict(data=2, fsdp=2, tensor=2)):
        other = initial_parameters(config, make_mesh(MeshConfig(**sizes)))
        assert all((one[name] == other[name]).all() for name in one)
    assert len({leaf.std() for leaf in one.values()}) > 5, "parameters look alike"
