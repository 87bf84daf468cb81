"""Parity with PyTorch and Hugging Face: logits, loss, gradients, a training curve; optimizers against their formulas.

`pytest -rP` prints every difference that is measured.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from transformers import LlamaConfig, LlamaForCausalLM

from jaxpar.attention import TokenInfo
from jaxpar.config import Config, MeshConfig, OptimizerConfig, RopeScaling, configure
from jaxpar.data import Batch, batches, global_batch, open_data
from jaxpar.loss import LossSums, cross_entropy
from jaxpar.model import Llama
from jaxpar.optimizer import make_optimizer, schedule
from jaxpar.sharding import Rules, make_mesh
from jaxpar.sources import SEPARATOR, STORIES
from jaxpar.step import TrainState, batch_spec, loss_and_gradients, make_train_step
from jaxpar.tree import leaf_name, named_leaves
from jaxpar.validation import CHOICES, resolve, validate_mesh

Leaves = dict[str, np.ndarray]

QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""Compiles twice as fast; what is compared here is small, and runs a few times."""


def config_of(**groups: Any) -> Config:
    """A resolved config that computes in float32."""
    return resolve(configure(precision=dict(compute="float32"), **groups))


def mesh_of(**axes: int) -> Mesh:
    """A mesh of the first of the simulated devices."""
    return make_mesh(MeshConfig(**axes))


def draw(config: Config, mesh: Mesh, std: float) -> Llama:
    """The same random model on every mesh: norm scales between 1/2 and 3/2, weights of spread `std`."""
    random = np.random.default_rng(1)

    def leaf(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        is_scale = leaf_name(path).endswith("scale")
        values = random.uniform(0.5, 1.5, like.shape) if is_scale else std * random.normal(size=like.shape)
        return jax.device_put(values.astype(np.float32), NamedSharding(mesh, like.sharding.spec))

    with jax.set_mesh(mesh):
        return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(lambda: Llama(config, nnx.Rngs(params=0))))


def relative(value: Any, reference: Any) -> float:
    """Norm of the difference over the norm of the reference, in float64."""
    reference = np.asarray(reference, np.float64)
    return float(np.linalg.norm(np.asarray(value, np.float64) - reference) / np.linalg.norm(reference))


def within(what: str, difference: float, limit: float) -> None:
    """Asserts that a difference is below its limit (not-a-number is not), and prints it."""
    print(f"{what}: {difference:.1e} (limit {limit:g})")
    assert difference < limit, f"{what}: {difference} is not below {limit}"


def all_within(what: str, values: Mapping[str, Any], expected: Mapping[str, Any], limit: float) -> None:
    """The same for the relative difference of every array of a mapping."""
    assert values.keys() == expected.keys()
    errors = {name: relative(values[name], reference) for name, reference in expected.items()}
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    within(f"{what}, worst {worst}", errors[worst], limit)


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


def to_hugging_face(tree: Llama) -> Leaves:
    """Weights or gradients under their Hugging Face names, on the host: layers apart, matrices [out, in]."""
    state = {}
    for name, leaf in named_leaves(tree).items():
        array = np.array(leaf)
        if name in WHOLE:
            state[f"{WHOLE[name]}.weight"] = array.T if name == "head" else array
            continue
        for layer, weight in enumerate(array):
            if weight.ndim > 1:
                inputs = weight.shape[:2] if name.endswith(".out") else weight.shape[:1]
                weight = weight.reshape(math.prod(inputs), -1).T
            state[f"model.layers.{layer}.{LAYER[name]}.weight"] = weight
    return state


def hugging_face(config: Config, weights: Leaves) -> LlamaForCausalLM:
    """The model of Hugging Face with these weights."""
    m, scaling = config.model, config.model.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": m.rope_theta}
    if scaling.factor != 1:
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": scaling.original_sequence_length}
        rope |= {name: getattr(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    sizes = dict(vocab_size=m.vocab_size, hidden_size=m.dim, intermediate_size=m.ffn_dim, num_hidden_layers=m.layers)
    heads = dict(num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.head_dim)
    rest = dict(rms_norm_eps=m.norm_eps, tie_word_embeddings=m.tie_embeddings, rope_parameters=rope, use_cache=False)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **rest, attn_implementation="eager"))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == m.tie_embeddings
    if m.tie_embeddings:
        weights = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    model.load_state_dict({name: torch.tensor(w) for name, w in weights.items()}, strict=True)
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
    gradients: Leaves


