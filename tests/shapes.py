"""Tiny models that several tests share: one configuration per option, and combinations."""

from __future__ import annotations

from dataclasses import replace

import torch

from mygpt import GPT, GPTConfig

TUTORIAL = GPTConfig(5, 8, 2, 2, max_seq_len=12)
MODERN = GPTConfig(
    5, 8, 4, 2, max_seq_len=12, num_kv_heads=2, head_dim=6, mlp_dim=20, norm="rms",
    position="rotary", mlp="swiglu", mlp_bias=False, qk_norm=True,
)  # fmt: skip
GPT2 = GPTConfig(7, 12, 3, 2, max_seq_len=10, mlp="gelu_tanh", attention_bias=True)
LLAMA = GPTConfig(
    6, 24, 4, 1, max_seq_len=16, num_kv_heads=1, norm="rms", norm_eps=1e-5, position="rotary",
    rope_base=500.0, mlp="swiglu", mlp_bias=False, tied=False,
)  # fmt: skip
MIXED = GPTConfig(
    3, 6, 2, 3, max_seq_len=9, norm="rms", mlp="swiglu", attention_bias=True, qk_norm=True,
    tied=False,
)  # fmt: skip
ODD = GPTConfig(1, 5, 1, 1, max_seq_len=3, norm_eps=0.1, mlp_bias=False)
ROTARY_LAYER_NORM = GPTConfig(
    8, 8, 2, 2, max_seq_len=11, head_dim=2, position="rotary", attention_bias=True, qk_norm=True
)
CONFIGS = {
    "tutorial": TUTORIAL,
    "modern": MODERN,
    "gpt2": GPT2,
    "llama": LLAMA,
    "mixed": MIXED,
    "odd": ODD,
    "rotary_layer_norm": ROTARY_LAYER_NORM,
}


def unchecked(config: GPTConfig, **options: str) -> GPTConfig:
    """The same with values that `GPTConfig` does not allow yet."""
    changed = replace(config)
    for name, value in options.items():
        object.__setattr__(changed, name, value)
    return changed


def build(config: GPTConfig, seed: int = 0, spread: float | None = 0.5) -> GPT:
    """A model in eval mode with random parameters, also of norms and biases.

    `spread` is their standard deviation around the initial values; None keeps those.
    """
    torch.manual_seed(seed)
    model = GPT.from_config(config).eval()
    if spread is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model


class OwnForward(GPT):
    """A GPT that a learner changed: no cache in its forward."""

    def forward(self, ids, targets=None):
        logits, loss = super().forward(ids, targets)
        return logits.flip(-1), loss


def own_forward() -> OwnForward:
    """The tutorial's model with another forward pass."""
    model = OwnForward.from_config(TUTORIAL)
    model.load_state_dict(build(TUTORIAL).state_dict())
    return model.eval()
