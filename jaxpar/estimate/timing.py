"""Seconds a step takes, by arithmetic: matmuls, attention, memory traffic, collectives over their
links, bubble.

What is reached of the peaks is in `hardware.Rates`, which `scripts/calibrate.py` measures. None was
measured with jaxpar on a GPU yet; the constants here are assumptions.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from jaxpar.config import AXES, Config, MeshConfig, ModelConfig
from jaxpar.estimate.counts import ITEMSIZE, orthogonalized, step_flops
from jaxpar.estimate.hardware import Hardware
from jaxpar.estimate.memory import update_bytes
from jaxpar.estimate.traffic import Transfer, transfers
from jaxpar.parallel.timetable import turns
from jaxpar.parameters import parameters

HIDDEN = 0.90
"""Of the computation beside which collectives can run that nothing waits for; they slow it down a
little."""

LATENCY = 10e-6
"""Seconds that a collective takes however small it is."""

HOP = {True: 1e-6, False: 4e-6}
"""Seconds of every step of a ring, over fast links or over the network."""

_ROUNDS = {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "all-reduce": 2}


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step. `exposed` is by axes, what the computation waits for; `hidden` runs
    beside it. `again`: of `matmul` and `attention`, what the backward pass does a second time."""

    matmul: float
    attention: float
    memory: float
    exposed: dict[str, float]
    hidden: dict[str, float]
    bubble: float
    again: float

    @property
    def compute(self) -> float:
        return self.matmul + self.attention + self.memory

    @property
    def total(self) -> float:
        return self.compute + sum(self.exposed.values()) + self.bubble


def step_time(
    config: Config,
    mesh: MeshConfig,
    hardware: Hardware,
    *,
    synchronous: float | Mapping[str, float] = 0.0,
) -> StepTime:
    """Predicted time of one training step.

    Args:
      config: the run.
      mesh: sizes of the axes, laid out with `tensor` innermost.
      hardware: rates and links.
      synchronous: share of the time of collectives, of all axes or by axes (`data+sequence`), that
        is waited for because the compiler does not run them beside the computation; those that
        everything depends on are waited for in any case.

    Raises:
      ConfigError: the hardware does not tell the peak of the dtype that the run computes in.
    """
    matmul, attention, memory, again = _compute(config, mesh, hardware)
    # Idle stages compute something and drop it; what they send is among the transfers.
    bubble = (
        (matmul + attention)
        * (mesh.pipeline - 1)
        / (config.parallel.chunks * config.train.microbatches)
    )
    exposed: dict[str, float] = {}
    hidden: dict[str, float] = {}
    for transfer in transfers(config, mesh):
        into, name = hidden if transfer.hidden else exposed, "+".join(transfer.axes)
        into[name] = into.get(name, 0.0) + transfer.count * _seconds(transfer, mesh, hardware)
    for name, seconds in hidden.items():
        waited = exposed.get(name, 0.0)
        share = synchronous.get(name, 0.0) if isinstance(synchronous, Mapping) else synchronous
        _wait(name, min(seconds, share * (seconds + waited) - waited), exposed, hidden)
    cover = HIDDEN * (matmul + attention + bubble)
    beside = sum(hidden.values())
    for name, seconds in hidden.items():  # what does not fit beside the computation
        _wait(name, seconds * (1 - cover / beside) if beside else 0.0, exposed, hidden)
    return StepTime(matmul, attention, memory, exposed, hidden, bubble, again)


def _wait(name: str, seconds: float, exposed: dict[str, float], hidden: dict[str, float]) -> None:
    """Moves what is above 0 of so many seconds of an axis to what is waited for."""
    if seconds > 0:
        exposed[name] = exposed.get(name, 0.0) + seconds
        hidden[name] -= seconds


def overlap_room(memory_bytes: int, held: int) -> int:
    """Bytes of a device below which XLA's scheduler wants a program's peak to stay: the more of
    them it would need, the fewer collectives it lets run beside the computation, for that takes
    buffers. Not configured by jax's share of the memory.

    Args:
      memory_bytes: of the whole device.
      held: arguments and results of the step, which are there all along.
    """
    # GetSchedulerMemoryLimit in xla/service/gpu/gpu_hlo_schedule.cc: of 80% of the memory, 95%
    # (xla_gpu_memory_limit_slop_factor) of what arguments and results leave.
    return int(held + 0.95 * (0.80 * memory_bytes - held))


def bubble_fraction(microbatches: int, stages: int, chunks: int = 1) -> float:
    """Share of a pipeline's time in which a stage is idle (Narayanan et al., 2021)."""
    return (stages - 1) / (chunks * microbatches + stages - 1)


