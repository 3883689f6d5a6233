"""`mygpt plan`: estimate the compute, memory and time of a training before it starts."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mygpt.cli.terminal import Waiting, say, to_json

if TYPE_CHECKING:
    from mygpt.core.config import GPTConfig
    from mygpt.scaling import Job, Time
    from mygpt.scaling.memory import Dtype
    from mygpt.training.efficiency import Efficiency

_SHAPE = ("embed_dim", "num_heads", "num_kv_heads", "num_layers", "mlp_dim", "max_seq_len")
_FORMATS = ("float32", "tf32", "bfloat16")
_BATCH = 16  # windows in a step, for models without a known batch size


@dataclass(frozen=True)
class Model:
    """The model to estimate for.

    Attributes:
        name: as the user gave it.
        config: its shape.
        source: where the shape comes from.
        published: the published number of parameters; None if there is none.
        tokens: the published number of training tokens; None if there is none.
        batch_size: windows in a step.
    """

    name: str
    config: GPTConfig
    source: str
    published: float | None
    tokens: int | None
    batch_size: int


def _help(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


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
        _help(
            "Training tokens: 10M, 2.5B, 1T. Default: the published number, else 20 for each "
            "parameter.",
            _BUDGET,
        ),
    ] = None,
    batch_tokens: Annotated[
        str | None, _help("Tokens in a step, rounded to whole windows.", _BUDGET)
    ] = None,
    batch_size: Annotated[
        int | None, _help("Windows in a step, instead of --batch-tokens.", _BUDGET)
    ] = None,
    devices: Annotated[int, _help("Devices on each machine (1).", _DEVICES)] = 1,
    nodes: Annotated[int, _help("Machines (1).", _DEVICES)] = 1,
    device_memory: Annotated[
        str | None,
        _help("Memory of each device: 80GB, 24GiB. Shows which set-ups fit.", _DEVICES),
    ] = None,
    micro_batch: Annotated[
        int | None,
        _help("Windows that a device processes at once (about 4,096 tokens).", _DEVICES),
    ] = None,
    dtype: Annotated[
        str | None,
        _help("float32, tf32 or bfloat16. Default: memory for 32 and 16 bits.", _DEVICES),
    ] = None,
    checkpoint_activations: Annotated[
        bool,
        _help("Recompute blocks in the backward pass.", _DEVICES, "--checkpoint-activations"),
    ] = False,
    link_gbps: Annotated[
        float | None, _help("Each device's network bandwidth in gigabits a second.", _DEVICES)
    ] = None,
    embed_dim: Annotated[int | None, _help("The embedding's width C.", _MODEL)] = None,
    num_heads: Annotated[int | None, _help("Attention heads.", _MODEL)] = None,
    num_kv_heads: Annotated[int | None, _help("Key and value heads.", _MODEL)] = None,
    num_layers: Annotated[int | None, _help("Transformer blocks.", _MODEL)] = None,
    mlp_dim: Annotated[int | None, _help("Hidden width of the MLP.", _MODEL)] = None,
    max_seq_len: Annotated[int | None, _help("The context window in tokens.", _MODEL)] = None,
    vocab_size: Annotated[int | None, _help("The number of token ids.", _MODEL)] = None,
    peak_tflops: Annotated[
        float | None, _help("A device's peak speed in 10^12 operations a second.", _TIME)
    ] = None,
    efficiency: Annotated[
        float | None, _help("The fraction of the peak that training reaches (MFU): 0.4.", _TIME)
    ] = None,
    measure: Annotated[
        bool,
        _help("Train a few steps on this machine and estimate the time.", _TIME, "--measure"),
    ] = False,
    device: Annotated[
        str, _help("The device of --measure: auto, cpu, cuda or mps.", _TIME)
    ] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Estimate a training: parameters, operations, memory of each device, steps and time.

    Everything is computed from the model's shape by the formulas in docs/scaling.md. Only
    --measure runs anything. The time is estimated only if an efficiency is measured or given.

    Example: mygpt plan gpt2 --tokens 10B --devices 8 --device-memory 24GB
    """  # fmt: skip
    given = locals()
    from mygpt.cli.plan_page import show
    from mygpt.scaling import estimate

    changes = {name: given[name] for name in (*_SHAPE, "vocab_size") if given[name] is not None}
    chosen = _model(model, changes)
    rate = _given_rate(peak_tflops, efficiency, measure)
    formats = _formats(dtype)
    job = _job(chosen, given)
    estimated = estimate(
        job, dtypes=formats, checkpointings=(True,) if checkpoint_activations else (False, True)
    )
    measured = _measure(job, dtype, checkpoint_activations, device) if measure else None
    time = _time(job, rate, measured)
    if json:
        values = {
            "model": {
                "name": chosen.name,
                "source": chosen.source,
                "published_parameters": chosen.published,
                "config": chosen.config.to_dict(),
            },
            "job": {name: value for name, value in asdict(job).items() if name != "config"}
            | {"batch_tokens": job.batch_tokens, "micro_batch": job.piece, "pieces": job.pieces},
            "computed": asdict(estimated),
            "measured": measured and asdict(measured) | {"config": measured.config.to_dict()},
            "time": time and asdict(time),
        }
        say(to_json(values, indent=2))
        return
    show(chosen, job, estimated, nodes=nodes, time=time, measured=measured)


