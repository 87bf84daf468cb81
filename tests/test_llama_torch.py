"""Parity with PyTorch and Hugging Face: logits, loss, gradients, a training curve; optimizers against their formulas.

`pytest -rP` prints every difference that is measured.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from transformers import LlamaConfig, LlamaForCausalLM

from jaxpar.attention import TokenInfo
from jaxpar.config import Config, MeshConfig, OptimizerConfig, configure
from jaxpar.data import Batch, batches, global_batch, open_data
from jaxpar.loss import LossSums, cross_entropy
from jaxpar.model import Llama
from jaxpar.optimizer import make_optimizer, schedule
from jaxpar.sharding import Rules, make_mesh
from jaxpar.step import batch_spec, init_state, loss_and_gradients, make_train_step
from jaxpar.tree import leaf_name, named_leaves
from jaxpar.validation import CHOICES, resolve, validate_mesh

Leaves = dict[str, np.ndarray]


def config_of(**groups: Any) -> Config:
    """A resolved config that computes in float32."""
    return resolve(configure(**({"precision": dict(compute="float32")} | groups)))


def mesh_of(**axes: int) -> jax.sharding.Mesh:
    """A mesh of the first of the simulated devices."""
    return make_mesh(MeshConfig(**axes))


def place(batch: Batch, config: Config, mesh: jax.sharding.Mesh) -> Batch:
    return global_batch(batch, NamedSharding(mesh, batch_spec(config)))


def host(tree: Any) -> Leaves:
    """The leaves by name, copied off the devices."""
    return {name: np.array(leaf) for name, leaf in named_leaves(tree).items()}


def relative(value: Any, reference: Any) -> float:
    """Norm of the difference over the norm of the reference."""
    return float(np.linalg.norm(np.subtract(value, reference)) / np.linalg.norm(reference))


def within(what: str, difference: float, limit: float) -> None:
    """Asserts that a difference is below its limit (not-a-number is not), and prints it."""
    print(f"{what}: {difference:.1e} (limit {limit:g})")
    assert difference < limit, f"{what}: {difference} is not below {limit}"


# The same weights in both.

WHOLE = {"embedding": "model.embed_tokens", "norm.scale": "model.norm", "head": "lm_head"}
LAYER = {
    "layers.attention_norm.scale": "input_layernorm",
    "layers.attention.query": "self_attn.q_proj",
    "layers.attention.key": "self_attn.k_proj",
    "layers.attention.value": "self_attn.v_proj",
    "layers.attention.out": "self_attn.o_proj",
    "layers.mlp_norm.scale": "post_attention_layernorm",
    "layers.mlp.gate": "mlp.gate_proj",
    "layers.mlp.up": "mlp.up_proj",
    "layers.mlp.down": "mlp.down_proj",
}


def to_hugging_face(leaves: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Weights or gradients of jaxpar under their Hugging Face names: layers apart, matrices [out, in]."""
    state = {}
    for name, leaf in leaves.items():
        if name in WHOLE:
            state[f"{WHOLE[name]}.weight"] = leaf.T if name == "head" else leaf
            continue
        for layer, weight in enumerate(leaf):
            if weight.ndim > 1:
                inputs = weight.shape[:2] if name.endswith(".out") else weight.shape[:1]
                weight = weight.reshape(math.prod(inputs), -1).T
            state[f"model.layers.{layer}.{LAYER[name]}.weight"] = weight
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


