"""`mygpt plan`: estimates agree with published figures and with the sizes of real tensors."""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mygpt
from mygpt import GPT, GPTConfig
from mygpt.cli.plan import duration_text, parse_bytes, parse_count
from mygpt.errors import InputError, OutOfMemoryError
from mygpt.scaling.estimates import activations, device_memory, flops_per_token
from mygpt.scaling.presets import PUBLISHED, SHAPES
from mygpt.training import speed
from mygpt.training.config import TrainConfig
from mygpt.training.optimizer import Optimizer
from mygpt.training.speed import measure_speed
from shapes import CONFIGS, build
from shell import Shell
from training_steps import moments

CPU = torch.device("cpu")
TEN_MILLION = GPTConfig(512, **SHAPES["medium"])


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys, "plan")


def values_of(plan: Shell, *arguments: str) -> dict[str, Any]:
    return json.loads(plan.printed(*arguments, "--json"))


# Published figures


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_agree_with_published_ones(name: str) -> None:
    known = PUBLISHED[name]
    within = (
        1e-4 if name == "gpt3" else 0.0
    )  # for GPT-3 there is only the paper's figure, in four digits
    assert known.config.num_parameters() == pytest.approx(known.parameters, rel=within)


@pytest.mark.parametrize(
    ("name", "tokens", "flops", "weights"),
    [
        ("gpt2", 10**10, 7.47e18, 498e6),
        ("gpt3", 300 * 10**9, 3.14e23, 698e9),  # Brown et al. 2020, table D.1
        ("llama-2-7b", 2 * 10**12, 8.09e22, 26.95e9),
    ],
)
def test_flops_and_bytes_agree_with_published_ones(
    name: str, tokens: int, flops: float, weights: float
) -> None:
    """Published are 6ND, with the embedding lookups and without attention."""
    config = PUBLISHED[name].config
    counted = flops_per_token(config, config.max_seq_len)
    assert tokens * counted.weights == pytest.approx(flops, rel=0.02)
    replica = device_memory(config, sharding="ddp", devices=1, micro_batch=1)
    assert replica.weights == pytest.approx(weights, rel=0.02)


def test_attention_is_the_causal_half_of_what_palm_counts() -> None:
    """Chowdhery et al. 2022, appendix B: 12 L H Q T per token for all of it."""
    palm = GPTConfig(256_000, 18_432, 48, 118, 2048, head_dim=256, num_kv_heads=1)
    assert flops_per_token(palm, 2048).attention == 12 * 118 * 48 * 256 * 2049 / 2


@pytest.mark.slow
def test_transformers_counts_the_same_parameters() -> None:
    """transformers' models of these names, built on the meta device."""
    transformers = pytest.importorskip("transformers")
    llama = {
        "vocab_size": 32_000, "hidden_size": 8192, "intermediate_size": 28_672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    }  # fmt: skip
    seven = {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32,
    }  # fmt: skip
    theirs = {
        "gpt2": transformers.GPT2Config(),
        "llama-2-7b": transformers.LlamaConfig(**seven),
        "llama-2-70b": transformers.LlamaConfig(**llama),
    }
    for name, config in theirs.items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert model.num_parameters() == PUBLISHED[name].config.num_parameters(), name


# Sizes of real tensors


@pytest.mark.parametrize("config", [TEN_MILLION, *CONFIGS.values()])
def test_training_states_have_the_sizes_of_real_tensors(config: GPTConfig) -> None:
    """Weights, gradients and AdamW's state, to the byte."""
    model = GPT.from_config(config)
    optimizer = Optimizer(model, TrainConfig(batch_size=1, seq_len=2, lr=1e-3, steps=1))
    ids = torch.zeros(1, 2, dtype=torch.int64)
    model(ids, ids)[1].backward()
    optimizer.step(1e-3)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    estimated = device_memory(config, sharding="ddp", devices=1, micro_batch=1)
    assert estimated.weights == sum(p.nbytes for p in model.parameters())
    assert estimated.gradients == sum(g.nbytes for g in gradients)
    assert estimated.optimizer == sum(a.nbytes for a in moments(optimizer).values())


