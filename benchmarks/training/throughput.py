"""Speed of training steps: tokens per second of mygpt and of plain code, measured in turns.

Usage: python -m benchmarks.training.throughput PATH [--rounds 5] [--steps 400]
       [--large-steps 5] [--batch 12] [--only tutorial,large,large-dropout]
       [--no-autocast] [--out docs/benchmarks]
in the folder above `benchmarks`, on a machine that does nothing else. All run in one process with
the same threads; the first step of each run is not counted. Writes `training-speed.json` and
`training.md`.
Letters: C embedding, N parameters, T window.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.generation.rounds import QUIET_WAIT_S, ROOT, await_quiet
from benchmarks.training import ours, report
from benchmarks.training.load import Others
from benchmarks.training.ours import Timed
from benchmarks.training.recipes import nanogpt, tutorial

_GEMM_ROWS = 2048


@dataclass
class Contestant:
    """One way to train a model, and its measurements.

    Attributes:
        label: its name in the table.
        run: trains for a number of steps.
        positions: parameters of the position embedding, which is not in a matrix product.
        autocast: whether torch's autocast computes products in bfloat16.
        rates: tokens/s of each round.
        others: cores that other programs used, in each round.
        last: the measurement of the last round.
    """

    label: str
    run: Callable[[int], Timed]
    positions: int
    autocast: bool = False
    rates: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    last: Timed | None = None


@dataclass
class Match:
    """Contestants on models of one shape; ratios are to the first one."""

    key: str
    title: str
    layers: int
    width: int
    window: int
    contestants: list[Contestant]


def palm_flops_per_token(parameters: int, *, layers: int, width: int, window: int) -> int:
    """Operations of a training step per token (PaLM; Chowdhery et al., 2022, appendix B).

    6 N for products with weights, forward and backward (N without the position embedding, a tied
    head once), and 12 * layers * C * T for attention, including the masked half.
    """
    return 6 * parameters + 12 * layers * width * window


def plain_steps(
    make: Callable[[], Any], steps: int, *, compiled: bool = False, autocast: bool = False
) -> Timed:
    """Train a plain recipe for `steps` (at least 2); the first step is not timed.

    Args:
        make: gives the recipe.
        steps: how many.
        compiled: whether torch.compile runs the model; the first step compiles it.
        autocast: whether torch's autocast computes products in bfloat16.
    """
    recipe = make()
    if compiled:
        recipe.model.compile()

    def step(done: float) -> torch.Tensor:
        # A context for each step: within one, autocast keeps the rounded weights.
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return recipe.step(done)

    first = step(0.0).item()
    began = time.perf_counter()
    for number in range(1, steps):
        loss = step(number / steps)
    last = loss.item()
    seconds = time.perf_counter() - began
    parameters = sum(p.numel() for p in recipe.model.parameters())
    return Timed((steps - 1) * recipe.tokens_per_step / seconds, first, last, parameters)


def gemm_gflops(rows: int = _GEMM_ROWS, repetitions: int = 5) -> float:
    """Median rate of torch.mm with two square float32 matrices on all threads."""
    one, other = torch.rand(rows, rows), torch.rand(rows, rows)
    torch.mm(one, other)
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        torch.mm(one, other)
        times.append(time.perf_counter() - began)
    return 2 * rows**3 / statistics.median(times) / 1e9


def plain_contestants(name: str, run: Callable[..., Timed], positions: int) -> list[Contestant]:
    """A plain recipe as it is, by torch.compile, and in bfloat16 too."""
    ways = {
        name: {},
        f"{name}, torch.compile": {"compiled": True},
        f"{name}, bfloat16 autocast": {"autocast": True},
        f"{name}, both": {"compiled": True, "autocast": True},
    }
    return [
        Contestant(label, partial(run, **way), positions, "autocast" in way)
        for label, way in ways.items()
    ]


def tutorial_match(path: str, data: torch.Tensor, vocab_size: int) -> Match:
    """The tutorial's model, learning rate, batches and seeds: both have the same final loss."""
    positions = tutorial.WINDOW * tutorial.C
    plain = partial(plain_steps, lambda: tutorial.Recipe(data, vocab_size))
    return Match(
        "tutorial",
        f"the tutorial's model, {tutorial.BATCH} x {tutorial.WINDOW}",
        tutorial.LAYERS,
        tutorial.C,
        tutorial.WINDOW,
        [
            *plain_contestants("the tutorial's loop", plain, positions),
            Contestant("mygpt", partial(ours.tutorial_step, path), positions),
        ],
    )