def hugging_face(config: Config, leaves: Mapping[str, np.ndarray]) -> LlamaForCausalLM:
    """The model of Hugging Face with the weights of jaxpar."""
    m = config.model
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": m.rope_theta}
    if m.rope_scaling.factor != 1:
        rope |= {"rope_type": "llama3", "factor": m.rope_scaling.factor}
        rope |= {name: getattr(m.rope_scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
        rope["original_max_position_embeddings"] = m.rope_scaling.original_sequence_length
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=m.vocab_size,
            hidden_size=m.dim,
            intermediate_size=m.ffn_dim,
            num_hidden_layers=m.layers,
            num_attention_heads=m.heads,
            num_key_value_heads=m.kv_heads,
            head_dim=m.head_dim,
            rms_norm_eps=m.norm_eps,
            tie_word_embeddings=m.tie_embeddings,
            rope_parameters=rope,
            max_position_embeddings=1024,
            use_cache=False,
            attn_implementation="eager",
        )
    )
    assert model.config._attn_implementation == "eager"
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == m.tie_embeddings
    state = to_hugging_face(leaves)
    if m.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model


# 1 and 2. Logits, loss and gradients.

MODEL = dict(vocab_size=64, dim=32, layers=2, heads=4, ffn_dim=48)
CASES = {
    "multi-head": MODEL,
    "grouped-query": MODEL | dict(dim=64, heads=8, kv_heads=2),
    "one key-value head, wide heads": MODEL | dict(dim=24, kv_heads=1, head_dim=10),
    "tied": MODEL | dict(tie_embeddings=True, rope_theta=500_000.0),
    "llama 3.1": MODEL | dict(head_dim=16, rope_scaling=dict(factor=8.0, original_sequence_length=32)),
    "odd": dict(vocab_size=67, dim=36, layers=1, heads=3, ffn_dim=50, norm_eps=0.1),
}
DOCUMENTS = ((24,), (11, 2, 9))
"""Lengths of the documents of each row of 24 tokens: one that fills it; three packed, and two places of padding."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Logits [length, V] of every document, mean loss, and gradients under their Hugging Face names."""

    logits: list[np.ndarray]
    loss: float
    gradients: dict[str, np.ndarray]


def lively(model: Llama) -> Llama:
    """Weights so large that every part of the model matters, and norm scales that differ."""
    random = np.random.default_rng(1)

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        factor = random.uniform(0.5, 1.5, leaf.shape) if leaf_name(path).endswith("scale") else 10
        return jax.device_put(np.asarray(leaf * factor, np.float32), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, model)


def packed(vocab_size: int) -> tuple[Batch, list[np.ndarray]]:
    """`DOCUMENTS` of random tokens as a batch [1, B, S], and one by one."""
    random = np.random.default_rng(2)
    shape = (1, len(DOCUMENTS), sum(DOCUMENTS[0]))
    batch = Batch(*(np.full(shape, value, np.int32) for value in (0, -1, 0, 0)))
    documents = []
    for row, lengths in enumerate(DOCUMENTS):
        stops = list(itertools.accumulate(lengths))
        for segment, (length, stop) in enumerate(zip(lengths, stops, strict=True), 1):
            document = random.integers(vocab_size, size=length)
            at = (0, row, slice(stop - length, stop))
            batch.tokens[at], batch.positions[at], batch.segments[at] = document, np.arange(length), segment
            batch.targets[0, row, stop - length : stop - 1] = document[1:]
            documents.append(document)
    return batch, documents


def ours(config: Config, model: Llama, batch: Batch) -> Outcome:
    @jax.jit
    def run(model: Llama, batch: Batch) -> tuple[jax.Array, LossSums, Llama]:
        tokens, _, positions, segments = (field[0] for field in batch)
        x_BSD, _ = model(tokens, TokenInfo(positions, segments))
        x_BSD, w_DV = (jax.sharding.reshard(x, jax.P()) for x in (x_BSD, model.head_weight()))
        return jnp.einsum("BSD,DV->BSV", x_BSD, w_DV), *loss_and_gradients(model, batch, config)

    logits_BSV, losses, gradients = run(model, batch)
    assert losses.objective == losses.cross_entropy  # no z-loss
    documents = []
    for row, lengths in enumerate(DOCUMENTS):
        documents += np.split(np.array(logits_BSV[row]), list(itertools.accumulate(lengths)))[:-1]
    gradients = {name: g.numpy() for name, g in to_hugging_face(host(gradients)).items()}
    return Outcome(documents, float(losses.cross_entropy), gradients)


