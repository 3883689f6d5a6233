"""Text that is unknown to a tokenizer: it is counted, reported, and beyond a limit refused."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import mygpt
from mygpt.cli import main
from mygpt.data import encode_documents, predicted_size
from mygpt.errors import InputError
from mygpt.text import Document
from mygpt.tokenization import CharTokenizer, ForeignTokenizer
from mygpt.tokenization.unknown import UnknownText, without_unknown
from mygpt.training.events import Note
from mygpt.training.history import Validation, diagnose
from store_samples import build_with

TEXT = "hello world 123 " * 20 + "🙂🙂é\n"
SMALL: dict[str, Any] = {
    "preset": "nano", "embed_dim": 16, "num_layers": 1, "max_seq_len": 16, "steps": 4,
    "sample_tokens": 0, "listener": lambda event: None,
}  # fmt: skip


def bpe(unknown: str | None) -> Tokenizer:
    library = Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True))
    special = [unknown] * (unknown is not None)
    trainer = trainers.BpeTrainer(special_tokens=special, show_progress=False)
    library.train_from_iterator(["hello world"], trainer)
    return library


def pieces(letters: str) -> Tokenizer:
    """Unigram as in SentencePiece: characters outside its pieces are unknown."""
    known = [("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in letters)]
    library = Tokenizer(models.Unigram(known, unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    return library


def without_digits() -> Tokenizer:
    library = pieces("helowrd\n")
    library.normalizer = normalizers.Replace(Regex("[0-9]"), "")
    return library


def words() -> Tokenizer:
    known = {"<unk>": 0, "hello": 1, "world": 2}
    library = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return library


def word_pieces() -> Tokenizer:
    known = {"[UNK]": 0, "hello": 1, "wor": 2, "##ld": 3, "1": 4, "##2": 5, "##3": 6}
    library = Tokenizer(models.WordPiece(known, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    return library


def some_bytes() -> Tokenizer:
    """Byte-level, with a vocabulary that lacks some bytes, which the library drops."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.normalizer = normalizers.NFC()
    library.train_from_iterator(["hello world 123\n"], trainers.BpeTrainer(show_progress=False))
    return library


def foreign(library: Tokenizer) -> ForeignTokenizer:
    return ForeignTokenizer(json.loads(library.to_str()))


@pytest.mark.parametrize(
    ("library", "share", "shown"),
    [
        (bpe("<unk>"), 64 / 324, "'1'"),  # the line's end is white space
        (bpe(None), 63 / 324, "'1'"),
        (pieces("helowrd123\n"), 3 / 324, "'🙂' U+1F642, 'é' U+00E9"),
        (without_digits(), 63 / 324, "'1', '2', '3'"),
        (words(), 21 / 61, "'123', '🙂🙂é'"),
        (word_pieces(), 1 / 122, "'🙂🙂é'"),
        (some_bytes(), 3 / 324, "'🙂' U+1F642, 'é' U+00E9"),
    ],
)
def test_unknown_and_dropped_characters_are_counted(
    library: Tokenizer, share: float, shown: str
) -> None:
    """Including runs of characters that become a single unknown token."""
    tokenizer = foreign(library)
    found = UnknownText(tokenizer)
    found.add([TEXT[:96], TEXT[96:]], tokenizer.encode_array(TEXT))
    assert found.fraction == pytest.approx(share, rel=0.03)
    assert shown in str(found)
    known, left = without_unknown(tokenizer, TEXT)
    assert left
    again = UnknownText(tokenizer)
    again.add([known], tokenizer.encode_array(known))
    assert again.fraction == 0
    assert without_unknown(tokenizer, known) == (known, [])


def test_normalised_text_is_not_unknown() -> None:
    """Upper case, accents of composed letters, white space, joiners and control characters."""
    tokenizer = foreign(word_pieces())
    text = "HELLO  Wörld\n\t12 \u200d\x00\u3000hello"
    found = UnknownText(tokenizer)
    found.add([text], tokenizer.encode_array(text))
    assert (found.fraction, str(found), found.notes("x", "error")) == (0, "", [])
    assert not UnknownText(CharTokenizer("ab")).counts


def test_unknown_characters_are_removed_from_a_text() -> None:
    assert without_unknown(CharTokenizer("abc "), "a🙂 bé🙂c") == ("a bc", ["🙂", "é"])
    assert without_unknown(foreign(words()), "hello  sea world") == ("hello   world", ["sea"])


def code_of(*arguments: object) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as left:
        main(list(map(str, arguments)))
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unknown")
    pieces("helowrdth,.\n").save(str(folder / "pieces.json"))
    (folder / "emoji.txt").write_text("🙂🙃😀😁 hello\n" * 60)
    (folder / "few.txt").write_text("hello world the word\n" * 60 + "🙂 hello world\n" * 4)
    mygpt.train(
        folder / "few.txt", output=folder / "run", tokenizer=str(folder / "pieces.json"), **SMALL
    )
    return folder


REFUSED = (
    r"36\.4 % of the characters are unknown to the tokenizer \('.' U\+1F6.*the limit is 10\.0 %"
)


