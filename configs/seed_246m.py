"""The 246M-parameter model of the article that jaxpar grew from, on TinyStories."""

from jaxpar.config import configure


def get_config():
    # https://github.com/ASzot/training-parallelism: embed_dim=1024 n_heads=8 n_layers=16, 128
    # sequences of 256, GPT-2's 50257 ids without padding, feed-forward 1.5 x dim. AdamW with
    # torch's defaults.
    return configure(
        model=dict(vocab_size=50257, dim=1024, layers=16, heads=8, ffn_dim=1536),
        data=dict(source="tinystories", tokenizer="gpt2", sequence_length=256),
        train=dict(steps=1000, batch_size=128),
        optimizer=dict(
            learning_rate=3e-4,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.01,
            beta2=0.999,
            clip_norm=0.0,
        ),
    )