def _model(name: str | None, changes: dict[str, Any]) -> Model:
    """The model that the name means, with the user's changes."""
    from mygpt.errors import InputError
    from mygpt.scaling import PUBLISHED
    from mygpt.scaling.presets import SHAPES

    if name in PUBLISHED:
        known = PUBLISHED[name]
        found = Model(
            name, known.config, known.source, known.parameters, known.tokens,
            round(known.batch_tokens / known.config.max_seq_len),
        )  # fmt: skip
    elif name in SHAPES:
        found = _preset(name, changes)
    elif name and os.path.exists(name):
        from mygpt.checkpoint.model_file import read_checkpoint, resolve

        path = resolve(name)
        config = read_checkpoint(path).config
        found = Model(name, config, f"the shape in {path}", None, None, _BATCH)
    else:
        raise InputError(
            f"{'name a model' if name is None else f'model {name!r} is not known'}: choose "
            f"{', '.join(PUBLISHED)}; {', '.join(SHAPES)}; or a run or checkpoint that exists"
        )
    changed = {key: new for key, new in changes.items() if getattr(found.config, key) != new}
    if not changed:
        return found
    listed = ", ".join(f"{key} {new:,}" for key, new in changed.items())
    config = replace(found.config, **changed)
    batch_size = max(1, round(found.batch_size * found.config.max_seq_len / config.max_seq_len))
    return replace(
        found, config=config, source=f"{found.source}; changed: {listed}", published=None,
        batch_size=batch_size,
    )  # fmt: skip


def _preset(name: str, changes: dict[str, Any]) -> Model:
    from mygpt.core.config import GPTConfig
    from mygpt.errors import InputError
    from mygpt.scaling.presets import SHAPES
    from mygpt.training.config import preset_options

    if "vocab_size" not in changes:
        raise InputError(
            f"preset {name} has no vocabulary size: add --vocab-size, 257 for bytes or 50257 for "
            "GPT-2's tokenizer"
        )
    config = GPTConfig(changes["vocab_size"], **SHAPES[name])
    batch_size = preset_options(name, {})[1]["batch_size"]
    return Model(name, config, "a preset of `mygpt train`", None, None, batch_size)


def _formats(dtype: str | None) -> tuple[Dtype, ...]:
    from mygpt.errors import require_choice

    if dtype is None:
        return ("float32", "bfloat16")
    require_choice("dtype", dtype, _FORMATS)
    return ("bfloat16",) if dtype == "bfloat16" else ("float32",)


def _job(model: Model, given: dict[str, Any]) -> Job:
    from mygpt.errors import InputError, require_int
    from mygpt.scaling import Job
    from mygpt.scaling.amounts import parse_bytes, parse_count
    from mygpt.scaling.compute import CHINCHILLA

    for name in ("devices", "nodes"):
        require_int(name, given[name], least=1)
    batch_size, window = model.batch_size, model.config.max_seq_len
    if given["batch_tokens"] is not None:
        if given["batch_size"] is not None:
            raise InputError("--batch-tokens and --batch-size exclude each other: omit one")
        batch_size = max(1, round(parse_count("batch_tokens", given["batch_tokens"]) / window))
    elif given["batch_size"] is not None:
        batch_size = given["batch_size"]
    if given["tokens"] is not None:
        tokens = parse_count("tokens", given["tokens"])
    else:
        tokens = model.tokens or round(CHINCHILLA * model.config.num_parameters())
    memory = given["device_memory"]
    return Job(
        model.config, tokens, batch_size,
        devices=given["devices"] * given["nodes"],
        micro_batch=given["micro_batch"],
        device_memory=None if memory is None else parse_bytes("device_memory", memory),
        link_gbps=given["link_gbps"],
    )  # fmt: skip


def _given_rate(peak_tflops: float | None, efficiency: float | None, measure: bool) -> float | None:
    """Operations a second of a device from the user's options; None without them."""
    from mygpt.errors import InputError

    if peak_tflops is not None and not 0 < peak_tflops < 1e9:
        raise InputError(f"peak_tflops={peak_tflops} must be above 0: 312 is an A100's in bfloat16")
    if efficiency is not None and not 0 < efficiency <= 1:
        raise InputError(f"efficiency={efficiency} must be above 0 and at most 1, such as 0.4")
    if measure and (efficiency is not None or peak_tflops is not None):
        raise InputError("--measure measures the speed: omit --peak-tflops and --efficiency")
    if efficiency is not None and peak_tflops is None:
        raise InputError("--efficiency is a fraction of --peak-tflops: add it, or use --measure")
    if peak_tflops is not None and efficiency is None:
        raise InputError("--peak-tflops needs --efficiency, the fraction that training reaches")
    if peak_tflops is None or efficiency is None:
        return None
    return 1e12 * peak_tflops * efficiency


def _measure(job: Job, dtype: str | None, again: bool, device: str) -> Efficiency:
    import sys
    from typing import cast

    from mygpt.machine import choose_device

    with Waiting("training a few steps" if sys.stdout.isatty() else ""):
        from mygpt.training.config import DtypeName
        from mygpt.training.efficiency import measure

        return measure(
            job.config,
            device=choose_device(device),
            micro_batch=job.piece,
            dtype=cast(DtypeName, dtype or "auto"),
            checkpoint_activations=again,
        )


def _time(job: Job, rate: float | None, measured: Efficiency | None) -> Time | None:
    from mygpt.scaling.job import time_for

    if measured is not None:
        return time_for(job, measured.flops_per_s, "measured")
    return None if rate is None else time_for(job, rate, "given")
