"""Llama 3 70B."""

from jaxpar.config import configure


def get_config():
    # Sizes and learning rate: Grattafiori et al., 2024, https://arxiv.org/abs/2407.21783, table 3.
    # The rest is published only for 405B, section 3.4.1.
    return configure(
        model=dict(
            vocab_size=128256,
            dim=8192,
            layers=80,
            heads=64,
            kv_heads=8,
            ffn_dim=28672,
            rope_theta=5e5,
            norm_eps=1e-5,
        ),
        # Made-up tokens. To train: --config.data.source='/data/*.jsonl'
        # --config.data.tokenizer=/data/tokenizer.json
        data=dict(source="synthetic", sequence_length=8192),
        train=dict(steps=1_200_000, batch_size=1024, eval_every=1000),
        optimizer=dict(
            learning_rate=1.5e-4,
            min_learning_rate=1.5e-6,
            warmup_steps=8000,
            weight_decay=0.1,
            beta2=0.95,
        ),
        memory=dict(remat="full"),
        loss=dict(chunk=512),  # of 128,256 logits each
        checkpoint=dict(every=1000),
    )
