"""Names for the leaves of a pytree: `layers.attention.query`, `optimizer.mu.layers.mlp.up`."""

import collections
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


def leaf_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a key path; the `value` in which NNX wraps every parameter is left out."""
    parts = [_part(key) for key in path]
    if len(parts) > 1 and parts[-1] == "value":
        parts.pop()
    return ".".join(parts)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by name, in the order of `jax.tree.leaves`.

    Positions in tuples and lists are left out where the name is unique without them, so that a link
    more or less in an `optax.chain` leaves `optimizer.mu.layers.attention.query` what it is.
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    leaves, full = [leaf for _, leaf in pairs], [leaf_name(path) for path, _ in pairs]
    short = [".".join(part for part in name.split(".") if not part.isdecimal()) for name in full]
    uses = collections.Counter(short)
    names = [
        few if few and uses[few] == 1 else whole for few, whole in zip(short, full, strict=True)
    ]
    return dict(zip(names, leaves, strict=True))


def _part(key: Any) -> str:
    match key:
        case GetAttrKey():
            return key.name
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case SequenceKey():
            return str(key.idx)
    return str(key)
