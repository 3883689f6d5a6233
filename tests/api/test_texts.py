"""Training on texts that are in no file: documents, resuming, moved runs, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mygpt
from mygpt.errors import InputError
from training_runs import TEXT, TINY, log, silent

pytestmark = pytest.mark.kernels

TEXTS = [TEXT[:3000], "ünï" + TEXT[3000:6000], TEXT[6000:]]


def train(texts: Any, output: Path, **options: Any) -> mygpt.Writer:
    given = {"listener": silent, "report": False, **TINY, **options}
    return mygpt.train(texts=texts, output=output, **given)


def kept(run: Path) -> list[Path]:
    return sorted(run.glob("texts-*"))


def test_each_text_is_a_document(tmp_path: Path) -> None:
    """As in a file of JSON lines, so weights and digest are those of such a file."""
    writer = train(TEXTS, tmp_path / "run")
    corpus = writer.provenance["corpus"]
    assert (corpus["name"], corpus["documents"]) == ("texts", 3)
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    other = mygpt.train(lines, output=tmp_path / "other", listener=silent, report=False, **TINY)
    assert other.provenance["corpus"]["sha256"] == corpus["sha256"]
    assert log(tmp_path / "run") == log(tmp_path / "other")


@pytest.mark.parametrize("make", [
    tuple, iter, lambda texts: (text for text in texts), lambda texts: np.array(texts),
])  # fmt: skip
def test_any_iterable_of_strings_will_do(make: Any, tmp_path: Path) -> None:
    train(make(TEXTS), tmp_path / "run")
    train(TEXTS, tmp_path / "list")
    assert log(tmp_path / "run") == log(tmp_path / "list")
    assert [path.name for path in kept(tmp_path / "run")] == [
        path.name for path in kept(tmp_path / "list")
    ]


def test_a_column_of_a_table_will_do(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": TEXTS, "n": range(3)})
    writer = train(table["text"], tmp_path / "run")
    assert writer.provenance["corpus"]["documents"] == 3
    with pytest.raises(InputError, match=r"texts is a table: give one of its columns"):
        train(table, tmp_path / "other")


def test_a_run_on_texts_resumes_from_its_own_folder(tmp_path: Path) -> None:
    """Also after the folder was moved; the log is that of an uninterrupted run."""
    train(TEXTS, tmp_path / "run", steps=8, schedule="constant")
    train(TEXTS, tmp_path / "long", steps=12, schedule="constant")
    (tmp_path / "run").rename(tmp_path / "moved")
    writer = mygpt.resume(tmp_path / "moved", steps=12, listener=silent)
    assert log(tmp_path / "moved") == log(tmp_path / "long")
    assert writer.report() == tmp_path / "moved" / "report.html"
    (path,) = kept(tmp_path / "moved")
    path.write_bytes(path.read_bytes().replace(b"times", b"TIMES"))
    with pytest.raises(InputError, match="has changed since the run began"):
        mygpt.resume(tmp_path / "moved", steps=20, listener=silent)


def test_the_same_call_resumes_the_run(tmp_path: Path) -> None:
    for _ in range(2):
        train(TEXTS, tmp_path / "run", resume="auto")
    assert len(kept(tmp_path / "run")) == 1
    with pytest.raises(InputError, match="has changed since the run began"):
        train(TEXTS[:2], tmp_path / "run", resume="auto")
    assert len(kept(tmp_path / "run")) == 1


def test_a_run_is_replaced_with_its_texts(tmp_path: Path) -> None:
    """But only once the new one has begun."""
    train(TEXTS, tmp_path / "run")
    (before,) = kept(tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run"):
        train(TEXTS[:2], tmp_path / "run")
    with pytest.raises(InputError, match="is not known"):
        train(TEXTS[:2], tmp_path / "run", overwrite=True, tokenizer="morse")
    assert kept(tmp_path / "run") == [before]
    train(TEXTS[:2], tmp_path / "run", overwrite=True)
    assert len(kept(tmp_path / "run")) == 1
    assert kept(tmp_path / "run") != [before]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", 3], r"texts\[1\] is 3 \(int\): each must be a string"),
        (["a", float("nan")], r"texts\[1\] is nan \(float\): .*dropna"),
        ([b"a"], r"texts\[0\] is b'a' \(bytes\)"),
        (b"a", "must be a list of strings"),
        ({"text": "a"}, "must be a list of strings"),
        (3, "texts=3 must be a list of strings"),
        ([], "has no text in it"),
        (["", ""], "has no text in it"),
        (["a\ud800b"], r"texts\[0\] has half of a surrogate pair"),
        (SimpleNamespace(__iter__=None), "must be a list of strings"),
        (["a"], "has 1 character: too short to train on"),
    ],
)
def test_what_is_no_text_is_refused_and_nothing_is_written(
    texts: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(texts, tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


def test_how_files_are_read_is_no_option_of_texts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="omit files, encoding"):
        mygpt.train("a.txt", texts=["a"], encoding="latin-1")


def test_one_string_is_one_document_also_for_the_tutorial(tmp_path: Path) -> None:
    options = {"preset": "tutorial", "eval_every": 0, "val_fraction": 0.0}
    writer = train(TEXT, tmp_path / "run", **options)
    assert writer.provenance["corpus"]["documents"] == 1
    assert sorted(writer.tokenizer.chars) == sorted(set(TEXT))
