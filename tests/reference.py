"""Slow and obvious reference implementations of what the package does fast.

On plain Python numbers and lists where that is not too slow. Of mygpt only the configurations are
used. `python tests/reference.py --write-golden` computes the expected values of
tests/golden/filters.json again, which the samplers of all backends have to pass.
Letters: B batch, T time, C embedding, H heads, G key/value heads, D head size, L window,
V vocabulary.
"""

from __future__ import annotations

import json
import math
import sys

import torch

from mygpt.core.config import GPTConfig, SamplingConfig
from paths import GOLDEN

FILTERS = GOLDEN / "filters.json"
INF = math.inf

# --- the chapter's loop --------------------------------------------------------------------


def chapter_generate(model, ids, max_new_tokens, temperature=1.0, top_k=None):
    """Section 15.7: read the window, scale, filter, draw from the global generator."""
    model.eval()
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits, _ = model(ids[:, -model.max_seq_len :])
        scaled = logits[:, -1] / temperature  # (B, V)
        if top_k is not None:
            smallest_kept = scaled.topk(min(top_k, scaled.shape[1])).values[:, -1:]
            scaled = torch.where(scaled < smallest_kept, -INF, scaled)
        ids = torch.cat([ids, torch.multinomial(scaled.softmax(-1), num_samples=1)], dim=1)
    return ids


# --- past the window -----------------------------------------------------------------------


