"""When a run has products in bfloat16 on a CPU, what it records, and what is refused."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mygpt.cli import main
from mygpt.core.config import GPTConfig
from mygpt.cpu.common import processor
from mygpt.cpu.common.layout import FLOAT32, PAIRWISE
from mygpt.training import planning
from mygpt.training.planning import Planner
from mygpt.training.speed import training_speeds
from training_runs import Runs, assert_same, log, refusal

# Widths that machine code takes; every processor has products of pairs, if need be by float32.
SHAPE: dict[str, Any] = {"embed_dim": 32, "num_heads": 2}
needs_it = "dtype=bfloat16 needs a processor with AVX-512 BF16 or AMX"


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with products in bfloat16."""
    monkeypatch.setattr(processor, "bfloat16_products", lambda: PAIRWISE)


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without them."""
    monkeypatch.setattr(processor, "bfloat16_products", lambda: FLOAT32)


def planner(options: dict[str, Any], preset: str = "auto") -> Planner:
    return Planner(preset, options, torch.device("cpu"), time.monotonic())


def planned_dtype(options: dict[str, Any], preset: str = "auto") -> str | None:
    plan = planner(options, preset).plan(np.zeros(300_000, np.uint8), 30_000, 63)
    return plan.training.get("dtype")


def measuring(monkeypatch: pytest.MonkeyPatch, bfloat16: float) -> list[list[str]]:
    """Speeds as if measured: float32 1e11, bfloat16 so many times as fast; what is measured."""
    asked: list[list[str]] = []

    def measured(threads: int, formats: list[str]) -> dict[str, float]:
        asked.append(formats)
        return {name: 1e11 * (bfloat16 if name == "bfloat16" else 1.0) for name in formats}

    monkeypatch.setattr(planning, "training_speeds", measured)
    return asked


@pytest.mark.parametrize(("faster", "expected"), [(1.19, None), (1.21, "bfloat16"), (0.6, None)])
def test_a_run_by_the_clock_takes_bfloat16_if_it_is_faster(
    faster: float, expected: str | None, able: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measuring(monkeypatch, faster)
    assert planned_dtype({"minutes": 5.0}) == expected
    assert asked == [["float32", "bfloat16"]]


def test_the_plan_counts_on_the_speed_of_the_format(
    able: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measuring(monkeypatch, 3.0)
    assert planner({"minutes": 5.0}).speed == 3e11
    assert planner({"minutes": 5.0, "dtype": "float32"}).speed == 1e11
    found = planner({"minutes": 5.0}).plan(np.zeros(10**6, np.uint8), 10**5, 63)
    assert found.recipe is not None
    assert "bfloat16 products" in found.recipe.lines()[0]


@pytest.mark.parametrize(
    ("preset", "options", "measured", "dtype"),
    [
        ("auto", {"steps": 100}, [], None),
        ("auto", {"tokens": 10_000}, [], None),
        ("nano", {"minutes": 5.0}, [["float32"]], None),
        ("auto", {"minutes": 5.0, "dtype": "float32"}, [["float32"]], "float32"),
        ("auto", {"minutes": 5.0, "dtype": "bfloat16"}, [["bfloat16"]], "bfloat16"),
        # Shapes and ways to train that are not for the machine code.
        ("auto", {"minutes": 5.0, "embed_dim": 36}, [["float32", "bfloat16"]], None),
        ("auto", {"minutes": 5.0, "shard": True}, [["float32", "bfloat16"]], None),
    ],
)
def test_only_the_default_recipe_by_the_clock_chooses(
    preset: str,
    options: dict[str, Any],
    measured: list[list[str]],
    dtype: str | None,
    able: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = measuring(monkeypatch, 3.0)
    assert planned_dtype(options, preset) == dtype
    assert asked == measured


def test_a_processor_without_it_measures_float32_alone(
    unable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measuring(monkeypatch, 3.0)
    assert planned_dtype({"minutes": 5.0}) is None
    assert asked == [["float32"]]


@pytest.mark.kernels
def test_both_formats_are_measured_in_three_quarters_of_a_second(able: None) -> None:
    training_speeds(1, ["float32"])  # links the machine code
    began = time.monotonic()
    found = training_speeds(1, ["float32", "bfloat16"])
    assert 0.7 < time.monotonic() - began < 2.0
    assert all(speed > 1e8 for speed in found.values())


@pytest.mark.kernels
def test_a_run_records_its_format_and_is_resumed_and_reproduced_in_it(
    runs: Runs, able: None
) -> None:
    options = {**SHAPE, "dtype": "bfloat16"}
    heard = runs.fit("whole", **options)
    devices = [event.device for event in heard if hasattr(event, "device")]
    assert devices == [f"cpu ({torch.get_num_threads()} thread), bfloat16 products, mygpt's "
                       "kernels for CPUs"]  # fmt: skip
    settings = tomllib.loads((runs / "whole" / "config.toml").read_text())["training"]
    assert (settings["dtype"], settings["engine"]) == ("bfloat16", "compiled")
    runs.fit_until(6, **options)
    runs.resume()
    assert_same(runs / "run", runs / "whole")
    runs.replay("whole")
    assert log(runs / "again") == log(runs / "whole")
    runs.fit("float32", **SHAPE)
    assert log(runs / "float32") != log(runs / "whole")


@pytest.mark.kernels
def test_a_run_resumes_in_float32_if_requested(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state is float32 in any case, so a run can move to a processor without bfloat16."""
    with monkeypatch.context() as patch:
        patch.setattr(processor, "bfloat16_products", lambda: PAIRWISE)
        runs.fit_until(6, **SHAPE, dtype="bfloat16")
    monkeypatch.setattr(processor, "bfloat16_products", lambda: FLOAT32)
    said = refusal(runs.resume)
    assert needs_it in said
    assert said.endswith("use --dtype float32")
    said = refusal(runs.replay)
    assert needs_it in said
    assert said.endswith("reproduce the run on such a processor")
    runs.resume(dtype="float32")
    settings = tomllib.loads((runs / "run" / "config.toml").read_text())["training"]
    assert settings["dtype"] == "float32"


@pytest.mark.kernels
def test_a_processor_without_it_refuses_in_one_line(
    tmp_path: Path, unable: None, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "poems.txt"
    text.write_text("The fox is quick.\n" * 300)
    for length in (["--steps", "3"], ["--minutes", "0.1"]):
        with pytest.raises(SystemExit) as left:
            main(["train", str(text), "-o", f"{text}.run", *length, "--dtype", "bfloat16"])
        out, err = capsys.readouterr()
        assert (left.value.code, out, err.count("\n")) == (2, "", 1)
        assert needs_it in err
        assert "use --dtype float32" in err
    assert list(tmp_path.iterdir()) == [text]


def test_shapes_that_are_not_for_machine_code_have_torchs_autocast(runs: Runs) -> None:
    assert GPTConfig(5, 20, 2, 1).embed_dim % 16, "or it would be machine code"
    heard = runs.fit(embed_dim=20, dtype="bfloat16")
    devices = [event.device for event in heard if hasattr(event, "device")]
    assert "bfloat16 by autocast" in devices[0]
