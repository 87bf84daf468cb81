"""The vocabulary sharded over `tensor` (and `pipeline`): embedding lookup, and the softmax
statistics of the head.

What reads `local block` runs inside a full-manual region; `lookup` makes its own. Suffixes of local
blocks have small letters where a dimension is split: b, s (over sequence, and over tensor where the
residual is), v (axes of `vocab`).

Inside the region of a pipeline the cotangent of what several devices hold is the sum of their
shares.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxpar.sharding import Rules, all_manual


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table_VD: jax.Array, tokens_BS: jax.Array, rules: Rules) -> jax.Array:
    """Rows of an embedding whose vocabulary is sharded.

    Every device looks up the tokens whose rows it holds; the sum over the vocabulary's axes has one
    term a token, so it is exact in any dtype. In the gradient the contributions of a frequent token
    add up in float32 before anything is rounded.

    Args:
      table_VD: gathered over fsdp, sharded over the axes of `vocab`.
      tokens_BS: int32, sharded (batch, sequence).
      rules: the sharding table.

    Returns:
      [B, S, D] in the dtype of the table, laid out as the residual.

    Communication: the rows over tensor (reduce-scatter, or all-reduce without sequence
    parallelism). Backward: their gradient over tensor (all-gather with sequence parallelism). That
    of the table stays a partial sum over the tokens. In a pipeline besides, in both directions, an
    all-reduce of the rows over it.
    """

    def local(table_vD: jax.Array, tokens_bs: jax.Array) -> jax.Array:
        here_bs, row_bs = _held_here(tokens_bs, table_vD.shape[0], rules.vocab)
        x_bsD = jnp.where(here_bs[..., None], table_vD[row_bs], 0)
        return _sum_stages(
            scatter_tokens(x_bsD) if _shards_sequence(rules) else sum_tokens(x_bsD), rules
        )

    island = _manual(
        local,
        in_specs=(rules.spec("vocab", "embed"), rules.spec("batch", "seq")),
        out_specs=rules.spec("batch", "residual_seq", "embed"),
    )
    return island(as_plain(table_VD), tokens_BS)


def _lookup_forward(table_VD, tokens_BS, rules):
    return lookup(table_VD, tokens_BS, rules), (
        tokens_BS,
        table_VD,
    )  # of the table only the type is used


def _lookup_backward(rules, residuals, dx_BSD):
    tokens_BS, table_VD = residuals
    island = _manual(
        functools.partial(
            _lookup_gradient, rows=_local_rows(table_VD, rules), rules=rules, shares=all_manual()
        ),
        in_specs=(rules.spec("batch", "residual_seq", "embed"), rules.spec("batch", "seq")),
        out_specs=rules.spec("vocab", "embed", unreduced=deferred(table_VD)),
    )
    return island(dx_BSD, tokens_BS), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def _lookup_gradient(
    dx_bsD: jax.Array, tokens_bs: jax.Array, *, rows: int, rules: Rules, shares: bool
) -> jax.Array:
    dx_bSD = _sum_stages(dx_bsD, rules)
    if _shards_sequence(rules):
        dx_bSD = gather_tokens(dx_bSD)
    elif shares:
        dx_bSD = sum_tokens(dx_bSD)
    here_bs, row_bs = _held_here(tokens_bs, rows, rules.vocab)
    # A zero of its own, made late: else XLA shares one with the gradient of the head, for the whole
    # backward pass.
    dx_bSD, zero = jax.lax.optimization_barrier((dx_bSD, jnp.zeros((), jnp.float32)))
    dtable_vD = jnp.full((rows, dx_bSD.shape[-1]), zero)
    dtable_vD = dtable_vD.at[row_bs].add(
        jnp.where(here_bs[..., None], dx_bSD.astype(jnp.float32), 0)
    )
    return dtable_vD.astype(dx_bsD.dtype)


def _held_here(
    tokens_bs: jax.Array, rows: int, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Which tokens have their row on this device, and which row of its block (0 for the others)."""
    row_bs = tokens_bs - jax.lax.axis_index(axes) * rows
    here_bs = (row_bs >= 0) & (row_bs < rows)
    return here_bs, jnp.where(here_bs, row_bs, 0)


