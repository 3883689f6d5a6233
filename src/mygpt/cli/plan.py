"""`mygpt plan`: estimate the operations, memory and time of a training before it starts."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mygpt.cli.options import Json, option
from mygpt.cli.terminal import at_words, say, to_json, waiting
from mygpt.errors import InputError, require_choice
from mygpt.machine import bytes_text

if TYPE_CHECKING:
    from mygpt.core.config import GPTConfig
    from mygpt.scaling.estimates import Dtype, Sharding
    from mygpt.scaling.presets import Known

_SHAPE = (
    "embed_dim", "num_heads", "num_kv_heads", "num_layers", "mlp_dim", "max_seq_len", "vocab_size",
)  # fmt: skip
_BATCH = 16  # windows in a step, where nothing was published
_PIECE_TOKENS = 4096  # tokens of a device's micro-batch where --micro-batch is not given
_CHINCHILLA = 20  # compute-optimal tokens per parameter (Hoffmann et al. 2022, table 3)
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = {
    **{unit + "b" * b: 1000**n for n, unit in enumerate(("", *"kmgt")) for b in (0, 1)},
    **{unit + "ib": 1024**n for n, unit in enumerate("kmgt", 1)},
}
_BUDGET, _DEVICES, _MODEL, _TIME = "Budget", "Devices", "Model", "Time"


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, gpt3, llama-2-7b, -13b, -70b; tutorial, "
            "nano, small, medium, large (with --vocab-size); or a run or checkpoint.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        option(
            "Training tokens: 10M, 2.5B, 1T. Default: the published number, else 20 for each "
            "parameter."
        ),
    ] = None,
    batch_tokens: Annotated[
        str | None, option("Tokens in a step, rounded to whole windows.", panel=_BUDGET)
    ] = None,
    batch_size: Annotated[
        int | None, option("Windows in a step, instead of --batch-tokens.", panel=_BUDGET, min=1)
    ] = None,
    devices: Annotated[int, option("Devices on each machine. Default: 1.", min=1)] = 1,
    nodes: Annotated[int, option("Machines. Default: 1.", panel=_DEVICES, min=1)] = 1,
    device_memory: Annotated[
        str | None, option("Memory of each device: 80GB, 24GiB. Shows which set-ups fit.")
    ] = None,
    micro_batch: Annotated[
        int | None,
        option(
            "Windows that a device processes at once. Default: about 4,096 tokens.",
            panel=_DEVICES,
            min=1,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        option("float32, tf32 or bfloat16. Default: memory for 32 and 16 bits.", panel=_DEVICES),
    ] = None,
    checkpoint_activations: Annotated[
        bool,
        option(
            "Recompute blocks in the backward pass.", "--checkpoint-activations", panel=_DEVICES
        ),
    ] = False,
    embed_dim: Annotated[int | None, option("The embedding's width C.", panel=_MODEL)] = None,
    num_heads: Annotated[int | None, option("Attention heads.", panel=_MODEL)] = None,
    num_kv_heads: Annotated[int | None, option("Key and value heads.", panel=_MODEL)] = None,
    num_layers: Annotated[int | None, option("Transformer blocks.", panel=_MODEL)] = None,
    mlp_dim: Annotated[int | None, option("Hidden width of the MLP.", panel=_MODEL)] = None,
    max_seq_len: Annotated[
        int | None, option("The context window in tokens.", panel=_MODEL)
    ] = None,
    vocab_size: Annotated[int | None, option("The number of token ids.")] = None,
    peak_tflops: Annotated[
        float | None, option("A device's peak speed in 10^12 operations a second.", panel=_TIME)
    ] = None,
    efficiency: Annotated[
        float | None,
        option("The fraction of the peak that training reaches (MFU), such as 0.4.", panel=_TIME),
    ] = None,
    measure: Annotated[
        bool, option("Train a few steps on this machine and estimate the time.", "--measure")
    ] = False,
    device: Annotated[
        str, option("The device of --measure: auto, cpu, cuda or mps. Default: auto.", panel=_TIME)
    ] = "auto",
    json: Json = False,
) -> None:
    """Estimate a training: parameters, operations, memory of each device, steps and time.

    Everything is computed from the model's shape by the formulas in docs/scaling.md. Only
    --measure runs anything. The time is estimated only if an efficiency is measured or given.

    Example: mygpt plan gpt2 --tokens 10B --devices 8 --device-memory 24GB
    """  # fmt: skip
    given = locals()
    if dtype is not None:
        require_choice("dtype", dtype, ("float32", "tf32", "bfloat16"))
    known = _known(model, {name: given[name] for name in _SHAPE if given[name] is not None})
    config, job = known.config, _job(known, given)
    computed = _computed(config, job, dtype, checkpoint_activations)
    flops = sum(computed["flops"].values())
    rate, measured = _given_rate(peak_tflops, efficiency, measure), None
    if measure:
        measured = _measure(config, job["micro_batch"], dtype, checkpoint_activations, device)
        rate = measured["tokens_per_s"] * flops / job["tokens"]
    values: dict[str, Any] = {
        "model": {
            "name": model,
            "source": known.source,
            "published_parameters": known.parameters,
            "config": config.to_dict(),
        },
        "job": job,
        "computed": computed,
        "measured": measured,
        "time": rate
        and {
            "basis": "measured" if measure else "given",
            "flops_per_s": rate,
            "one_device_s": flops / rate,
            "all_devices_s": flops / rate / job["devices"],  # without communication time
        },
    }
    if json:
        say(to_json(values, indent=2))
        return
    for name, text in _page(config, values):
        say(at_words(f"{name:<14}{text}", sys.stdout, 14))
    say()
    for line in _memory_table(job, computed["placements"]):
        say(line)


def _known(name: str | None, changes: dict[str, Any]) -> Known:
    """The model that the name means, with the user's changes."""
    from mygpt.core.config import GPTConfig
    from mygpt.scaling.presets import PUBLISHED, SHAPES, Known

    if name in PUBLISHED:
        found = PUBLISHED[name]
    elif name in SHAPES:
        if "vocab_size" not in changes:
            raise InputError(
                f"preset {name} has no vocabulary size: add --vocab-size, 257 for bytes or 50257 "
                "for GPT-2's tokenizer"
            )
        from mygpt.training.config import preset_options

        config = GPTConfig(changes["vocab_size"], **SHAPES[name])
        batch_size = preset_options(name, {})[1]["batch_size"]
        found = Known(config, "a preset of `mygpt train`", batch_size * config.max_seq_len)
    elif name and os.path.exists(name):
        from mygpt.checkpoint.model_file import read_checkpoint, resolve

        path = resolve(name)
        config = read_checkpoint(path).config
        found = Known(config, f"the shape in {path}", _BATCH * config.max_seq_len)
    else:
        raise InputError(
            f"{'name a model' if name is None else f'model {name!r} is not known'}: choose "
            f"{', '.join(PUBLISHED)}; {', '.join(SHAPES)}; or a run or checkpoint that exists"
        )
    changed = {key: new for key, new in changes.items() if getattr(found.config, key) != new}
    if not changed:
        return found
    listed = ", ".join(f"{key} {new:,}" for key, new in changed.items())
    return replace(
        found, config=replace(found.config, **changed), parameters=None,
        source=f"{found.source}; changed: {listed}",
    )  # fmt: skip