def kept_bytes(model: GPT, rows: int, mixed: bool) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass: activations, and copies of parameters.

    Autocast's bfloat16 copies of the matrices are recognised by size: no activation has that size.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> None:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.detach()

    ids = torch.zeros(rows, model.max_seq_len, dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16) if mixed else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        model.train()(ids, ids)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and "position" not in n}
    copied = {p.numel() for p in matrices.values()} if mixed else set()
    kept = [0, 0]
    for tensor in found.values():
        copy = tensor.dtype == torch.bfloat16 and tensor.numel() in copied
        kept[copy] += tensor.untyped_storage().nbytes()
    return kept[0], kept[1]


@pytest.mark.parametrize("mode", ["autocast", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [
        {"embed_dim": 72, "num_heads": 3, "mlp": "gelu_tanh", "attention_bias": True},
        {"embed_dim": 64, "num_heads": 4, **SHAPES["small"], "num_kv_heads": 2},
        {"embed_dim": 72, "num_heads": 3, "norm": "rms", "position": "rotary", "mlp": "swiglu",
         "tied": False},
        {"embed_dim": 72, "num_heads": 3, "qk_norm": True, "mlp": "swiglu"},
    ],
)  # fmt: skip
def test_activations_agree_with_what_a_forward_pass_keeps(shape: dict[str, Any], mode: str) -> None:
    """Within 1%, for each kind of block (bfloat16 norms keep smaller statistics).

    In float32, tests/training/test_training_memory.py compares them to the byte.
    """
    config = GPTConfig(301, **{**shape, "num_layers": 3, "max_seq_len": 48})
    model = GPT.from_config(config)
    if mode == "bfloat16":
        model = model.to(torch.bfloat16)  # as FSDP2's mixed precision has it
    kept, copies = kept_bytes(model, 5, mode == "autocast")
    token = activations(config, "bfloat16", stream=2 if mode == "bfloat16" else 4)
    estimated = 5 * 48 * (token.blocks + token.head)
    assert estimated == pytest.approx(kept, rel=0.01)
    if mode == "autocast":
        placed = device_memory(config, sharding="ddp", devices=2, micro_batch=5, dtype="bfloat16")
        assert (placed.activations, placed.gathered) == (estimated, copies)


def test_checkpointing_keeps_only_the_inputs_of_the_blocks() -> None:
    shape = PUBLISHED["gpt2"].config
    full = activations(shape).blocks
    checkpointed = activations(shape, checkpointing=True).blocks
    one = activations(replace(shape, num_layers=1)).blocks
    assert checkpointed == 12 * 4 * 768 + one
    assert checkpointed - one < (full - one) / 10


# Devices


def test_fsdp_shards_the_states_and_ddp_does_not() -> None:
    config = PUBLISHED["gpt2"].config
    one, ddp, fsdp = (
        device_memory(config, sharding=sharding, devices=devices, micro_batch=2)
        for sharding, devices in (("ddp", 1), ("ddp", 8), ("fsdp", 8))
    )
    assert ddp == one
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(fsdp, name) == math.ceil(getattr(ddp, name) / 8)
    assert ddp.gathered == 0 < fsdp.gathered
    assert ddp.total == sum(vars(ddp).values())
    assert fsdp.activations == ddp.activations


def test_bfloat16_keeps_its_states_in_float32() -> None:
    config = PUBLISHED["gpt2"].config
    # Autocast leaves the residual stream in float32, FSDP2 does not.
    for sharding, stream in (("ddp", 4), ("fsdp", 2)):
        wide, narrow = (
            device_memory(config, sharding=sharding, devices=4, micro_batch=1, dtype=dtype)
            for dtype in ("float32", "bfloat16")
        )
        assert (wide.weights, wide.optimizer) == (narrow.weights, narrow.optimizer)
        assert narrow.activations < 0.75 * wide.activations
        token = activations(config, "bfloat16", stream=stream)
        assert narrow.activations == 1024 * (token.blocks + token.head)


# Numbers with units


def test_amounts_are_parsed_and_formatted() -> None:
    assert [parse_count("tokens", t) for t in ("10M", "2.5b", "1T", "3e11", "1_000", "7,000")] == [
        10**7, 25 * 10**8, 10**12, 3 * 10**11, 1000, 7000,
    ]  # fmt: skip
    assert parse_bytes("device_memory", "80GB") == 80 * 10**9
    assert parse_bytes("device_memory", "24 GiB") == 24 * 2**30
    for text in ("", "M", "-3M", "0", "1e40", "3Q", "1.2.3", "nan", "80i"):
        with pytest.raises(InputError, match="tokens="):
            parse_count("tokens", text)
    with pytest.raises(InputError, match="80GB"):
        parse_bytes("device_memory", "big")
    assert [duration_text(s) for s in (0.25, 41, 720, 1e5, 1e7)] == [
        "0.25 s", "41 s", "12.0 minutes", "27.8 hours", "115.7 days",
    ]  # fmt: skip


# The command


def test_printed_output_is_plain_text_of_at_most_80_columns(plan: Shell) -> None:
    code, out, err = plan(
        "gpt2", "--tokens", "10B", "--devices", "8", "--device-memory", "24GB"
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "124,439,808 (published: 124,439,808)" in out
    assert "7.98e+18 FLOPs, of which attention 7.1%" in out
    assert "19,074 steps of 524,288" in out
    assert "4.02 times the 20 of Chinchilla's rule" in out
    assert "time:         unknown: add --measure" in out
    assert re.search(r"FSDP bf16 recomputed .* 3\.6 GB   yes", out)
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_what_does_not_fit_is_named(plan: Shell) -> None:
    out = plan.printed("gpt3", "--devices", "8", "--nodes", "128", "--device-memory", "80GB")
    assert "memory of each of 1,024 devices, 2 windows at once:" in out
    fits = [line.split()[-1] for line in out.splitlines() if line.startswith(("DDP", "FSDP"))]
    assert fits == ["no"] * 5 + ["yes", "no", "yes"]


def test_no_time_without_an_efficiency(plan: Shell) -> None:
    given = ("gpt3", "--devices", "1024")
    assert values_of(plan, *given)["time"] is None
    time = values_of(plan, *given, "--peak-tflops", "312", "--efficiency", "0.4")["time"]
    total = 3.14e23 * (1 + 96 * 12_288 * 6 * 2048 / (6 * 174.6e9))
    assert time["basis"] == "given"
    assert time["one_device_s"] == pytest.approx(total / (0.4 * 312e12), rel=0.01)
    assert time["all_devices_s"] == pytest.approx(time["one_device_s"] / 1024)


def test_the_keys_of_the_json_output(plan: Shell) -> None:
    """Scripts rely on them."""
    values = values_of(plan, "llama-2-7b", "--devices", "2", "--device-memory", "80GB")
    assert list(values) == ["model", "job", "computed", "measured", "time"]
    assert list(values["job"]) == [
        "tokens", "batch_size", "devices", "micro_batch", "device_memory", "batch_tokens",
    ]  # fmt: skip
    assert list(values["computed"]) == [
        "parameters", "weights_bytes", "state_bytes", "steps", "flops", "tokens_a_parameter",
        "placements",
    ]  # fmt: skip
    assert list(values["computed"]["placements"][0]) == [
        "sharding", "dtype", "checkpointing", "memory", "total", "fits"
    ]  # fmt: skip
    assert values["computed"]["parameters"] == 6_738_415_616
    assert values["measured"] is values["time"] is None


def test_options_change_the_shape(plan: Shell) -> None:
    values = values_of(plan, "small", "--vocab-size", "257", "--num-layers", "2")
    config = GPTConfig(257, **{**SHAPES["small"], "num_layers": 2})
    assert values["model"]["config"] == config.to_dict()
    assert values["computed"]["parameters"] == config.num_parameters()
    assert values["job"]["tokens"] == 20 * config.num_parameters()
    values = values_of(plan, "gpt2", "--max-seq-len", "512", "--batch-tokens", "100K")
    assert values["job"]["batch_size"] == 195  # windows of 512
    assert "max_seq_len 512" in values["model"]["source"]


def test_the_shape_can_be_that_of_a_checkpoint(plan: Shell, tmp_path: Path) -> None:
    model = build(CONFIGS["modern"])
    mygpt.save_checkpoint(tmp_path / "x.safetensors", model, mygpt.CharTokenizer(list("abcde")))
    values = values_of(plan, str(tmp_path / "x.safetensors"))
    assert values["model"]["config"] == CONFIGS["modern"].to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a model: choose gpt2"),
        (["gtp2"], "model 'gtp2' is not known: choose gpt2"),
        (["small"], "add --vocab-size"),
        (["gpt2", "--tokens", "many"], "tokens='many'"),
        (["gpt2", "--device-memory", "80 apples"], "80GB"),
        (["gpt2", "--devices", "0"], "--devices '0' must be a whole number of at least 1"),
        (["gpt2", "--nodes", "-1"], "--nodes '-1' must be"),
        (["gpt2", "--devices", "600"], "--batch-size 600"),
        (["gpt2", "--batch-size", "0"], "--batch-size '0' must be"),
        (["gpt2", "--batch-size", "1", "--batch-tokens", "1M"], "omit one"),
        (["gpt2", "--micro-batch", "0"], "--micro-batch '0' must be"),
        (["gpt2", "--efficiency", "0.4"], "--peak-tflops"),
        (["gpt2", "--efficiency", "40", "--peak-tflops", "312"], "at most 1"),
        (["gpt2", "--efficiency", "nan", "--peak-tflops", "312"], "at most 1"),
        (["gpt2", "--peak-tflops", "312"], "--efficiency"),
        (["gpt2", "--measure", "--efficiency", "0.4"], "or --measure alone"),
        (["gpt2", "--dtype", "float8"], "float32, tf32, bfloat16"),
        (["gpt2", "--embed-dim", "100"], "not a multiple of num_heads"),
        (["gpt2", "--measure", "--device", "tpu"], "device='tpu'"),
    ],
)
def test_wrong_values_are_errors_of_one_line(
    plan: Shell, arguments: list[str], message: str
) -> None:
    assert message in plan.refused(*arguments)