def theirs(model: LlamaForCausalLM, documents: list[np.ndarray]) -> Outcome:
    """Each document alone, with the loss of Hugging Face, weighted by its predictions."""
    logits, total, predictions = [], torch.zeros(()), 0
    for document in documents:
        tokens = torch.from_numpy(document)[None]
        output = model(input_ids=tokens, labels=tokens)
        logits.append(output.logits[0].detach().numpy())
        total = total + output.loss * (len(document) - 1)
        predictions += len(document) - 1
    loss = total / predictions
    loss.backward()
    return Outcome(logits, loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()})


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Outcome, Outcome]:
    """One case in jaxpar, on one device, and in Hugging Face."""
    config = config_of(model=CASES[request.param])
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        model = lively(jax.jit(lambda: init_state(config).model)())
        batch, documents = packed(config.model.vocab_size)
        mine = ours(config, model, place(batch, config, mesh))
        return mine, theirs(hugging_face(config, host(model)), documents)


@pytest.mark.parametrize("row", [0, 1], ids=["whole", "packed"])
def test_logits_equal_hugging_face(pair: tuple[Outcome, Outcome], row: int) -> None:
    """A row of one document, and one of three, which Hugging Face gets one by one."""
    mine, expected = pair
    chosen = slice(0, 1) if row == 0 else slice(1, None)
    assert [x.shape for x in mine.logits] == [x.shape for x in expected.logits]
    difference = max(np.abs(a - b).max() for a, b in zip(mine.logits[chosen], expected.logits[chosen], strict=True))
    spread = np.std(np.concatenate(expected.logits[chosen]))
    assert spread > 0.5, f"logits of spread {spread} prove little"
    within("logits", difference, 1e-4)


def test_loss_equals_hugging_face(pair: tuple[Outcome, Outcome]) -> None:
    """The mean over the predictions of all documents."""
    mine, expected = pair
    within("loss", abs(mine.loss - expected.loss), 1e-5)


