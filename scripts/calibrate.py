"""Measures the rates that `plan` computes times with, and writes them as a hardware file.

  python scripts/calibrate.py --output=h100.toml     # on the machine itself; its GPU must be free
  python -m jaxpar.plan --hardware=h100.toml --devices=64 --config=...

Matmuls of several widths, a copy of a large array, attention forward and backward by the kernel
that a run of packed documents takes here (one document a row, for which `plan` counts; shorter ones
are shown beside it), and with several devices an all-gather over all of them; of random numbers,
for zeros take less power. Links between hosts are not measured. On GPUs that jaxpar knows, rates
are shares of the peaks of their data sheets; elsewhere, on CPUs too, the peak is the best rate that
was reached.
"""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

from arguments import parser

if __name__ == "__main__":  # before jax is imported, which takes seconds
    flags = parser(__doc__)
    flags.add_argument("--output", type=Path, required=True, help="the TOML file to write")
    flags.add_argument("--rows", type=int, default=8192, help="of the matrices")
    flags.add_argument("--length", type=int, default=8192, help="of the sequence of attention")
    flags.add_argument("--heads", type=int, default=32, help="query heads of attention")
    flags.add_argument("--kv_heads", type=int, default=8, help="its key-value heads")
    flags.add_argument("--head_dim", type=int, default=128, help="numbers of one of its heads")
    flags.add_argument("--document", type=int, default=1000, help="mean tokens of short documents")
    flags.add_argument(
        "--mib", type=int, default=1024, help="of the arrays that are copied and gathered"
    )
    flags.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    flags.add_argument("--repeats", type=int, default=10)
    OPTIONS = flags.parse_args()

import jax
import jax.numpy as jnp
import numpy as np
from bench_attention import documents
from stopwatch import seconds

from jaxpar.attention import Options, TokenInfo, attend, refuses_cudnn
from jaxpar.config import MeshConfig
from jaxpar.estimate import hardware
from jaxpar.kernels.matmul import einsum
from jaxpar.sharding import Rules, make_mesh


def normal(shape: tuple[int, ...], dtype: str, spread: float = 1.0) -> jax.Array:
    """Random numbers of a normal distribution."""
    draw = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    return jnp.asarray(spread * draw, dtype)


def matmul_rate(rows: int, narrow: int, dtype: str, repeats: int, turns: int = 8) -> float:
    """FLOP/s of [rows, rows] x [rows, narrow] and back, again and again."""
    x = normal((rows, rows), dtype)
    # Products have the spread of what they are made of.
    down, up = (
        normal((rows, narrow), dtype, rows**-0.5),
        normal((narrow, rows), dtype, narrow**-0.5),
    )

    @jax.jit
    def run(x, down, up):
        return jax.lax.fori_loop(
            0, turns, lambda _, x: einsum("ab,bc->ac", einsum("ab,bc->ac", x, down), up), x
        )

    return turns * 4 * rows * rows * narrow / seconds(run, x, down, up, repeats=repeats)


def fit(rates: dict[int, float]) -> tuple[float, float]:
    """Rate of wide matmuls, and the width at which half of it is reached: seconds = (1 + half /
    width) / rate, fitted by least squares relative to what was measured."""
    widths, measured = np.array(list(rates), float), np.array(list(rates.values()))
    columns = np.stack([np.ones_like(widths), 1 / widths], axis=1) * measured[:, None]
    (inverse, slope), *_ = np.linalg.lstsq(columns, np.ones_like(widths), rcond=None)
    best = measured.max()
    return (1 / inverse, max(0.0, slope / inverse)) if 0 < 1 / inverse < 2 * best else (best, 0.0)