def _job(known: Known, given: dict[str, Any]) -> dict[str, Any]:
    """What is to be trained, and on which devices."""
    window, batch_size = known.config.max_seq_len, given["batch_size"]
    if batch_size is not None and given["batch_tokens"] is not None:
        raise InputError("--batch-tokens and --batch-size exclude each other: omit one")
    if batch_size is None:
        asked = given["batch_tokens"]
        batch_tokens = known.batch_tokens if asked is None else parse_count("batch_tokens", asked)
        batch_size = max(1, round(batch_tokens / window))
    devices = given["devices"] * given["nodes"]
    if devices > batch_size:
        raise InputError(
            f"devices={devices} cannot share batch_size={batch_size}: each needs a window of "
            f"{window} a step, so choose --batch-size {devices} or more"
        )
    tokens, memory = given["tokens"], given["device_memory"]
    windows = math.ceil(batch_size / devices)  # of the device with the most
    return {
        "tokens": parse_count("tokens", tokens)
        if tokens is not None
        else known.tokens or _CHINCHILLA * known.config.num_parameters(),
        "batch_size": batch_size,
        "devices": devices,
        "micro_batch": min(windows, given["micro_batch"] or max(1, _PIECE_TOKENS // window)),
        "device_memory": None if memory is None else parse_bytes("device_memory", memory),
        "batch_tokens": batch_size * window,
    }


def _given_rate(peak_tflops: float | None, efficiency: float | None, measure: bool) -> float | None:
    """Operations a second of a device from the user's options; None without them."""
    if peak_tflops is None and efficiency is None:
        return None
    if measure or peak_tflops is None or efficiency is None:
        raise InputError("--peak-tflops and --efficiency need each other, or --measure alone")
    if not (0 < peak_tflops < 1e9 and 0 < efficiency <= 1):
        raise InputError(
            f"peak_tflops={peak_tflops} must be above 0, such as 312 (an A100's in bfloat16), and "
            f"efficiency={efficiency} above 0 and at most 1, such as 0.4"
        )
    return 1e12 * peak_tflops * efficiency


def _computed(
    config: GPTConfig, job: dict[str, Any], dtype: str | None, recompute: bool
) -> dict[str, Any]:
    """What follows from the shape: sizes, steps, operations, and memory of each way to train."""
    from mygpt.scaling.estimates import USABLE, device_memory, flops_per_token

    formats: tuple[Dtype, ...] = ("bfloat16",) if dtype == "bfloat16" else ("float32",)
    formats = ("float32", "bfloat16") if dtype is None else formats
    shardings: tuple[Sharding, ...] = ("ddp", "fsdp") if job["devices"] > 1 else ("ddp",)
    ways = product(shardings, formats, (True,) if recompute else (False, True))
    placements, limit = [], job["device_memory"]
    for sharding, form, checkpointing in ways:
        memory = device_memory(
            config, sharding=sharding, devices=job["devices"], micro_batch=job["micro_batch"],
            dtype=form, checkpointing=checkpointing,
        )  # fmt: skip
        way = {"sharding": sharding, "dtype": form, "checkpointing": checkpointing}
        fits = None if limit is None else memory.total <= USABLE * limit
        placements.append(way | {"memory": asdict(memory), "total": memory.total, "fits": fits})
    replica = device_memory(config, sharding="ddp", devices=1, micro_batch=1)
    flops, tokens = flops_per_token(config, config.max_seq_len), job["tokens"]
    return {
        "parameters": config.num_parameters(),
        "weights_bytes": replica.weights,
        "state_bytes": replica.weights + replica.optimizer,
        "steps": math.ceil(tokens / job["batch_tokens"]),
        "flops": {"weights": tokens * flops.weights, "attention": tokens * flops.attention},
        "tokens_a_parameter": tokens / config.num_parameters(),
        "placements": placements,
    }


def _measure(
    config: GPTConfig, micro_batch: int, dtype: Any, recompute: bool, device: str
) -> dict[str, Any]:
    from mygpt.machine import choose_device

    with waiting("training a few steps"):
        from mygpt.training.speed import measure_speed

        measured = measure_speed(
            config, choose_device(device), micro_batch=micro_batch, dtype=dtype or "auto",
            checkpoint_activations=recompute,
        )  # fmt: skip
    return asdict(measured)


def _page(config: GPTConfig, values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines to print, each with a name in front."""
    model, job, computed = values["model"], values["job"], values["computed"]
    published, measured, time = model["published_parameters"], values["measured"], values["time"]
    window = f"{config.max_seq_len:,}"
    yield "model:", f"{model['name']} ({model['source']})"
    shape = f"{config.num_layers} blocks of width {config.embed_dim:,}, {config.num_heads} heads"
    yield "", f"{shape}, MLP {config.mlp_hidden:,}, window {window}"
    counted = "" if published is None else f" (published: {published:,.0f})"
    yield "parameters:", f"{computed['parameters']:,}{counted}, vocabulary {config.vocab_size:,}"
    sizes = [bytes_text(computed[name]) for name in ("weights_bytes", "state_bytes")]
    yield "files:", f"{sizes[0]} for a model, {sizes[1]} for the state that --resume needs"
    step = f"{job['batch_tokens']:,} ({job['batch_size']:,} x {window})"
    yield "budget:", f"{job['tokens']:,} tokens in {computed['steps']:,} steps of {step}"
    each = computed["tokens_a_parameter"]
    ratio = f"{each / _CHINCHILLA:,.3g} times the {_CHINCHILLA} of Chinchilla's rule"
    yield "", f"{each:,.1f} tokens per parameter, {ratio}"
    flops = sum(computed["flops"].values())
    fraction = computed["flops"]["attention"] / flops
    yield "operations:", f"{flops:.2e} FLOPs, of which attention {fraction:.1%}"
    if measured:
        steps = f"{measured['steps']} steps of {measured['micro_batch']} x {window} tokens"
        yield "measured:", f"{measured['tokens_per_s']:,.0f} tokens/s in {steps}"
        yield "", f"on {measured['device']}; all other values are computed"
    if time is None:
        yield "time:", "unknown: add --measure, or --peak-tflops and --efficiency"
        return
    rate = f"{time['flops_per_s'] / 1e12:,.3g} TFLOP/s"
    yield "time:", f"{duration_text(time['one_device_s'])} on one device, at {rate}"
    if job["devices"] > 1:
        all_s = duration_text(time["all_devices_s"])
        yield "", f"{all_s} on {job['devices']:,} devices, without communication costs"


def _memory_table(job: dict[str, Any], placements: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each way to train: bytes by purpose."""
    where = "the device" if job["devices"] == 1 else f"each of {job['devices']:,} devices"
    limit = job["device_memory"]
    at_once = f"{job['micro_batch']:,} window{'s' * (job['micro_batch'] > 1)} at once"
    yield f"memory of {where}, {at_once}:"
    fits = "" if limit is None else "  fits"
    widths = {"states": 9, "gathered": 10, "activations": 13, "working": 9, "total": 9}
    yield " " * 24 + "".join(f"{name:>{width}}" for name, width in widths.items()) + fits
    for placement in placements:
        memory = placement["memory"]
        memory["states"] = sum(memory[n] for n in ("weights", "gradients", "optimizer"))
        memory["total"] = placement["total"]
        name = "" if job["devices"] == 1 else placement["sharding"].upper() + " "
        name += placement["dtype"].replace("bfloat16", "bf16")
        name += " recomputed" * placement["checkpointing"]
        cells = "".join(f"{bytes_text(memory[name]):>{width}}" for name, width in widths.items())
        fits = {None: "", True: "   yes", False: "    no"}[placement["fits"]]
        yield f"{name:<24}{cells}{fits}"
    free = "" if limit is None else f"; fits: a tenth of {bytes_text(limit)} stays free"
    yield f"states: weights, gradients, AdamW's moments{free}"


def parse_count(name: str, text: str) -> int:
    """Parse a number such as 10M, 2.5B, 1T, 3e11 or 300_000.

    Raises:
        InputError: naming the option, where `text` is not a number or is out of range.
    """
    return _parse(name, text, _COUNTS, "number such as 300000, 10M, 2.5B or 1T")


def parse_bytes(name: str, text: str) -> int:
    """Parse a size such as 80GB (10^9 each), 80GiB (2^30 each) or a number of bytes; as above."""
    return _parse(name, text, _BYTES, "size such as 80GB, 80GiB or 512MB")


def _parse(name: str, text: str, units: dict[str, int], meant: str) -> int:
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?(?:e\+?\d+)?)\s*([a-z]*)", text.strip().lower())
    value = float(found[1].replace(",", "")) * units.get(found[2], 0) if found else 0.0
    if not 1 <= value <= 1e18:
        raise InputError(f"{name}={text!r} must be a {meant}, at least 1 and at most 1e18")
    return round(value)


def duration_text(seconds: float) -> str:
    """Format a duration in a unit of its size: 41 s, 12.0 minutes, 5.2 hours, 3,400.0 days."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s"
