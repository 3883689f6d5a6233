"""The shape of a model (`GPTConfig`) and how tokens are drawn (`SamplingConfig`).

Frozen dataclasses that validate themselves.
Letters: C embedding, H heads, G key/value heads, D head size, M MLP width, L window, N layers,
V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from mygpt.errors import InputError, make_plain, require_choice, require_int, require_number

Norm = Literal["layer", "rms"]
Position = Literal["learned", "rotary"]
Mlp = Literal["gelu", "gelu_tanh", "swiglu"]

# Temperatures below this are treated as 0: dividing by them would overflow float32.
GREEDY_BELOW = 1e-30

_POSITIONS_AT_ONCE = 2**13


def positions_for(window: int, needed: int = 0) -> int:
    """The capacity of a table or a cache: min(window, max(8192, the power of two >= needed)).

    So a window of millions of tokens takes memory only as far as it is used.
    """
    return min(window, max(_POSITIONS_AT_ONCE, 1 << max(0, needed - 1).bit_length()))


@dataclass(frozen=True)
class GPTConfig:
    """The shape of one GPT; the defaults are the tutorial's block.

    The tutorial's model, GPT-2, Llama and Qwen3 are members of this one family; a switch that
    none of these needs does not exist.

    Raises:
        InputError: for an impossible shape, with the values that would fit.
    """

    vocab_size: int  # V, number of token ids
    embed_dim: int  # C, width of the residual stream
    num_heads: int  # H, query heads
    num_layers: int  # N, blocks
    max_seq_len: int = 64  # L, the context window in tokens
    dropout: float = 0.0  # probability of dropping an activation in training
    num_kv_heads: int | None = None  # key/value heads, shared by groups of query heads; None: H
    head_dim: int | None = None  # D, size of a head; None: C / H
    mlp_dim: int | None = None  # hidden width; None: 4C, for swiglu 8C/3 rounded up to 32s
    norm: Norm = "layer"  # LayerNorm, or RMSNorm (Zhang & Sennrich, 2019)
    norm_eps: float | None = None  # added to the variance; None: 1e-5 for layer, 1e-6 for rms
    position: Position = "learned"  # embedding, or rotary by halves (Su et al., 2021)
    rope_base: float = 10_000.0  # base of the rotary frequencies
    mlp: Mlp = "gelu"  # exact GELU, tanh GELU (GPT-2), or SwiGLU (Shazeer, 2020)
    attention_bias: bool = False  # biases on query, key, value and output
    mlp_bias: bool = True  # biases in the MLP
    qk_norm: bool = False  # RMSNorm on each head's queries and keys (Qwen3)
    tied: bool = True  # the head uses the token embedding's matrix

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embed_dim", "num_heads", "num_layers", "max_seq_len"):
            require_int(name, getattr(self, name), least=1)
        for name in ("num_kv_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), least=1)
        make_plain(self)
        require_choice("norm", self.norm, ("layer", "rms"))
        require_choice("position", self.position, ("learned", "rotary"))
        require_choice("mlp", self.mlp, ("gelu", "gelu_tanh", "swiglu"))
        require_number("dropout", self.dropout)
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout={self.dropout} must be at least 0 and below 1")
        for name in ("norm_eps", "rope_base"):
            if (value := getattr(self, name)) is not None:
                require_number(name, value)
                if not 0.0 < value < math.inf:
                    raise InputError(f"{name}={value} must be a finite number above 0")
        for name in ("attention_bias", "mlp_bias", "qk_norm", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r:.80} must be true or false")
        self._check_heads()

    def _check_heads(self) -> None:
        c, h = self.embed_dim, self.num_heads
        if self.head_dim is None and c % h:
            fits = " or ".join(str(h * n) for n in (c // h, c // h + 1) if n)
            raise InputError(f"embed_dim={c} is not a multiple of num_heads={h}: choose {fits}")
        if h % self.kv_heads:
            raise InputError(
                f"num_heads={h} is not a multiple of num_kv_heads={self.kv_heads}: "
                f"choose one of {', '.join(str(n) for n in range(1, h + 1) if h % n == 0)}"
            )
        if self.position == "rotary" and self.head_size % 2:
            raise InputError(f"rotary positions need an even head size, not {self.head_size}")

    @property
    def head_size(self) -> int:
        """D, the size of one head."""
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP."""
        if self.mlp_dim is not None:
            return self.mlp_dim
        if self.mlp == "swiglu":
            return 32 * math.ceil(8 * self.embed_dim / 3 / 32)
        return 4 * self.embed_dim

    @property
    def eps(self) -> float:
        """The number that the norms add to the variance."""
        if self.norm_eps is not None:
            return self.norm_eps
        return 1e-5 if self.norm == "layer" else 1e-6

    @property
    def is_tutorial_block(self) -> bool:
        """Whether the block is the tutorial's: learned positions, LayerNorm, exact GELU."""
        free = {"vocab_size", "embed_dim", "num_heads", "num_layers", "max_seq_len", "dropout"}
        return all(getattr(self, f.name) == f.default for f in fields(self) if f.name not in free)

    def num_parameters(self) -> int:
        """Number of parameters, each counted once (a tied head adds none)."""
        c, d, m = self.embed_dim, self.head_size, self.mlp_hidden
        q, kv = self.num_heads * d, self.kv_heads * d
        norm = 2 * c if self.norm == "layer" else c
        attention = c * (q + 2 * kv) + q * c
        attention += (q + 2 * kv + c) if self.attention_bias else 0
        attention += 2 * d if self.qk_norm else 0
        inner = 2 * m if self.mlp == "swiglu" else m
        mlp = c * inner + m * c + ((inner + c) if self.mlp_bias else 0)
        embeddings = self.vocab_size * c * (1 if self.tied else 2)
        embeddings += self.max_seq_len * c if self.position == "learned" else 0
        return embeddings + self.num_layers * (attention + mlp + 2 * norm) + norm

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn from logits.

    The penalty is applied first, then the other settings in the order of the fields. Top-k: Fan
    et al., 2018; top-p ("nucleus"): Holtzman et al., 2020; min-p: Nguyen et al., 2024; penalty:
    Keskar et al., 2019.

    Raises:
        InputError: for a value outside its range.
    """

    temperature: float = 1.0  # logits are divided by it; 0 is argmax
    top_k: int | None = None  # keep exactly the k largest logits; None or 0 is off
    top_p: float | None = None  # keep the likeliest tokens until they reach p; None or 1 is off
    min_p: float | None = None  # keep tokens of at least min_p times the largest probability
    repetition_penalty: float | None = None  # above 1: tokens that occurred get less likely

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if name == "temperature" or getattr(self, name) is not None:
                require_number(name, getattr(self, name))
        if not 0.0 <= self.temperature < math.inf:
            raise InputError(
                f"temperature={self.temperature} must be a finite number of at least 0 "
                "(0 is greedy, 1 leaves the distribution as it is)"
            )
        if self.top_k is not None:
            require_int("top_k", self.top_k, least=0, unit=" (0 is off)")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InputError(f"top_p={self.top_p} must be above 0 and at most 1 (1 is off)")
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise InputError(f"min_p={self.min_p} must be between 0 (off) and 1")
        penalty = self.repetition_penalty
        if penalty is not None and not 0.0 < penalty < math.inf:
            raise InputError(f"repetition_penalty={penalty} must be above 0 (1 is off)")

    @property
    def greedy(self) -> bool:
        """Whether the draw is argmax: no random number can change it."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1
