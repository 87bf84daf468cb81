"""One training step, compiled for devices that may be absent, and whether what was to be offloaded
left the device.

XLA's GPU compiler runs without a GPU where `jax-cuda12-plugin` is installed: the same fusions,
collectives and buffers.
"""

import dataclasses
import functools

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from jaxpar import attention, xla
from jaxpar.config import Config, ConfigError, MeshConfig
from jaxpar.data.batches import abstract_batch
from jaxpar.estimate import memory
from jaxpar.step import TrainState, init_state, make_train_step


def absent_gpus(target: str, topology: str) -> list[jax.Device]:
    """Descriptions of GPUs to compile for.

    Args:
      target: text of a target description, as in `assets/gpus/h100.txtpb`.
      topology: NVLink domains x hosts in each x GPUs in each, such as `1x1x8` for eight GPUs of one
        host.
    """
    return topologies.get_topology_desc(
        platform="cuda", target_config=target, topology=topology
    ).devices


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the training state, with the memory in which each array
    lives."""

    def placed(x: jax.ShapeDtypeStruct, *, host: bool = False) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else jax.P()
        sharding = NamedSharding(mesh, spec, memory_kind="pinned_host" if host and x.ndim else None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda: init_state(config))
    in_host = functools.partial(
        placed, host=config.memory.offload_optimizer
    )  # jax.eval_shape does not tell
    return dataclasses.replace(
        jax.tree.map(placed, state), optimizer=jax.tree.map(in_host, state.optimizer)
    )


def compile_train_step(config: Config, mesh: Mesh) -> jax.stages.Compiled:
    """The training step for a mesh of devices, absent ones too. It donates the state; no array is
    made.

    Attention is that of these devices, not of the machine that compiles. For absent ones cuDNN
    cannot be asked how much memory its calls work in: `memory_analysis()` has none of it.
    """
    with jax.set_mesh(mesh):
        options = xla.options(config.compile, mesh.devices.flat)
        step = jax.jit(make_train_step(config), donate_argnums=0, compiler_options=options)
        return step.lower(abstract_state(config, mesh), abstract_batch(config, mesh)).compile()


def check_attention(config: Config, mesh: Mesh) -> str:
    """What computes the attention of a training step, for people: `cudnn`, or `xla` and why.

    Raises:
      ConfigError: `attention.implementation=cudnn` and cuDNN cannot; the rule that is broken.
    """
    model, train, sizes = config.model, config.train, MeshConfig(*mesh.devices.shape)
    rows = train.batch_size // train.microbatches // sizes.batch_shards
    tokens, heads = config.data.sequence_length // sizes.sequence, model.heads // sizes.tensor
    with jax.set_mesh(mesh):
        why = attention.refuses_cudnn(
            (rows, tokens, heads, model.head_dim),
            config.precision.compute,
            attention.Options.make(config),
        )
    return f"xla; not cudnn: {why}" if why else "cudnn"


def check_host_memory(config: Config, mesh: Mesh) -> None:
    """Refuses `memory.offload` on devices that reach no pinned host memory. Absent devices cannot
    tell.

    Raises:
      ConfigError: with the memories they have.
    """
    device = mesh.local_devices[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if config.memory.offload and "pinned_host" not in kinds:
        raise ConfigError(
            f"memory.offload={config.memory.offload} needs pinned host memory, and "
            f"{device.device_kind} has only "
            f"{', '.join(kinds)}; leave memory.offload out and save memory by memory.remat"
        )


def check_offload(compiled: jax.stages.Compiled, config: Config, mesh: MeshConfig) -> None:
    """Holds the buffers of a compiled step against `memory.offload`, which XLA may pass over in
    silence.

    Raises:
      ConfigError: what has stayed on the device.
    """
    asked, stats = config.memory, compiled.memory_analysis()
    assert stats is not None
    sizes = memory.activation_bytes(config, mesh)
    activations = config.model.layers * sum(sizes[name] for name in asked.offloaded)
    optimizer = memory.state_bytes(config, mesh)["optimizer"] if asked.offload_optimizer else 0
    missing = {
        ", ".join(asked.offloaded): activations - stats.host_temp_size_in_bytes,
        "optimizer": optimizer - stats.host_argument_size_in_bytes,
    }
    stayed = [f"{count / 2**20:,.1f} MiB of {name}" for name, count in missing.items() if count > 0]
    if stayed:
        raise ConfigError(
            f"memory.offload={asked.offload}: the compiler leaves {' and '.join(stayed)} in the "
            "memory of the device; "
            "leave them out (on CPUs all of them: their memory is the host's)"
        )
