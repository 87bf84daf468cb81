"""Generate text from a checkpoint.

  python -m jaxpar.generate --checkpoint=runs/tiny --prompt="Once upon a time" [--max_tokens=200
  --temperature=0.8]

--checkpoint is the workdir of a run, its `checkpoints` folder, or one step in it. The model may be
spread over devices with --mesh.data, --mesh.fsdp and --mesh.tensor, whatever mesh trained it.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxpar import cli
from jaxpar.attention import TokenInfo
from jaxpar.checkpoint import (
    carried_tokenizer,
    load_config,
    load_marks,
    locate,
    restore_state,
)
from jaxpar.config import BATCH_AXES, Config, ConfigError, ParallelConfig
from jaxpar.data.corpus import fitting_tokenizer
from jaxpar.data.tokenizer import Tokenizer, tokenizer_mark
from jaxpar.model import Cache, Llama


@dataclasses.dataclass(frozen=True)
class Sampling:
    """`temperature=0` takes the likeliest token; `top_k=0` considers all, `top_p` the likeliest of
    those that together have this share of their mass."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ConfigError(
                f"--temperature={self.temperature} must not be negative; 0 takes the likeliest "
                "token"
            )
        if self.top_k < 0:
            raise ConfigError(f"--top_k={self.top_k} must not be negative; 0 considers all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p={self.top_p} must be above 0 and at most 1")