def test_gradients_equal_autograd(pair: tuple[Outcome, Outcome]) -> None:
    """Each parameter of each layer."""
    mine, expected = pair
    assert mine.gradients.keys() == expected.gradients.keys()
    errors = {name: relative(mine.gradients[name], g) for name, g in expected.gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    within(f"gradients, worst {worst}", errors[worst], 1e-4)
    assert np.isfinite(list(errors.values())).all()


def test_rope_scaling_matters_here() -> None:
    """The llama 3.1 case has kept, interpolated and stretched frequencies, and would not pass without scaling."""
    config = config_of(model=CASES["llama 3.1"])
    m, scaling = config.model, config.model.rope_scaling
    with jax.set_mesh(mesh_of()):
        leaves = host(lively(jax.jit(lambda: init_state(config).model)()))
    turns = [scaling.original_sequence_length * m.rope_theta ** (-k / 8) / (2 * math.pi) for k in range(8)]
    kinds = {(t > scaling.high_freq_factor) - (t < scaling.low_freq_factor) for t in turns}
    assert kinds == {-1, 0, 1}
    plain = dataclasses.replace(config, model=dataclasses.replace(m, rope_scaling=type(scaling)()))
    tokens = torch.from_numpy(packed(m.vocab_size)[1][0])[None]
    with torch.no_grad():
        logits = [hugging_face(c, leaves)(input_ids=tokens).logits for c in (config, plain)]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


# 3. A training curve.


def cosine_rate(n: int, o: OptimizerConfig, steps: int) -> float:
    """Learning rate of update n, counted from 0."""
    if n < o.warmup_steps:
        return o.learning_rate * (n + 1) / o.warmup_steps
    done = (n - o.warmup_steps) / (steps - o.warmup_steps)
    return o.min_learning_rate + (o.learning_rate - o.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss, gradient norm and learning rate of every step, and the last weights under their Hugging Face names."""

    loss: np.ndarray
    grad_norm: np.ndarray
    learning_rate: np.ndarray
    weights: dict[str, np.ndarray]


def train_ours(config: Config, mesh: jax.sharding.Mesh, data: list[Batch]) -> tuple[Curve, Leaves]:
    """Trains the freshly initialised model; also returns its first weights."""
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: init_state(config))()
        first = host(state.model)
        step = jax.jit(make_train_step(config), donate_argnums=0)
        metrics = []
        for batch in data:
            state, measured = step(state, place(batch, config, mesh))
            metrics.append({name: float(measured[name]) for name in ("loss", "grad_norm", "learning_rate", "skipped")})
        weights = {name: w.numpy() for name, w in to_hugging_face(host(state.model)).items()}
    assert metrics[-1]["skipped"] == 0
    columns = (np.array([m[name] for m in metrics]) for name in ("loss", "grad_norm", "learning_rate"))
    return Curve(*columns, weights=weights), first


def train_torch(config: Config, model: LlamaForCausalLM, data: list[Batch]) -> Curve:
    """AdamW, clipping and schedule of PyTorch; documents kept apart by a mask and by their positions."""
    o = config.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), eps=o.eps)
    factor = lambda n: cosine_rate(n, o, config.train.steps) / o.learning_rate  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rows = []
    for batch in data:
        fields = (torch.from_numpy(x.reshape(-1, x.shape[-1])).long() for x in batch)
        tokens, targets, positions, segments = fields
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        seen = causal & (segments[:, :, None] == segments[:, None, :])
        mask = torch.where(seen, 0.0, -math.inf)[:, None]
        logits = model(input_ids=tokens, position_ids=positions, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        rows.append((loss.item(), norm.item(), scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return Curve(*np.array(rows).T, weights=weights)


def test_training_curve_equals_pytorch() -> None:
    """50 steps on text on fsdp=2 x sequence=2 x tensor=2, in two microbatches; PyTorch in one go on the CPU."""
    config = config_of(
        model=dict(vocab_size=258, dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128),
        data=dict(source="stories", tokenizer="bytes", sequence_length=32),
        train=dict(steps=50, batch_size=8, microbatches=2),
        optimizer=dict(learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=5, clip_norm=1.0),
    )
    axes = dict(fsdp=2, sequence=2, tensor=2)
    validate_mesh(config, MeshConfig(**axes))
    corpus = open_data(config.data, vocab_size=config.model.vocab_size, seed=0)
    data = list(batches(corpus.train, seed=0, batch_size=8, microbatches=2, stop=config.train.steps))
    assert any((batch.segments > 1).any() for batch in data), "no packed documents"
    mine, first = train_ours(config, mesh_of(**axes), data)
    expected = train_torch(config, hugging_face(config, first), data)
    assert expected.loss[-5:].mean() < expected.loss[0] - 2, "nothing was learned"
    assert (expected.grad_norm > 1).any() and (expected.grad_norm < 1).any(), "clipping always or never"
    within("learning rate", np.abs(mine.learning_rate / expected.learning_rate - 1).max(), 1e-5)
    within("gradient norm", np.abs(mine.grad_norm / expected.grad_norm - 1).max(), 1e-3)
    within("weights", max(relative(mine.weights[name], w) for name, w in expected.weights.items()), 1e-3)
    within("loss at any step", np.abs(mine.loss - expected.loss).max(), 1e-3)


# 4. Cross-entropy and z-loss.

Z_LOSS = 1e-2


def loss_in_float64(
    x_BSD: np.ndarray, w_DV: np.ndarray, targets_BS: np.ndarray
) -> tuple[list[float], list[np.ndarray]]:
    """Objective, cross-entropy and squared log-partition, summed over the valid tokens; the objective's gradients."""
    x, w = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (x_BSD, w_DV))
    targets = torch.from_numpy(targets_BS).long()
    logits = (x @ w)[targets >= 0]
    log_partition = logits.logsumexp(-1)
    ce = (log_partition - logits.gather(-1, targets[targets >= 0][:, None])[:, 0]).sum()
    z = log_partition.square().sum()
    total = ce + Z_LOSS * z
    total.backward()
    return [total.item(), ce.item(), z.item()], [x.grad.numpy(), w.grad.numpy()]


@pytest.mark.parametrize(
    "axes, vocab_size, chunk, sequence_parallel, scale",
    [
        ({}, 67, 7, True, 1),
        ({}, 67, 1000, False, 300),  # logits that overflow exp
        (dict(tensor=4), 68, 7, True, 1),
        (dict(tensor=4), 68, 5, False, 300),
        (dict(fsdp=2, sequence=2, tensor=2), 66, 3, True, 1),
    ],
)
def test_cross_entropy_equals_torch(
    axes: dict[str, int], vocab_size: int, chunk: int, sequence_parallel: bool, scale: int
) -> None:
    """Sums and gradients with a z-loss, ignored targets, and chunks that do not divide the tokens."""
    random = np.random.default_rng(0)
    x_BSD = scale * random.normal(size=(2, 16, 8)).astype(np.float32)
    w_DV = random.normal(size=(8, vocab_size)).astype(np.float32)
    targets_BS = random.integers(vocab_size, size=(2, 16)).astype(np.int32)
    targets_BS[random.random((2, 16)) < 0.3] = -1
    targets_BS[0, :2] = 0, vocab_size - 1
    rules = Rules.make(sequence_parallel=sequence_parallel)

    @jax.jit
    def run(x: jax.Array, w: jax.Array, targets: jax.Array) -> tuple[tuple[jax.Array, LossSums], Any]:
        def third(x: jax.Array, w: jax.Array) -> tuple[jax.Array, LossSums]:
            sums = cross_entropy(x, w, targets, rules, chunk, Z_LOSS)
            return sums.objective / 3, sums  # a third, to see that the backward pass scales

        return jax.value_and_grad(third, argnums=(0, 1), has_aux=True)(x, w), cross_entropy(
            x, w, targets, rules, chunk, Z_LOSS
        )

    mesh = mesh_of(**axes)
    dims = ("batch", "residual_seq", "embed"), ("embed_fsdp", "vocab"), ("batch", "seq")
    arrays = (x_BSD, w_DV, targets_BS)
    with jax.set_mesh(mesh):
        x, w, t = (jax.device_put(a, NamedSharding(mesh, rules.spec(*d))) for a, d in zip(arrays, dims, strict=True))
        ((_, sums), gradients), alone = run(x, w, t)
    expected_sums, expected_gradients = loss_in_float64(*arrays)
    within("sums", max(relative(a, b) for a, b in zip(sums, expected_sums, strict=True)), 1e-5)
    within("sums without gradients", max(relative(a, b) for a, b in zip(alone, expected_sums, strict=True)), 1e-5)
    for name, g, expected in zip(("x", "w"), gradients, expected_gradients, strict=True):
        within(f"gradient of {name}", relative(3 * np.array(g), expected), 1e-5)
    assert not np.array(gradients[0])[targets_BS < 0].any()


# 5. Optimizers and schedules.

RATES = {"adamw": 1e-2, "lion": 3e-3, "adafactor": 1e-2, "muon": 1e-2, "sgd": 0.3}
SHAPES = {
    "embedding": (33, 40),
    "layers.attention.query": (2, 6, 2, 4),
    "layers.attention.out": (2, 2, 4, 6),
    "layers.mlp.up": (2, 6, 10),
    "layers.mlp_norm.scale": (2, 6),
}


@dataclasses.dataclass
class Formula:
    """One leaf under one optimizer, in float64: `update(gradient, decay)` is what the learning rate multiplies."""

    name: str
    o: OptimizerConfig
    step: int = 0
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)

    def update(self, g: np.ndarray, decay: np.ndarray | float) -> np.ndarray:
        self.step += 1
        return getattr(self, self.o.name)(g, decay)

    def average(self, key: str, value: np.ndarray, keep: float) -> np.ndarray:
        self.memory[key] = keep * self.memory.get(key, 0) + (1 - keep) * value
        return self.memory[key]

    def unbiased(self, average: np.ndarray, keep: float, step: int) -> np.ndarray:
        return average / (1 - keep**step)

    def sgd(self, g: np.ndarray, decay: np.ndarray | float) -> np.ndarray:
        """torch.optim.SGD: the decay is part of the gradient, and so of the momentum."""
        self.memory["m"] = self.o.beta1 * self.memory.get("m", 0) + g + decay
        return self.memory["m"]

    def lion(self, g: np.ndarray, decay: np.ndarray | float) -> np.ndarray:
        """Chen et al., 2023, algorithm 2."""
        direction = np.sign(self.o.beta1 * self.memory.get("m", 0) + (1 - self.o.beta1) * g)
        self.average("m", g, self.o.beta2)
        return direction + decay

    def adamw(self, g: np.ndarray, decay: np.ndarray | float) -> np.ndarray:
        """Loshchilov and Hutter, 2019, algorithm 2."""
        m = self.unbiased(self.average("m", g, self.o.beta1), self.o.beta1, self.step)
        v = self.unbiased(self.average("v", g**2, self.o.beta2), self.o.beta2, self.step)
        return m / (np.sqrt(v) + self.o.eps) + decay

    def adafactor(self, g: np.ndarray, decay: np.ndarray | float) -> np.ndarray:
        """Shazeer and Stern, 2018, algorithm 4, without relative steps; factored from 32 rows and columns on."""
        keep = 1 - self.step**-0.8
        if min(g.shape) >= 32:
            rows = self.average("rows", np.mean(g**2, axis=1, keepdims=True), keep)
            v = rows * self.average("columns", np.mean(g**2, axis=0, keepdims=True), keep) / np.mean(rows)
        else:
            v = self.average("v", g**2, keep)
        direction = g / np.sqrt(v)
        return direction / max(1.0, np.sqrt(np.mean(direction**2))) + decay

    def muon(self, g: np.ndarray, decay: np.ndarray | float) -> np.ndarray:
        """Jordan et al., 2024: Nesterov momentum, five Newton-Schulz steps on each layer's [in, out] matrix."""
        beta = self.o.beta1
        ahead = self.unbiased(self.average("m", g, beta), beta, self.step + 1)
        m = beta * ahead + (1 - beta) * self.unbiased(g, beta, self.step)
        if "." not in self.name or self.name.endswith("scale"):
            v = self.unbiased(self.average("v", g**2, self.o.beta2), self.o.beta2, self.step)
            return m / (np.sqrt(v) + self.o.eps) + decay
        inputs = math.prod(m.shape[1:3] if self.name.endswith(".out") else m.shape[1:2])
        return np.stack([self.orthogonal(layer.reshape(inputs, -1)) for layer in m]).reshape(g.shape) + decay

    def orthogonal(self, x: np.ndarray) -> np.ndarray:
        scale = math.sqrt(max(1.0, x.shape[1] / x.shape[0]))
        x = x / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return scale * x