def test_a_text_that_is_mostly_unknown_is_refused_everywhere(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was once accepted without a message, with a loss of "0.000 bits per byte"."""
    by_name = {"tokenizer": str(place / "pieces.json")}
    for arguments in (by_name, {"init_from": place / "run"}):
        options = {**SMALL, **arguments}
        if "init_from" in arguments:
            options = {"steps": 2, "listener": SMALL["listener"], **arguments}
        with pytest.raises(InputError, match=REFUSED):
            mygpt.train(place / "emoji.txt", output=tmp_path / "run", **options)
    with pytest.raises(InputError, match="few, validation: " + REFUSED):
        mygpt.train(
            place / "few.txt", val_file=place / "emoji.txt", output=tmp_path / "run",
            **SMALL, **by_name,
        )  # fmt: skip
    tokenizer = foreign(pieces("helowrdth,.\n"))
    with pytest.raises(InputError, match=REFUSED):
        build_with([place / "emoji.txt"], tmp_path / "store", tokenizer=tokenizer)
    assert not (tmp_path / "run").exists()
    store = build_with(
        [place / "emoji.txt"], tmp_path / "store", tokenizer=tokenizer, unknown="keep"
    )
    assert store.num_documents == 1
    assert code_of("eval", place / "run", place / "emoji.txt") == 2
    assert "give --unknown keep to use the text anyway" in capsys.readouterr().err
    with pytest.raises(InputError, match="unknown='perhaps' is not known: choose error or keep"):
        mygpt.train(place / "few.txt", output=tmp_path / "run", unknown="perhaps", **SMALL)


def test_a_small_unknown_fraction_is_noted_and_a_large_one_can_be_kept(
    place: Path, tmp_path: Path
) -> None:
    events: list[Any] = []
    mygpt.train(
        place / "emoji.txt", output=tmp_path / "run", tokenizer=str(place / "pieces.json"),
        unknown="keep", **{**SMALL, "listener": events.append},
    )  # fmt: skip
    notes = [str(event) for event in events if isinstance(event, Note)]
    assert any("36.4 % of the characters are unknown to the tokenizer" in note for note in notes)
    assert events[-1].verdict.startswith("the tokenizer does not know 36% of the text")
    assert 'unknown = "keep"' in (tmp_path / "run" / "config.toml").read_text()


def test_the_diagnosis_does_not_rely_on_losses_of_unknown_text() -> None:
    history = [Validation(10, 0.1, 0.1), Validation(20, 0.0, 0.0)]
    assert (
        diagnose(history, steps=20, epochs=3, ended_early=False)
        == "learning to the end: more time would help"
    )
    text = diagnose(history, steps=20, epochs=3, ended_early=False, unknown=0.8)
    assert text.startswith("the tokenizer does not know 80% of the text, so the losses say little")


@pytest.mark.slow
def test_eval_can_drop_unknown_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures are then those of the remaining text."""
    for policy, size in (("drop", 60 * 21 + 4 * 13), ("keep", 60 * 21 + 4 * 17)):
        few = place / "few.txt"
        assert code_of("eval", place / "run", few, "--unknown", policy, "--json") == 0
        result = json.loads(capsys.readouterr().out)
        assert result["baselines"]["num_bytes"] == size
        assert "'🙂' U+1F642" in result["notes"][0]


def test_characters_outside_the_vocabulary_are_refused_with_a_remedy(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chars = tmp_path / "chars"
    mygpt.train(place / "few.txt", output=chars, tokenizer="char", **SMALL)
    (tmp_path / "new.txt").write_text("hello €world\n" * 9)
    assert code_of("eval", chars, tmp_path / "new.txt") == 2
    assert "'€' (U+20AC" in (error := capsys.readouterr().err)
    assert error.endswith("; --unknown drop removes them\n")
    assert code_of("eval", chars, tmp_path / "new.txt", "--unknown", "drop") == 0
    shown = capsys.readouterr().out
    assert "note: the model does not know '€' U+20AC: removed from the text" in shown


def test_a_store_has_the_byte_counts_of_its_validation_text(tmp_path: Path) -> None:
    """Exact for complete shards; for a part of one, estimated with the shard's unknown tokens."""
    text = "hello world the word\n" * 60 + "🙂 hello\n" * 20
    (tmp_path / "text.txt").write_text(text)
    tokenizer = foreign(pieces("helowrdth,.\n"))
    store = build_with([tmp_path / "text.txt"], tmp_path / "store", tokenizer=tokenizer)
    count = len(store.tokens)
    whole = store.size_of(0, count)
    assert (whole.num_bytes, whole.num_chars) == (len(text.encode()), len(text))
    cut = int(len(text) * 0.9)
    held = [Document("", text, cut)]
    tokens = encode_documents(held, tokenizer)
    exact = predicted_size(held, tokens, tokenizer)
    part = store.size_of(count - len(tokens) + 1, count)
    assert part.num_bytes == pytest.approx(exact.num_bytes, abs=3)
    assert part.num_chars is None  # how many of them are unknown tokens' is unknown
    (tmp_path / "ascii.txt").write_text("hello world the word 1\n" * 60)
    store = build_with([tmp_path / "ascii.txt"], tmp_path / "other", tokenizer=tokenizer)
    part = store.size_of(7, len(store.tokens))
    assert part.num_chars == part.num_bytes


def test_a_cached_store_does_not_bypass_the_check_for_unknown_text(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been built with --unknown keep; without that the text is refused again."""
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MYGPT_STORE_ABOVE", "100")
    options = {**SMALL, "tokenizer": str(place / "pieces.json")}
    for policy, name in (("error", "1"), ("keep", "2"), ("error", "3")):
        with (
            nullcontext()
            if policy == "keep"
            else pytest.raises(InputError, match="the limit is 10")
        ):
            mygpt.train(place / "emoji.txt", output=tmp_path / name, unknown=policy, **options)
