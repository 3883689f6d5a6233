"""Messages in Python name arguments, where those of the command name flags."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_type_hints

import pytest

import mygpt
from mygpt.api.messages import in_python
from mygpt.api.options import TrainOptions
from mygpt.errors import InputError
from mygpt.training.events import Event, Finished, Note
from paths import PACKAGE
from training_runs import TINY, silent

CASES = {
    "a lower --lr would help": "a lower lr would help",
    "add --overwrite, or choose another --output": "add overwrite=True, or choose another output",
    "(--no-split-documents leaves it in the text)": "(split_documents=False leaves it in the text)",
    "give the model with --from": "give the model with init_from",
    "one of --steps, --tokens, --minutes": "one of steps, tokens, minutes",
    "resume with: mygpt train --resume runs/x": "resume with: mygpt.resume('runs/x')",
    "it holds a run: resume it with --resume 'my runs/x', or": (
        "it holds a run: resume it with mygpt.resume('my runs/x'), or"
    ),
    "`mygpt report runs/x` shows it": "mygpt.load('runs/x').report() shows it",
    "generate with: mygpt generate --checkpoint runs/x/best.safetensors": (
        "generate with: mygpt.load('runs/x/best.safetensors').generate()"
    ),
    # A command for the terminal stays, and so do its flags; what follows does not.
    "tokenize it (mygpt tokenize FILES --out STORE --tokenizer byte); or --tokenizer byte": (
        "tokenize it (mygpt tokenize FILES --out STORE --tokenizer byte); or tokenizer byte"
    ),
    "add --engine torch, or remove --compile": "add engine='torch', or remove compile=True",
    "--port is taken": "--port is taken",
    "a dash -- and a-b--c stay": "a dash -- and a-b--c stay",
}


@pytest.mark.parametrize("flags", CASES)
def test_flags_become_arguments(flags: str) -> None:
    assert in_python(flags) == CASES[flags]


def strings_of(path: Path) -> list[str]:
    """The string constants of a file, with "{}" for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [each.value if isinstance(each, ast.Constant) else "X" for each in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_no_flag_of_a_training_is_left_in_any_message_of_the_package() -> None:
    """But in complete commands for a terminal."""
    flags = "|".join(name.replace("_", "-") for name in get_type_hints(TrainOptions))
    left = []
    for path in PACKAGE.glob("**/*.py"):
        if path.parent.name in ("cli", "server", "views", "api"):
            continue
        for text in strings_of(path):
            outside = re.sub(r"mygpt [a-z]+ [^`;)\n]*", "", in_python(text))
            left += re.findall(rf"(?<![\w-])--(?:no-)?(?:{flags})(?![\w-])", outside)
    assert left == []


@pytest.mark.kernels
def test_errors_and_notes_of_a_training_name_arguments(text: str, tmp_path: Path) -> None:
    heard: list[Event] = []
    run = tmp_path / "run"
    mygpt.train(text, output=run, listener=heard.append, **TINY)
    with pytest.raises(InputError) as caught:
        mygpt.train(text, output=run, listener=silent, **TINY)
    said = str(caught.value)
    assert f"resume it with mygpt.resume('{run}'), replace it with overwrite=True" in said
    assert "--" not in said
    mygpt.resume(run, listener=heard.append)
    notes = [str(event) for event in heard if isinstance(event, (Note, Finished))]
    assert any("is finished, nothing to do" in note for note in notes)
    assert not any("--lr" in note or "--steps" in note for note in notes)


def test_what_a_model_generates_is_not_changed(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mygpt.api.training import print_event
    from mygpt.training.events import Sampled

    print_event(Sampled(1, "use --lr"))
    print_event(Note("use --lr"))
    assert capsys.readouterr().out == "  | use --lr\nnote: use lr\n"
