"""Help pages: commands in groups, few options first, and the nearest name for a misspelt one."""

from __future__ import annotations

import re

import pytest

from mygpt.cli.commands import app
from shell import Shell

COMMANDS = sorted(str(command.name) for command in app.registered_commands)


def options_in(page: str) -> list[str]:
    """The long option at the beginning of each row."""
    return re.findall(r"^  (?:-\w, )?(--(?:\[no-\])?[a-z-]+)", page, re.M)


def test_the_commands_are_in_groups(shell: Shell) -> None:
    page = shell.printed("--help")
    groups = re.findall(r"^(\w+):\n((?:  .*\n)+)", page, re.M)
    names = {name: re.findall(r"^  (\w+) ", rows, re.M) for name, rows in groups}
    assert list(names) == ["Learn", "Train", "Write", "Exchange", "Inspect", "Options"]
    assert {"train", "plan", "tokenize", "data"} <= set(names["Train"])
    assert names["Write"] == ["generate", "serve"]
    listed = [name for group in list(names)[:-1] for name in names[group]]
    assert sorted(listed) == sorted([*COMMANDS, "data"])
    assert "..." not in page.partition("\n")[2], "a description was cut"


def test_without_arguments_the_help_page_is_printed(shell: Shell) -> None:
    code, out, err = shell()
    assert (code, err) == (2, "")
    assert out == shell.printed("--help")


@pytest.mark.parametrize(
    ("command", "first", "rest"),
    [
        (
            "train",
            ["--minutes", "--output", "--overwrite", "--resume", "--from", "--preset", "--dry-run",
             "--open"],
            ["--lr", "--[no-]checkpoint-activations", "--tokenizer", "--quiet", "--field"],
        ),
        (
            "generate",
            ["--checkpoint", "--prompt", "--max-new-tokens", "--num-samples", "--temperature",
             "--top-k", "--seed", "--stop"],
            ["--min-p", "--json", "--engine", "--unknown", "--[no-]stream"],
        ),
    ],
)  # fmt: skip
def test_a_long_help_begins_with_the_options_that_people_need_first(
    shell: Shell, command: str, first: list[str], rest: list[str]
) -> None:
    page, everything = shell.printed(command, "--help"), shell.printed(command, "--help-all")
    assert options_in(page) == [*first, "--help", "--help-all"]
    listed = options_in(everything)
    assert listed[: len(first) + 1] == [*first, "--help"]
    assert set(rest) <= set(listed)
    assert f"Show {len(listed) - len(first) - 1} more options: " in " ".join(page.split())


def test_a_prompt_may_be_the_name_of_the_help_option(shell: Shell) -> None:
    message = shell.refused("generate", "-p", "--help-all", "--top-p", 5)
    assert "top_p=5.0 must be above 0" in message


@pytest.mark.parametrize("columns", [80, 60])
@pytest.mark.parametrize("command", ["", *COMMANDS, "data", "data shakespeare"])
def test_lines_are_broken_at_words(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    page = shell.printed(*command.split(), "--help-all")
    assert max(map(len, page.splitlines())) <= columns
    assert "--help-all" not in page
    monkeypatch.setenv("COLUMNS", "1000")
    wide = shell.printed(*command.split(), "--help-all")
    assert page.split() == wide.split(), "no word was cut"


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_described_in_one_style(shell: Shell, command: str) -> None:
    page = " ".join(shell.printed(command, "--help-all").split())
    assert "[default" not in page
    assert not re.search(r"\(\d[\d,.]*\)", page)
    assert not re.search(r"Default: (None|False|True)", page)


def test_the_defaults_are_those_of_the_functions(shell: Shell) -> None:
    page = " ".join(shell.printed("generate", "--help-all").split())
    for text in (
        "-n, --max-new-tokens N The largest number of tokens to generate. Default: 200.",
        "most probable token. Default: 0.8.",
        "--[no-]stream Print tokens as they are generated. Default: --stream.",
    ):
        assert text in page
    page = " ".join(shell.printed("serve", "--help").split())
    assert "Environment variable: MYGPT_API_KEY." in page
    assert "--out PATH The store's folder. Required." in " ".join(
        shell.printed("tokenize", "--help").split()
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["train", "x.txt", "--minuets", 5],
            "there is no option --minuets: did you mean --minutes? `mygpt train --help-all` lists",
        ),
        (["generate", "--top_k", 5], "there is no option --top_k: did you mean --top-k?"),
        (["info", "--jason"], "did you mean --json? `mygpt info --help` lists the options"),
        (["info", "--xyzzy"], "there is no option --xyzzy: `mygpt info --help` lists the options"),
        (["info", "-x"], "there is no option -x: `mygpt info --help` lists the options"),
        (["info", "--a\nb"], r"there is no option '--a\nb': `mygpt info"),
        (["genrate"], "there is no command 'genrate': did you mean generate?"),
    ],
)
def test_a_misspelt_name_gets_the_nearest_one(
    shell: Shell, args: list[object], message: str
) -> None:
    assert message in shell.refused(*args)
