"""Names of leaves."""

import dataclasses
from typing import NamedTuple

import jax

from jaxpar.tree import leaf_name, named_leaves


class Moments(NamedTuple):
    mu: dict
    nu: dict


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    optimizer: tuple
    value: float


def test_positions_are_left_out_where_the_name_is_unique():
    mu = {"mlp": {"up": 1.0}}
    plain, chained = State((Moments(mu, {}),), 2.0), State(((), (Moments(mu, {}), ())), 2.0)
    assert named_leaves(plain) == {"optimizer.mu.mlp.up": 1.0, "value": 2.0}
    assert named_leaves(chained) == named_leaves(plain)
    assert named_leaves({"a": [1.0, 2.0], "b": [3.0]}) == {"a.0": 1.0, "a.1": 2.0, "b": 3.0}
    assert named_leaves([4.0]) == {"0": 4.0}, "a name is never empty"


def test_the_wrapper_of_a_parameter_is_left_out():
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path({"up": {"value": 1.0}})]
    assert [leaf_name(path) for path in paths] == ["up"]
    ((path, _),) = jax.tree_util.tree_leaves_with_path({"value": 1.0})
    assert leaf_name(path) == "value"


def test_order_is_that_of_the_leaves():
    tree = {"b": 1.0, "a": (2.0, {"d": 3.0, "c": 4.0})}
    assert list(named_leaves(tree).values()) == jax.tree.leaves(tree)
    assert named_leaves({"a": (), "b": {}}) == {}
