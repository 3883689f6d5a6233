"""The GPT's forward pass in NumPy, for one sequence.

It has the layers of `mygpt.core.model` in the same order, with parameters of the same names.
Letters: T time, C embedding, H heads, G key/value heads, R = H / G query heads that share one,
D head size, M MLP width, L window, N layers, V vocabulary, P positions read before, S the last
positions whose attention weights are returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.core.config import GPTConfig, positions_for
from mygpt.engine import rotary_angles
from mygpt.errors import InputError

Floats = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]  # float32
Layer = Callable[[Floats], Floats]
Record = Callable[[Floats], None]  # takes the attention weights (H, T, P + T) of a block


def constant(number: float) -> Floats:
    """A number as a NumPy scalar array: with Python numbers the arithmetic takes twice as long."""
    return np.array(number, dtype=np.float32)


ONE, HALF, MINUS_HALF = constant(1.0), constant(0.5), constant(-0.5)


class Linear:
    """x W + b, with W transposed once from torch's (out, in) to the order in which it is read."""

    def __init__(self, arrays: Arrays, name: str, outputs: slice = slice(None)) -> None:
        matrix = arrays[f"{name}.weight"][outputs]
        self.weight = np.array(matrix.T, dtype=np.float32, order="C")  # (in, out)
        bias = arrays.get(f"{name}.bias")
        self.bias = None if bias is None else np.array(bias[outputs], dtype=np.float32)

    def __call__(self, x: Floats) -> Floats:
        """(T, in) to (T, out)."""
        out: Floats = x @ self.weight
        if self.bias is not None:
            out += self.bias
        return out


class RMSNorm:
    """Divide by the root of the mean square and scale (Zhang & Sennrich, 2019)."""

    def __init__(self, arrays: Arrays, name: str, eps: float) -> None:
        self.weight = np.array(arrays[f"{name}.weight"], dtype=np.float32)
        # A product with it is a mean, in a third of the time of `mean`.
        self.mean = np.full((len(self.weight), 1), 1.0 / len(self.weight), dtype=np.float32)
        self.eps = constant(eps)

    def __call__(self, x: Floats) -> Floats:
        """Any shape that ends in the norm's size; the same shape."""
        return x / np.sqrt(np.square(x) @ self.mean + self.eps) * self.weight


class LayerNorm(RMSNorm):
    """RMSNorm of x minus its mean, plus a bias (Ba, Kiros & Hinton, 2016)."""

    def __init__(self, arrays: Arrays, name: str, eps: float) -> None:
        super().__init__(arrays, name, eps)
        self.bias = np.array(arrays[f"{name}.bias"], dtype=np.float32)

    def __call__(self, x: Floats) -> Floats:
        """(T, C) to (T, C)."""
        return super().__call__(x - x @ self.mean) + self.bias


def make_norm(config: GPTConfig, arrays: Arrays, name: str) -> Layer:
    """The configuration's norm with the parameters under `name`."""
    kind = RMSNorm if config.norm == "rms" else LayerNorm
    return kind(arrays, name, config.eps)


# Of Abramowitz & Stegun's formula 26.2.17: p, then b1 to b5.
TAIL_P = constant(0.2316419)
TAIL_B = [constant(b) for b in (0.319381530, -0.356563782, 1.781477937, -1.821255978, 1.330274429)]
NORMAL_PEAK = constant(1 / math.sqrt(2 * math.pi))


def upper_tail(x: Floats) -> Floats:
    """Probability that a standard normal number exceeds x >= 0, to 3e-7.

    NumPy has no erf. Abramowitz & Stegun, "Handbook of Mathematical Functions", 1964, formula
    26.2.17: its own error is below 7.5e-8, the rest is float32's.
    """
    t = np.reciprocal(ONE + TAIL_P * x)
    polynomial = TAIL_B[-1] * t
    for coefficient in TAIL_B[-2::-1]:
        polynomial += coefficient
        polynomial *= t
    return polynomial * NORMAL_PEAK * np.exp(MINUS_HALF * np.square(x))


def gelu(x: Floats) -> Floats:
    """x times the probability that a standard normal number is below x.

    For x >= 0 that is x - x tail(x), and for x < 0 it is x tail(-x): both are max(x, 0) minus
    |x| tail(|x|), without a branch and without cancellation where the result is small.
    """
    size = np.abs(x)
    return np.maximum(x, 0) - size * upper_tail(size)


ROOT_2_OVER_PI, CUBIC = constant(math.sqrt(2 / math.pi)), constant(0.044715)


def gelu_tanh(x: Floats) -> Floats:
    """GPT-2's approximation of GELU (Hendrycks & Gimpel, 2016)."""
    return HALF * x * (ONE + np.tanh(ROOT_2_OVER_PI * (x + CUBIC * x * x * x)))


def swiglu(x: Floats) -> Floats:
    """The first half of (T, 2M) times its own sigmoid, times the second (Shazeer, 2020)."""
    half = x.shape[-1] // 2
    gate, value = x[:, :half], x[:, half:]  # each (T, M)
    return gate / (ONE + np.exp(-gate)) * value


