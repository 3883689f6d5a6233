"""From logits to the next token; every faster sampler is tested against this file.

Order: repetition penalty, temperature, top-k, top-p, min-p, then the draw. To add a filter, write
a function from logits to logits and call it in `filter_logits` (ARCHITECTURE.md lists the other
places: the setting, its option, and the faster samplers).
Letters: B batch, T tokens so far, V vocabulary. Logits are (B, V) floating point; a token that is
filtered out has logit -inf. Nothing is changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mygpt.core.config import GREEDY_BELOW, SamplingConfig
from mygpt.core.random import Stream
from mygpt.errors import broken_model, overflowing_settings


def penalize_repetition(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of tokens in each row's `ids`."""
    seen = logits.gather(1, ids)  # (B, T)
    return logits.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature: below 1 sharpens, above 1 flattens (section 15.5)."""
    return logits / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly the k largest logits of each row, of equal ones the lower ids (section 15.6)."""
    if k >= logits.shape[-1]:
        return logits
    _, order = logits.sort(dim=-1, descending=True, stable=True)
    return logits.scatter(1, order[:, k:], -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probability reaches p (nucleus).

    A token stays while those before it, likeliest first, of equal ones the lower ids first, have
    not reached p; so the likeliest always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1, dtype=_widest(logits))
    dropped = probabilities.cumsum(dim=-1) - probabilities >= p  # never the first: 0 >= p
    return logits.masked_fill(dropped.gather(1, order.argsort(dim=-1)), -math.inf)


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep tokens with at least `min_p` times the probability of the row's likeliest."""
    largest = logits.max(dim=-1, keepdim=True).values
    return logits.masked_fill(logits < largest + math.log(min_p), -math.inf)


def filter_logits(logits: Tensor, sampling: SamplingConfig, ids: Tensor) -> Tensor:
    """Logits (B, V) after penalty, temperature and filters; `ids` (B, T) is all text so far.

    The temperature must be above 0: argmax has no logits to show (see `SamplingConfig.greedy`).
    """
    logits = apply_temperature(_after_penalty(logits, sampling, ids), sampling.temperature)
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def probabilities(logits: Tensor, sampling: SamplingConfig, ids: Tensor) -> Tensor:
    """The distribution (B, V) the next token is drawn from; one-hot when the draw is argmax."""
    if not sampling.greedy:
        return filter_logits(logits, sampling, ids).softmax(dim=-1)
    best = argmax(logits, sampling, ids)
    return torch.zeros_like(logits).scatter_(1, best[:, None], 1.0)


def argmax(logits: Tensor, sampling: SamplingConfig, ids: Tensor) -> Tensor:
    """The likeliest token of each row, (B,) int64; of equals the lowest id (section 15.3)."""
    return _after_penalty(logits, sampling, ids).argmax(dim=-1)


def _after_penalty(logits: Tensor, sampling: SamplingConfig, ids: Tensor) -> Tensor:
    penalty = sampling.repetition_penalty
    if penalty is None or penalty == 1.0:
        return logits
    return penalize_repetition(logits, ids, penalty)


def draw_multinomial(probs: Tensor) -> Tensor:
    """Draw from each row's distribution with torch's global generator, (B,) int64 (15.4)."""
    return torch.multinomial(probs, num_samples=1)[:, 0]


def draw(probs: Tensor, uniforms: Sequence[float]) -> Tensor:
    """Invert each row's cumulative distribution at its uniform number in [0, 1): (B,) int64.

    Sums are float64 in the order of ids. A token of probability 0 is never drawn: a uniform
    number is at most 1 - 2**-53, whose product with the total rounds to less than the total.
    """
    device = "cpu" if probs.device.type == "mps" else probs.device  # MPS has no float64
    wide = probs.to(device, torch.float64)
    cumulative = wide.cumsum(dim=-1)  # (B, V)
    if cumulative.is_cuda:
        cumulative = _only_where_probable(cumulative, wide)
    total = cumulative[:, -1:]
    target = torch.tensor(list(uniforms), dtype=torch.float64).to(device)[:, None] * total
    return torch.searchsorted(cumulative, target, right=True)[:, 0].to(probs.device)


def _only_where_probable(cumulative: Tensor, probs: Tensor) -> Tensor:
    """Sums (B, V) that never decrease, and increase only at tokens of a probability above 0.

    A parallel sum groups its terms differently at each token, so that rounding can change it
    where nothing was added.
    """
    return cumulative.masked_fill(probs == 0, -math.inf).cummax(dim=-1).values


def _widest(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.device.type == "mps" else torch.float64


def next_ids(
    logits: Tensor,
    sampling: SamplingConfig,
    ids: Tensor,
    streams: Sequence[Stream] | None,
    step: int,
) -> Tensor:
    """Draw each row's next token, (B,) int64.

    Args:
        logits: (B, V), the model's prediction after `ids`; with streams, bfloat16 and float16 are
            converted to float32.
        sampling: how to draw.
        ids: (B, T) int64, all text so far.
        streams: each row's random numbers; None draws with `draw_multinomial`, as the chapter
            does, and temperature 0 draws nothing.
        step: how many tokens were drawn before.

    Raises:
        InputError: when a broken model predicts NaN or infinity, or the settings overflow.
    """
    finite = logits.max(dim=-1).values.isfinite().all()
    if streams is not None:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.temperature < GREEDY_BELOW or (streams is not None and sampling.greedy):
        ids = argmax(logits, sampling, ids)
        _check(sampling, finite)
        return ids
    probs = probabilities(logits, sampling, ids)
    _check(sampling, finite, probs.sum(dim=-1).isfinite().all())
    if streams is None:
        return draw_multinomial(probs)
    return draw(probs, [stream.uniform(step) for stream in streams])


def _check(sampling: SamplingConfig, *finite: Tensor) -> None:
    """Raise unless logits, then probabilities, are finite; waits for the device once."""
    good = torch.stack(finite).tolist()
    if not good[0]:
        raise broken_model()
    if not all(good):
        raise overflowing_settings(sampling.temperature, sampling.repetition_penalty)
