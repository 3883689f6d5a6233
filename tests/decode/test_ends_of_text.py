"""What ends a text: one token or several, in every engine, from import to export, in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import mygpt
from decoding import engine_for, every_kind
from mygpt import GPTConfig, SamplingConfig, Writer
from mygpt.cli import main
from mygpt.core.random import Stream
from mygpt.data import TokenStore
from mygpt.decode.packing import arrays_of
from mygpt.engine import Request
from mygpt.errors import InputError
from mygpt.formats.gguf_tokenizer import tokenizer_values
from mygpt.formats.tokenizers import read_tokenizer
from mygpt.tokenization import (
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    ForeignTokenizer,
    end_notes,
    ends_of,
    from_state,
    load_tokenizer,
)
from mygpt.training.events import Event, Note
from servers import client
from shapes import build

TEXT = "the quick brown fox jumps over the lazy dog, and the cat sat on the mat.\n" * 20
TINY = {
    "steps": 2, "batch_size": 4, "max_seq_len": 16, "embed_dim": 16, "num_layers": 1,
    "num_heads": 1, "sample_tokens": 0, "device": "cpu",
}  # fmt: skip


def library_of(*special: str, plain: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """Byte-level BPE of 280 tokens, then these."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator([TEXT], trainer)
    library.add_tokens(list(plain))
    library.add_special_tokens(list(special))
    return library


def note_list() -> tuple[list[str], Callable[[Event], None]]:
    """The notes of training, and the listener that collects them."""
    notes: list[str] = []
    return notes, lambda event: notes.extend([event.text] if isinstance(event, Note) else [])


def folder_of(place: Path, library: tokenizers.Tokenizer, **files: Any) -> Path:
    place.mkdir(exist_ok=True)
    library.save(str(place / "tokenizer.json"))
    for name, content in files.items():
        (place / f"{name}.json").write_text(json.dumps(content))
    return place


# --- engines -------------------------------------------------------------------------------


@every_kind
def test_any_of_several_ends_ends_a_row(kind: str) -> None:
    """Alone, among rows with other ends, and in a batch; ids that the model lacks end none."""
    config = GPTConfig(40, embed_dim=16, num_heads=2, num_layers=1, max_seq_len=64)
    engine = engine_for(build(config, 0, 0.3), kind)
    sampling = SamplingConfig(9.0, repetition_penalty=1.3)
    whole = Request(np.array([1, 2]), 30, sampling, Stream(3))
    (ids,) = engine.start([whole]).advance(30)
    assert len(ids) == 30
    place = next(n for n in range(4, 30) if ids[n] not in ids[:n])
    later = next(n for n in range(place + 1, 30) if ids[n] not in ids[:n])
    for ends in ((ids[place],), (ids[later], ids[place]), (ids[place], ids[later], 99)):
        several = replace(whole, end=ends)
        one = replace(whole, end=ids[later])
        found = engine.start([several, whole, one]).advance(30)
        assert found == [ids[: place + 1], ids, ids[: later + 1]]
        batch = engine.open(2)
        slots = [batch.join(several), batch.join(one)]
        drawn: dict[int, list[int]] = {slot: [] for slot in slots}
        while new := {slot: more for slot, more in batch.advance(3).items() if more}:
            for slot, more in new.items():
                drawn[slot] += more
        assert [drawn[slot] for slot in slots] == [ids[: place + 1], ids[: later + 1]]
        batch.end(slots[0])  # the next text in the slot has ends of its own
        again = batch.join(whole)
        assert batch.advance(30)[again] == ids


# --- import, use, export -------------------------------------------------------------------


@pytest.mark.kernels
def test_every_end_that_a_generation_config_lists_ends_a_text(tmp_path: Path) -> None:
    """In `Writer`, streams and the server; and an exported folder lists them again."""
    names = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    folder = folder_of(
        tmp_path / "model",
        library_of(*names),
        tokenizer_config={"eos_token": "<|eot_id|>"},
        generation_config={"eos_token_id": [280, 281, 282]},
    )
    tokenizer, notes = read_tokenizer(folder, 283)
    assert ends_of(tokenizer) == (282, 280, 281)
    assert notes == ["'<|end_of_text|>', '<|eom_id|>' in generation_config.json also end a text"]
    assert ends_of(from_state(tokenizer.to_state())) == (282, 280, 281)
    config = GPTConfig(283, embed_dim=16, num_heads=2, num_layers=1, max_seq_len=32)
    writer = Writer(build(config, 0, 0.02), tokenizer)
    how: dict[str, Any] = {"temperature": 9.0, "overflow": "refill"}
    found = writer.complete("the", 400, 12, seed=1, logprobs=0, **how)
    last = {sample.token_ids[-1] for sample in found if sample.finish_reason == "end"}
    assert last == {280, 281, 282}, "a case that shows nothing"
    for sample in found:
        assert not set(sample.token_ids[:-1]) & {280, 281, 282}
        assert "<|" not in sample.text
        assert "".join(writer.stream("the", 400, seed=1, **how)) == found[0].text
    with client(writer) as api:
        body = {"model": "mygpt", "prompt": "the", "max_tokens": 400, "n": 12, "seed": 1}
        answer = api.post("/v1/completions", json={**body, **how}).json()
        assert api.get("/api/model").json()["ends"] == [282, 280, 281]
    assert [choice["text"] for choice in answer["choices"]] == [sample.text for sample in found]


