"""A plain Llama in PyTorch and its training step: what `bench_step.py` runs beside jaxpar.

As one writes it with PyTorch's own parts: `nn.Linear`, `F.rms_norm`, `scaled_dot_product_attention`
(flash where the device has it), `F.cross_entropy` on the whole logits, fused AdamW, autocast for
bfloat16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# B batch, S sequence, D model dim, H query heads, G key-value heads, K head dim.


class Block(nn.Module):
    def __init__(
        self, dim: int, heads: int, kv_heads: int, head_dim: int, ffn_dim: int, eps: float
    ):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.eps = heads, kv_heads, head_dim, eps
        self.attention_norm, self.mlp_norm = (nn.Parameter(torch.ones(dim)) for _ in range(2))
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key, self.value = (nn.Linear(dim, kv_heads * head_dim, bias=False) for _ in range(2))
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.gate, self.up = (nn.Linear(dim, ffn_dim, bias=False) for _ in range(2))
        self.down = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:  # [B, heads, S, K]
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
                x.dtype
            )

        normed = F.rms_norm(x_BSD, x_BSD.shape[-1:], self.attention_norm, self.eps)
        q, k, v = (
            rotate(split(self.query(normed))),
            rotate(split(self.key(normed))),
            split(self.value(normed)),
        )
        grouped = self.kv_heads != self.heads
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x_BSD = x_BSD + self.out(o.transpose(1, 2).flatten(2))
        normed = F.rms_norm(x_BSD, x_BSD.shape[-1:], self.mlp_norm, self.eps)
        return x_BSD + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Llama(nn.Module):
    """`model`: the fields of jaxpar's `ModelConfig`, as a mapping."""

    def __init__(self, model: dict):
        super().__init__()
        sizes = (
            model["dim"],
            model["heads"],
            model["kv_heads"],
            model["head_dim"],
            model["ffn_dim"],
        )
        self.embedding = nn.Embedding(model["vocab_size"], model["dim"])
        self.layers = nn.ModuleList(
            Block(*sizes, model["norm_eps"]) for _ in range(model["layers"])
        )
        self.norm = nn.Parameter(torch.ones(model["dim"]))
        self.head = nn.Linear(model["dim"], model["vocab_size"], bias=False)
        if model["tie_embeddings"]:
            self.head.weight = self.embedding.weight
        self.theta, self.head_dim, self.eps = (
            model["rope_theta"],
            model["head_dim"],
            model["norm_eps"],
        )
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=model["init_std"])

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor) -> Tensor:
        exponents = torch.arange(0, self.head_dim, 2, device=tokens_BS.device) / self.head_dim
        angles = torch.outer(
            torch.arange(tokens_BS.shape[1], device=tokens_BS.device), self.theta**-exponents
        )
        x_BSD, cos, sin = self.embedding(tokens_BS), angles.cos(), angles.sin()
        for layer in self.layers:
            x_BSD = layer(x_BSD, cos, sin)
        logits = self.head(F.rms_norm(x_BSD, x_BSD.shape[-1:], self.norm, self.eps))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets_BS.flatten(), ignore_index=-1)


def make_step(config: dict, device: str, *, compiled: bool):
    """`step(tokens, targets) -> loss`, one AdamW update of float32 masters. `config`: jaxpar's, as
    mappings."""
    model, o = Llama(config["model"]).to(device), config["optimizer"]
    assert o["name"] == "adamw"
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        dict(params=matrices, weight_decay=o["weight_decay"]),
        dict(params=vectors, weight_decay=0.0),
    ]
    adamw = torch.optim.AdamW(
        groups, o["learning_rate"], (o["beta1"], o["beta2"]), o["eps"], fused=True
    )
    forward = torch.compile(model) if compiled else model
    dtype = getattr(torch, config["precision"]["compute"])

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = forward(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), o["clip_norm"])
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss

    return step