def copy_rate(size: int, repeats: int) -> float:
    """Bytes/s, read and written."""
    x = normal((size // 4,), "float32")
    return 2 * size / seconds(jax.jit(lambda x: x + 1), x, repeats=repeats)


OF_RUNS = Options(packed=True, implementation="auto")
"""Attention as runs take it unless they are told otherwise."""


def attention_shape(options: argparse.Namespace) -> tuple[int, int, int, int]:
    """[B, S, H, K] of the queries."""
    return 1, options.length, options.heads, options.head_dim


def attention_rate(options: argparse.Namespace, document: int) -> float:
    """FLOP/s of the causal half of one row, forward and backward, as `counts.Flops` counts them
    whatever the documents, which have so many tokens in the mean; 0: the row is one."""
    rules, shape = Rules(), attention_shape(options)
    _, length, heads, head_dim = shape
    placed = rules.spec("batch", "seq", "heads", "head_dim")
    q, k, v = (
        jax.device_put(normal((1, length, n, head_dim), options.dtype), placed)
        for n in (heads, options.kv_heads, options.kv_heads)
    )
    info: TokenInfo = documents(1, length, document)
    queries = jax.device_put(info, rules.spec("batch", "seq"))
    keys = jax.device_put(info, rules.spec("batch", None))

    def objective(q, k, v):
        return jnp.sum(attend(q, k, v, queries, keys, rules, OF_RUNS).astype(jnp.float32))

    both = jax.jit(jax.grad(objective, (0, 1, 2)))
    return 6 * length**2 * heads * head_dim / seconds(both, q, k, v, repeats=options.repeats)


def link_rate(size: int, repeats: int) -> float:
    """Bytes/s that a device sends in an all-gather of `size` bytes over all devices, in a ring."""
    n = len(jax.devices())
    mesh = jax.make_mesh((n,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(
        normal((n, size // 4 // n), "float32"), jax.NamedSharding(mesh, jax.P("all"))
    )
    gather = jax.jit(lambda x: x + 0, out_shardings=jax.NamedSharding(mesh, jax.P()))
    return (n - 1) / n * size / seconds(gather, x, repeats=repeats)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """All rates of this machine: FLOP/s and bytes/s, and `half`, a width."""
    dtype, repeats = options.dtype, options.repeats
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        widths = [n for n in (64, 128, 256, 512, 1024, 2048, 4096, 8192) if n <= options.rows]
        rates = {n: matmul_rate(options.rows, n, dtype, repeats) for n in widths}
        for width, rate in rates.items():
            print(f"matmul, width {width}: {rate / 1e12:.3f} TFLOP/s")
        wide, half = fit(rates)
        found = dict(matmul=wide, half=half, best=max(rates.values()))
        found["copy"] = copy_rate(options.mib * 2**20, repeats)
        why = refuses_cudnn(attention_shape(options), dtype, OF_RUNS)
        print(f"attention by {f'XLA: {why}' if why else 'cuDNN'}")
        found["attention"] = attention_rate(options, 0)
        short = attention_rate(options, options.document)
        print(f"attention, documents of {options.document} tokens: {short / 1e12:.3f} TFLOP/s")
    if len(jax.devices()) > 1:
        found["link"] = link_rate(options.mib * 2**20, repeats)
    for name, rate in found.items():
        print(f"{name}: {rate:.4g}")
    return found


def describe(found: dict[str, float], output: Path, dtype: str) -> dict[str, str | float | int]:
    """The fields of the hardware file; writes the description of a known GPU beside it."""
    device, count = jax.devices()[0], len(jax.devices())
    known = next(
        (gpu for gpu in map(hardware.find, hardware.NAMES) if gpu.kind == device.device_kind), None
    )
    versions = f"jax {jax.__version__}, jaxlib {jax.lib.__version__}, {platform.platform()}"
    where = f"{count} x {device.device_kind}, {versions}"
    fields: dict[str, str | float | int] = {
        "measured": f"{datetime.date.today()} by scripts/calibrate.py on {where}"
    }
    if known:
        output.with_suffix(".txtpb").write_text(known.target)
        peak, bandwidth, link = known.peak(dtype), known.memory_bandwidth, known.link
        fields |= dict(target=output.with_suffix(".txtpb").name, network_gbps=known.network / 1e9)
        fields |= dict(domain=known.domain, host=known.host)
    else:
        peak, bandwidth, link = found["best"], found["copy"], found.get("link", 1e9)
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = (device.memory_stats() or {}).get("bytes_limit", whole)
        fields |= dict(
            kind=device.device_kind, memory_gib=limit / 2**30, memory_gbps=bandwidth / 1e9
        )
        fields |= {f"{dtype}_tflops": peak / 1e12}
        fields |= dict(network_gbps=1.0, domain=count, host=count)
    fields |= dict(
        link_gbps=link / 1e9, matmul_share=found["matmul"] / peak, matmul_half=found["half"]
    )
    fields |= dict(attention_share=found["attention"] / peak, copy_share=found["copy"] / bandwidth)
    return fields | ({"link_share": found["link"] / link} if "link" in found else {})


def main(options: argparse.Namespace) -> None:
    fields = describe(measure(options), options.output, options.dtype)
    lines = [
        f"{name} = {json.dumps(round(v, 6) if isinstance(v, float) else v)}"
        for name, v in fields.items()
    ]
    options.output.write_text("\n".join(lines) + "\n")
    print(
        f"wrote {options.output}: python -m jaxpar.plan --hardware={options.output} --devices=N "
        "--config=FILE"
    )


if __name__ == "__main__":
    main(OPTIONS)