def large_match(path: str, data: torch.Tensor, vocab_size: int, shape: nanogpt.Shape) -> Match:
    """nanoGPT's model for a GPU; mygpt with the same kind of block, and with the modern one."""
    positions = shape.window * shape.width
    own = partial(ours.large_step, path, batch=shape.batch, dropout=shape.dropout)
    plain = partial(plain_steps, lambda: nanogpt.Recipe(data, vocab_size, shape=shape))
    kind = f"dropout {shape.dropout}" if shape.dropout else "no dropout"
    return Match(
        "large-dropout" if shape.dropout else "large",
        f"10.65 million parameters, {shape.batch} x {shape.window}, {kind}",
        shape.layers,
        shape.width,
        shape.window,
        [
            *plain_contestants("nanoGPT-style code", plain, positions),
            Contestant("mygpt, the same block", partial(own, modern=False), positions),
            Contestant("mygpt, the modern block", partial(own, modern=True), 0),
        ],
    )


def measure(match: Match, rounds: int, steps: int) -> list[float]:
    """Measure all in turns, after a warm-up round; returns the GEMM rate of each round."""
    gemm = []
    for number in range(rounds + 1):
        for one in match.contestants:
            if not number:
                one.run(2)  # loads libraries, fills caches
                continue
            await_quiet(QUIET_WAIT_S)
            others = Others()
            one.last = one.run(steps)
            one.others.append(others.cores())
            one.rates.append(one.last.tokens_per_s)
            print(
                f"  round {number}: {one.label}: {one.rates[-1]:,.0f} tokens/s, "
                f"loss {one.last.first_loss:.4f} -> {one.last.last_loss:.4f}, "
                f"others {one.others[-1]:.2f}",
                flush=True,
            )
        if number:
            gemm.append(gemm_gflops())
    return gemm


def described(match: Match, gemm: list[float], steps: int) -> dict[str, Any]:
    """The results of a match as plain values."""
    found = []
    for one in match.contestants:
        assert one.last is not None
        flops = palm_flops_per_token(
            one.last.parameters - one.positions,
            layers=match.layers,
            width=match.width,
            window=match.window,
        )
        found.append(
            {
                **asdict(one.last),
                "label": one.label,
                "tokens_per_s": one.rates,
                "others_cores": one.others,
                "flops_per_token": flops,
            }
        )
    return {
        "key": match.key,
        "title": match.title,
        "steps": steps,
        "gemm_gflops": gemm,
        "contestants": found,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "path", type=Path, help="a text; Tiny Shakespeare for the published results"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="per round, of the tutorial's model")
    parser.add_argument("--large-steps", type=int, default=5, help="per round, of the large models")
    parser.add_argument(
        "--batch", type=int, default=12, help="windows per step of the large models"
    )
    parser.add_argument(
        "--only", default="tutorial,large,large-dropout", help="separated by commas"
    )
    # Processors without instructions for bfloat16 take eight times as long with it.
    parser.add_argument("--no-autocast", action="store_true", help="omit bfloat16 autocast")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    return parser.parse_args()


def main() -> None:
    options = parse()
    text = options.path.read_text(encoding="utf-8")
    chars = sorted(set(text))
    index = {char: i for i, char in enumerate(chars)}
    data = torch.tensor([index[char] for char in text])
    path, shape = str(options.path), replace(nanogpt.GPU, batch=options.batch)
    matches = [
        tutorial_match(path, data, len(chars)),
        large_match(path, data, len(chars), replace(shape, dropout=0.0)),
        large_match(path, data, len(chars), shape),
    ]
    results: dict[str, Any] = {"machine": report.describe_machine(), "matches": []}
    results["machine"]["threads"] = torch.get_num_threads()
    for match in matches:
        if match.key in options.only.split(","):
            if options.no_autocast:
                match.contestants = [c for c in match.contestants if not c.autocast]
            print(match.title, flush=True)
            steps = options.steps if match.key == "tutorial" else options.large_steps
            gemm = measure(match, options.rounds, steps)
            results["matches"].append(described(match, gemm, steps))
    page = report.write_speed(results, options.out)
    print(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
