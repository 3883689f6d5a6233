"""What happens inside a forward pass: residual stream, heads, attention, and their contributions.

`read_activations` runs a model on one text and keeps its activations; it can replace some by those
of another text (activation patching). `Inside` computes the logit lens (nostalgebraist, 2020) and
direct contributions to a logit (Elhage et al., 2021, "A Mathematical Framework for Transformer
Circuits").
Letters: B batch, T time, C embedding, N blocks, H heads, G key/value heads, D head size,
K tokens, V vocabulary.
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
    attention_weights,
    head_of,
    logits_of,
    require_standard_forward,
    run_blocks,
    to_array,
)

# The fields of `Inside` for the names with which `run_blocks` calls `at`, and those of attention.
_FIELDS = {"residual": "residual", "heads": "heads", "mlp": "mlps"}
_OF_ATTENTION = ("attention", "keys", "values")


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
        keys: (N, G, T, D), with rotary positions after the rotation.
        values: (N, G, T, D).
        heads: (N, H, T, D), each head's weighted sum of values, before the output projection.
        mlps: (N, T, C), what each MLP adds to the residual stream.
        patches: the activations that were replaced.
    """

    model: GPT = field(repr=False)
    ids: NDArray[np.int64]
    logits: Floats = field(repr=False)
    residual: Floats = field(repr=False)
    attention: Floats = field(repr=False)
    keys: Floats = field(repr=False)
    values: Floats = field(repr=False)
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
        return logits_of(self.model, torch.from_numpy(rows))

    def contributions(self, token: int | None = None, position: int = -1) -> Contributions:
        """What each part adds to the logit of a token.

        Args:
            token: its id; None is the token with the largest logit.
            position: index of the position; negative ones count from the end.

        Raises:
            InputError: for a token or a position that does not exist, and after a patch of the
                residual stream, which is no sum of parts.
        """
        token = int(self.logits[self._at(position)].argmax()) if token is None else token
        return self.contributions_of([token], position)[0]

    def contributions_of(self, tokens: Sequence[int], position: int = -1) -> list[Contributions]:
        """`contributions` of several tokens, in the time of about one."""
        position = self._at(position)
        if any(patch.part.kind == "block" for patch in self.patches):
            raise InputError(
                "contributions do not add up after a patch of a block, which replaces the sum: "
                "patch heads, attention or mlp"
            )
        for token in tokens:
            if not 0 <= token < self.model.config.vocab_size:
                raise InputError(f"token={token} must be 0 to {self.model.config.vocab_size - 1}")
        return _contributions(self, tokens, position)

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


def read_activations(
    model: GPT,
    ids: Sequence[int],
    patches: Sequence[Patch] = (),
    known: tuple[Inside, int] | None = None,
) -> Inside:
    """Run a model on one text and keep its activations.

    Args:
        model: run without dropout, as it is; see `mygpt.evaluation.ablation.ablated` for one with
            parts switched off.
        ids: (T,) token ids, at most as long as the window.
        patches: activations of another text of length T that replace this one's.
        known: a pass of the same ids, and how many of its first blocks are the same here: these
            are not run again.

    Raises:
        InputError: for no token, or more than fit into the window; for an id outside the
            vocabulary; for patches of another length; for a model with another forward.
    """
    _check(model, ids, patches)
    kept: dict[str, list[Floats]] = {name: [] for name in (*_FIELDS.values(), *_OF_ATTENTION)}
    device, resume = model.token_embedding.weight.device, None
    if known is not None:
        before, count = known
        for name, arrays in kept.items():
            arrays += list(getattr(before, name)[: 2 * count + 1 if name == "residual" else count])
        x = torch.from_numpy(before.residual[2 * count])[None]  # (1, T, C)
        resume = count, x.to(model.token_embedding.weight)

    def at(name: str, n: int, x: Tensor) -> Tensor:
        for patch in patches:
            if patch.place == (name, n):
                x = patch.apply(x)
        values = to_array(x[0])
        kept[_FIELDS[name]].append(values.swapaxes(0, 1) if name == "heads" else values)
        return x

    def record(n: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        kept["attention"].append(to_array(attention_weights(query, key)[0]))
        kept["keys"].append(to_array(key[0]))
        kept["values"].append(to_array(value[0]))

    with torch.no_grad():
        x = run_blocks(model, torch.tensor([list(ids)], device=device), at, record, resume)
    stacked = {name: np.stack(arrays) for name, arrays in kept.items()}
    logits = logits_of(model, x[0])
    return Inside(model, np.array(ids, np.int64), logits, **stacked, patches=tuple(patches))


def _check(model: GPT, ids: Sequence[int], patches: Sequence[Patch]) -> None:
    """See `read_activations`."""
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


def _double(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def _contributions(inside: Inside, tokens: Sequence[int], position: int) -> list[Contributions]:
    """Each vector that was added to the residual stream, times one direction a token.

    With the residual stream x, the final norm's gain g and bias b, and the head's row u of the
    token, the logit is u (g (x - m) s + b), where s = 1 / sqrt(mean((x - m)^2) + eps), and m is
    the mean of x for LayerNorm and 0 for RMSNorm. For this s it is linear in x:
    direction x + u b, where direction = s (u g - mean(u g)), for RMSNorm s u g, since
    u g (x - mean(x)) = (u g - mean(u g)) x.
    """
    model = inside.model
    norm: Any = model.final_norm
    blocks: Any = model.blocks
    rows = _double(head_of(model)[torch.tensor(tokens)])  # (K, C)
    x = torch.from_numpy(inside.residual[-1, position]).double()
    directions = rows * _double(norm.weight)
    if not isinstance(norm, RMSNorm):
        x, directions = x - x.mean(), directions - directions.mean(-1, keepdim=True)
    directions /= torch.sqrt(x.square().mean() + model.config.eps)
    none = torch.zeros(len(rows), dtype=torch.float64)
    heads, biases = [], []
    for n, block in enumerate(blocks):
        output = block.attention.output
        # torch's product, not NumPy's, whose number of threads is not set.
        by_head = directions @ _double(output.weight)  # (K, H D)
        by_head = by_head.reshape(len(rows), model.config.num_heads, -1)
        values = torch.from_numpy(inside.heads[n, :, position]).double()  # (H, D)
        heads.append((by_head * values).sum(-1))  # (K, H)
        biases.append(none if output.bias is None else directions @ _double(output.bias))
    embedding = directions @ _double(model.token_embedding.weight[int(inside.ids[position])])
    learned = model.config.position == "learned"
    place = directions @ _double(model.position_embedding.weight[position]) if learned else none
    mlps = directions @ torch.from_numpy(inside.mlps[:, position]).double().T  # (K, N)
    norm_bias = none if isinstance(norm, RMSNorm) else rows @ _double(norm.bias)
    return [
        Contributions(
            token,
            position,
            float(inside.logits[position, token]),
            float(embedding[k]),
            float(place[k]),
            torch.stack(heads)[:, k].numpy(),
            torch.stack(biases)[:, k].numpy(),
            mlps[k].numpy(),
            float(norm_bias[k]),
        )
        for k, token in enumerate(tokens)
    ]