def tree_of(seed: int) -> Leaves:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", CHOICES["optimizer.name"])
def test_optimizer_equals_its_formula(name: str) -> None:
    """Four updates of leaves of every kind, under warmup and decay."""
    settings = dict(name=name, warmup_steps=2, learning_rate=0.1, weight_decay=0.3, beta1=0.8, eps=1e-3)
    config = config_of(train=dict(steps=4), optimizer=settings)
    optimizer, o = make_optimizer(config), config.optimizer
    start, formulas = tree_of(0), {leaf: Formula(leaf, o) for leaf in SHAPES}
    expected = {leaf: p.astype(np.float64) for leaf, p in start.items()}
    with jax.set_mesh(mesh_of()):
        params = {leaf: jnp.asarray(p) for leaf, p in start.items()}
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for n in range(4):
            gradients = tree_of(n + 1)
            updates, state = update({leaf: jnp.asarray(g) for leaf, g in gradients.items()}, state, params)
            params = {leaf: p + updates[leaf] for leaf, p in params.items()}
            for leaf, p in expected.items():
                decay = 0.0 if leaf.endswith("scale") else o.weight_decay * p
                change = formulas[leaf].update(gradients[leaf].astype(np.float64), decay)
                expected[leaf] = p - cosine_rate(n, o, 4) * change
    errors = {leaf: relative(params[leaf] - start[leaf], p - start[leaf]) for leaf, p in expected.items()}
    worst = max(errors, key=lambda leaf: errors[leaf])
    within(f"{name}, change of {worst}", errors[worst], 1e-5)


