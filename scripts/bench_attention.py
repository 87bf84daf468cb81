"""Times attention of one layer, forward and backward: cuDNN's causal call alone (no documents), and
`attend` in each implementation, on the GPU that is there. Prints a table, and JSON with --json.

    python scripts/bench_attention.py --batch=4 --length=4096 --heads=32 --kv_heads=8 --head_dim=128
    --document=1000
"""

import argparse
import json
import sys
from pathlib import Path

from arguments import parser

if __name__ == "__main__":  # before jax is imported, which takes seconds
    flags = parser(__doc__)
    defaults = dict(
        batch=4, length=4096, heads=32, kv_heads=8, head_dim=128, document=1000, repeats=20
    )
    for name, default in defaults.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--json", help="file for the results")
    OPTIONS = flags.parse_args()

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import reshard
from stopwatch import seconds

from jaxpar.attention import Options, TokenInfo, attend
from jaxpar.config import MeshConfig
from jaxpar.sharding import Rules, make_mesh


def documents(batch: int, length: int, mean: int) -> TokenInfo:
    """Rows of documents of exponentially distributed lengths; `mean` 0: one document a row."""
    random = np.random.default_rng(0)
    begins = random.random((batch, length)) < (1 / mean if mean else 0)
    begins[:, 0] = True
    place = np.arange(length)
    positions = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    return TokenInfo(
        jnp.asarray(positions, jnp.int32), jnp.asarray(np.cumsum(begins, axis=1), jnp.int32)
    )


def main(asked: argparse.Namespace) -> int:
    device = jax.devices()[0]
    if device.platform != "gpu":
        print(f"bench_attention needs a GPU; this is {device.device_kind}", file=sys.stderr)
        return 2
    shape = asked.batch, asked.length, asked.head_dim
    draw = np.random.default_rng(0).standard_normal
    q, k, v = (
        jnp.asarray(draw((*shape[:2], n, shape[2]), np.float32), jnp.bfloat16)
        for n in (asked.heads, asked.kv_heads, asked.kv_heads)
    )
    packed, whole = documents(*shape[:2], asked.document), documents(*shape[:2], 0)
    rules = Rules()

    def ours(info: TokenInfo, **options):
        def run(q, k, v):
            queries, keys = (
                jax.tree.map(lambda x, spec=spec: reshard(x, spec), info)
                for spec in (rules.spec("batch", "seq"), rules.spec("batch", None))
            )
            placed = (
                reshard(x, rules.spec("batch", "seq", "heads", "head_dim")) for x in (q, k, v)
            )
            return attend(*placed, queries, keys, rules, Options(**options))

        return run

    def alone(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    cases = {
        "cuDNN alone, one document": alone,
        "cudnn, one document, unpacked": ours(whole, packed=False, implementation="cudnn"),
        "cudnn, one document, packed": ours(whole, implementation="cudnn"),
        "cudnn, packed documents": ours(packed, implementation="cudnn"),
        "xla, packed documents": ours(packed, implementation="xla"),
    }
    results = {}
    with jax.set_mesh(make_mesh(MeshConfig(), [device])):
        for name, function in cases.items():
            both = jax.jit(
                jax.grad(lambda *qkv, f=function: f(*qkv).astype(jnp.float32).sum(), (0, 1, 2))
            )
            forward = seconds(jax.jit(function), q, k, v, repeats=asked.repeats)
            results[name] = dict(
                forward=forward, both=seconds(both, q, k, v, repeats=asked.repeats)
            )
    first = next(iter(results.values()))
    print(f"{device.device_kind}, jax {jax.__version__}, bf16, {vars(asked)}")
    print("| | forward, ms | forward and backward, ms | of cuDNN alone |\n|---|---|---|---|")
    for name, row in results.items():
        share = first["both"] / row["both"]
        print(f"| {name} | {row['forward'] * 1e3:.2f} | {row['both'] * 1e3:.2f} | {share:.2f} |")
    if asked.json:
        found = dict(device=device.device_kind, jax=jax.__version__, **vars(asked), results=results)
        Path(asked.json).write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