def packed(vocab_size: int) -> tuple[Batch, list[np.ndarray]]:
    """`DOCUMENTS` of random tokens as a batch [1, B, S], and one by one."""
    random = np.random.default_rng(2)
    batch = Batch(*(np.full((1, len(DOCUMENTS), sum(DOCUMENTS[0])), value, np.int32) for value in (0, -1, 0, 0)))
    documents = []
    for row, lengths in enumerate(DOCUMENTS):
        for segment, (length, stop) in enumerate(zip(lengths, itertools.accumulate(lengths), strict=True), 1):
            document = random.integers(vocab_size, size=length)
            at = (0, row, slice(stop - length, stop))
            batch.tokens[at], batch.positions[at], batch.segments[at] = document, np.arange(length), segment
            batch.targets[0, row, stop - length : stop - 1] = document[1:]
            documents.append(document)
    return batch, documents


def ours(config: Config, model: Llama, batch: Batch) -> Outcome:
    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(model: Llama, batch: Batch) -> tuple[jax.Array, LossSums, Llama]:
        tokens, _, positions, segments = (field[0] for field in batch)
        x_BSD, _ = model(tokens, TokenInfo(positions, segments))
        x_BSD, w_DV = (jax.sharding.reshard(x, jax.P()) for x in (x_BSD, model.head_weight()))
        return jnp.einsum("BSD,DV->BSV", x_BSD, w_DV), *loss_and_gradients(model, batch, config)

    logits_BSV, losses, gradients = run(model, batch)
    assert losses.objective == losses.cross_entropy  # no z-loss
    documents = []
    for row, lengths in zip(np.array(logits_BSV), DOCUMENTS, strict=True):
        documents += np.split(row, list(itertools.accumulate(lengths)))[: len(lengths)]
    return Outcome(documents, float(losses.cross_entropy), to_hugging_face(gradients))


def theirs(model: LlamaForCausalLM, documents: list[np.ndarray]) -> Outcome:
    """Each document alone, with the loss of Hugging Face, weighted by its predictions."""
    logits, losses = [], []
    for document in documents:
        tokens = torch.from_numpy(document)[None]
        output = model(input_ids=tokens, labels=tokens)
        logits.append(output.logits[0].detach().numpy())
        losses.append(output.loss * (len(document) - 1))
    loss = torch.stack(losses).sum() / sum(len(document) - 1 for document in documents)
    loss.backward()
    return Outcome(logits, loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()})


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Outcome, Outcome]:
    """One case in jaxpar, on one device, and in Hugging Face."""
    config, mesh = config_of(model=CASES[request.param]), mesh_of()
    batch, documents = packed(config.model.vocab_size)
    with jax.set_mesh(mesh):
        model = draw(config, mesh, std=0.2)
        mine = ours(config, model, global_batch(batch, NamedSharding(mesh, batch_spec(config)), zigzag=False))
        return mine, theirs(hugging_face(config, to_hugging_face(model)), documents)


@pytest.mark.parametrize("row", [slice(0, 1), slice(1, None)], ids=["whole", "packed"])
def test_logits_equal_hugging_face(pair: tuple[Outcome, Outcome], row: slice) -> None:
    """A row of one document, and one of three, which Hugging Face gets one by one."""
    mine, expected = (outcome.logits[row] for outcome in pair)
    assert np.std(np.concatenate(expected)) > 0.5, "flat logits prove little"
    within("logits", max(np.abs(a - b).max() for a, b in zip(mine, expected, strict=True)), 1e-4)


def test_loss_and_gradients_equal_hugging_face(pair: tuple[Outcome, Outcome]) -> None:
    """The mean over the predictions of all documents; each parameter of each layer."""
    mine, expected = pair
    within("loss", abs(mine.loss - expected.loss), 1e-5)
    all_within("gradients", mine.gradients, expected.gradients, 1e-4)


