"""8 layers of dim 512: the shape in which `docs/benchmarks.md` compares trainers on a CPU."""

from jaxpar.config import configure


def get_config():
    return configure(
        model=dict(vocab_size=8192, dim=512, layers=8, heads=8, ffn_dim=1408),
        data=dict(source="synthetic", tokenizer="bytes", sequence_length=256),
        train=dict(steps=100, batch_size=8),
        precision=dict(compute="float32"),
        memory=dict(remat="full"),
    )
