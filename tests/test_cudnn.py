"""What is asked of cuDNN, on CPUs: its calls are emulated to the letter of their interface
(`fused_emulation`), so that offsets, lengths, padding, shards and gradients are held against XLA.
On a GPU: test_attention_gpu.py."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import fused_emulation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxpar import attention
from jaxpar.attention import Options, TokenInfo, attend
from jaxpar.config import ConfigError, MeshConfig
from jaxpar.kernels import cudnn
from jaxpar.sharding import Rules, make_mesh

S = 48


def rows(lengths: list[list[int]], length: int = S) -> TokenInfo:
    """Rows of documents of these lengths, from the start; the rest of a row is padding."""
    positions, segments = np.zeros((2, len(lengths), length), np.int32)
    for row, documents in enumerate(lengths):
        at = 0
        for number, count in enumerate(documents):
            end = min(at + count, length)
            positions[row, at:end], segments[row, at:end] = np.arange(end - at), number + 1
            at = end
    return TokenInfo(positions, segments)


def random_rows(seed: int, count: int) -> TokenInfo:
    random = np.random.default_rng(seed)
    documents = [
        list(random.choice([1, 1, 2, 3, 7, 20, 60], random.integers(1, 14))) for _ in range(count)
    ]
    return rows(documents)


PACKED = {
    "one document": rows([[S], [S]]),
    "two, the second cut by the end": rows([[20, 90], [1, 90]]),
    "documents of one token": rows([[1] * S, [1, 1, 46]]),
    "padding": rows([[10, 5], [3]]),
    "an empty row": rows([[], [S]]),
    "more in one row than at a time": rows([[3] * 9, [S]]),
    **{f"random {seed}": random_rows(seed, 2) for seed in range(3)},
}


def results(mesh, info: TokenInfo, options: Options, dtype=jnp.float32, head_dim=8):
    """Result and gradients of tokens that are not padding."""
    rules, (B, T) = Rules(), info.positions.shape
    draw = np.random.default_rng(1).standard_normal
    seen = (info.segments > 0)[..., None, None]

    def total(q, k, v, queries, keys):
        o = attend(q, k, v, queries, keys, rules, options).astype(jnp.float32)
        # As in training, no loss depends on padding, though its queries may compute anything.
        o = jnp.where(jax.reshard(seen, rules.spec("batch", "seq", None, None)), o, 0)
        return jnp.sum(jnp.sin(o)), o

    with jax.set_mesh(mesh):

        def put(x, *names):
            return jax.device_put(x, NamedSharding(mesh, rules.spec(*names)))

        heads = ("heads", 4), ("kv_heads", 2), ("kv_heads", 2)
        qkv = [
            put(
                draw((B, T, n, head_dim), np.float32).astype(dtype),
                "batch",
                "seq",
                name,
                "head_dim",
            )
            for name, n in heads
        ]
        queries, keys = (TokenInfo(*(put(x, "batch", dim) for x in info)) for dim in ("seq", None))
        return jax.tree.map(
            np.asarray, jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*qkv, queries, keys)
        )


@pytest.mark.parametrize(
    ("sizes", "context"),
    [
        (MeshConfig(), "all_gather"),
        (MeshConfig(sequence=4), "all_gather"),
        (MeshConfig(sequence=2, tensor=2), "all_gather"),
        (MeshConfig(data=2, sequence=2), "ulysses"),
    ],
    ids=["one device", "four parts", "two parts and heads", "Ulysses"],
)
@pytest.mark.parametrize("info", PACKED.values(), ids=PACKED)
def test_packed_documents(info, sizes, context, monkeypatch):
    """With two documents at a time and NaN wherever cuDNN writes nothing."""
    mesh = make_mesh(sizes, jax.devices()[: sizes.devices])
    expected = results(mesh, info, Options(context))
    fused_emulation.install(monkeypatch)
    monkeypatch.setattr(cudnn, "documents_at_a_time", lambda tokens: 2)
    found = results(mesh, info, Options(context, implementation="cudnn"))
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "sizes", [MeshConfig(), MeshConfig(sequence=4)], ids=["one device", "four parts"]
)
def test_unpacked_documents_and_padding(sizes, monkeypatch):
    mesh, info = make_mesh(sizes, jax.devices()[: sizes.devices]), rows([[30], [S]])
    expected = results(mesh, info, Options())
    fused_emulation.install(monkeypatch)
    found = results(mesh, info, Options(packed=False, implementation="cudnn"))
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-6)


def test_the_emulation_takes_documents_as_cudnn_does(monkeypatch):
    """The offsets and lengths of one example, written out: 4 heads of 8, rows of 6 tokens, two
    documents at a time."""
    info, seen = rows([[2, 3], [4, 1, 1]], 6), []
    monkeypatch.setattr(
        cudnn,
        "_forward_call",
        lambda q, k, v, packed, causal: seen.append((packed, causal)) or stop(),
    )

    def stop():
        raise InterruptedError

    x = np.zeros((2, 6, 4, 8), np.float32)
    number = cudnn.document_numbers(*info)
    np.testing.assert_array_equal(number, [[0, 0, 1, 1, 1, -1], [0, 0, 0, 0, 1, 2]])
    for first in (0, 2):
        with pytest.raises(InterruptedError):
            cudnn._boxed_forward(x, x, x, cudnn.own_boxes(number, first, 2, 0), causal=True)
    (one, _), (two, _) = seen
    np.testing.assert_array_equal(one.q_length, [[2, 3], [4, 1]])
    np.testing.assert_array_equal(one.q_offset, np.array([[0, 2, 6], [10, 12, 12]]) * 32)
    np.testing.assert_array_equal(two.q_length, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(two.k_offset, np.array([[11, 12, 12], [12, 12, 12]]) * 32)


REFUSED = {
    "a CPU": (None, "bfloat16", 64, False, "needs NVIDIA GPUs of compute capability 8.0"),
    "Volta": ((7, 0), "bfloat16", 64, False, "needs NVIDIA GPUs of compute capability 8.0"),
    "float32": ((9, 0), "float32", 64, False, "precision.compute is float32"),
    "an odd head": (
        (9, 0),
        "bfloat16",
        68,
        False,
        "model.head_dim=68 must be a multiple of 8 and at most 256",
    ),
    "a large head": (
        (8, 6),
        "bfloat16",
        136,
        False,
        "model.head_dim=136 must be a multiple of 8 and at most 128",
    ),
    "packed before Hopper": ((8, 6), "bfloat16", 64, True, "use data.packing=false"),
}
HONOURED = [
    ((8, 0), 64, False),
    ((8, 6), 128, False),
    ((9, 0), 64, True),
    ((9, 0), 256, True),
    ((10, 0), 128, True),
]


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "packed", "why"), REFUSED.values(), ids=REFUSED
)
def test_what_cudnn_cannot(capability, dtype, head_dim, packed, why):
    assert why in cudnn.refusal(capability, jnp.dtype(dtype), (1, 128, 8, head_dim), packed=packed)


@pytest.mark.parametrize(("capability", "head_dim", "packed"), HONOURED, ids=str)
def test_what_cudnn_can(capability, head_dim, packed):
    assert not cudnn.refusal(
        capability, jnp.dtype("bfloat16"), (1, 128, 8, head_dim), packed=packed
    )


@pytest.mark.parametrize(
    ("sizes", "options", "why"),
    [
        (MeshConfig(), Options(), "needs NVIDIA GPUs"),
        (MeshConfig(sequence=4), Options("ring"), "parallel.context=ulysses or all_gather"),
        (MeshConfig(sequence=4), Options(zigzag=True), "use parallel.zigzag=false"),
    ],
    ids=["CPUs", "ring", "zigzag"],
)
def test_asked_for_it_is_refused_and_auto_takes_xla(sizes, options, why):
    mesh, info = make_mesh(sizes, jax.devices()[: sizes.devices]), rows([[30], [S]])
    expected = results(mesh, info, options)
    auto = results(mesh, info, dataclasses.replace(options, implementation="auto"))
    jax.tree.map(np.testing.assert_array_equal, auto, expected)
    with pytest.raises(
        ConfigError, match=f"attention.implementation=cudnn: .*{why}.*implementation=auto"
    ):
        results(mesh, info, dataclasses.replace(options, implementation="cudnn"))
    assert attention.Options().implementation == "xla"


ROOT = Path(__file__).parents[1]
HIDDEN = """
import sys
import jax, jax.numpy as jnp
import jax._src.cudnn
name = "fused_attention_stablehlo"
sys.modules[f"jax._src.cudnn.{name}"] = None
delattr(jax._src.cudnn, name)

