"""Print the result of `mygpt plan`: lines of a name and a text, and one table."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mygpt.cli.terminal import say, visible
from mygpt.scaling.amounts import bytes_text, count_text, duration_text, flops_text, rate_text

if TYPE_CHECKING:
    from mygpt.cli.plan import Model
    from mygpt.scaling import Estimate, Job, Time
    from mygpt.scaling.job import Fewest, Placement, Traffic
    from mygpt.training.efficiency import Efficiency

_NAME, _WIDTH = 14, 80
_FIRST, _COLUMN = 24, 14  # widths of the table's first and other columns
_ROWS = ("weights", "gradients", "optimizer", "gathered", "activations", "working")
_ROW_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW's two moments",
    "gathered": "gathered weights",
    "activations": "activations",
    "working": "logits, gradients",
}


def show(
    model: Model,
    job: Job,
    estimate: Estimate,
    *,
    nodes: int,
    time: Time | None,
    measured: Efficiency | None,
) -> None:
    """Print everything: wrapped on a terminal, one line for each entry otherwise."""
    for name, text in _model_lines(model, estimate):
        _say(name, text)
    say()
    for name, text in _budget_lines(job, estimate):
        _say(name, text)
    say()
    for line in _memory_table(job, estimate, nodes):
        say(line)
    for name, text in _fit_lines(job, estimate):
        _say(name, text)
    say()
    for name, text in _time_lines(job, time, measured):
        _say(name, text)
    if measured:
        _say("note", "the lines named measured were run here; all other numbers are computed")
    else:
        _say("note", "all numbers are computed; nothing was run")


def _say(name: str, text: str) -> None:
    start = f"{name + ':' if name else '':<{_NAME}}"
    lines = [visible(text, sys.stdout)]
    if sys.stdout.isatty():
        lines = textwrap.wrap(
            lines[0], _WIDTH - _NAME, break_on_hyphens=False, break_long_words=False
        )
    say(start + f"\n{' ' * _NAME}".join(lines))


def _model_lines(model: Model, estimate: Estimate) -> Iterator[tuple[str, str]]:
    config = model.config
    heads = f"{config.num_heads} heads"
    if config.kv_heads != config.num_heads:
        heads += f" ({config.kv_heads} key and value heads)"
    yield "model", f"{model.name} ({model.source})"
    yield (
        "shape",
        f"{config.num_layers} blocks of width {config.embed_dim:,}, {heads}, MLP "
        f"{config.mlp_hidden:,}, window {config.max_seq_len:,}, vocabulary {config.vocab_size:,}",
    )
    published = "" if model.published is None else f" (published: {model.published:,.0f})"
    yield "parameters", f"{estimate.parameters:,}{published}"
    yield (
        "weights",
        f"{bytes_text(estimate.weights_bytes)} in float32, "
        f"{bytes_text(estimate.weights_16bit_bytes)} in 16 bits",
    )
    yield (
        "checkpoints",
        f"{bytes_text(estimate.state_bytes)} for the state that --resume needs; a run's folder "
        f"{bytes_text(estimate.run_bytes)} (two models, two states)",
    )


def _budget_lines(job: Job, estimate: Estimate) -> Iterator[tuple[str, str]]:
    yield (
        "budget",
        f"{count_text(job.tokens)} tokens in {job.steps:,} steps of {job.batch_tokens:,} "
        f"({job.batch_size:,} window{'s' * (job.batch_size > 1)} of {job.config.max_seq_len:,})",
    )
    ratio, each = estimate.times_chinchilla, estimate.tokens_a_parameter
    if 0.95 <= ratio <= 1.05:
        comparison = "as Chinchilla's rule advises"
    elif ratio < 1:
        comparison = (
            f"{ratio:.2g} times the 20 of Chinchilla's rule: a smaller model on more tokens would "
            "reach a lower loss with the same number of operations"
        )
    else:
        comparison = (
            f"{ratio:,.3g} times the 20 of Chinchilla's rule: a larger model on fewer tokens would "
            "reach a lower loss with the same number of operations, but be slower to use"
        )
    yield "", f"{each:,.{1 if each < 100 else 0}f} tokens for each parameter, {comparison}"
    flops = estimate.flops
    yield (
        "operations",
        f"{flops_text(flops.weights)} FLOPs (6ND, as in papers); {flops_text(flops.total)} "
        f"including attention scores ({flops.attention / flops.weights:+.1%})",
    )


def _memory_table(job: Job, estimate: Estimate, nodes: int) -> Iterator[str]:
    """Bytes by purpose, with one column for each sharding and number format."""
    first = [
        p for p in estimate.placements if p.checkpointing == estimate.placements[0].checkpointing
    ]
    where = "the device" if job.devices == 1 else f"each of {job.devices:,} devices"
    where += f" on {nodes:,} machines" if nodes > 1 else ""
    count = f"{job.piece:,} window{'s' * (job.piece > 1)} at once"
    yield f"memory of {where}, {count}, computed:"
    yield _row("", [_column(p, job) for p in first])
    again = first[0].checkpointing
    for name in _ROWS:
        title = _ROW_NAMES[name] + (", recomputed" if name == "activations" and again else "")
        yield _row(title, [bytes_text(getattr(p.memory, name)) for p in first])
    yield _row("total", [bytes_text(p.total) for p in first])
    others = [p for p in estimate.placements if p not in first]
    if others:
        yield _row("total, recomputing", [bytes_text(p.total) for p in others])
    if estimate.traffic:
        yield _row("sent in a step", [bytes_text(t.bytes) for t in _by_column(first, estimate)])
        times = [t.seconds for t in _by_column(first, estimate)]
        if job.link_gbps is not None:
            shown = ["" if s is None else f"{duration_text(s)} or more" for s in times]
            yield _row(f"at {job.link_gbps:g} Gbit/s", shown)


def _by_column(columns: list[Placement], estimate: Estimate) -> list[Traffic]:
    return [
        next(t for t in estimate.traffic if (t.sharding, t.dtype) == (p.sharding, p.dtype))
        for p in columns
    ]


def _column(placement: Placement, job: Job) -> str:
    kind = "" if job.devices == 1 else f"{placement.sharding.upper()} "
    return kind + ("bf16" if placement.dtype == "bfloat16" else "float32")


def _row(name: str, cells: list[str]) -> str:
    return f"  {name:<{_FIRST - 2}}{''.join(f'{cell:>{_COLUMN}}' for cell in cells)}".rstrip()


def _fit_lines(job: Job, estimate: Estimate) -> Iterator[tuple[str, str]]:
    if job.device_memory is None:
        yield "fits", "unknown: add --device-memory, such as 80GB"
        return
    memory = bytes_text(job.device_memory)
    here = "one device" if job.devices == 1 else f"{job.devices:,} devices"
    parts = []
    for sharding in dict.fromkeys(p.sharding for p in estimate.placements):
        ways = [p for p in estimate.placements if p.sharding == sharding]
        fitting = [_way(p.dtype, p.checkpointing) for p in ways if p.fits]
        how = "" if job.devices == 1 else f"under {sharding.upper()} "
        parts.append(how + _fitting(fitting, len(ways)))
    yield "fits", f"{here} of {memory} (with a tenth to spare): {'; '.join(parts)}"
    yield "fewest", f"devices of {memory}, with FSDP if several: {_fewest(estimate.fewest)}"


def _fitting(fitting: list[str], count: int) -> str:
    if not fitting:
        return "no"
    return "yes" if len(fitting) == count else "only " + ", ".join(fitting)


def _way(dtype: str, checkpointing: bool) -> str:
    return dtype + " recomputing" * checkpointing


def _fewest(found: tuple[Fewest, ...]) -> str:
    """The numbers of devices, with equal ones combined."""
    ways: dict[int | None, list[str]] = {}
    for each in found:
        ways.setdefault(each.devices, []).append(_way(each.dtype, each.checkpointing))
    if len(ways) == 1 and None not in ways:
        return f"{found[0].devices:,}"
    parts = [f"{count:,} in {' and '.join(names)}" for count, names in ways.items() if count]
    if None in ways:
        cause = "what FSDP cannot shard is too large: lower --micro-batch or --max-seq-len"
        parts.append(f"impossible in {' and '.join(ways[None])} ({cause})")
    return "; ".join(parts)


def _time_lines(
    job: Job, time: Time | None, measured: Efficiency | None
) -> Iterator[tuple[str, str]]:
    if measured is not None:
        yield "measured", _measured(job, measured)
        yield "measured", _rates(measured)
    if time is None:
        yield (
            "time",
            "unknown: add --measure for this device, or --peak-tflops and --efficiency",
        )
        return
    basis = "at the measured rate" if time.basis == "measured" else "at the efficiency given"
    yield (
        "time",
        f"{duration_text(time.one_device_s)} on one device {basis} "
        f"({rate_text(time.flops_per_s)}), computed",
    )
    if job.devices > 1:
        yield (
            "",
            f"{duration_text(time.all_devices_s)} on {job.devices:,} devices at this efficiency "
            "without communication costs, computed",
        )


def _measured(job: Job, measured: Efficiency) -> str:
    """What was trained for the measurement."""
    blocks, whole = measured.config.num_layers, job.config.num_layers
    model = "the whole model" if blocks == whole else f"{blocks} of its {whole} blocks"
    windows = f"{measured.micro_batch} window{'s' * (measured.micro_batch > 1)} at once"
    return (
        f"{measured.steps} steps of {model}, {windows}, {measured.dtype}, {measured.engine} "
        f"engine, on {measured.device}"
    )


def _rates(measured: Efficiency) -> str:
    speed = f"{measured.tokens_per_s:,.0f} tokens/s, {rate_text(measured.flops_per_s)}"
    if measured.share_of_products is None or measured.products_per_s is None:
        return speed
    return (
        f"{speed}: {measured.share_of_products:.0%} of the speed of plain matrix products here "
        f"({rate_text(measured.products_per_s)})"
    )