def _compute(
    config: Config, mesh: MeshConfig, hardware: Hardware
) -> tuple[float, float, float, float]:
    """Seconds of matmuls, of attention, of what only moves memory, and how many of the first two
    are done again, on one device."""
    model, train = config.model, config.train
    flops = step_flops(config)
    peak = hardware.peak(config.precision.compute)
    tokens = flops.tokens / (mesh.batch_shards * mesh.sequence)
    shards = mesh.tensor * mesh.pipeline
    rates = hardware.rates
    matmul = again = 0.0
    twice = recomputed(config, mesh.pipeline)
    for operations, repeated, narrow in _matmuls(config, mesh, tokens / train.microbatches, twice):
        slow = (1 + rates.matmul_half / narrow) / (rates.matmul_share * peak)
        matmul += tokens * (operations + repeated) * slow / shards
        again += tokens * repeated * slow / shards
    repeated = twice.get("attention", 0)
    attention = tokens * (flops.attention + repeated) / shards / (rates.attention_share * peak)
    again += attention * repeated / (flops.attention + repeated)
    bandwidth = rates.copy_share * hardware.memory_bandwidth
    item = ITEMSIZE[config.precision.compute]
    whole = model.dim / (mesh.tensor if config.parallel.sequence_parallel else 1)
    # Read and written by norms, rotation, SwiGLU and residual, forward and twice as much backward.
    moved = (
        3
        * item
        * (10 * whole + (4 * model.ffn_dim + 4 * model.heads * model.head_dim) / mesh.tensor)
    )
    elementwise = tokens * moved * model.layers / mesh.pipeline / bandwidth
    update = update_bytes(config, mesh) / bandwidth
    # In float32, which XLA multiplies as TF32 where it can, at half of the rate of bfloat16.
    single = max(hardware.peaks.get("float32", 0), hardware.peaks.get("bfloat16", 0) / 2)
    if muon := sum(own.flops for own in orthogonalized(config, mesh)):
        update += muon / (rates.matmul_share * single)
    return matmul, attention, elementwise + update, again


def _matmuls(
    config: Config, mesh: MeshConfig, rows: float, again: Mapping[str, int]
) -> list[tuple[float, float, float]]:
    """Of every matmul, operations a token of all devices together, those that are done besides
    because it is repeated (see `recomputed`), and the narrowest side on one device."""
    model, parallel, M = config.model, config.parallel, config.train.microbatches
    losses = M
    if mesh.pipeline > 1:
        losses = turns(parallel.schedule, mesh.pipeline, M, parallel.chunks).losses
    head = 6 * model.dim * model.vocab_size
    narrow = min(rows, model.dim, model.vocab_size / (mesh.tensor * mesh.pipeline))
    products: list[tuple[float, float, float]] = [(head, head * (losses / M - 1), narrow)]
    for label, size in _products(model):
        across = size / (model.layers * model.dim * mesh.tensor)  # every one is [L, D, ...]
        products.append((6 * size, again.get(label, 0), min(rows, model.dim, across)))
    return products


@functools.cache
def _products(model: ModelConfig) -> tuple[tuple[str, int], ...]:
    """What the matrices of layers make, as remat names it, and their elements."""
    rows = parameters(model).values()
    return tuple((row.makes, row.size(model)) for row in rows if row.in_layers and row.contracts)


def recomputed(config: Config, stages: int = 1) -> dict[str, int]:
    """Operations a token, of all layers, that the backward pass does again: by the name of the
    matmul's result, and `attention` (its causal half). A pipeline stage starts from its stored
    input, so it does everything once more."""
    model, kept = config.model, config.memory.kept + config.memory.offloaded
    costs = {label: 2 * size for label, size in _products(model)}
    costs["attention"] = (
        2 * model.layers * model.heads * model.head_dim * config.data.sequence_length
    )
    again = {name: cost for name, cost in costs.items() if name not in kept and name != "down"}
    return (
        {name: cost + again.get(name, 0) for name, cost in costs.items()} if stages > 1 else again
    )


def _seconds(transfer: Transfer, mesh: MeshConfig, hardware: Hardware) -> float:
    devices, near = _group(transfer.axes, mesh, hardware.domain)
    return collective_seconds(transfer.kind, transfer.size, devices, near, hardware)


@functools.cache
def _group(axes: tuple[str, ...], mesh: MeshConfig, domain: int) -> tuple[int, int]:
    """Members of a device's group over `axes`, and how many of them the fast links join."""
    devices = math.prod(getattr(mesh, axis) for axis in axes)
    return devices, members_near(axes, mesh, domain)


def members_near(axes: tuple[str, ...], mesh: MeshConfig, domain: int) -> int:
    """How many members of a device's group over `axes` sit in its domain of fast links, inner axes
    first."""
    near, stride = 1, 1
    for axis in reversed(AXES):
        size = getattr(mesh, axis)
        if axis in axes:
            near *= max(1, min(size, domain // stride))
        stride *= size
    return near


def collective_seconds(
    kind: str, size: float, devices: int, near: int, hardware: Hardware
) -> float:
    """Time of one collective at the speed of the links it crosses.

    A ring of n devices sends (n-1)/n of the whole, an all-reduce twice that, a permute all of it.
    Over the fast links it runs at their speed; where it leaves them, at the speed of the network
    cards of all members that sit together.

    Args:
      kind: as in HLO.
      size: bytes of the whole: the result of a gather, the input of a scatter.
      devices: n, members of a group.
      near: members of a group that the fast links join.
      hardware: whose links.
    """
    bandwidth = hardware.link if near >= devices else min(hardware.link, hardware.network * near)
    share = 1.0 if kind == "collective-permute" else _ROUNDS[kind] * (devices - 1) / devices
    steps = 1 if kind == "collective-permute" else _ROUNDS[kind] * (devices - 1)
    return (
        LATENCY
        + steps * HOP[near >= devices]
        + share * size / (hardware.rates.link_share * bandwidth)
    )