def visible_parts(prompt_length: int, steps: int, window: int, overflow: str) -> list[range]:
    """The positions of the text that the model reads at each step."""
    parts = []
    seen = list(range(prompt_length))[-window:]
    for step in range(steps):
        if overflow == "stop" and len(seen) == window:
            break
        if len(seen) > window:
            seen = seen[-window if overflow == "crop" else -max(1, window // 2) :]
        parts.append(range(seen[0], seen[-1] + 1))
        seen.append(prompt_length + step)  # the token of this step
    return parts


# --- sampling, on lists of floats ----------------------------------------------------------


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def most_probable_first(logits: list[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def masked(logits: list[float], kept: list[int]) -> list[float]:
    return [x if i in kept else -INF for i, x in enumerate(logits)]


def penalized(logits: list[float], seen: list[int], penalty: float) -> list[float]:
    out = list(logits)
    for i in set(seen):
        out[i] = logits[i] * penalty if logits[i] < 0 else logits[i] / penalty
    return out


def top_k(logits: list[float], k: int) -> list[float]:
    return masked(logits, most_probable_first(logits)[:k])


def top_p(logits: list[float], p: float) -> list[float]:
    probabilities, kept, reached = softmax(logits), [], 0.0
    for i in most_probable_first(logits):
        if kept and reached >= p:
            break
        kept.append(i)
        reached += probabilities[i]
    return masked(logits, kept)


def min_p(logits: list[float], fraction: float) -> list[float]:
    probabilities = softmax(logits)
    least = fraction * max(probabilities)
    return masked(logits, [i for i, p in enumerate(probabilities) if p >= least])


def distribution(logits: list[float], sampling: SamplingConfig, seen: list[int]) -> list[float]:
    """The next token's distribution."""
    logits = penalized(logits, seen, sampling.repetition_penalty or 1.0)
    if sampling.temperature < 1e-30:
        best = most_probable_first(logits)[0]
        return [float(i == best) for i in range(len(logits))]
    logits = [x / sampling.temperature for x in logits]
    logits = top_k(logits, sampling.top_k or len(logits))
    if sampling.top_p is not None and sampling.top_p < 1:
        logits = top_p(logits, sampling.top_p)
    return softmax(min_p(logits, sampling.min_p or 0.0))


def draw(probabilities: list[float], uniform: float) -> int:
    """Inverse CDF: the first possible token whose cumulative sum is above uniform * total."""
    possible = [i for i, p in enumerate(probabilities) if p > 0]
    target, reached = uniform * sum(probabilities), 0.0
    for i in possible:
        reached += probabilities[i]
        if reached > target:
            return i
    return possible[-1]


# --- the golden table of samplers ----------------------------------------------------------

MARGIN = 1e-4  # no case is so near a value where rounding could decide it


def golden_text() -> str:
    """The content of tests/golden/filters.json, with what its cases expect computed from them.

    A new case is a line with a name, logits (null is minus infinity), the ids of the text so far
    and fields of SamplingConfig; or one with probabilities and a uniform number.
    """
    cases = json.loads(FILTERS.read_text(encoding="utf-8"))
    filters = [
        filter_case(*(case[key] for key in ("name", "logits", "seen", "settings")))
        for case in cases["filters"]
    ]
    draws = []
    for case in cases["draws"]:
        p, u = case["probabilities"], case["uniform"]
        draws.append({"probabilities": p, "uniform": u, "id": draw(p, u)})
    parts = [",\n".join(map(json.dumps, rows)) for rows in (filters, draws)]
    return f'{{\n"filters": [\n{parts[0]}\n],\n"draws": [\n{parts[1]}\n]\n}}\n'


def filter_case(name: str, logits: list[float | None], seen: list[int], settings: dict) -> dict:
    """A case with its distribution, and the ids of probability above 0."""
    sampling, values = SamplingConfig(**settings), [-INF if x is None else x for x in logits]
    probabilities = distribution(values, sampling, seen)
    assert all(p < 1e-50 or p > 1e-9 for p in probabilities), name
    for field in ("top_p", "min_p"):
        for factor in (1 - MARGIN, 1 + MARGIN):
            value = (getattr(sampling, field) or 0.0) * factor
            if 0 < value <= 1 and not sampling.greedy:
                other = SamplingConfig(**settings | {field: value})
                assert distribution(values, other, seen) == probabilities, (name, field)
    return {
        "name": name,
        "logits": logits,
        "seen": seen,
        "settings": settings,
        "kept": [i for i, p in enumerate(probabilities) if p > 1e-9],
        "probabilities": [float(f"{p:.9g}") if p > 1e-9 else 0.0 for p in probabilities],
    }


# --- random numbers ------------------------------------------------------------------------


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Philox4x32-10 on Python integers, from the paper's section 3.3."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def uniform(seed: int, index: int, step: int) -> float:
    """The uniform number for token `step` of sample `index`: 53 bits of Philox."""
    key = (seed % 2**32, seed // 2**32)
    x0, x1, _, _ = philox(key, (step, index % 2**32, 1, index // 2**32))
    return (x0 // 2**5 * 2**26 + x1 // 2**6) / 2**53


def seeded_generate(model, prompt, steps, sampling, seed, index, overflow="crop"):
    """One row of `generate(seed=...)`, with lists of ids."""
    text = list(prompt)
    parts = visible_parts(len(prompt), steps, model.max_seq_len, overflow)
    for step, part in enumerate(parts):
        with torch.no_grad():
            logits, _ = model(torch.tensor([text[part.start : part.stop]]))
        probabilities = distribution(logits[0, -1].tolist(), sampling, text)
        text.append(draw(probabilities, uniform(seed, index, step)))
    return text


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    """Pearson's statistic of counts against their expectation."""
    total = sum(counts)
    assert all(p > 0 or c == 0 for c, p in zip(counts, probabilities, strict=True))
    return sum(
        (c - total * p) ** 2 / (total * p)
        for c, p in zip(counts, probabilities, strict=True)
        if p > 0
    )


def chi_square_range(degrees: int) -> tuple[float, float]:
    """Bounds that a chi-square of so many degrees exceeds once in a million times or less.

    Laurent & Massart, "Adaptive estimation of a quadratic functional", 2000, lemma 1.
    """
    x = math.log(2e6)
    return degrees - 2 * math.sqrt(degrees * x), degrees + 2 * math.sqrt(degrees * x) + 2 * x


# --- the model: one sequence, one head at a time -------------------------------------------


def forward(config: GPTConfig, state: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of ids (T,) in float64, by the textbook's formulas."""
    w = {name: tensor.double() for name, tensor in state.items()}
    x = w["token_embedding.weight"][ids]  # (T, C)
    if config.position == "learned":
        x = x + w["position_embedding.weight"][: len(ids)]
    for n in range(config.num_layers):
        at = f"blocks.{n}."
        x = x + attention(config, w, at + "attention.", norm(config, w, at + "attention_norm", x))
        x = x + mlp(config, w, at + "mlp.", norm(config, w, at + "mlp_norm", x))
    x = norm(config, w, "final_norm", x)
    return x @ w["token_embedding.weight" if config.tied else "head.weight"].T


def eps_of(config):
    """Of all norms of a model, also those of queries and keys."""
    if config.norm_eps is not None:
        return config.norm_eps
    return 1e-6 if config.norm == "rms" else 1e-5


def norm(config, w, name, x):
    if config.norm == "rms":
        return rms(x, w[f"{name}.weight"], eps_of(config))
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    scaled = centred / (variance + eps_of(config)).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms(x, weight, eps):
    return weight * x / ((x**2).mean(-1, keepdim=True) + eps).sqrt()


def affine(w, name, x, rows=slice(None)):
    """x W^T + b with some rows of W; without b if the layer has none."""
    out = x @ w[f"{name}.weight"][rows].T
    return out + w[f"{name}.bias"][rows] if f"{name}.bias" in w else out


def attention_weights(config, w, at, x):
    """Of each head, for each position the weights of this one and those before it."""
    heads, groups = config.num_heads, config.num_kv_heads or config.num_heads
    d = config.head_dim or config.embed_dim // heads
    found = []
    for h in range(heads):
        g = h * groups // heads  # the key/value head of this query head
        q, k = (
            affine(w, at + "query_key_value", x, slice(first * d, (first + 1) * d))
            for first in (h, heads + g)
        )  # each (T, D)
        if config.qk_norm:
            q = rms(q, w[at + "query_norm.weight"], eps_of(config))
            k = rms(k, w[at + "key_norm.weight"], eps_of(config))
        if config.position == "rotary":
            q, k = rotated(q, config.rope_base), rotated(k, config.rope_base)
        found.append(
            [
                softmax([float(q[t] @ k[s]) / math.sqrt(d) for s in range(t + 1)])
                for t in range(len(x))
            ]
        )
    return found


def attention(config, w, at, x):
    heads, groups = config.num_heads, config.num_kv_heads or config.num_heads
    d = config.head_dim or config.embed_dim // heads
    outputs = []
    for h, weights in enumerate(attention_weights(config, w, at, x)):
        first = heads + groups + h * groups // heads
        v = affine(w, at + "query_key_value", x, slice(first * d, (first + 1) * d))  # (T, D)
        mixed = [sum(a * v[s] for s, a in enumerate(row)) for row in weights]
        outputs.append(torch.stack(mixed))
    return affine(w, at + "output", torch.cat(outputs, dim=-1))


def rotated(x, base):
    """Rotary positions: pair (i, i + D/2) of position t rotated by t * base ** (-2 i / D)."""
    d = x.shape[-1]
    out = x.clone()
    for t in range(len(x)):
        for i in range(d // 2):
            angle = t * base ** (-2 * i / d)
            a, b = x[t, i], x[t, i + d // 2]
            out[t, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, i + d // 2] = a * math.sin(angle) + b * math.cos(angle)
    return out


def mlp(config, w, at, x):
    hidden = affine(w, at + "input", x)
    if config.mlp == "swiglu":
        half = hidden.shape[-1] // 2
        gate, up = hidden[:, :half], hidden[:, half:]
        hidden = gate / (1 + (-gate).exp()) * up
    elif config.mlp == "gelu":
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    else:
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        hidden = hidden * (1 + torch.tanh(inner)) / 2
    return affine(w, at + "output", hidden)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-golden"]:
        sys.exit("usage: python tests/reference.py --write-golden")
    FILTERS.write_text(golden_text(), encoding="utf-8")
    print(f"wrote {FILTERS}")