def sample(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """One token id a row, int32 [B], from float32 logits."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    ordered_BV = -jnp.sort(-logits_BV, axis=-1)
    if 0 < sampling.top_k < logits_BV.shape[1]:
        logits_BV = jnp.where(
            logits_BV < ordered_BV[:, sampling.top_k - 1, None], -jnp.inf, logits_BV
        )
        ordered_BV = ordered_BV.at[:, sampling.top_k :].set(-jnp.inf)
    if sampling.top_p < 1:
        mass_BV = jnp.cumsum(jax.nn.softmax(ordered_BV, axis=-1), axis=-1)
        last_B1 = jnp.sum(mass_BV < sampling.top_p, axis=-1, keepdims=True)
        logits_BV = jnp.where(
            logits_BV < jnp.take_along_axis(ordered_BV, last_B1, axis=-1), -jnp.inf, logits_BV
        )
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def next_logits(model: Llama, tokens_BS: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Float32 logits [B, V] of the token after the last, and the cache extended by S tokens."""
    batch, length = tokens_BS.shape
    rules = model.layout.rules
    positions = jnp.broadcast_to(
        cache.length + jnp.arange(length, dtype=jnp.int32), (batch, length)
    )
    positions = jax.sharding.reshard(positions, rules.spec("batch", "seq"))
    x_BSD, extended = model(tokens_BS, TokenInfo(positions, jnp.ones_like(positions)), cache)
    assert extended is not None
    head_DV = model.layout.weight(model.head_weight())
    logits_BV = jnp.einsum("BD,DV->BV", x_BSD[:, -1], head_DV, preferred_element_type=jnp.float32)
    return jax.sharding.reshard(logits_BV, jax.P()), extended


def generate(
    model: Llama,
    prompt: np.ndarray,
    *,
    samples: int,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
) -> Iterator[np.ndarray]:
    """Yields the next token of every sample, int32 [samples], `max_tokens` times.

    Args:
      model: on the current mesh, whose batch axes must divide `samples`; built without sequence
        parallelism.
      prompt: token ids [S], S >= 1, the same for all samples.
    """
    spec = model.layout.rules.spec("batch", "seq")

    @functools.partial(jax.jit, donate_argnums=2)
    def advance(
        model: Llama, tokens_BS: jax.Array, cache: Cache, key: jax.Array
    ) -> tuple[jax.Array, Cache]:
        logits_BV, cache = next_logits(model, jax.sharding.reshard(tokens_BS, spec), cache)
        return sample(logits_BV, key, sampling), cache

    cache = jax.jit(lambda: Cache.empty(model, samples, len(prompt) + max_tokens))()
    tokens = jnp.asarray(np.tile(prompt.astype(np.int32), (samples, 1)))
    for key in jax.random.split(jax.random.key(seed), max_tokens):
        drawn, cache = advance(model, tokens, cache, key)
        tokens = drawn[:, None]
        yield np.asarray(drawn)


def generation_config(saved: Config) -> Config:
    """The config of a run, for a forward pass over single tokens: the residual cannot be split
    along the sequence."""
    return dataclasses.replace(saved, parallel=ParallelConfig(sequence_parallel=False))


def load_model(directory: Path, config: Config) -> Llama:
    """The parameters of a checkpoint on the current mesh, in the parameters' dtype."""
    abstract = jax.eval_shape(lambda: Llama(config, nnx.Rngs(params=0)))
    return restore_state(directory, {"model": abstract}, partial=True)["model"]


def main(argv: list[str] | None = None) -> int:
    launch = cli.parse_launch(
        argv,
        __doc__ or "",
        checkpoint=cli.Option(None, "workdir of a run, or one of its checkpoints", required=True),
        prompt=cli.Option("", "text to continue; without it a document is begun"),
        tokenizer=cli.Option(None, "its name or file (default: the checkpoint's own)"),
        max_tokens=cli.Option(200, "tokens to generate at most"),
        samples=cli.Option(1, "continuations to draw"),
        temperature=cli.Option(0.8, "0 takes the likeliest token"),
        top_k=cli.Option(50, "draw from the k likeliest tokens; 0: from all"),
        top_p=cli.Option(1.0, "draw from the likeliest tokens of this total probability"),
        seed=cli.Option(0, "of the draws"),
    )
    options = launch.options
    for name in ("max_tokens", "samples"):
        if options[name] < 1:
            raise ConfigError(f"--{name}={options[name]} must be at least 1")
    sampling = Sampling(options["temperature"], options["top_k"], options["top_p"])
    directory = locate(options["checkpoint"])
    saved = load_config(directory)
    if saved.data.source == "synthetic":
        raise ConfigError(
            f"{directory} was trained on synthetic tokens; it has no text to generate"
        )
    tokenizer = tokenizer_of(directory, saved, options["tokenizer"])
    # Without a prompt, or with one that is no token, begin where documents begin: after another.
    ids = tokenizer.encode(options["prompt"]).tolist() or [tokenizer.eot]
    prompt = np.asarray(ids, np.int32)
    mesh = cli.start(launch, generation_config(saved), training=False)
    if mesh.shape["sequence"] > 1:
        raise ConfigError(
            f"mesh.sequence={mesh.shape['sequence']}: tokens are generated one by one; use 1"
        )
    with jax.set_mesh(mesh):
        shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
        rows = -(-options["samples"] // shards) * shards  # the surplus is not printed
        model = load_model(directory, generation_config(saved))
        tokens = generate(
            model,
            prompt,
            samples=rows,
            max_tokens=options["max_tokens"],
            sampling=sampling,
            seed=options["seed"],
        )
        print_samples(tokens, tokenizer, options["prompt"], options["samples"], ids)
    return 0


def tokenizer_of(directory: Path, saved: Config, asked: str | None) -> Tokenizer:
    """The tokenizer of a checkpoint: the one it carries, else where its config says; or the one
    that is `asked` for, and then it is told if it is another.

    Raises:
      ConfigError: it can't be loaded, or its ids are not those of the model.
    """
    own = str(carried_tokenizer(directory) or saved.data.tokenizer)
    data = dataclasses.replace(saved.data, tokenizer=asked or own)
    tokenizer = fitting_tokenizer(data, saved.model.vocab_size)
    mark = load_marks(directory).get("data.tokenizer") or saved.data.tokenizer
    if asked and (tokenizer_mark(asked) or asked) != mark:
        print(
            f"warning: --tokenizer={asked} is not the tokenizer of {directory} "
            f"({saved.data.tokenizer}): its ids may mean other text",
            file=sys.stderr,
        )
    return tokenizer


def print_samples(
    tokens: Iterator[np.ndarray],
    tokenizer: Tokenizer,
    prompt: str,
    samples: int,
    prompt_ids: Sequence[int] = (),
) -> None:
    """Prints one sample as it grows, several when all are done; each ends where its document
    ends.

    Text is decoded together with the ids of the prompt: some tokenizers drop the space before the
    first word of what they decode.
    """
    texts: list[list[int]] = [[] for _ in range(samples)]
    ended = [False] * samples
    before, shown = tokenizer.decode(prompt_ids), ""

    def continuation(row: int) -> str:
        text = tokenizer.decode([*prompt_ids, *texts[row]])
        return text.removeprefix(before)

    if samples == 1:
        print(prompt, end="", flush=True)
    for drawn in tokens:
        for row in range(samples):
            ended[row] |= int(drawn[row]) == tokenizer.eot
            if not ended[row]:
                texts[row].append(int(drawn[row]))
        if samples == 1:
            text = continuation(0)
            # The rest of a character may be still to come.
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
        if all(ended):
            break
    if samples == 1:
        print()
    for row in range(samples if samples > 1 else 0):
        print(f"--- sample {row + 1}\n{prompt}{continuation(row)}")


if __name__ == "__main__":
    cli.run(main)