from jaxpar import train, verify
from jaxpar.attention import Options, TokenInfo, attend
from jaxpar.compile import check_attention
from jaxpar.config import MeshConfig, configure
from jaxpar.kernels import cudnn
from jaxpar.sharding import Rules, make_mesh
from jaxpar.validation import resolve

mesh = make_mesh(MeshConfig(), jax.devices()[:1])
with jax.set_mesh(mesh):
    rules = Rules()
    x = jax.reshard(jnp.ones((1, 4, 2, 8)), rules.spec("batch", "seq", "heads", "head_dim"))
    ones = jnp.ones((1, 4), jnp.int32)
    queries, keys = (jax.reshard(ones, rules.spec("batch", name)) for name in ("seq", None))
    queries, keys = TokenInfo(queries, queries), TokenInfo(keys, keys)
    print(attend(x, x, x, queries, keys, rules, Options(implementation="auto")).sum())
model = dict(vocab_size=64, dim=16, layers=1, heads=2, ffn_dim=16)
print(check_attention(resolve(configure(model=model, data=dict(sequence_length=8))), mesh))
print(cudnn.refusal((9, 0), jnp.bfloat16, (1, 4, 2, 64), packed=False))
"""


def test_a_private_module_that_moves_concerns_gpus_alone():
    """jax has imported it; jaxpar does not find it any more."""
    run = subprocess.run(
        [sys.executable, "-c", HIDDEN], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stderr
    computed, kernel, refusal = run.stdout.splitlines()
    assert float(computed) == 64
    assert kernel.startswith("xla; not cudnn: it needs NVIDIA GPUs")
    assert refusal.startswith(f"jax {jax.__version__} keeps its calls elsewhere")