@pytest.mark.parametrize(
    ("listed", "rows", "ends", "note"),
    [
        ([282, 283], 284, (282, 283), None),
        ([282, 280], 284, (282, 280), "' stop' in generation_config.json also ends a text"),
        ([282, 5], 284, (282,), None),  # a character of text
        (
            [282, 290],
            300,
            (282, 290),
            "290 in generation_config.json also ends",
        ),  # a row for padding
        ([282, 300, -1, "281", None, True], 300, (282,), None),
    ],
)
def test_which_listed_ids_end_a_text(
    tmp_path: Path, listed: list[Any], rows: int, ends: tuple[int, ...], note: str | None
) -> None:
    """Special or not, unless it stands for a character."""
    library = library_of("<|im_start|>", END_OF_TEXT, "<|im_end|>", plain=(" stop",))
    folder = folder_of(tmp_path / "m", library, generation_config={"eos_token_id": listed})
    tokenizer, notes = read_tokenizer(folder, rows)
    assert ends_of(tokenizer) == ends
    assert note is None or any(note in line for line in notes)
    ids = tokenizer.encode_array("the fox stop<|im_end|>").tolist()
    assert not set(ids) & set(ends)
    assert tokenizer.decode(ids) == "the fox stop<|im_end|>"


def test_an_exported_folder_keeps_all_ends(tmp_path: Path) -> None:
    from mygpt.checkpoint.model_file import Checkpoint
    from mygpt.formats.hugging_face import read_hugging_face, write_hugging_face

    library = library_of("<s>", "</s>", "<|end|>")
    tokenizer = ForeignTokenizer(
        json.loads(library.to_str()), end_of_text=281, other_ends=[282], vocab_size=283
    )
    config = GPTConfig(283, embed_dim=16, num_heads=2, num_layers=1, max_seq_len=32)
    arrays = arrays_of(build(config, 0, 0.1))
    write_hugging_face(Checkpoint(tmp_path, config, tokenizer, arrays, {}), tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert listed["eos_token_id"] == [281, 282]
    assert ends_of(read_hugging_face(tmp_path / "out").tokenizer) == (281, 282)


def test_gguf_names_the_ends_that_it_has_places_for() -> None:
    bpe = BPETokenizer.train([TEXT], 280)
    bpe.other_ends = (278, 279, 277)  # type: ignore[misc]
    values, notes = tokenizer_values(bpe, bpe.vocab_size)
    assert values["tokenizer.ggml.eos_token_id"] == 256
    assert values["tokenizer.ggml.eot_token_id"] == 278
    assert values["tokenizer.ggml.eom_token_id"] == 279
    assert notes == ["GGUF has no entry for the ids 277, which also end a text in mygpt"]


def test_a_state_with_invalid_ends_is_refused() -> None:
    state = ForeignTokenizer(json.loads(library_of("</s>").to_str()), end_of_text=280).to_state()
    assert "other_ends" not in state  # as files had it before
    for wrong in (5, [281], ["280"], [-1]):
        with pytest.raises(InputError, match="other_ends"):
            from_state({**state, "other_ends": wrong})


# --- a tokenizer named by hand -------------------------------------------------------------


def llama_like(bos: bool = True) -> tokenizers.Tokenizer:
    library = library_of("<s>", "</s>", "<unk>")
    if bos:
        library.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 280)]
        )
    return library


