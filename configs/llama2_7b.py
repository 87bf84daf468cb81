"""Llama 2 7B, with the pretraining settings of its paper."""

from jaxpar.config import configure


def get_config():
    # Sizes and optimizer: Touvron et al., 2023, https://arxiv.org/abs/2307.09288, section 2.2: 4M
    # tokens a step, 2T in all.
    return configure(
        model=dict(
            vocab_size=32000,
            dim=4096,
            layers=32,
            heads=32,
            ffn_dim=11008,
            rope_theta=1e4,
            norm_eps=1e-5,
        ),
        # Made-up tokens. To train: --config.data.source='/data/*.jsonl'
        # --config.data.tokenizer=/data/tokenizer.model
        data=dict(source="synthetic", sequence_length=4096),
        train=dict(steps=480_000, batch_size=1024, eval_every=1000),
        optimizer=dict(
            learning_rate=3e-4,
            min_learning_rate=3e-5,
            warmup_steps=2000,
            weight_decay=0.1,
            beta2=0.95,
            eps=1e-5,
        ),
        memory=dict(remat="full"),
        checkpoint=dict(every=1000),
    )
