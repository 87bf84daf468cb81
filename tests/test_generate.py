"""Generation through the command: the cache changes nothing, `eot` ends a text, and draws follow
the distribution."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import cli, generate
from jaxpar.attention import TokenInfo
from jaxpar.checkpoint import Checkpointer, Position
from jaxpar.config import Config, ConfigError, MeshConfig, configure
from jaxpar.data.tokenizer import load_tokenizer
from jaxpar.generate import Sampling, sample
from jaxpar.model import Cache
from jaxpar.sharding import make_mesh
from jaxpar.step import init_state
from jaxpar.validation import resolve

BYTES = load_tokenizer("bytes")
PROMPT = "It is what"
TOKENS = 12
FLAGS = (f"--prompt={PROMPT}", f"--max_tokens={TOKENS}")

MESHES = {
    "one device": (MeshConfig(), ("--cpu_devices=8",)),
    "tensor=2 x fsdp=2": (
        MeshConfig(fsdp=2, tensor=2),
        ("--mesh.fsdp=2", "--mesh.tensor=2", "--mesh.expert=2"),
    ),
}


def config_of(**train) -> Config:
    """A model whose next tokens differ clearly: the weights are large."""
    model = dict(vocab_size=320, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, init_std=0.3)
    data = dict(tokenizer="bytes", sequence_length=32)
    return resolve(
        configure(model=model, data=data, train=train, precision=dict(compute="float32"))
    )


def on(mesh: MeshConfig):
    return jax.set_mesh(make_mesh(mesh, jax.devices()[: mesh.devices]))


def save(workdir: Path, config: Config) -> Path:
    """A checkpoint of a model that writes printable ASCII."""
    with on(MeshConfig()):
        state = jax.jit(lambda: init_state(config))()
        head = np.asarray(state.model.head[...]).copy()
        head[:, [*range(32), *range(127, 320)]] = 0
        state.model.head[...] = jnp.asarray(head)
        checkpointer = Checkpointer(workdir, config)
        checkpointer.save(5, state, position=Position(5, 40, 0))
        checkpointer.close()
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    # With 8 devices along `data`, no training step could use this batch.
    return save(
        tmp_path_factory.mktemp("generate") / "run", config_of(batch_size=6, microbatches=3)
    )


def load(run: Path):
    config = generate.generation_config(config_of(batch_size=6, microbatches=3))
    return generate.load_model(run / "checkpoints" / "5", config)


@pytest.fixture(scope="module")
def logits_of(run):
    """`logits_of(tokens)`: logits [S, V] after every token, by one forward pass without a cache on
    one device."""
    size = 1 + len(PROMPT) + TOKENS

    @jax.jit
    def forward(model, tokens_BS, segments_BS):
        positions_BS = jnp.zeros_like(tokens_BS) + jnp.arange(size, dtype=jnp.int32)
        x_BSD, _ = model(tokens_BS, TokenInfo(positions_BS, segments_BS))
        return x_BSD[0] @ model.head_weight()

    with on(MeshConfig()):
        model = load(run)

    def logits_of(tokens: list[int]) -> np.ndarray:
        padding = [0] * (size - len(tokens))
        with on(MeshConfig()):
            spec = model.layout.rules.spec("batch", "seq")
            rows = (tokens + padding, [1] * len(tokens) + padding)
            placed = (jax.device_put(np.asarray([row], np.int32), spec) for row in rows)
            return np.asarray(forward(model, *placed))[: len(tokens)]

    return logits_of


@pytest.fixture(scope="module")
def greedy(logits_of):
    """`greedy(text)`: what is likeliest to follow, computed anew for every token."""

    def greedy(text: str) -> str:
        tokens = BYTES.encode(text).tolist() or [BYTES.eot]
        start = len(tokens)
        for _ in range(TOKENS):
            last = np.sort(logits_of(tokens)[-1])
            assert last[-1] - last[-2] > 1e-3, "too close to call: choose another prompt"
            tokens.append(int(np.argmax(logits_of(tokens)[-1])))
        return BYTES.decode(tokens[start:])

    return greedy


@pytest.mark.parametrize("mesh", MESHES)
def test_greedy_equals_the_full_forward_pass(run, greedy, capsys, mesh):
    """The command takes all eight devices: here `one device` is each with the whole model."""
    assert len(set(greedy(PROMPT))) > 4, "the model should not repeat itself"
    assert generate.main([f"--checkpoint={run}", *FLAGS, "--temperature=0", *MESHES[mesh][1]]) == 0
    assert capsys.readouterr().out == PROMPT + greedy(PROMPT) + "\n"


@pytest.mark.parametrize("mesh", MESHES)
def test_the_cache_gives_the_same_logits(run, logits_of, mesh):
    """A prompt at once, then token by token, in two rows of which the second is another text."""
    rows = [
        BYTES.encode(PROMPT + text).astype(np.int32) for text in (" is it, then", " will be, if")
    ]
    expected = np.stack([logits_of(row.tolist()) for row in rows])
    step = jax.jit(generate.next_logits)
    with on(MESHES[mesh][0]):
        model = load(run)
        spec = model.layout.rules.spec("batch", "seq")
        tokens = np.stack(rows)
        cache = Cache.empty(model, 2, tokens.shape[1] + 3)
        for start, stop in [(0, 10), *((at, at + 1) for at in range(10, tokens.shape[1]))]:
            logits, cache = step(model, jax.device_put(tokens[:, start:stop], spec), cache)
            np.testing.assert_allclose(
                np.asarray(logits), expected[:, stop - 1], rtol=1e-4, atol=1e-4
            )
        assert int(cache.length) == tokens.shape[1]


def test_without_a_prompt_a_document_is_begun(run, greedy, capsys):
    assert generate.main([f"--checkpoint={run}", f"--max_tokens={TOKENS}", "--temperature=0"]) == 0
    assert capsys.readouterr().out == greedy("") + "\n"


def test_several_samples(run, greedy, capsys):
    """Three rows over eight devices; those that fill up are not shown."""
    main = [f"--checkpoint={run / 'checkpoints'}", *FLAGS, "--samples=3"]
    assert generate.main([*main, "--temperature=0"]) == 0
    blocks = [f"--- sample {n}\n{PROMPT}{greedy(PROMPT)}\n" for n in (1, 2, 3)]
    assert capsys.readouterr().out == "".join(blocks)
    texts = []
    for flags in (("--seed=1",), ("--seed=1",), ("--seed=2",)):
        assert generate.main([*main, "--temperature=5", "--top_k=0", *flags]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0].split("--- sample ")[1:])) == 3


def test_eot_ends_a_text(run, capsys, monkeypatch):
    """Whatever the model would go on to write after it."""
    monkeypatch.setattr(generate, "generate", lambda *_, **__: iter(drawn))
    drawn = [np.array([token]) for token in (*b"ab", BYTES.eot, *b"c")]
    assert generate.main([f"--checkpoint={run / 'checkpoints' / '5'}", "--prompt=>"]) == 0
    assert capsys.readouterr().out == ">ab\n"


def draws(*texts: bytes):
    return (np.array(row) for row in zip(*texts, strict=True))


def test_eot_ends_each_sample_by_itself(capsys):
    eot = BYTES.eot
    tokens = draws([*b"ab", eot, *b"cd"], [eot, *b"efgh"], [*b"ijkl", eot], [*b"mnopq"])
    generate.print_samples(tokens, BYTES, ">", 4)
    texts = [block.partition("\n")[2] for block in capsys.readouterr().out.split("--- sample ")[1:]]
    assert texts == [">ab\n", ">\n", ">ijkl\n", ">mnopq\n"]


def metaspace(path: Path) -> Path:
    """A tokenizer.json whose words begin with a mark for the space before them, which the first
    word of a text loses."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    words = ["<unk>", "</s>", "▁Once", "▁upon", "▁a", "▁time"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("samples", [1, 2])
