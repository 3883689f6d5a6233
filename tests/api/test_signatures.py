"""Options of the public functions: typed, shown by `help()`, and refused if they are misspelt."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal, get_type_hints

import pytest
import torch

import mygpt
from mygpt import training
from mygpt.api.options import LengthOptions, ReplayOptions, ResumeOptions, TrainOptions
from mygpt.core.config import SamplingConfig
from mygpt.decode import writer as decoding
from mygpt.decode.options import EngineOptions, LoadOptions, TextOptions
from mygpt.decode.text_call import TextCall
from mygpt.errors import InputError
from mygpt.training.config import SHAPE_OPTIONS, Stage, TrainConfig
from mygpt.training.resuming import RESUMABLE
from paths import ROOT, TESTS
from shapes import TUTORIAL, build

WIDER = {  # what a user may pass where the field has one type
    "batch_size": int | Literal["auto"] | None,
    "stages": Sequence[Stage] | None,
    "eval_shares": Sequence[float] | None,
}
OF_THE_API = {"files", "texts", "listener", "report"}
PUBLIC: list[Callable[..., Any]] = [
    mygpt.train, mygpt.resume, mygpt.replay, mygpt.load, mygpt.generate, mygpt.stream,
    mygpt.Writer.generate, mygpt.Writer.stream, mygpt.Writer.complete, mygpt.Writer.samples,
    mygpt.Writer.save, mygpt.Writer.report,
]  # fmt: skip


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's keyword-only parameters and their types."""
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}


def names(made: type) -> set[str]:
    """The keyword-only parameters of a class."""
    parameters = inspect.signature(made).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def test_the_options_of_a_training_are_the_fields_of_its_configuration() -> None:
    """So that neither gets a field, or another type, that the other has not."""
    typed = get_type_hints(TrainOptions)
    hints = get_type_hints(TrainConfig) | get_type_hints(mygpt.GPTConfig)
    names = [*(field.name for field in fields(TrainConfig)), *SHAPE_OPTIONS]
    for name in names:
        assert typed.pop(name) == WIDER.get(name, hints[name] | None), name
    own = keywords(training.train)
    assert typed == {name: own[name] for name in own if name not in OF_THE_API}


def test_the_options_of_the_other_functions_are_those_of_what_takes_them() -> None:
    assert set(get_type_hints(LengthOptions)) == RESUMABLE
    assert set(get_type_hints(ResumeOptions)) == set(get_type_hints(TrainOptions)) - {
        "output", "overwrite", "resume", "command"
    }  # fmt: skip
    replaying = keywords(training.replay)
    typed = get_type_hints(ReplayOptions)
    assert typed == {name: replaying[name] for name in replaying if name in typed}
    assert set(typed) == set(replaying) - {"output", "listener"}
    assert get_type_hints(LoadOptions) == keywords(decoding.load)
    assert set(get_type_hints(EngineOptions)) == set(names(decoding.Writer)) - {"drafts_from"}
    sampling = {field.name for field in fields(SamplingConfig)}
    own = {*names(TextCall), *sampling}
    assert set(get_type_hints(TextOptions)) == own


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__qualname__)
def test_no_option_is_any_and_each_is_shown(function: Callable[..., Any]) -> None:
    """By `inspect.signature`, which `help()` and completion use."""
    shown = inspect.signature(function).parameters.values()
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in shown)
    assert not any("Any" in str(parameter.annotation).split("[")[0] for parameter in shown)


def test_defaults_are_those_of_the_code_that_uses_them() -> None:
    shown = inspect.signature(mygpt.Writer.complete).parameters
    assert (shown["temperature"].default, shown["overflow"].default) == (1.0, "crop")
    assert inspect.signature(mygpt.train).parameters["preset"].default == "auto"
    assert inspect.signature(mygpt.load).parameters["engine"].default == "auto"


MODEL = build(TUTORIAL)
MISSPELT: list[tuple[Callable[..., Any], str, str]] = [
    (lambda **o: mygpt.train("a.txt", **o), "toknizer", "tokenizer"),
    (lambda **o: mygpt.train("a.txt", **o), "minuts", "minutes"),
    (lambda **o: mygpt.train("a.txt", **o), "lisener", "listener"),
    (lambda **o: mygpt.resume("runs/none", **o), "minuts", "minutes"),
    (lambda **o: mygpt.replay("runs/none", output="o", **o), "overwritten", "overwrite"),
    (lambda **o: mygpt.load("runs/none", **o), "enginee", "engine"),
    (lambda **o: mygpt.generate(MODEL, [0], 1, **o), "sede", "seed"),
    (lambda **o: mygpt.stream(MODEL, [0], 1, **o), "topp", "top_p"),
    (lambda **o: small_writer(**o), "devise", "device"),
    (lambda **o: small_writer().generate("a", **o), "temprature", "temperature"),
    (lambda **o: small_writer().stream("a", **o), "max_tokens", "max_new_tokens"),
    (lambda **o: small_writer().complete("a", **o), "num_sample", "num_samples"),
    (lambda **o: small_writer().samples("a", **o), "topk", "top_k"),
]


def small_writer(**options: Any) -> mygpt.Writer:
    return mygpt.Writer(MODEL, mygpt.CharTokenizer("abcde"), **options)


@pytest.mark.parametrize(("call", "wrong", "nearest"), MISSPELT)
def test_a_misspelt_option_names_the_nearest(
    call: Callable[..., Any], wrong: str, nearest: str
) -> None:
    with pytest.raises(InputError, match=f"unknown option {wrong}: did you mean {nearest}\\?"):
        call(**{wrong: 1})


def test_an_option_that_resembles_none_lists_all() -> None:
    with pytest.raises(InputError, match=r"unknown option frobnicate: there are .*logprobs"):
        small_writer().generate("a", frobnicate=1)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="unknown option num_samples"):
        small_writer().generate("a", num_samples=2)  # type: ignore[call-overload]


def test_ids_of_a_seed_may_be_numpys() -> None:
    import numpy as np

    one = mygpt.generate(MODEL, [0, 1], 5, seed=np.int32(3))
    assert torch.equal(one, mygpt.generate(MODEL, [0, 1], 5, seed=3))


@pytest.mark.slow
@pytest.mark.processes
def test_a_users_script_passes_the_type_checker() -> None:
    """It has every option; misspelt names and wrong values in it are found.

    With the settings of `make lint` (strict), so that both use the same cache of mypy's.
    """
    script = TESTS / "api" / "user_script.py"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", script],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_the_users_script_has_every_option() -> None:
    """So that a new option is checked as well."""
    text = (TESTS / "api" / "user_script.py").read_text(encoding="utf-8")
    for options in (TrainOptions, ReplayOptions, LoadOptions, TextOptions):
        assert [name for name in get_type_hints(options) if f"{name}=" not in text] == []
