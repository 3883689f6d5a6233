"""Wrong arguments get one line with the value, what is possible, and a remedy, in every command."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest
import typer

from mygpt.cli.commands import app
from shell import Shell

COMMANDS: dict[str, Any] = {
    name: command
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
    if name != "data"  # a group
}


def options_of(command: Any) -> list[Any]:
    """A command's options, without those of its help pages."""
    own = command.get_help_option(command.make_context("x", [], resilient_parsing=True))
    found = [each for each in command.params if each.param_type_name == "option"]
    return [each for each in found if each.name != own.name]


def flag_of(option: Any) -> str:
    return max(option.opts, key=len)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_value_that_is_no_number_is_one_line(shell: Shell, name: str) -> None:
    """It was "Invalid value for '--port': Input should be a valid integer, unable to parse ..."."""
    kinds = get_type_hints(COMMANDS[name].callback)
    for option in options_of(COMMANDS[name]):
        kind, flag = str(kinds[option.name]), flag_of(option)
        if "int" in kind or "float" in kind:
            limit = "a whole number" if "int" in kind else "a number"
            message = shell.refused(name, flag, "hot")
            assert message.startswith(f"mygpt: {flag} 'hot' must be {limit}")
            assert f"`mygpt {name} --help" in message
            assert message.endswith("` lists the options\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_without_its_value_is_one_line(shell: Shell, name: str) -> None:
    for option in options_of(COMMANDS[name]):
        flag = flag_of(option)
        message = shell.refused(name, f"{flag}=x" if option.is_flag else flag)
        problem = "takes no value" if option.is_flag else "needs a value"
        assert message.startswith(f"mygpt: {flag} {problem}: `mygpt {name} --help"), message


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["generate", "--temperature", "hot"],
            "--temperature 'hot' must be a number, such as 0.8: `mygpt generate --help-all` lists",
        ),
        (["generate", "--temperature", "0,8"], "must be a number: did you mean 0.8? `mygpt"),
        (["train", "--steps", "1e3"], "must be a whole number: did you mean 1000? `mygpt train"),
        (["train", "--steps", "1,000"], "'1,000' must be a whole number: did you mean 1000? "),
        (["generate", "-n", 2.5], "--max-new-tokens '2.5' must be a whole number, such as 200: "),
        (["tokenize", "a", "--shard-tokens", "a\nb"], r"'a\nb' must be a whole number, such as"),
        (["generate", "--seed", ""], "--seed '' must be a whole number: `mygpt generate --help"),
        (["serve", "--port", 70000], "'70000' must be a whole number from 0 to 65535, such as"),
        (["plan", "gpt2", "--devices", 0], "--devices '0' must be a whole number of at least 1, "),
    ],
)  # fmt: skip
def test_a_wrong_number_gets_its_limit_and_a_number_that_is_possible(
    shell: Shell, args: list[object], message: str
) -> None:
    assert message in shell.refused(*args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["eval"], "CHECKPOINT is missing (a run's folder or a checkpoint file): `"),
        (["eval", "runs/poems"], "FILE is missing (the text to evaluate on; - is standard input):"),
        (["export", "a", "b"], "--to is missing (hf: a folder for transformers and vLLM; "),
        (["info", "a", "b c"], "unexpected argument 'b c': `mygpt info --help` lists the options"),
        (["data", "shakspeare"], "there is no command 'shakspeare': did you mean shakespeare? "),
    ],
)  # fmt: skip
def test_missing_and_further_arguments_are_one_line(
    shell: Shell, args: list[object], message: str
) -> None:
    assert message in shell.refused(*args)