def test_the_first_word_keeps_its_space(tmp_path, capsys, samples):
    tokenizer = load_tokenizer(str(metaspace(tmp_path / "tokenizer.json")))
    ids = tokenizer.encode("Once upon").tolist()
    assert ids == [2, 3] and tokenizer.decode([4, 5]) == "a time"
    tokens = draws(*[bytes([4, 5])] * samples)
    generate.print_samples(tokens, tokenizer, "Once upon", samples, ids)
    assert capsys.readouterr().out.count("Once upon a time\n") == samples
    generate.print_samples(draws(bytes([4, 5])), tokenizer, "", 1, [tokenizer.eot])
    assert capsys.readouterr().out == "a time\n"


def test_the_tokenizer_of_a_checkpoint(run, tmp_path, capsys, monkeypatch):
    """The one it carries, wherever the run's has gone; a flag takes another, and it is told. A
    prompt that is no token begins a document."""
    file = metaspace(tmp_path / "tokenizer.json")
    config = config_of()
    data = dataclasses.replace(config.data, tokenizer=str(file))
    save(tmp_path / "run", dataclasses.replace(config, data=data))
    other = file.rename(tmp_path / "other.json")
    prompts = []

    def answer(model, prompt, **_):
        prompts.append(prompt.tolist())
        return draws(bytes([4, 5]))

    monkeypatch.setattr(generate, "generate", answer)
    main = [f"--checkpoint={tmp_path / 'run'}"]
    assert generate.main([*main, "--prompt=Once"]) == 0
    assert generate.main([*main, "--prompt= "]) == 0
    assert generate.main([*main, "--prompt=Once", f"--tokenizer={other}"]) == 0
    output = capsys.readouterr()
    assert output.out == "Once a time\n a time\nOnce a time\n" and output.err == ""
    assert prompts == [[2], [1], [2]]
    assert generate.main([*main, "--tokenizer=bytes"]) == 0
    assert "warning: --tokenizer=bytes is not the tokenizer of" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"data.tokenizer='gpt2' has 50257 ids, more than"):
        generate.main([*main, "--tokenizer=gpt2"])