def _local_rows(table_VD: jax.Array, rules: Rules) -> int:
    """Rows of the table on one device."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return (
        table_VD.shape[0]
        if all_manual()
        else table_VD.shape[0] // math.prod(sizes[axis] for axis in rules.vocab)
    )


def _shards_sequence(rules: Rules) -> bool:
    return "tensor" in rules.residual_seq


def _sum_stages(x_bsD: jax.Array, rules: Rules) -> jax.Array:
    return jax.lax.psum(x_bsD, "pipeline") if "pipeline" in rules.vocab else x_bsD


def as_plain(weight: jax.Array) -> jax.Array:
    """An entered weight (`reduce.enter_step`) without its reduced axes, for a manual region. No
    communication."""
    return jax.sharding.reshard(weight, jax.P(*jax.typeof(weight).sharding.spec.partitions))


def deferred(weight: jax.Array) -> frozenset[str]:
    """The axes over which the gradient of an entered weight is to stay a partial sum.

    Raises:
      ValueError: the weight was not entered, so nobody would take the sum.
    """
    reduced = jax.typeof(weight).sharding.spec.reduced
    if not reduced and not all_manual() and jax.sharding.get_abstract_mesh().size > 1:
        raise ValueError(
            f"{jax.typeof(weight)} needs reduce.enter_step before it is differentiated"
        )
    return reduced


def _manual(local, *, in_specs, out_specs):
    """A full-manual region through which nothing is differentiated: both directions spell out their
    sums."""
    specs = dict(in_specs=in_specs, out_specs=out_specs)
    return jax.shard_map(local, **specs, check_vma=False)  # see above


def gather_tokens(x_bsD: jax.Array) -> jax.Array:
    """Residual sharded along the sequence over `tensor` -> whole there. All-gather of b*S*D."""
    return jax.lax.all_gather(x_bsD, "tensor", axis=1, tiled=True)


def scatter_tokens(dx_bSD: jax.Array) -> jax.Array:
    """Sums partial gradients over `tensor` and leaves each device its tokens. Reduce-scatter of
    b*S*D."""
    return jax.lax.psum_scatter(dx_bSD, "tensor", scatter_dimension=1, tiled=True)


def sum_tokens(dx_bSD: jax.Array) -> jax.Array:
    """Sums partial gradients over `tensor`. All-reduce of b*S*D."""
    return jax.lax.psum(dx_bSD, "tensor")


def log_partition(
    logits_cv: jax.Array, target_c: jax.Array, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax statistics over a sharded vocabulary (Megatron's vocabulary-parallel loss).

    The target is found by comparison with an iota, because a gather of a logit would need its
    owner's index. Two all-reduces: the maximum (c float32), then the sum of exponentials and the
    target logit together (2c float32).

    Args:
      logits_cv: float32 [C, v], the columns of this device.
      target_c: int32 [C], ids in the whole vocabulary, or -1.
      axes: over which the vocabulary is sharded.

    Returns:
      Log of the partition function [C], logit of the target [C] (0 where there is none), and where
      this device holds the target [C, v].
    """
    first = jax.lax.axis_index(axes) * logits_cv.shape[1]
    hit_cv = jnp.arange(logits_cv.shape[1]) + first == target_c[:, None]
    top_c = jax.lax.pmax(jnp.max(logits_cv, axis=1), axes)
    partial_c2 = jnp.stack(
        [
            jnp.sum(jnp.exp(logits_cv - top_c[:, None]), axis=1),
            jnp.sum(jnp.where(hit_cv, logits_cv, 0), axis=1),
        ],
        axis=1,
    )
    total_c2 = jax.lax.psum(partial_c2, axes)
    return jnp.log(total_c2[:, 0]) + top_c, total_c2[:, 1], hit_cv