@pytest.mark.parametrize(
    ("special", "files", "end"),
    [
        (("<s>", "</s>"), {}, "</s>"),
        (("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), {}, "<|end_of_text|>"),
        (("<|im_start|>", "<|im_end|>"), {}, "<|im_end|>"),
        (("[CLS]", "[SEP]"), {}, "[SEP]"),
        (("[CLS]", "[EOS]", "[SEP]"), {}, "[EOS]"),
        (("</s>", "<stop>"), {"tokenizer_config": {"eos_token": "<stop>"}}, "<stop>"),
        (
            ("</s>", "<stop>"),
            {"special_tokens_map": {"eos_token": {"content": "<stop>"}}},
            "<stop>",
        ),
        (("<pad>", "<mask>"), {}, None),
    ],
)
def test_a_tokenizer_named_by_hand_has_an_end_of_text(
    tmp_path: Path, special: tuple[str, ...], files: dict[str, Any], end: str | None
) -> None:
    folder = folder_of(tmp_path / "t", library_of(*special), **files)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    found = tokenizer.end_of_text
    assert (None if found is None else tokenizer.token_text(found)) == end
    assert (f"{end!r} (id {found}) ends documents" in end_notes(tokenizer)[0]) == (end is not None)
    assert ("generates until a limit" in end_notes(tokenizer)[0]) == (end is None)


def test_what_a_post_processor_puts_behind_a_text_ends_it(tmp_path: Path) -> None:
    library = library_of("<a>", "<z>", "</s>")
    library.post_processor = processors.TemplateProcessing(
        single="$A <z>", pair="$A <z> $B", special_tokens=[("<z>", 281)]
    )
    folder_of(tmp_path, library)
    assert load_tokenizer(tmp_path / "tokenizer.json").end_of_text == 281


@pytest.mark.kernels
def test_training_with_anothers_tokenizer_learns_where_documents_end(tmp_path: Path) -> None:
    """Each document follows the end and beginning tokens; a note names them."""
    path = folder_of(tmp_path / "llama", llama_like()) / "tokenizer.json"
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    notes, listener = note_list()
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    writer = mygpt.train(
        files, output=tmp_path / "run", tokenizer=str(path), listener=listener, **TINY
    )
    assert writer.tokenizer.end_of_text == 281
    assert writer.tokenizer.beginning == (280,)
    assert "the tokenizer's '</s>' (id 281) ends documents, and '<s>' begins each" in notes
    bare = folder_of(tmp_path / "bare", library_of("<pad>")) / "tokenizer.json"
    mygpt.train(files, output=tmp_path / "other", tokenizer=str(bare), listener=listener, **TINY)
    assert any("no token that ends documents" in note for note in notes)


def test_tokenize_says_what_ends_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder_of(tmp_path / "llama", llama_like(bos=False)) / "tokenizer.json"
    (tmp_path / "a.txt").write_text(f"{TEXT}{END_OF_TEXT}\n{TEXT}")
    with pytest.raises(SystemExit) as left:
        main(
            ["tokenize", str(tmp_path / "a.txt"), "--out", str(tmp_path / "s"), "--tokenizer",
             str(path)]
        )  # fmt: skip
    assert left.value.code == 0
    assert "the tokenizer's '</s>' (id 281) ends documents\n" in capsys.readouterr().err
    tokens = TokenStore.open(tmp_path / "s").tokens[:]
    assert (tokens == 281).sum() == 2
    assert tokens[0] == 281


def test_info_names_the_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = llama_like()
    several = ForeignTokenizer(
        json.loads(library.to_str()), end_of_text=281, other_ends=[282], vocab_size=290
    )
    none = CharTokenizer("ab")
    for tokenizer, line in (
        (several, "end of text: </s> (id 281), <unk> (id 282); <s> (id 280) before each text\n"),
        (none, "end of text: none: the model never ends a text by itself\n"),
    ):
        config = GPTConfig(
            tokenizer.vocab_size, embed_dim=16, num_heads=2, num_layers=1, max_seq_len=32
        )
        mygpt.save_checkpoint(tmp_path / "m.safetensors", build(config), tokenizer)
        with pytest.raises(SystemExit):
            main(["info", str(tmp_path / "m.safetensors")])
        assert line in capsys.readouterr().out


def test_a_row_without_a_token_has_no_text() -> None:
    """Whatever the decoder writes between tokens; it is drawn, counted, and not seen."""
    for decoder in (None, decoders.WordPiece(), decoders.Metaspace(), decoders.BPEDecoder()):
        library = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        if decoder is not None:
            library.decoder = decoder
        tokenizer = ForeignTokenizer(json.loads(library.to_str()), vocab_size=4)
        assert [tokenizer.token_text(n) for n in (2, 3)] == ["", ""]
        assert tokenizer.byte_lengths()[2:].tolist() == [0, 0]
        assert tokenizer.decode([0, 3, 1, 2]) == tokenizer.decode([0, 1])
        stream = tokenizer.decoder()
        pieces = [stream.push(n) for n in (0, 3, 1, 2)]
        assert pieces[1] == pieces[3] == ""
        assert "".join(pieces) + stream.finish() == tokenizer.decode([0, 1])


@pytest.mark.kernels
def test_fine_tuning_a_model_without_an_end_of_text_token_gets_a_note(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abba " * 60)
    notes, listener = note_list()
    mygpt.train(
        tmp_path / "a.txt", output=tmp_path / "first", preset="tutorial", listener=listener, **TINY
    )
    assert not any("ends documents" in note for note in notes)
    (tmp_path / "b.txt").write_text(f"abba {END_OF_TEXT}ab ba" * 40)
    mygpt.train(
        tmp_path / "b.txt", output=tmp_path / "second", init_from=tmp_path / "first",
        listener=listener, steps=1, batch_size=2, device="cpu",
    )  # fmt: skip
    assert any("no token that ends documents" in note for note in notes)


def test_gpt2s_own_tokenizer_stays_byte_level_bpe(tmp_path: Path) -> None:
    folder_of(tmp_path, library_of(END_OF_TEXT))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert isinstance(tokenizer, BPETokenizer)
    assert tokenizer.end_of_text == 280
    assert end_notes(tokenizer) == ["the tokenizer's '<|endoftext|>' (id 280) ends documents"]
    BPETokenizer.train([TEXT], 280).save(tmp_path / "ours.json")
    assert end_notes(load_tokenizer(tmp_path / "ours.json")) == []
