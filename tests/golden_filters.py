"""The cases of tests/golden/filters.json, which the samplers of all backends have to pass.

The expected values are those of tests/reference.py. In the file, null is a logit of minus infinity,
`seen` is the text so far (for the repetition penalty), the settings are fields of SamplingConfig,
and `kept` are the ids of probability above 0. No case is within MARGIN of a value where rounding
could decide it, unless its sums are exact in binary.
"""

from __future__ import annotations

import json

from mygpt.core.config import SamplingConfig
from reference import INF, distribution, draw

MARGIN = 1e-4
RAMP = [2.0, 1.0, 0.0, -1.0, -2.0]
MIXED = [0.5, -1.25, 3.0, 2.0, -0.5, 1.5, 0.0, 2.75]
TIES = [1.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0]

# name, logits, seen, settings
FILTERS = [
    ("plain", RAMP, [], {}),
    ("the chapter's table, temperature 0.5", [2.0, 1.0, 0.0], [], {"temperature": 0.5}),
    ("the chapter's table, temperature 100", [2.0, 1.0, 0.0], [], {"temperature": 100.0}),
    ("temperature 0 is argmax", MIXED, [], {"temperature": 0.0}),
    ("temperature 0, of equals the lowest id", TIES, [], {"temperature": 0.0}),
    ("temperature 1e-40 is argmax", MIXED, [], {"temperature": 1e-40}),
    ("temperature 1e-40, of equals the lowest id", TIES, [], {"temperature": 1e-40}),
    ("temperature 1e-20 leaves the largest", MIXED, [], {"temperature": 1e-20}),
    ("temperature 1e-20 shares among equals", TIES, [], {"temperature": 1e-20}),
    ("temperature 1e30 is uniform", MIXED, [], {"temperature": 1e30}),
    ("temperature 1e30 raises no dead token", [1.0, -INF, -3.0], [], {"temperature": 1e30}),
    ("large logits do not overflow", [1e4, 1e4 - 1, -1e4], [], {}),
    ("one token", [-7.0], [0], {"top_k": 3, "top_p": 0.1, "min_p": 1.0, "repetition_penalty": 2.0}),
    ("a dead token stays dead", [0.5, -INF, 1.5, -INF], [1, 3], {"repetition_penalty": 1.5}),
    ("top-k", MIXED, [], {"top_k": 3}),
    ("top-k 1", MIXED, [], {"top_k": 1}),
    ("top-k 1, of equals the lowest id", TIES, [], {"top_k": 1}),
    ("top-k with a tie at the cut, lower ids stay", TIES, [], {"top_k": 4}),
    ("top-k with a tie inside the cut", TIES, [], {"top_k": 2}),
    ("top-k among equals only", [0.0] * 6, [], {"top_k": 4}),
    ("top-k V", MIXED, [], {"top_k": 8}),
    ("top-k past V", MIXED, [], {"top_k": 1000}),
    ("top-k 0 is off", MIXED, [], {"top_k": 0}),
    ("top-k past the living", [1.0, -INF, 0.0, -INF], [], {"top_k": 3}),
    ("top-p 1 is off", MIXED, [], {"top_p": 1.0}),
    ("top-p 0.9", MIXED, [], {"top_p": 0.9}),
    ("top-p tiny keeps the likeliest", MIXED, [], {"top_p": 1e-9}),
    ("top-p takes the token that passes p", [1.0, 0.0], [], {"top_p": 0.74}),
    ("top-p among equals, lower ids stay", [0.0] * 5, [], {"top_p": 0.5}),
    ("top-p with dead tokens", [1.0, -INF, 0.5, -INF], [], {"top_p": 0.99}),
    ("min-p 0 is off", MIXED, [], {"min_p": 0.0}),
    ("min-p 0.2", MIXED, [], {"min_p": 0.2}),
    ("min-p 1 keeps the largest and its equals", TIES, [], {"min_p": 1.0}),
    ("min-p counts after the temperature", MIXED, [], {"min_p": 0.2, "temperature": 3.0}),
    ("penalty 2", MIXED, [2, 4, 2, 6], {"repetition_penalty": 2.0}),
    ("penalty 0.5 rewards", MIXED, [2, 4, 2, 6], {"repetition_penalty": 0.5}),
    ("penalty 1 is off", MIXED, [2, 4], {"repetition_penalty": 1.0}),
    ("penalty of everything seen", MIXED, list(range(8)), {"repetition_penalty": 1.3}),
    ("penalty moves the argmax", MIXED, [2], {"repetition_penalty": 1.5, "temperature": 0.0}),
    ("penalty makes a tie at the cut", [1.0, 2.0, 0.5], [1], {"repetition_penalty": 2, "top_k": 1}),
    ("temperature comes before top-p", MIXED, [], {"temperature": 2.0, "top_p": 0.7}),
    ("top-k comes before top-p", MIXED, [], {"top_k": 3, "top_p": 0.75}),
    ("top-p comes before min-p", MIXED, [], {"top_p": 0.75, "min_p": 0.3}),
    (
        "all of them in order",
        MIXED,
        [2, 4, 2],
        {"repetition_penalty": 1.2, "temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.25},
    ),
    (
        "all of them, hot",
        [3.5, 1.0, 4.0, 1.0, 5.0, -2.5, 2.0, 6.0, -5.0, 3.25],
        [7, 7, 8, 4],
        {"repetition_penalty": 1.7, "temperature": 1.9, "top_k": 7, "top_p": 0.95, "min_p": 0.1},
    ),
]

# probabilities, uniform
NEARLY_ONE = 1 - 2**-53
DRAWS = [
    ([0.5, 0.25, 0.25], 0.0),
    ([0.5, 0.25, 0.25], 0.4999),
    ([0.5, 0.25, 0.25], 0.5),
    ([0.5, 0.25, 0.25], 0.75),
    ([0.5, 0.25, 0.25], NEARLY_ONE),
    ([1.0], 0.0),
    ([1.0], NEARLY_ONE),
    ([0.0, 0.0, 0.5, 0.5], 0.0),
    ([0.5, 0.5, 0.0, 0.0], NEARLY_ONE),
    ([0.0, 0.5, 0.0, 0.5, 0.0], 0.5),
    ([0.0, 0.5, 0.0, 0.5, 0.0], NEARLY_ONE),
    ([0.0, 1.0, 0.0], 0.3),
    ([0.1, 0.2, 0.3, 0.4], 0.29),
    ([0.1, 0.2, 0.3, 0.4], 0.31),
    ([0.25, 0.25, 0.25], 0.5),
    ([0.25, 0.25, 0.25], NEARLY_ONE),
    ([0.3, 0.3, 0.4], NEARLY_ONE),
    ([1e-30, 1.0], 0.0),
    ([1.0, 1e-30], NEARLY_ONE),
]


def golden_text() -> str:
    """The content of the file: JSON, one case per line."""
    filters = [filter_case(*case) for case in FILTERS]
    draws = [{"probabilities": p, "uniform": u, "id": draw(p, u)} for p, u in DRAWS]
    return (
        '{\n"filters": [\n'
        + ",\n".join(json.dumps(case) for case in filters)
        + '\n],\n"draws": [\n'
        + ",\n".join(json.dumps(case) for case in draws)
        + "\n]\n}\n"
    )


def filter_case(name: str, logits: list[float], seen: list[int], settings: dict) -> dict:
    sampling = SamplingConfig(**settings)
    probabilities = distribution(logits, sampling, seen)
    assert all(p < 1e-50 or p > 1e-9 for p in probabilities), name
    check_margins(name, logits, sampling, seen)
    return {
        "name": name,
        "logits": [None if x == -INF else x for x in logits],
        "seen": seen,
        "settings": settings,
        "kept": [i for i, p in enumerate(probabilities) if p > 1e-9],
        "probabilities": [float(f"{p:.9g}") if p > 1e-9 else 0.0 for p in probabilities],
    }


def check_margins(name: str, logits: list[float], sampling: SamplingConfig, seen: list[int]):
    """Check that top-p or min-p changed by MARGIN give the same distribution."""
    if sampling.greedy:
        return
    fields = dict(vars(sampling))
    expected = distribution(logits, sampling, seen)
    for field in ("top_p", "min_p"):
        for factor in (1 - MARGIN, 1 + MARGIN):
            value = (fields[field] or 0.0) * factor
            if 0 < value <= 1:
                other = SamplingConfig(**{**fields, field: value})
                assert distribution(logits, other, seen) == expected, (name, field)
