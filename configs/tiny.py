"""A 3.5M-parameter Llama on the built-in stories, byte by byte: trains anywhere in minutes."""

from jaxpar.config import configure


def get_config():
    # Every sharded size is divisible by 8, so that any mesh of 8 devices can run it. Small batches
    # learn most from few tokens, and tokens are what a CPU is short of.
    return configure(
        model=dict(vocab_size=512, dim=256, layers=4, heads=8, kv_heads=8, ffn_dim=704),
        data=dict(source="stories", tokenizer="bytes", sequence_length=256),
        train=dict(steps=400, batch_size=8, eval_every=100, eval_batches=0),
        optimizer=dict(learning_rate=2e-3, min_learning_rate=2e-4, warmup_steps=30),
        checkpoint=dict(every=100),
        log=dict(every=20),
    )