def test_rope_scaling_matters_here() -> None:
    """The llama 3.1 case keeps, blends and stretches frequencies, and would not pass without scaling."""
    config = config_of(model=CASES["llama 3.1"])
    turns = 32 * config.model.rope_theta ** (-np.arange(8) / 8) / (2 * math.pi)
    assert (turns > 4).any() and ((turns > 1) & (turns < 4)).any() and (turns < 1).any()
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, rope_scaling=RopeScaling()))
    weights, documents = to_hugging_face(draw(config, mesh_of(), std=0.2)), packed(config.model.vocab_size)[1]
    scaled, unscaled = (theirs(hugging_face(c, weights), documents).logits[0] for c in (config, plain))
    assert np.abs(scaled - unscaled).max() > 1e-2


# 3. A training curve.


def cosine_rate(n: int, o: OptimizerConfig, steps: int) -> float:
    """Learning rate of update n, counted from 0."""
    if n < o.warmup_steps:
        return o.learning_rate * (n + 1) / o.warmup_steps
    done = (n - o.warmup_steps) / (steps - o.warmup_steps)
    return o.min_learning_rate + (o.learning_rate - o.min_learning_rate) * (1 + math.cos(math.pi * done)) / 2


def train_ours(config: Config, mesh: Mesh, data: list[Batch]) -> tuple[np.ndarray, Leaves]:
    """Loss, gradient norm and learning rate of every step [steps, 3]; the weights under their Hugging Face names."""
    with jax.set_mesh(mesh):
        model, zero = draw(config, mesh, std=0.02), jnp.zeros((), jnp.int32)
        state = TrainState(zero, zero.copy(), model, jax.jit(make_optimizer(config).init)(model))
        step = jax.jit(make_train_step(config), donate_argnums=0, compiler_options=QUICK)
        rows = []
        for batch in data:
            state, metrics = step(state, global_batch(batch, NamedSharding(mesh, batch_spec(config)), zigzag=False))
            rows.append([float(metrics[name]) for name in ("loss", "grad_norm", "learning_rate")])
    assert (state.step, state.skipped) == (len(data), 0)
    return np.array(rows), to_hugging_face(state.model)