def test_no_more_is_drawn_when_all_have_ended(capsys):
    tokens = draws([*b"a", BYTES.eot, *b"bc"], [BYTES.eot, *b"def"])
    generate.print_samples(tokens, BYTES, "", 2)
    assert next(tokens).tolist() == [*b"be"]
    capsys.readouterr()


def test_a_character_of_several_tokens_is_shown_whole(capsys):
    generate.print_samples(draws("é🙂.".encode()), BYTES, "", 1)
    assert capsys.readouterr().out == "é🙂.\n"


# Sampling.

PROBABILITIES = np.array([0.05, 0.5, 0.15, 0.3])


def frequencies(draws: int = 20_000, **options) -> np.ndarray:
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITIES, jnp.float32)), (draws, 4))
    tokens = sample(
        logits, jax.random.key(0), Sampling(**{"temperature": 1.0, "top_k": 0, **options})
    )
    assert (tokens.shape, tokens.dtype) == ((draws,), jnp.int32)
    return np.bincount(np.asarray(tokens), minlength=4) / draws


def restricted(keep: list[int], temperature: float = 1.0) -> np.ndarray:
    weights = np.where(np.isin(np.arange(4), keep), PROBABILITIES ** (1 / temperature), 0)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, restricted([0, 1, 2, 3])),
        ({"temperature": 2.0}, restricted([0, 1, 2, 3], 2.0)),
        ({"temperature": 0.5}, restricted([0, 1, 2, 3], 0.5)),
        ({"temperature": 0.0}, restricted([1])),
        ({"top_k": 1}, restricted([1])),
        ({"top_k": 2}, restricted([1, 3])),
        ({"top_k": 4}, restricted([0, 1, 2, 3])),
        ({"top_k": 99}, restricted([0, 1, 2, 3])),
        ({"top_p": 0.4}, restricted([1])),
        ({"top_p": 0.6}, restricted([1, 3])),
        ({"top_p": 0.9}, restricted([1, 2, 3])),
        ({"top_p": 1.0}, restricted([0, 1, 2, 3])),
        ({"top_p": 0.9, "top_k": 2}, restricted([1, 3])),
        ({"top_p": 0.4, "temperature": 9.0}, restricted([1, 3], 9.0)),
    ],
)
def test_draws_follow_the_distribution(options, expected):
    found = frequencies(**options)
    assert (found[expected == 0] == 0).all(), "drew what is excluded"
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_draws_are_of_each_row():
    logits = jnp.log(jnp.asarray([[0.98, 0.01, 0.01], [0.01, 0.01, 0.98]], jnp.float32))
    for options in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.5}):
        tokens = sample(
            logits, jax.random.key(0), Sampling(**{"temperature": 1.0, "top_k": 0, **options})
        )
        assert tokens.tolist() == [0, 2]


# Refusals.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--temperature=-1",), ("--temperature=-1", "must not be negative")),
        (("--temperature=nan",), ("--temperature=nan",)),
        (("--temperature=warm",), ("--temperature=warm", "float")),
        (("--top_k=-1",), ("--top_k=-1", "0 considers all")),
        (("--top_p=0",), ("--top_p=0", "above 0 and at most 1")),
        (("--top_p=1.5",), ("--top_p=1.5", "above 0 and at most 1")),
        (("--max_tokens=0",), ("--max_tokens=0", "at least 1")),
        (("--samples=-1",), ("--samples=-1", "at least 1")),
        (("--seed=99999999999999999999",), ("--seed=99999999999999999999",)),
        (("--max_token=3",), ("--max_token", "Did you mean --max_tokens?")),
        (("--mesh.sequence=2",), ("mesh.sequence=2", "use 1")),
        (("--mesh.sequence=8",), ("mesh.sequence=8", "use 1")),
        (("--mesh.tensor=8",), ("model.heads=4 is not divisible by mesh.tensor=8", "{1, 2}")),
        (("--mesh.pipeline=2",), ("mesh.pipeline=2", "one by one", "mesh.tensor")),
        (("--mesh.data=4",), ("data=4", "8 devices")),
    ],
)
def test_refuses(run, capsys, flags, words):
    with pytest.raises(SystemExit) as exit:
        cli.run(lambda _: generate.main([f"--checkpoint={run}", *flags]))
    output = capsys.readouterr()
    assert (exit.value.code, output.out) == (2, "")
    for word in words:
        assert word in output.err


def test_refuses_checkpoints_without_text(tmp_path, run):
    config = config_of()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="synthetic"))
    save(tmp_path / "synthetic", config)
    with pytest.raises(ConfigError, match="synthetic tokens; it has no text to generate"):
        generate.main([f"--checkpoint={tmp_path / 'synthetic'}"])
    with pytest.raises(ConfigError, match="holds no checkpoints"):
        generate.main([f"--checkpoint={tmp_path / 'absent'}"])
