"""The 7.26B-parameter model of the article that jaxpar grew from, on TinyStories."""

from jaxpar.config import configure


def get_config():
    # https://github.com/ASzot/training-parallelism: embed_dim=4096 n_heads=32 n_layers=48
    # batch_size=1 context_len=256, GPT-2's 50257 ids without padding, feed-forward 1.5 x dim. AdamW
    # with torch's defaults. The article's batch is 1 a device: give --config.train.batch_size the
    # number of devices.
    return configure(
        model=dict(vocab_size=50257, dim=4096, layers=48, heads=32, ffn_dim=6144),
        data=dict(source="tinystories", tokenizer="gpt2", sequence_length=256),
        train=dict(steps=1000, batch_size=1),
        optimizer=dict(
            learning_rate=3e-4,
            schedule="constant",
            warmup_steps=0,
            weight_decay=0.01,
            beta2=0.999,
            clip_norm=0.0,
        ),
        memory=dict(remat="full"),
    )