def train_torch(config: Config, data: list[Batch]) -> tuple[np.ndarray, Leaves]:
    """AdamW, clipping and schedule of PyTorch; documents kept apart by a mask and by their positions."""
    model, o = hugging_face(config, to_hugging_face(draw(config, mesh_of(), std=0.02))), config.optimizer
    decays = {True: o.weight_decay, False: 0.0}
    groups = [dict(params=[p for p in model.parameters() if (p.ndim > 1) == m], weight_decay=decays[m]) for m in decays]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(o.beta1, o.beta2), eps=o.eps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: cosine_rate(n, o, config.train.steps))
    rows = []
    for batch in data:
        tokens, targets, positions, segments = (torch.from_numpy(x).flatten(0, 1).long() for x in batch)
        seen = (segments[:, :, None] == segments[:, None, :]).tril()
        mask = torch.where(seen, 0.0, -math.inf)[:, None]
        logits = model(input_ids=tokens, position_ids=positions, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        rows.append((loss.item(), norm.item(), scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return np.array(rows), {name: p.detach().numpy() for name, p in model.named_parameters()}


def test_training_curve_equals_pytorch(tmp_path: Path) -> None:
    """50 steps on text on fsdp=2 x sequence=2 x tensor=2, in two microbatches; PyTorch in one go.

    Paragraphs are documents, so that windows hold several. The learning rate stays below the point where rounding grows
    exponentially: at 1e-2 no two programs agree.
    """
    text = tmp_path / "paragraphs.txt"
    text.write_text(STORIES.read_text()[:100_000].replace("\n\n", f"\n{SEPARATOR}\n"))
    config = config_of(
        model=dict(vocab_size=258, dim=64, layers=2, heads=4, kv_heads=2, ffn_dim=128),
        data=dict(source=str(text), tokenizer="bytes", sequence_length=32),
        train=dict(steps=50, batch_size=8, microbatches=2),
        optimizer=dict(learning_rate=5e-3, min_learning_rate=5e-4, warmup_steps=10, clip_norm=1.0),
    )
    axes = dict(fsdp=2, sequence=2, tensor=2)
    validate_mesh(config, MeshConfig(**axes))
    corpus = open_data(config.data, vocab_size=config.model.vocab_size, seed=0)
    data = list(batches(corpus.train, seed=0, batch_size=8, microbatches=2, stop=config.train.steps))
    assert np.mean([batch.segments.max(axis=-1) > 1 for batch in data]) > 0.05, "hardly any packed documents"
    (mine, my_weights), (expected, weights) = train_ours(config, mesh_of(**axes), data), train_torch(config, data)
    assert expected[-5:, 0].mean() < expected[0, 0] - 2, "nothing was learned"
    assert expected[:, 1].min() < 1 < expected[:, 1].max(), "clipping always or never"
    within("loss at any step", np.abs(mine - expected)[:, 0].max(), 1e-4)
    within("gradient norm at any step", np.abs(mine / expected - 1)[:, 1].max(), 1e-3)
    within("learning rate at any step", np.abs(mine / expected - 1)[:, 2].max(), 1e-5)
    all_within("weights after the last", my_weights, weights, 1e-4)


# 4. Cross-entropy and z-loss.

Z_LOSS = 1e-2


def loss_in_float64(x_BSD: np.ndarray, w_DV: np.ndarray, targets_BS: np.ndarray) -> tuple[LossSums, Leaves]:
    """Sums over the valid tokens, and the gradients of the objective."""
    x, w = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (x_BSD, w_DV))
    targets = torch.from_numpy(targets_BS).long()
    logits, valid = (x @ w)[targets >= 0], targets[targets >= 0]
    log_partition = logits.logsumexp(-1)
    ce, z = (log_partition - logits[torch.arange(len(valid)), valid]).sum(), log_partition.square().sum()
    total = ce + Z_LOSS * z
    total.backward()
    return LossSums(total.item(), ce.item(), z.item()), {"x": x.grad.numpy(), "w": w.grad.numpy()}


@pytest.mark.parametrize(
    "axes, vocab, chunk, parallel, scale",
    [
        ({}, 67, 7, True, 1),
        ({}, 67, 1000, False, 300),  # logits that overflow exp
        (dict(tensor=4), 68, 7, True, 1),
        (dict(tensor=4), 68, 5, False, 300),
        (dict(fsdp=2, sequence=2, tensor=2), 66, 3, True, 1),
    ],
)
def test_cross_entropy_equals_torch(axes: Any, vocab: int, chunk: int, parallel: bool, scale: int) -> None:
    """Sums and gradients with a z-loss, ignored targets, and chunks that do not divide the tokens."""
    random = np.random.default_rng(0)
    x_BSD = scale * random.normal(size=(2, 16, 8)).astype(np.float32)
    w_DV = random.normal(size=(8, vocab)).astype(np.float32)
    targets_BS = np.where(random.random((2, 16)) < 0.3, -1, random.integers(vocab, size=(2, 16))).astype(np.int32)
    targets_BS[0, :3] = 0, vocab - 1, -1
    rules, mesh = Rules.make(sequence_parallel=parallel), mesh_of(**axes)

    def third(x: jax.Array, w: jax.Array, targets: jax.Array) -> tuple[jax.Array, LossSums]:
        sums = cross_entropy(x, w, targets, rules, chunk, Z_LOSS)
        return sums.objective / 3, sums  # a third, to see that the backward pass scales

    arrays = (x_BSD, w_DV, targets_BS)
    dims = ("batch", "residual_seq", "embed"), ("embed_fsdp", "vocab"), ("batch", "seq")
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, rules.spec(*d))) for a, d in zip(arrays, dims, strict=True)]
        (_, sums), (dx, dw) = jax.jit(jax.value_and_grad(third, argnums=(0, 1), has_aux=True))(*placed)
        _, alone = jax.jit(third)(*placed)
    expected, gradients = loss_in_float64(*arrays)
    all_within("sums", sums._asdict(), expected._asdict(), 1e-5)
    all_within("sums without gradients", alone._asdict(), expected._asdict(), 1e-5)
    all_within("gradients", {"x": 3 * np.array(dx), "w": 3 * np.array(dw)}, gradients, 5e-5)
    assert not np.array(dx)[targets_BS < 0].any()


# 5. Optimizers and schedules.