ACTIVATIONS: dict[str, Layer] = {"gelu": gelu, "gelu_tanh": gelu_tanh, "swiglu": swiglu}


class Rotary:
    """Cosines and sines of positions, for all blocks; those of a long window grow as it is read.

    The sines of the first half include the rotation's minus sign.
    """

    def __init__(self, config: GPTConfig) -> None:
        self.config = config
        self.reserve(0)

    def reserve(self, positions: int) -> None:
        """Compute the tables, (L, 1, D) each, for at least so many positions."""
        cos, sin = rotary_angles(self.config, positions_for(self.config.max_seq_len, positions))
        sin[:, : sin.shape[1] // 2] *= -1
        self.cos, self.sin = cos[:, None], sin[:, None]

    def rows(self, first: int, end: int) -> tuple[Floats, Floats]:
        """Cosines and sines of positions `first` to `end` - 1, each (T, 1, D)."""
        if end > len(self.cos):
            self.reserve(end)
        return self.cos[first:end], self.sin[first:end]


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Rotate each pair (x[i], x[i + D/2]) of (T, H, D) by its position's angle, (T, 1, D)."""
    half = x.shape[-1] // 2
    swapped: Floats = np.concatenate([x[..., half:], x[..., :half]], axis=-1)
    return x * cos + swapped * sin


@lru_cache(maxsize=1)
def future(time: int) -> Floats:
    """(T, T), the causal mask: minus infinity for positions after t."""
    return np.triu(np.full((time, time), -math.inf, dtype=np.float32), k=1)


class Cache:
    """Keys and values of the positions that one row has read, filled from the left.

    Attributes:
        keys: (N, G, 1, D, L), transposed for the product with queries; L is the capacity, which
            grows.
        values: (N, G, 1, L, D).
        length: positions filled so far.

    Args:
        config: the model's.
        positions: the capacity at first; None is that of a whole window of usual size.
    """

    def __init__(self, config: GPTConfig, positions: int | None = None) -> None:
        n, g, d = config.num_layers, config.kv_heads, config.head_size
        capacity = positions_for(config.max_seq_len) if positions is None else positions
        capacity = max(1, min(capacity, config.max_seq_len))
        self.keys = np.empty((n, g, 1, d, capacity), dtype=np.float32)
        self.values = np.empty((n, g, 1, capacity, d), dtype=np.float32)
        self.length = 0

    def reserve(self, count: int) -> None:
        """Make the capacity at least `count` positions; it grows by a factor of two or more."""
        capacity, length = self.keys.shape[-1], self.length
        if count <= capacity:
            return
        capacity = max(count, 2 * capacity)
        keys, values = self.keys, self.values
        self.keys = np.empty((*keys.shape[:-1], capacity), dtype=np.float32)
        self.values = np.empty((*values.shape[:-2], capacity, values.shape[-1]), dtype=np.float32)
        self.keys[..., :length] = keys[..., :length]
        self.values[..., :length, :] = values[..., :length, :]

    def extend(self, layer: int, key: Floats, value: Floats) -> tuple[Floats, Floats]:
        """Store T new positions of a layer, each (T, G, D); return all: (.., P+T), (P+T, ..)."""
        end = self.length + len(key)
        self.reserve(end)
        self.keys[layer, :, 0, :, self.length : end] = key.transpose(1, 2, 0)
        self.values[layer, :, 0, self.length : end] = value.transpose(1, 0, 2)
        return self.keys[layer, ..., :end], self.values[layer, :, :, :end]

    def copy_from(self, other: Cache) -> None:
        """Copy the contents of `other`."""
        self.length = 0
        self.reserve(other.length)
        self.length = other.length
        self.keys[..., : self.length] = other.keys[..., : self.length]
        self.values[..., : self.length, :] = other.values[..., : self.length, :]


class Attention:
    """Causal self-attention; groups of query heads may share keys and values."""

    def __init__(self, config: GPTConfig, arrays: Arrays, at: str, rotary: Rotary | None) -> None:
        self.groups, self.d = config.kv_heads, config.head_size
        self.scale = constant(1 / math.sqrt(self.d))
        queries = config.num_heads * self.d
        self.query = Linear(arrays, at + "query_key_value", slice(queries))
        self.key_value = Linear(arrays, at + "query_key_value", slice(queries, None))
        self.output = Linear(arrays, at + "output")
        self.norms: tuple[Layer, Layer] | None = None
        if config.qk_norm:
            self.norms = (
                RMSNorm(arrays, at + "query_norm", config.eps),
                RMSNorm(arrays, at + "key_norm", config.eps),
            )
        self.rotary = rotary

    def __call__(
        self, x: Floats, cache: Cache, layer: int, first: int, record: Record | None
    ) -> Floats:
        """Read (T, C); the results of positions from `first` on, (T - first, C)."""
        time, past = len(x), cache.length
        query = self.query(x[first:]).reshape(time - first, -1, self.d)  # (T - first, H, D)
        key_value = self.key_value(x).reshape(time, 2, self.groups, self.d)
        key, value = key_value[:, 0], key_value[:, 1]  # each (T, G, D)
        if self.norms is not None:
            query, key = self.norms[0](query), self.norms[1](key)
        if self.rotary is not None:
            cos, sin = self.rotary.rows(past, past + time)
            query, key = rotate(query, cos[first:], sin[first:]), rotate(key, cos, sin)
        keys, values = cache.extend(layer, key, value)  # (G, 1, D, P + T), (G, 1, P + T, D)
        grouped = query.reshape(time - first, self.groups, -1, self.d).transpose(1, 2, 0, 3)
        attended = attend(grouped * self.scale, keys, values, record)  # (G, R, T - first, D)
        return self.output(attended.transpose(2, 0, 1, 3).reshape(time - first, -1))


def attend(query: Floats, keys: Floats, values: Floats, record: Record | None = None) -> Floats:
    """softmax(query keys) values; with several queries, all positions are new ones."""
    scores = query @ keys  # (G, R, T, P + T)
    time = scores.shape[-2]
    if time > 1:
        assert scores.shape[-1] == time, "several tokens can only be read into an empty cache"
        scores += future(time)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    totals = scores.sum(axis=-1, keepdims=True)
    if record is not None:
        record((scores / totals).reshape(-1, *scores.shape[-2:]))
    # Dividing after the product divides fewer numbers than before it.
    return scores @ values / totals


class Block:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, arrays: Arrays, at: str, rotary: Rotary | None) -> None:
        self.attention_norm = make_norm(config, arrays, at + "attention_norm")
        self.attention = Attention(config, arrays, at + "attention.", rotary)
        self.mlp_norm = make_norm(config, arrays, at + "mlp_norm")
        self.mlp_input = Linear(arrays, at + "mlp.input")
        self.activation = ACTIVATIONS[config.mlp]
        self.mlp_output = Linear(arrays, at + "mlp.output")

    def __call__(
        self, x: Floats, cache: Cache, layer: int, first: int, record: Record | None
    ) -> Floats:
        """Read (T, C); the positions from `first` on, (T - first, C)."""
        x = x[first:] + self.attention(self.attention_norm(x), cache, layer, first, record)
        return x + self.mlp_output(self.activation(self.mlp_input(self.mlp_norm(x))))


