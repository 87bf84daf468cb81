"""Times the parts of one training step, each alone, beside the roofline of this device.

  python scripts/breakdown.py --config=configs/cpu_bench.py [--config.precision.compute=bfloat16]

The roofline: the rate of a large square matmul and the bandwidth of a large copy, both measured
here. `bench_step.py --breakdown` puts these parts beside a whole step and calls the difference the
rest: activations that the layer loop stacks, the embedding, the metrics, and on CPUs what the parts
gain or lose by other neighbours in the cache.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

from arguments import parser

from jaxpar import cli

if __name__ == "__main__":  # before jax is imported, which takes seconds
    try:
        REQUEST = cli.parse([*sys.argv[1:], "--workdir=unused"], __doc__ or "")
    except cli.ConfigError as error:
        parser(__doc__).error(str(error))

import jax
import jax.numpy as jnp
import optax
from calibrate import matmul_rate
from stopwatch import seconds

from jaxpar import attention, loss
from jaxpar.attention import TokenInfo
from jaxpar.config import Config
from jaxpar.estimate import counts
from jaxpar.kernels.matmul import einsum
from jaxpar.model import Llama, remat_policy
from jaxpar.optimizer import make_optimizer
from jaxpar.parallel import layers
from jaxpar.step import enter, init_state

REPEATS = 5
Row = tuple[str, float, float]
"""Name of a part, seconds that it takes, seconds that it would take at the roofline."""


def breakdown(config: Config) -> dict[str, Any]:
    """Parts of one step on the current mesh, which has one device: `rate` in FLOP/s, `bandwidth` in
    bytes/s, and `rows` of `Row`; those of layers and loss are of all layers and microbatches."""
    large = jax.default_backend() == "gpu"
    sizes = (4096, 8192) if large else (512, 1024, 2048)
    rate = max(matmul_rate(size, size, config.precision.compute, REPEATS) for size in sizes)
    long = jnp.ones(2**29 if large else 2**25, jnp.float32)
    bandwidth = 2 * long.nbytes / in_place(lambda a: a + 1, long)
    model = jax.jit(lambda: init_state(config).model)()
    parts = [*layer_parts(model, config, rate), head_part(model, config, rate)]
    rows = [(name, alone * config.train.microbatches, least) for name, alone, least in parts]
    return dict(
        rate=rate, bandwidth=bandwidth, rows=[*rows, optimizer_part(model, config, bandwidth)]
    )


def layer_parts(model: Llama, config: Config, rate: float) -> list[Row]:
    """Attention, matmuls, the rest of a layer, and what remat computes again, of all layers and one
    microbatch."""
    m, layout, L = config.model, model.layout, config.model.layers
    B, S = config.train.batch_size // config.train.microbatches, config.data.sequence_length
    at_tokens = layout.rules.spec("batch", "seq")
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S), out_sharding=at_tokens)
    shared = jax.jit(model.shared)(TokenInfo(positions, jnp.ones_like(positions)))
    layer = jax.tree.map(lambda w: w[0], enter(model, config).layers)
    x = jnp.ones((B, S, m.dim), layout.dtype, out_sharding=layout.residual)
    q, k = (
        jnp.ones(
            (B, S, heads, m.head_dim),
            layout.dtype,
            out_sharding=layout.rules.spec("batch", "seq", name, "head_dim"),
        )
        for heads, name in ((m.heads, "heads"), (m.kv_heads, "kv_heads"))
    )

    def one_layer(layer: Any, x: jax.Array) -> jax.Array:
        return layer(x, shared)[0]

    def core(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.attend(
            q, k, v, shared.queries, shared.keys, layout.rules, layout.attention
        )

    def products(layer: Any, x: jax.Array, o: jax.Array) -> tuple[jax.Array, ...]:
        a, mlp, x = layer.attention, layer.mlp, layout.column_input(x)
        gate = einsum("BSD,DF->BSF", x, layout.weight(mlp.gate))
        return (
            einsum("BSD,DHK->BSHK", x, layout.weight(a.query)),
            einsum("BSD,DGK->BSGK", x, layout.weight(a.key)),
            einsum("BSD,DGK->BSGK", x, layout.weight(a.value)),
            layout.row_parallel("BSHK,DHK->BSD", o, layout.weight(a.out)),
            einsum("BSD,DF->BSF", x, layout.weight(mlp.up)),
            layout.row_parallel("BSF,DF->BSD", gate, layout.weight(mlp.down)),
        )

    again = jax.checkpoint(
        one_layer, policy=remat_policy(config.memory)
    )  # alone, XLA would merge it with its replay
    alone, whole, with_replay = (
        both_ways(f, *arrays, turns=L)
        for f, *arrays in ((core, q, k, k), (one_layer, layer, x), (again, layer, x))
    )
    matmuls = both_ways(products, layer, x, q, turns=L)
    flops, tokens = counts.step_flops(config), config.train.batch_size * S
    head = 6 * m.dim * m.vocab_size
    return [
        ("attention", alone, flops.attention * tokens / rate),
        ("matmuls of the layers", matmuls, (flops.matmul - head) * tokens / rate),
        ("norms, rotary positions, SiLU and sums", max(whole - alone - matmuls, 0), 0.0),
        (f"computed again (remat {config.memory.remat})", max(with_replay - whole, 0), 0.0),
    ]


def head_part(model: Llama, config: Config, rate: float) -> Row:
    """Head and loss of one microbatch, with their gradients."""
    m, layout = config.model, model.layout
    B, S = config.train.batch_size // config.train.microbatches, config.data.sequence_length
    x = jnp.ones((B, S, m.dim), layout.dtype, out_sharding=layout.residual)
    targets = jnp.zeros((B, S), jnp.int32, out_sharding=layout.rules.spec("batch", "seq"))

    def head(x: jax.Array, weight: jax.Array) -> jax.Array:
        sums = loss.cross_entropy(
            x,
            weight,
            targets,
            jnp.ones(()),
            layout.rules,
            config.loss.chunk,
            0.0,
            layout.sum_dtype,
        )
        return sums.objective

    alone = both_ways(head, x, enter(model, config).head_weight())
    return "head and loss", alone, 6 * m.dim * m.vocab_size * config.train.batch_size * S / rate


def optimizer_part(model: Llama, config: Config, bandwidth: float) -> Row:
    """The update, in place. At the roofline AdamW reads parameter, gradient and two moments, and
    writes all but the
    gradient: 28 bytes a parameter."""
    optimizer = make_optimizer(config)
    state = jax.jit(optimizer.init)(model)
    gradients = jax.tree.map(jnp.ones_like, model)

    def update(carry: tuple, gradients: Any) -> tuple:
        model, state = carry
        changes, state = optimizer.update(gradients, state, model)
        return optax.apply_updates(model, changes), state

    alone = in_place(update, (jax.tree.map(jnp.copy, model), state), gradients)
    return "optimizer", alone, 28 * counts.parameter_count(config.model) / bandwidth


def in_place(function: Callable, carry: Any, *arrays: Any) -> float:
    """Seconds of a function whose result takes the place of its first argument: no new memory is
    touched."""
    held, run = [carry], jax.jit(function, donate_argnums=0)

    def again() -> Any:
        held[0] = run(held[0], *arrays)
        return held[0]

    return seconds(again, repeats=REPEATS)


def both_ways(function: Callable, *arrays: Any, turns: int = 1) -> float:
    """Seconds of `turns` calls in one program of a function and of its gradient by all arguments,
    which adds up."""

    def once(gradient: Any, arrays: tuple) -> tuple[Any, Any]:
        gradient, arrays = jax.lax.optimization_barrier(
            (gradient, arrays)
        )  # or XLA takes it out of the loop
        result, pull = jax.vjp(function, *arrays)
        return result, pull(gradient)

    def program(gradient: Any, *arrays: Any) -> tuple[Any, Any]:
        def again(_: Any, carry: tuple) -> tuple[Any, Any]:
            result, gradients = once(carry[0], arrays)
            return result, layers.add(carry[1], gradients)

        return jax.lax.fori_loop(1, turns, again, once(gradient, arrays))

    gradient = jax.jit(lambda *arrays: jax.tree.map(jnp.ones_like, function(*arrays)))(*arrays)
    return seconds(jax.jit(program), gradient, *arrays, repeats=REPEATS)


def main(request: cli.Request) -> None:
    mesh = cli.start(request, request.config)
    if mesh.size != 1:
        sys.exit(f"the breakdown is of one device, and this mesh has {mesh.size}")
    with jax.set_mesh(mesh):
        print(json.dumps(breakdown(request.config)))


if __name__ == "__main__":
    main(REQUEST)
