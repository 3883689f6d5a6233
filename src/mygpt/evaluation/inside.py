"""What happens inside a forward pass: residual stream, heads, attention, and their contributions.

`read_activations` runs a model on one text and keeps its activations; it can replace some by those
of another text (activation patching). `Inside` computes the logit lens (nostalgebraist, 2020) and
direct contributions to a logit (Elhage et al., 2021, "A Mathematical Framework for Transformer
Circuits").
Letters: B batch, T time, C embedding, N blocks, H heads, G key/value heads, D head size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mygpt.core.model import GPT, RMSNorm
from mygpt.errors import InputError
from mygpt.evaluation.ablation import Part
from mygpt.evaluation.activations import (
    Floats,
    head_of,
    logits_of,
    require_standard_forward,
    run_blocks,
    to_array,
)


@dataclass(frozen=True, eq=False)
class Patch:
    """An activation of one text, to replace that of another one; made by `Inside.patch`."""

    part: Part
    position: int | None  # index of the token; None is all
    values: Floats  # (T, H, D) of attention and heads, else (T, C)

    @property
    def place(self) -> tuple[str, int]:
        """The name and the index with which `run_blocks` calls `at`."""
        if self.part.kind == "block":
            return "residual", 2 * self.part.block + 2
        return "mlp" if self.part.kind == "mlp" else "heads", self.part.block

    def apply(self, x: Tensor) -> Tensor:
        """x (1, T, ...) with the values at the position."""
        where: tuple[Any, ...] = (slice(None) if self.position is None else self.position,)
        if self.part.kind == "head":
            where += (self.part.head,)
        changed = x.clone()
        changed[0][where] = torch.tensor(self.values[where]).to(x)
        return changed


@dataclass(frozen=True)
class Contributions:
    """What each part of a model adds to one logit, directly, in units of the logit.

    The final norm is linear once its scale is given. The logit is therefore a sum over all that
    was added to the residual stream at this position, with the scale that the norm had there.
    What a part adds through later parts counts as theirs.

    Attributes:
        token: id of the token that the logit is of.
        position: index of the position, from 0.
        logit: the logit of the forward pass.
        embedding: of the token at this position.
        position_embedding: 0 with rotary positions.
        heads: (N, H) float64.
        attention_biases: (N,) float64, of the biases of the attention's output projections.
        mlps: (N,) float64, with their biases.
        norm_bias: of the final norm's bias.
    """

    token: int
    position: int
    logit: float
    embedding: float
    position_embedding: float
    heads: NDArray[np.float64]
    attention_biases: NDArray[np.float64]
    mlps: NDArray[np.float64]
    norm_bias: float

    @property
    def total(self) -> float:
        """The sum, which is the logit up to the rounding of the model's number format."""
        arrays = self.heads.sum() + self.attention_biases.sum() + self.mlps.sum()
        return float(self.embedding + self.position_embedding + arrays + self.norm_bias)


@dataclass(frozen=True, eq=False)
class Inside:
    """One forward pass and its activations, all float32.

    Attributes:
        model: the model that ran.
        ids: (T,) int64.
        logits: (T, V), each position's prediction of the next token.
        residual: (2N + 1, T, C), the residual stream after the embedding, and after the attention
            and the MLP of each block; `residual[::2]` is after the embedding and each block.
        attention: (N, H, T, T), the weight of position s at position t.
        heads: (N, H, T, D), each head's weighted sum of values, before the output projection.
        mlps: (N, T, C), what each MLP adds to the residual stream.
        patches: the activations that were replaced.
    """

    model: GPT = field(repr=False)
    ids: NDArray[np.int64]
    logits: Floats = field(repr=False)
    residual: Floats = field(repr=False)
    attention: Floats = field(repr=False)
    heads: Floats = field(repr=False)
    mlps: Floats = field(repr=False)
    patches: tuple[Patch, ...] = field(default=(), repr=False)

    @cached_property
    def losses(self) -> Floats:
        """(T - 1,), the loss of each token but the first, in nats."""
        targets = torch.from_numpy(self.ids[1:])
        return F.cross_entropy(
            torch.from_numpy(self.logits[:-1]), targets, reduction="none"
        ).numpy()

    @property
    def loss(self) -> float:
        """Nats per token; NaN for a single token."""
        return float(self.losses.mean(dtype=np.float64)) if len(self.losses) else math.nan

    def lens(self, position: int | None = None) -> Floats:
        """The logit lens: logits of the residual stream at each depth.

        Args:
            position: index of one position; None is all.

        Returns:
            (2N + 1, T, V), of one position (2N + 1, V): `residual` through the final norm and the
            head. The last are the model's logits.
        """
        rows = self.residual if position is None else self.residual[:, self._at(position)]
        return np.stack([logits_of(self.model, torch.from_numpy(row)) for row in rows])

    def contributions(self, token: int | None = None, position: int = -1) -> Contributions:
        """What each part adds to the logit of a token.

        Args:
            token: its id; None is the token with the largest logit.
            position: index of the position; negative ones count from the end.

        Raises:
            InputError: for a token or a position that does not exist, and after a patch of the
                residual stream, which is no sum of parts.
        """
        position = self._at(position)
        if any(patch.part.kind == "block" for patch in self.patches):
            raise InputError(
                "contributions do not add up after a patch of a block, which replaces the sum: "
                "patch heads, attention or mlp"
            )
        token = int(self.logits[position].argmax()) if token is None else token
        if not 0 <= token < self.model.config.vocab_size:
            raise InputError(f"token={token} must be 0 to {self.model.config.vocab_size - 1}")
        return _contributions(self, token, position)

    def patch(self, part: str | Part, position: int | None = None) -> Patch:
        """An activation of this text, for `read_activations` of another one of equal length.

        Args:
            part: a head or an attention ("1.3", "attention1": the heads' values), an MLP ("mlp1":
                what it adds), or a block ("block1": the residual stream after it).
            position: index of the token; None is all.
        """
        if isinstance(part, str):
            part = Part.parse(part, self.model.config)
        position = None if position is None else self._at(position)
        if part.kind == "block":
            values = self.residual[2 * part.block + 2]
        elif part.kind == "mlp":
            values = self.mlps[part.block]
        else:
            values = self.heads[part.block].swapaxes(0, 1)
        return Patch(part, position, values)

    def _at(self, position: int) -> int:
        """An index from 0."""
        time = len(self.ids)
        if not -time <= position < time:
            raise InputError(f"position={position} must be 0 to {time - 1}, or -1 for the last")
        return position % time


