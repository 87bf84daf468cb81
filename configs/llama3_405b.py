"""Llama 3.1 405B."""

from jaxpar.config import configure


def get_config():
    # Sizes, learning rate and schedule: Grattafiori et al., 2024, https://arxiv.org/abs/2407.21783,
    # table 3 and section 3.4.1, which grows the step from 4M tokens to 8M, taken here, and to 16M.
    return configure(
        model=dict(
            vocab_size=128256,
            dim=16384,
            layers=126,
            heads=128,
            kv_heads=8,
            ffn_dim=53248,
            rope_theta=5e5,
            norm_eps=1e-5,
            rope_scaling=dict(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_sequence_length=8192
            ),
        ),
        # Made-up tokens. To train: --config.data.source='/data/*.jsonl'
        # --config.data.tokenizer=/data/tokenizer.json
        data=dict(source="synthetic", sequence_length=8192),
        train=dict(steps=1_200_000, batch_size=1024, eval_every=1000),
        optimizer=dict(
            learning_rate=8e-5,
            min_learning_rate=8e-7,
            warmup_steps=8000,
            weight_decay=0.1,
            beta2=0.95,
        ),
        memory=dict(remat="full"),
        loss=dict(chunk=512),  # of 128,256 logits each
        checkpoint=dict(every=1000),
    )