@pytest.mark.parametrize("name", CHOICES["optimizer.name"])
def test_optimizer_on_a_mesh_equals_one_device(name: str) -> None:
    """Ten steps on one batch lower its loss, by the same on fsdp=2 x tensor=2."""
    config = config_of(
        model=dict(vocab_size=64, dim=64, layers=1, heads=2, ffn_dim=96),
        data=dict(sequence_length=8),
        train=dict(steps=10, batch_size=2),
        optimizer=dict(name=name, learning_rate=RATES[name], warmup_steps=2),
    )
    random = np.random.default_rng(0)
    tokens = random.integers(64, size=(1, 2, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (1, 2, 8))
    batch = Batch(tokens[..., :-1], tokens[..., 1:], positions, np.ones_like(positions))
    one, mesh = (train_ours(config, mesh_of(**axes), [batch] * 10)[0].loss for axes in ({}, dict(fsdp=2, tensor=2)))
    print(one)
    assert one[-1] < one[0] - 0.1, f"the loss went from {one[0]} to {one[-1]}"
    within(f"{name}, loss at any step", np.abs(mesh - one).max(), 1e-5)


@pytest.mark.parametrize(
    "settings, steps, expected",
    [
        (dict(schedule="cosine", warmup_steps=0), 4, [1, 0.868198, 0.55, 0.231802, 0.1, 0.1]),
        (dict(schedule="cosine", warmup_steps=2), 4, [0.5, 1, 1, 0.55, 0.1]),
        (dict(schedule="linear", warmup_steps=1), 4, [1, 1, 0.7, 0.4, 0.1, 0.1]),
        (dict(schedule="linear", warmup_steps=4), 10, [0.25, 0.5, 0.75, 1, 1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1]),
        (dict(schedule="wsd", warmup_steps=2, decay_fraction=0.3), 10, [0.5, *[1] * 6, 1, 0.7, 0.4, 0.1]),
        (dict(schedule="wsd", warmup_steps=0, decay_fraction=1.0), 3, [1, 0.7, 0.4, 0.1]),
        (dict(schedule="wsd", warmup_steps=2, decay_fraction=0.8), 5, [0.5, 1, 1, 0.7, 0.4, 0.1]),
        (dict(schedule="constant", warmup_steps=2), 4, [0.5, 1, 1, 1, 1]),
        (dict(schedule="constant", warmup_steps=0), 2, [1, 1, 1]),
        *[(dict(schedule=s, warmup_steps=4), 4, [0.25, 0.5, 0.75, 1]) for s in CHOICES["optimizer.schedule"]],
        *[(dict(schedule=s, warmup_steps=9), 4, [0.25, 0.5, 0.75, 1]) for s in CHOICES["optimizer.schedule"]],
        *[(dict(schedule=s, warmup_steps=w), 1, [1]) for s in CHOICES["optimizer.schedule"] for w in (0, 1, 100)],
    ],
    ids=str,
)
def test_schedule(settings: dict[str, Any], steps: int, expected: list[float]) -> None:
    """Rates of the updates 0, 1, ... worked out by hand; entry `steps` is what the decay ends at."""
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, **settings)
    rate = schedule(config, steps)
    assert [float(rate(n)) for n in range(len(expected))] == pytest.approx(expected, abs=1e-6)