@dataclass(frozen=True)
class Reading:
    """The results of one pass over a text.

    Attributes:
        weights: (N, H, S, S) float32: the attention weight of position s at position t, of the last
            S positions. A row sums to one minus the weights of earlier positions.
        logits: (T, V) float32, each position's prediction of the next token.
    """

    weights: Floats
    logits: Floats


class Network:
    """A GPT with copies of the given arrays: further training does not change it."""

    def __init__(self, config: GPTConfig, arrays: Arrays) -> None:
        self.config = config
        self.token_embedding = np.array(arrays["token_embedding.weight"], dtype=np.float32)
        self.position_embedding: Floats | None = None
        if config.position == "learned":
            self.position_embedding = np.array(arrays["position_embedding.weight"], np.float32)
        rotary = Rotary(config) if config.position == "rotary" else None
        self.blocks = [
            Block(config, arrays, f"blocks.{n}.", rotary) for n in range(config.num_layers)
        ]
        self.final_norm = make_norm(config, arrays, "final_norm")
        head = self.token_embedding if config.tied else np.array(arrays["head.weight"], np.float32)
        self.head = head.T  # (C, V); BLAS reads it either way, and V may be large to copy

    def read(self, ids: Sequence[int], cache: Cache) -> Floats:
        """Logits (V,) after the tokens in `cache` and `ids` (T,), which are added to the cache."""
        logits: Floats = (self.final_norm(self._blocks(ids, cache, len(ids) - 1)) @ self.head)[0]
        return logits

    def read_all(self, ids: Sequence[int], shown: int | None = None) -> Reading:
        """Every position's prediction for `ids` (T,), with the attention weights.

        Args:
            ids: the text.
            shown: S, of how many of the last positions the attention is returned; None is T.

        Raises:
            InputError: for no token, or more than fit into the window.
        """
        time = len(ids)
        if not 1 <= time <= self.config.max_seq_len:
            raise InputError(
                f"{time} tokens cannot be read at once: give 1 to {self.config.max_seq_len}"
            )
        first = time - min(time, shown or time)
        weights: list[Floats] = []

        def record(all_weights: Floats) -> None:  # (H, T, T): all might not fit into memory
            weights.append(all_weights[:, first:, first:].copy())

        x = self._blocks(ids, Cache(self.config, time), 0, record)  # (T, C)
        return Reading(np.stack(weights), self.final_norm(x) @ self.head)

    def _blocks(
        self, ids: Sequence[int], cache: Cache, first: int, record: Record | None = None
    ) -> Floats:
        """All blocks' result for positions from `first` on, (T - first, C)."""
        time, past = len(ids), cache.length
        x = self.token_embedding[ids]  # (T, C)
        if self.position_embedding is not None:
            x = x + self.position_embedding[past : past + time]
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            # Of earlier positions the last block needs only keys and values.
            x = block(x, cache, layer, first if layer == last else 0, record)
        cache.length += time
        return x