ELEMENTWISE = ("adamw", "lion", "sgd")
RATES = {"adamw": 1e-2, "lion": 3e-3, "adafactor": 1e-2, "muon": 1e-2, "sgd": 0.3}
SHAPES = {
    "embedding": (33, 40),
    "layers.attention.query": (2, 6, 2, 4),
    "layers.attention.out": (2, 2, 4, 6),
    "layers.mlp.up": (2, 6, 10),
    "layers.mlp_norm.scale": (2, 6),
}


class Formula:
    """One leaf under one optimizer, in float64: `rule(g, decay, t)` is what the learning rate multiplies, t from 1."""

    def __init__(self, name: str, o: OptimizerConfig) -> None:
        self.name, self.beta1, self.beta2, self.eps = name, o.beta1, o.beta2, o.eps
        self.rule, self.memory = getattr(self, o.name), {}

    def average(self, key: str, value: np.ndarray, keep: float) -> np.ndarray:
        self.memory[key] = keep * self.memory.get(key, 0) + (1 - keep) * value
        return self.memory[key]

    def sgd(self, g: np.ndarray, decay: np.ndarray, t: int) -> np.ndarray:
        """torch.optim.SGD: the decay is part of the gradient, and so of the momentum."""
        return self.average("m", (g + decay) / (1 - self.beta1), self.beta1)

    def lion(self, g: np.ndarray, decay: np.ndarray, t: int) -> np.ndarray:
        """Chen et al., 2023, algorithm 2."""
        direction = np.sign(self.beta1 * self.memory.get("m", 0) + (1 - self.beta1) * g)
        self.average("m", g, self.beta2)
        return direction + decay

    def adamw(self, g: np.ndarray, decay: np.ndarray, t: int) -> np.ndarray:
        """Loshchilov and Hutter, 2019, algorithm 2."""
        return self.scaled(self.average("m", g, self.beta1) / (1 - self.beta1**t), g, t) + decay

    def scaled(self, m: np.ndarray, g: np.ndarray, t: int) -> np.ndarray:
        return m / (np.sqrt(self.average("v", g**2, self.beta2) / (1 - self.beta2**t)) + self.eps)

    def adafactor(self, g: np.ndarray, decay: np.ndarray, t: int) -> np.ndarray:
        """Shazeer and Stern, 2018, algorithm 4, without relative steps; factored from 32 rows and columns on."""
        keep = 1 - t**-0.8
        if min(g.shape) >= 32:
            rows = self.average("rows", np.mean(g**2, axis=1, keepdims=True), keep)
            v = rows * self.average("columns", np.mean(g**2, axis=0, keepdims=True), keep) / np.mean(rows)
        else:
            v = self.average("v", g**2, keep)
        direction = g / np.sqrt(v)
        return direction / max(1.0, np.sqrt(np.mean(direction**2))) + decay

    def muon(self, g: np.ndarray, decay: np.ndarray, t: int) -> np.ndarray:
        """Jordan et al., 2024: Nesterov momentum, then each layer's [in, out] matrix made orthogonal; else NAdamW."""
        ahead = self.average("m", g, self.beta1) / (1 - self.beta1 ** (t + 1))
        m = self.beta1 * ahead + (1 - self.beta1) * g / (1 - self.beta1**t)
        if self.name == "embedding" or self.name.endswith("scale"):
            return self.scaled(m, g, t) + decay
        inputs = math.prod(m.shape[1:3] if self.name.endswith(".out") else m.shape[1:2])
        return np.stack([self.orthogonal(layer.reshape(inputs, -1)) for layer in m]).reshape(g.shape) + decay

    def orthogonal(self, x: np.ndarray) -> np.ndarray:
        """Five Newton-Schulz steps."""
        scale, x = math.sqrt(max(1.0, x.shape[1] / x.shape[0])), x / (np.linalg.norm(x) + self.eps)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return scale * x


