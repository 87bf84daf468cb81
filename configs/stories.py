"""A 25M-parameter Llama with GPT-2's vocabulary, for one GPU: bundled stories or TinyStories."""

from jaxpar.config import configure


def get_config():
    # The built-in corpus has 0.27M tokens, an epoch of 32 steps: enough to watch, and soon learnt
    # by heart. With a network, --config.data.source=tinystories --config.train.steps=20000.
    return configure(
        # 50257 ids padded to a multiple of 128, which tensor cores and every mesh like.
        model=dict(
            vocab_size=50304, dim=256, layers=12, heads=8, ffn_dim=1024, tie_embeddings=True
        ),
        data=dict(source="stories", tokenizer="gpt2", sequence_length=256),
        train=dict(steps=500, batch_size=32, eval_every=100),
        optimizer=dict(learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=50),
    )
