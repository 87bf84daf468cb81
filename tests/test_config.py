"""Every rule of config.py, and that its messages name the value and the nearest legal ones."""

import dataclasses

import pytest

from jaxpar.config import (
    AXES,
    BATCH_AXES,
    Config,
    ConfigError,
    MemoryConfig,
    MeshConfig,
    RopeScaling,
    check_field,
    config_fields,
    configure,
    field_paths,
    value_of,
)
from jaxpar.validation import CHOICES, resolve, resolve_mesh, validate_mesh


def message(call, *args, **kwargs) -> str:
    """The message of the `ConfigError` that the call must raise."""
    with pytest.raises(ConfigError) as error:
        call(*args, **kwargs)
    return str(error.value)


def resolved(**groups) -> Config:
    return resolve(configure(**groups))


def nested(path: str, value) -> dict:
    """`{"model": {"dim": value}}` of `model.dim`."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


class TestDoor:
    def test_defaults_survive(self):
        config = resolved()
        assert dataclasses.replace(config, model=Config().model) == Config()
        assert (config.model.kv_heads, config.model.head_dim) == (8, 64)

    def test_nested_override(self):
        config = resolved(
            model=dict(dim=128, heads=4, kv_heads=2, rope_scaling=dict(factor=8.0)),
            train=dict(steps=7),
        )
        assert (config.model.head_dim, config.model.kv_heads, config.train.steps) == (32, 2, 7)
        assert config.model.rope_scaling == RopeScaling(factor=8.0)

    def test_head_dim_frees_dim(self):
        assert resolved(model=dict(dim=100, heads=8, head_dim=16)).model.head_dim == 16

    def test_integer_becomes_float(self):
        value = resolved(optimizer=dict(learning_rate=1)).optimizer.learning_rate
        assert value == 1.0 and isinstance(value, float)

    def test_result_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            resolved().model.dim = 1

    def test_configure_does_not_share_state(self):
        configure().model.dim = 64
        assert configure().model.dim == Config().model.dim

    @pytest.mark.parametrize(
        ("groups", "words"),
        [
            (dict(model=dict(dimm=3)), ["'model.dimm'", "Did you mean model.dim?"]),
            (
                dict(model=dict(rope_scaling=dict(factr=2.0))),
                ["Did you mean model.rope_scaling.factor?"],
            ),
            (
                dict(data=dict(learning_rate=1.0)),
                ["'data.learning_rate'", "optimizer.learning_rate"],
            ),
            (dict(nonsense=dict(a=1)), ["'nonsense'", "Known: "]),
            (dict(train=dict(steps="ten")), ["train.steps='ten'"]),
            (dict(train=dict(steps=1.5)), ["train.steps=1.5"]),
            (dict(model=5), ["model=5"]),
        ],
    )
    def test_configure_refuses(self, groups, words):
        text = message(configure, **groups)
        assert all(word in text for word in words), text

    def test_resolve_refuses_a_field_added_by_hand(self):
        raw = configure()
        with raw.unlocked():
            raw.model.dimm = 3
        assert "Did you mean model.dim?" in message(resolve, raw)

    @pytest.mark.parametrize(
        ("path", "value", "words"),
        [
            ("train.steps", "10", ["train.steps='10'", "is a str", "must be int"]),
            ("train.steps", None, ["train.steps=None", "must be int"]),
            ("train.steps", True, ["train.steps=True", "is a bool", "must be int"]),
            ("data.packing", 1, ["is a int", "must be bool"]),
            ("model.kv_heads", "8", ["is a str", "must be int"]),
        ],
    )
    def test_resolve_refuses_wrong_types(self, path, value, words):
        raw = configure()
        group, name = path.split(".")
        with raw.ignore_type():
            raw[group][name] = value
        text = message(resolve, raw)
        assert all(word in text for word in [path, *words]), text


class TestNames:
    def test_field_paths(self):
        paths = field_paths()
        assert paths["model.dim"] is int and paths["model.rope_scaling.factor"] is float
        assert "model.rope_scaling" not in paths

    def test_value_of_reaches_every_field(self):
        config = resolved()
        assert all(value_of(config, path) is not None for path in field_paths())

    def test_check_field_takes_fields_and_groups(self):
        for path in ("model", "model.dim", "model.rope_scaling", "model.rope_scaling.factor"):
            check_field(path)

    def test_every_field_is_explained(self):
        for path, item in config_fields().items():
            assert len(item.metadata["doc"]) > 10, f"{path} has no explanation for --help"

    @pytest.mark.parametrize(
        ("path", "hint"),
        [
            ("model.batch_size", "Did you mean train.batch_size?"),
            ("batch_size", "Did you mean train.batch_size?"),
            ("train.step", "Did you mean train.steps?"),
            ("train.xyzzy", "Known: train.steps, train.batch_size"),
            ("modle.dim", "Did you mean model.dim?"),
            ("modle", "Did you mean model?"),
        ],
    )
    def test_an_unknown_field_is_told_the_one_that_is_meant(self, path, hint):
        assert hint in message(check_field, path)


class TestRules:
    @pytest.mark.parametrize("path", sorted(CHOICES))
    def test_choices(self, path):
        text = message(resolved, **nested(path, "nonsense"))
        assert f"{path}='nonsense' is not one of {', '.join(CHOICES[path])}." in text
        for choice in CHOICES[path]:
            scaled = (
                dict(precision=dict(compute="float16", loss_scale=65536.0))
                if choice == "float16"
                else {}
            )
            resolved(**(scaled or nested(path, choice)))

    @pytest.mark.parametrize(
        "precision", [dict(compute="float16"), dict(compute="bfloat16", loss_scale=8.0)]
    )
    def test_float16_and_a_loss_scale_belong_together(self, precision):
        assert "float16 needs a loss scale" in message(resolved, precision=precision)

    def test_choices_name_the_nearest(self):
        assert "Did you mean adamw?" in message(resolved, optimizer=dict(name="adam"))

    @pytest.mark.parametrize(
        "path",
        """model.vocab_size model.dim model.layers model.heads model.kv_heads model.head_dim
        model.ffn_dim model.rope_scaling.original_sequence_length data.sequence_length data.prefetch
        train.steps train.batch_size train.microbatches train.max_nonfinite_steps
        precision.loss_scale_growth_steps loss.chunk checkpoint.keep log.every""".split(),
    )
    def test_positive_integers(self, path):
        text = message(resolved, **nested(path, 0))
        assert f"{path}=0 must be finite and positive; use at least 1" in text

    @pytest.mark.parametrize(
        "path",
        """model.rope_theta model.norm_eps model.init_std model.rope_scaling.factor
        model.rope_scaling.low_freq_factor model.rope_scaling.high_freq_factor
        optimizer.learning_rate optimizer.eps""".split(),
    )
    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_positive_floats(self, path, value):
        assert f"{path}={value} must be finite and positive" in message(
            resolved, **nested(path, value)
        )

    @pytest.mark.parametrize(
        "path",
        """train.seed train.eval_every train.eval_batches train.z_loss optimizer.warmup_steps
        optimizer.min_learning_rate optimizer.weight_decay optimizer.clip_norm checkpoint.every
        checkpoint.keep_best""".split(),
    )
    def test_not_negative(self, path):
        kind = field_paths()[path]
        resolved(**nested(path, kind(0)))
        text = message(resolved, **nested(path, kind(-1)))
        assert f"{path}={kind(-1)} must be finite and not negative; use at least 0" in text

    @pytest.mark.parametrize(
        "path", ["optimizer.beta1", "optimizer.beta2", "data.validation_fraction"]
    )
    @pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
    def test_fractions(self, path, value):
        resolved(**nested(path, 0.0))
        assert f"{path}={value} must be at least 0 and below 1" in message(
            resolved, **nested(path, value)
        )

    @pytest.mark.parametrize("value", [0.0, 1.1, float("nan")])
    def test_decay_fraction(self, value):
        resolved(optimizer=dict(decay_fraction=1.0))
        text = message(resolved, optimizer=dict(decay_fraction=value))
        assert f"optimizer.decay_fraction={value} must be above 0 and at most 1" in text

    def test_min_learning_rate(self):
        text = message(resolved, optimizer=dict(learning_rate=1e-5, min_learning_rate=1e-4))
        assert "optimizer.learning_rate=1e-05 is below optimizer.min_learning_rate=0.0001" in text
        assert "min_learning_rate of at most 1e-05, or optimizer.learning_rate of at least" in text

    def test_heads_divide_dim(self):
        text = message(resolved, model=dict(dim=100, heads=3))
        assert (
            "model.dim=100 is not divisible by model.heads=3; use model.heads in {1, 2, 4, 5, 10, "
            "20}" in text
        )
        assert "model.head_dim" in text

    def test_kv_heads_divide_heads(self):
        text = message(resolved, model=dict(heads=8, kv_heads=3))
        assert (
            "model.heads=8 is not divisible by model.kv_heads=3; use model.kv_heads in {1, 2, 4, 8}"
            in text
        )
        assert "model.heads in {6, 9}" in text
        assert "{16}" in message(resolved, model=dict(heads=8, kv_heads=16))

    def test_head_dim_is_even(self):
        assert "model.head_dim=33 must be even" in message(resolved, model=dict(head_dim=33))

    def test_rope_scaling_band(self):
        band = dict(low_freq_factor=4.0, high_freq_factor=4.0)
        text = message(resolved, model=dict(rope_scaling=dict(factor=8.0, **band)))
        assert "low_freq_factor=4.0 must be below high_freq_factor=4.0" in text
        resolved(model=dict(rope_scaling=dict(factor=1.0, **band)))

    def test_microbatches_divide_batch(self):
        text = message(resolved, train=dict(batch_size=10, microbatches=4))
        assert (
            "train.batch_size=10 is not divisible by train.microbatches=4; use train.microbatches "
            "in" in text
        )
        assert "{1, 2, 5, 10}" in text and "{8, 12}" in text

    def test_zigzag_is_not_for_ulysses(self):
        text = message(resolved, parallel=dict(context="ulysses", zigzag=True))
        assert (
            "parallel.zigzag=True" in text
            and "use parallel.zigzag=false, or parallel.context=ring" in text
        )
        resolved(parallel=dict(context="all_gather", zigzag=True))


class TestMesh:
    def test_data_takes_what_is_left(self):
        assert resolve_mesh({}, 8) == MeshConfig(data=8)
        assert resolve_mesh({"tensor": 2}, 8) == MeshConfig(data=4, tensor=2)
        assert resolve_mesh({"tensor": 2, "data": None}, 8) == MeshConfig(data=4, tensor=2)

    def test_minus_one_takes_what_is_left(self):
        assert resolve_mesh({"fsdp": -1, "tensor": 2}, 8) == MeshConfig(fsdp=4, tensor=2)
        assert resolve_mesh({"fsdp": -1, "data": 2, "tensor": 2}, 8) == MeshConfig(
            data=2, fsdp=2, tensor=2
        )
        assert resolve_mesh({"fsdp": -1, "tensor": 8}, 8) == MeshConfig(tensor=8)

    def test_minus_one_leaves_data_at_one(self):
        assert resolve_mesh({"fsdp": -1}, 8) == MeshConfig(fsdp=8)

    def test_all_given(self):
        sizes = dict(pipeline=2, data=1, fsdp=2, expert=1, sequence=2, tensor=1)
        mesh = resolve_mesh(sizes, 8)
        assert (mesh.shape, mesh.devices, mesh.batch_shards) == ((2, 1, 2, 1, 2, 1), 8, 2)

    def test_devices_not_known_yet(self):
        assert resolve_mesh({}, None) == MeshConfig()
        assert resolve_mesh({"fsdp": -1, "tensor": 4}, None) == MeshConfig(tensor=4)

    def test_string(self):
        assert str(MeshConfig(fsdp=4, tensor=2)) == "fsdp=4 x tensor=2"
        assert str(MeshConfig()) == "one device"

    def test_axes(self):
        assert tuple(field.name for field in dataclasses.fields(MeshConfig)) == AXES
        assert set(BATCH_AXES) < set(AXES)

    @pytest.mark.parametrize("devices", [8, None])
    @pytest.mark.parametrize(
        ("sizes", "words"),
        [
            ({"tensr": 2}, ["unknown mesh axis 'tensr'", "Did you mean tensor?"]),
            ({"zzz": 2}, ["Known: pipeline, data, fsdp, expert, sequence, tensor."]),
            ({"data": -1, "fsdp": -1}, ["mesh.data=-1 and mesh.fsdp=-1", "only one axis"]),
            ({"tensor": 0}, ["mesh.tensor=0 must be at least 1, or -1"]),
            ({"tensor": -2}, ["mesh.tensor=-2 must be at least 1, or -1"]),
        ],
    )
    def test_refuses(self, sizes, devices, words):
        text = message(resolve_mesh, sizes, devices)
        assert all(word in text for word in words), text

    @pytest.mark.parametrize(
        ("sizes", "words"),
        [
            (
                {"tensor": 3},
                ["tensor=3 = 3 does not divide 8 devices", "{1, 2, 4, 8}", "--cpu_devices=3"],
            ),
            (
                {"fsdp": -1, "tensor": 16},
                ["tensor=16 = 16 does not divide 8", "mesh.fsdp=-1", "--cpu_devices=16"],
            ),
            (
                {"data": 2, "tensor": 2},
                ["data=2 x tensor=2 = 4 does not use 8 devices", "--cpu_devices=4"],
            ),
            (
                {"data": 2, "fsdp": 3, "tensor": 5},
                ["= 30 does not use 8 devices", "--cpu_devices=30"],
            ),
            ({"data": 16}, ["data=16 = 16 does not use 8 devices", "--cpu_devices=16"]),
        ],
    )
    def test_must_use_all_devices(self, sizes, words):
        text = message(resolve_mesh, sizes, 8)
        assert all(word in text for word in words), text


class TestMeshAgainstConfig:
    @pytest.mark.parametrize(
        ("groups", "sizes", "words"),
        [
            ({}, dict(tensor=3), ["model.heads=8", "mesh.tensor=3", "{1, 2, 4, 8}"]),
            (
                dict(model=dict(kv_heads=2)),
                dict(tensor=4),
                ["model.kv_heads=2", "mesh.tensor=4", "{1, 2}"],
            ),
            (
                dict(model=dict(ffn_dim=1404)),
                dict(tensor=8),
                ["model.ffn_dim=1404", "mesh.tensor=8", "{1400, 1408}"],
            ),
            (
                dict(model=dict(vocab_size=50257)),
                dict(tensor=2),
                ["model.vocab_size=50257", "{50256, 50258}"],
            ),
            ({}, dict(fsdp=3), ["model.dim=512", "mesh.fsdp=3", "{1, 2, 4, 8, 16, 32}"]),
            ({}, dict(sequence=3), ["data.sequence_length=256", "mesh.sequence=3", "{255, 258}"]),
            (
                dict(data=dict(sequence_length=72)),
                dict(sequence=4, tensor=4),
                [
                    "data.sequence_length=72",
                    "= 16",
                    "{64, 80}",
                    "--config.parallel.sequence_parallel=false",
                ],
            ),
            (
                dict(data=dict(sequence_length=36), parallel=dict(zigzag=True)),
                dict(sequence=4),
                [
                    "data.sequence_length=36",
                    "2 x mesh.sequence = 8",
                    "{32, 40}",
                    "parallel.zigzag=false",
                ],
            ),
            (
                dict(parallel=dict(context="ulysses")),
                dict(sequence=8, tensor=2),
                [
                    "model.heads=8 / mesh.tensor=2 = 4",
                    "mesh.sequence=8",
                    "{1, 2, 4}",
                    "parallel.context=ring",
                ],
            ),
            (
                dict(model=dict(kv_heads=2), parallel=dict(context="ulysses")),
                dict(sequence=4),
                [
                    "model.kv_heads=2 / mesh.tensor=1 = 2",
                    "mesh.sequence=4",
                    "{1, 2}",
                    "parallel.context=ring",
                ],
            ),
            ({}, dict(data=3), ["train.batch_size=32", "= 3 ", "{30, 33}"]),
            (
                {},
                dict(data=2, fsdp=16, expert=2),
                ["train.batch_size=32", "= 64 ", "{64}", "{1, 2, 4, 8, 16, 32}"],
            ),
            (
                dict(train=dict(microbatches=8)),
                dict(fsdp=8),
                [
                    "microbatches=8 x data=1 x fsdp=8 x expert=1 = 64",
                    "train.batch_size in {64}",
                    "{1, 2, 4}",
                ],
            ),
        ],
    )
    def test_every_sharded_dimension_divides(self, groups, sizes, words):
        text = message(validate_mesh, resolved(**groups), MeshConfig(**sizes))
        assert all(word in text for word in words), text

    @pytest.mark.parametrize(
        ("groups", "sizes"),
        [
            ({}, {}),
            ({}, dict(data=2, fsdp=2, expert=2, sequence=2, tensor=8)),
            (dict(train=dict(batch_size=1)), dict(sequence=8, tensor=8)),
            (dict(model=dict(vocab_size=50257)), dict(fsdp=8)),
            (dict(parallel=dict(context="ulysses")), dict(sequence=4, tensor=2)),
            (dict(parallel=dict(context="ring", zigzag=True)), dict(sequence=8, tensor=4)),
            (dict(data=dict(sequence_length=255), parallel=dict(zigzag=True)), {}),
            (
                dict(data=dict(sequence_length=72), parallel=dict(sequence_parallel=False)),
                dict(sequence=4, tensor=4),
            ),
        ],
    )
    def test_takes(self, groups, sizes):
        validate_mesh(resolved(**groups), MeshConfig(**sizes))


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (
            dict(remat="dot"),
            "memory.remat='dot' has 'dot', which is unknown; use none, dots, attention, full, or "
            "names",
        ),
        (
            dict(remat="gate,keys"),
            "has 'keys', which is unknown; .* key, value, .*Did you mean key",
        ),
        (
            dict(remat=""),
            "memory.remat='' names nothing; use none, dots, attention, full, or names",
        ),
        (dict(remat="none,gate"), "has 'none', which is unknown"),
        (dict(remat="optimizer"), "has 'optimizer', which is unknown"),
        (
            dict(offload="optimiser"),
            "memory.offload='optimiser' .*; use names .*optimizer. Did you mean optimizer",
        ),
        (dict(offload=","), "memory.offload=',' names nothing; use names"),
    ],
)
def test_unknown_activations_are_refused(memory, message):
    with pytest.raises(ConfigError, match=message):
        resolve(configure(memory=memory))


def test_offloaded_activations_are_not_kept():
    memory = resolve(
        configure(memory=dict(remat="attention", offload="gate, query,optimizer"))
    ).memory
    assert memory.kept == ("residual", "key", "value", "attention", "attention_output")
    assert memory.offloaded == ("query", "gate") and memory.offload_optimizer
    assert resolve(configure(memory=dict(remat="gate"))).memory.kept == ("residual", "gate")
    assert MemoryConfig(remat="full").kept == ("residual",)