@pytest.mark.parametrize("name", RATES)
def test_optimizer_equals_its_formula(name: str) -> None:
    """Four updates of leaves of every kind, under warmup and decay; weight decay on all but norm scales."""
    settings = dict(name=name, warmup_steps=2, learning_rate=0.1, weight_decay=0.3, beta1=0.8, eps=1e-3)
    config = config_of(train=dict(steps=4), optimizer=settings)
    optimizer, random = make_optimizer(config), np.random.default_rng(0)
    start, *gradients = ({k: random.normal(size=v).astype(np.float32) for k, v in SHAPES.items()} for _ in range(5))
    formulas = {leaf: Formula(leaf, config.optimizer) for leaf in SHAPES}
    expected = {leaf: p.astype(np.float64) for leaf, p in start.items()}
    with jax.set_mesh(mesh_of()):
        params = jax.tree.map(jnp.asarray, start)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for n, g in enumerate(gradients):
            updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
            params = jax.tree.map(jnp.add, params, updates)
            for leaf, p in expected.items():
                decay = (0.0 if leaf.endswith("scale") else 0.3) * p
                change = formulas[leaf].rule(g[leaf].astype(np.float64), decay, n + 1)
                expected[leaf] = p - cosine_rate(n, config.optimizer, 4) * change
    changes = ({leaf: p - start[leaf] for leaf, p in tree.items()} for tree in (params, expected))
    all_within(f"{name}, change", *changes, limit=1e-5)


# adafactor and muon mix a whole matrix; for the others, which do not, the curve above stands in the fast tests.
@pytest.mark.parametrize("name", ["adafactor", "muon", *(pytest.param(n, marks=pytest.mark.slow) for n in ELEMENTWISE)])
def test_optimizer_on_a_mesh_equals_one_device(name: str) -> None:
    """Ten steps on one batch lower its loss, by the same on fsdp=2 x tensor=2."""
    config = config_of(
        model=dict(vocab_size=64, dim=64, layers=1, heads=2, ffn_dim=96),
        data=dict(sequence_length=8),
        train=dict(steps=10, batch_size=2),
        optimizer=dict(name=name, learning_rate=RATES[name], warmup_steps=2),
    )
    tokens = np.random.default_rng(0).integers(64, size=(1, 2, 9)).astype(np.int32)
    positions = np.broadcast_to(np.arange(8, dtype=np.int32), (1, 2, 8))
    data = [Batch(tokens[..., :-1], tokens[..., 1:], positions, np.ones_like(positions))] * 10
    one, mesh = (train_ours(config, mesh_of(**axes), data)[0][:, 0] for axes in ({}, dict(fsdp=2, tensor=2)))
    assert one[-1] < one[0] - 1, f"the loss went from {one[0]} to {one[-1]}"
    within(f"{name}, loss at any step", np.abs(mesh - one).max(), 1e-5)


@pytest.mark.parametrize(
    "settings, steps, expected",
    [
        (dict(schedule="cosine", warmup_steps=0), 4, [1, 0.868198, 0.55, 0.231802, 0.1, 0.1]),
        (dict(schedule="cosine", warmup_steps=2), 4, [0.5, 1, 1, 0.55, 0.1]),
        (dict(schedule="linear", warmup_steps=1), 4, [1, 1, 0.7, 0.4, 0.1, 0.1]),
        (dict(schedule="linear", warmup_steps=4), 10, [0.25, 0.5, 0.75, 1, 1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1]),
        (dict(schedule="wsd", warmup_steps=2, decay_fraction=0.3), 10, [0.5, 1, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1]),
        (dict(schedule="wsd", warmup_steps=0, decay_fraction=1.0), 3, [1, 0.7, 0.4, 0.1]),
        (dict(schedule="wsd", warmup_steps=2, decay_fraction=0.8), 5, [0.5, 1, 1, 0.7, 0.4, 0.1]),
        (dict(schedule="constant", warmup_steps=2), 4, [0.5, 1, 1, 1, 1]),
        (dict(schedule="linear", warmup_steps=4), 4, [0.25, 0.5, 0.75, 1]),
        *[(dict(schedule=s, warmup_steps=9), 4, [0.25, 0.5, 0.75, 1]) for s in CHOICES["optimizer.schedule"]],
        *[(dict(schedule=s, warmup_steps=w), 1, [1]) for s in CHOICES["optimizer.schedule"] for w in (0, 1, 9)],
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_schedule(settings: dict[str, Any], steps: int, expected: list[float]) -> None:
    """Rates of the updates 0, 1, ... worked out by hand; entry `steps` is where the decay ends."""
    rate = schedule(OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, **settings), steps)
    assert [float(rate(n)) for n in range(len(expected))] == pytest.approx(expected, abs=1e-6)