def read_activations(model: GPT, ids: Sequence[int], patches: Sequence[Patch] = ()) -> Inside:
    """Run a model on one text and keep its activations.

    Args:
        model: run without dropout, as it is; see `mygpt.evaluation.ablation.ablated` for one with
            parts switched off.
        ids: (T,) token ids, at most as long as the window.
        patches: activations of another text of length T that replace this one's.

    Raises:
        InputError: for no token, or more than fit into the window; for an id outside the
            vocabulary; for patches of another length; for a model with another forward.
    """
    time, config = len(ids), model.config
    require_standard_forward(model)
    if not 1 <= time <= config.max_seq_len:
        raise InputError(f"{time} tokens cannot be read at once: give 1 to {config.max_seq_len}")
    if not all(0 <= i < config.vocab_size for i in ids):
        raise InputError(f"token ids must be 0 to {config.vocab_size - 1}")
    for patch in patches:
        if len(patch.values) != time:
            raise InputError(
                f"a patch of {len(patch.values)} tokens does not fit a text of {time}: both texts "
                "need the same number of tokens"
            )
    kept: dict[str, list[Floats]] = {"residual": [], "heads": [], "mlp": []}
    attention: list[Floats] = []

    def at(name: str, n: int, x: Tensor) -> Tensor:
        for patch in patches:
            if patch.place == (name, n):
                x = patch.apply(x)
        kept[name].append(to_array(x[0]))
        return x

    given = torch.tensor([list(ids)], device=model.token_embedding.weight.device)
    with torch.no_grad():
        x = run_blocks(model, given, at, lambda n, weights: attention.append(to_array(weights[0])))
    return Inside(
        model,
        np.array(ids, np.int64),
        logits_of(model, x[0]),
        np.stack(kept["residual"]),
        np.stack(attention),
        np.stack(kept["heads"]).swapaxes(1, 2),
        np.stack(kept["mlp"]),
        tuple(patches),
    )


def _double(x: Tensor) -> NDArray[np.float64]:
    values: NDArray[np.float64] = x.detach().cpu().double().numpy()
    return values


def _contributions(inside: Inside, token: int, position: int) -> Contributions:
    """Each vector that was added to the residual stream, times one direction.

    With the residual stream x, the final norm's gain g and bias b, and the head's row u of the
    token, the logit is u (g (x - m) s + b), where s = 1 / sqrt(mean((x - m)^2) + eps), and m is
    the mean of x for LayerNorm and 0 for RMSNorm. For this s it is linear in x:
    direction x + u b, where direction = s (u g - mean(u g)), for RMSNorm s u g, since
    u g (x - mean(x)) = (u g - mean(u g)) x.
    """
    model = inside.model
    norm: Any = model.final_norm
    blocks: Any = model.blocks
    row = _double(head_of(model)[token])  # (C,)
    x = inside.residual[-1, position].astype(np.float64)
    direction = row * _double(norm.weight)
    if not isinstance(norm, RMSNorm):
        x, direction = x - x.mean(), direction - direction.mean()
    direction /= np.sqrt(np.square(x).mean() + model.config.eps)
    heads, biases = [], []
    for n, block in enumerate(blocks):
        output = block.attention.output
        by_head = (direction @ _double(output.weight)).reshape(model.config.num_heads, -1)  # (H, D)
        heads.append((by_head * inside.heads[n, :, position]).sum(-1))
        biases.append(0.0 if output.bias is None else direction @ _double(output.bias))
    learned = model.config.position == "learned"
    return Contributions(
        token,
        position,
        float(inside.logits[position, token]),
        float(direction @ _double(model.token_embedding.weight[inside.ids[position]])),
        float(direction @ _double(model.position_embedding.weight[position])) if learned else 0.0,
        np.stack(heads),
        np.array(biases),
        inside.mlps[:, position] @ direction,
        0.0 if isinstance(norm, RMSNorm) else float(row @ _double(norm.bias)),
    )