def test_a_plan_of_a_published_model_needs_no_torch() -> None:
    code = (
        "import sys; from mygpt.cli import main\n"
        "try: main(['plan', 'gpt3'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# Measuring


@pytest.mark.kernels
def test_measure_trains_the_named_model(plan: Shell) -> None:
    values = values_of(
        plan, "small", "--vocab-size", "65", "--tokens", "1M", "--devices", "4", "--measure",
        "--device", "cpu",
    )  # fmt: skip
    measured, time = values["measured"], values["time"]
    config = GPTConfig(65, **SHAPES["small"])
    assert measured["steps"] >= 3
    assert measured["micro_batch"] == 4
    each = flops_per_token(config, 128).total
    assert time["flops_per_s"] == pytest.approx(each * measured["tokens_per_s"])
    assert time["basis"] == "measured"
    assert time["one_device_s"] == pytest.approx(1e6 / measured["tokens_per_s"])
    assert time["all_devices_s"] == pytest.approx(time["one_device_s"] / 4)


@pytest.mark.kernels
def test_measure_reports_what_it_ran(plan: Shell) -> None:
    """And does not change the state of torch's generator."""
    before = torch.get_rng_state()
    out = plan.printed(
        "tutorial", "--vocab-size", "65", "--devices", "2", "--batch-size", "4", "--measure",
        "--device", "cpu",
    )  # fmt: skip
    assert "steps of 2 x 64 tokens" in out
    assert "mygpt's kernels for CPUs; all other values are computed" in out
    assert "on 2 devices, without communication costs" in out
    assert torch.equal(before, torch.get_rng_state())


def test_measuring_takes_as_many_windows_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model does not fit, the error says so."""
    monkeypatch.setattr(speed, "free_memory", lambda _: 200_000_000)
    monkeypatch.setattr(speed, "suitable_engine", lambda *_: "torch")
    nano = GPTConfig(65, **SHAPES["nano"])
    found = measure_speed(nano, CPU, micro_batch=1024, budget_s=0.0)
    assert 1 <= found.micro_batch < 1024
    monkeypatch.setattr(speed, "free_memory", lambda _: 100_000_000)
    with pytest.raises(OutOfMemoryError, match="choose a smaller --embed-dim"):
        measure_speed(TEN_MILLION, CPU, micro_batch=4)
