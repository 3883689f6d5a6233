"""Tokenizers in several files of a folder, compared with transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from bpe_samples import PARAGRAPH
from mygpt.errors import InputError
from mygpt.formats.tokenizers import read_tokenizer
from mygpt.tokenization import END_OF_TEXT

TEXTS = [
    "", " ", "  a", "a  ", "\n", "\r\n\r\n", "\t\ta\u0301\u0301", "The quick brown", " The quick",
    "they'LL say 'tis 12345 times", "x=1;\n\n\n  y", "e\u0301 \u212b \ufb01 \u1112\u1161\u11ab",
    "👩‍👩‍👧‍👦 🇩🇪", "a" * 300, "   x   \n\n  ", END_OF_TEXT, f"a{END_OF_TEXT}b",
    "<s>a</s>", "<mask> <pad>",
    "<tool_call>x</tool_call>", "a <tool_call> b", "<|im_start|>user\nhi<|im_end|>",
    "<extra> <extra>",
    "!!??", "don't", "DON'T", "1 22 333 4444", "東京都", "\x00", "hello<extra>there", "[PAD]x",
]  # fmt: skip


def library() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([PARAGRAPH * 8], trainer)
    return made


LIBRARY = library()
SIZE = LIBRARY.get_vocab_size()


def two_files(folder: Path, words: list[str], model_type: str = "gpt2", **files: object) -> Path:
    """A folder of vocab.json and merges.txt; `words` follow the vocabulary's."""
    folder.mkdir(exist_ok=True)
    LIBRARY.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    vocab |= {word: len(vocab) + n for n, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    write(folder, **{"config": {"model_type": model_type}} | files)
    return folder


def write(folder: Path, **files: object) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def token(content: str, **flags: bool) -> dict[str, object]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return {"content": content, **plain, "special": True, **flags}


def same_as_transformers(folder: Path, rows: int | None = None) -> tuple[object, object]:
    """Ids of many texts, the ids around them and the texts again are those of transformers."""
    from transformers import AutoTokenizer

    judge = AutoTokenizer.from_pretrained(str(folder))
    ours, _ = read_tokenizer(folder, len(judge) if rows is None else rows)
    judged = judge(TEXTS, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, wanted in zip(TEXTS, judged, strict=True):
        ids = ours.encode_array(text).tolist()
        assert ids == wanted, text
        decoded = judge.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == decoded
        assert [*ours.beginning, *ids] == judge(text, split_special_tokens=True)["input_ids"][
            : len(ours.beginning) + len(ids)
        ]
    if judge.eos_token is not None and judge.eos_token_id < ours.vocab_size:
        assert ours.end_of_text == judge.eos_token_id
    return ours, judge


def settings(tokenizer_class: str | None = None, **more: object) -> dict[str, object]:
    named = {} if tokenizer_class is None else {"tokenizer_class": f"{tokenizer_class}"}
    return {"tokenizer_config": named | more}


def special(**roles: object) -> dict[str, object]:
    return {"special_tokens_map": {name if "_" in name else f"{name}_token": value
                                   for name, value in roles.items()}}  # fmt: skip


QWEN_ADDED = {END_OF_TEXT: SIZE, "<|im_start|>": SIZE + 1, "<|im_end|>": SIZE + 2}
QWEN_LISTED = {str(n): token(name) for name, n in QWEN_ADDED.items()}
LISTED = {
    str(SIZE): token(END_OF_TEXT),
    str(SIZE + 2): token("<tool_call>", special=False, lstrip=True),
    str(SIZE + 1): token("<extra>", special=False, rstrip=True, normalized=True),
}
END, TWO, ROBERTA = (
    [END_OF_TEXT],
    [END_OF_TEXT, "</s>"],
    ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
)
# Words that the vocabulary has too, type of the model, and the other files.
FOLDERS = {
    "gpt2, no other file": (END, "gpt2", {}),
    "gpt2": (END, "gpt2", settings("GPT2Tokenizer")),
    "gpt2, its end of text added": ([], "gpt2", {"added_tokens": {END_OF_TEXT: SIZE}}),
    "gpt2, its end of text implied": ([], "gpt2", {}),
    "gpt2, a space before the text": (
        END, "gpt2", settings("GPT2Tokenizer", add_prefix_space=True)
    ),
    "gpt2, begun by a token": (
        [*END, "<s>"], "gpt2", settings(bos_token="<s>", add_bos_token=True)
    ),
    "gpt2, enclosed by tokens": (END, "gpt2", settings(add_bos_token=True, add_eos_token=True)),
    "gpt2, another end": (TWO, "gpt2", special(eos="</s>", bos=token("</s>"))),
    "gpt2, two ends, of which the older file's counts": (
        TWO, "gpt2", settings(eos_token=END_OF_TEXT) | special(eos="</s>")
    ),
    "gpt2, two ends, of which the newer file's counts": (
        TWO, "gpt2",
        settings(eos_token=END_OF_TEXT, added_tokens_decoder={str(SIZE): token(END_OF_TEXT)})
        | special(eos="</s>"),
    ),
    "gpt2, added tokens": (
        END, "gpt2",
        special(pad="[PAD]")
        | {"added_tokens": {"<extra>": SIZE + 1, "[PAD]": SIZE + 2, "<tool_call>": SIZE + 3}},
    ),
    "gpt2, additional special tokens": (
        END, "gpt2", special(additional_special_tokens=["<extra>", "<tool_call>"])
    ),
    "gpt2, a decoder of added tokens": (
        END, "gpt2",
        settings("GPT2TokenizerFast", added_tokens_decoder=LISTED, eos_token=END_OF_TEXT),
    ),
    "codegen": (
        END, "gpt2",
        settings("CodeGenTokenizer") | {"added_tokens": {"  ": SIZE + 2, "   ": SIZE + 1}},
    ),
    "neox": ([*END, "<|padding|>"], "gpt2", settings("GPTNeoXTokenizerFast")),
    "neox, its padding implied": (END, "llama", settings("GPTNeoXTokenizer")),
    "qwen, no other file": (END, "qwen3", {}),
    "qwen of the old files": (
        [], "qwen3",
        settings("Qwen2Tokenizer")
        | {"added_tokens": QWEN_ADDED}
        | special(eos="<|im_end|>", pad=END_OF_TEXT,
                  additional_special_tokens=["<|im_start|>", "<|im_end|>"]),
    ),
    "qwen of the new files": (
        [], "qwen3",
        settings(
            "Qwen2Tokenizer", bos_token=None, eos_token="<|im_end|>", unk_token=None,
            pad_token=END_OF_TEXT,
            added_tokens_decoder=QWEN_LISTED
            | {str(SIZE + 3): token("<tool_call>", special=False)},
        ),
    ),
    "qwen's class on a llama": (END, "llama", settings("Qwen2Tokenizer")),
    "gpt2's class on a qwen": (END, "qwen3", settings("GPT2Tokenizer")),
    "roberta": (ROBERTA, "gpt2", settings("RobertaTokenizer")),
    "bart": (ROBERTA, "gpt2", settings("BartTokenizerFast")),
    "roberta's class in config.json": (
        ROBERTA, "gpt2",
        {"config": {"model_type": "gpt2", "tokenizer_class": "RobertaTokenizer"}},
    ),
    "roberta, tokens implied": (["<s>", "</s>", "<unk>"], "gpt2", settings("RobertaTokenizer")),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_two_files_is_read_as_transformers_reads_it(name, tmp_path):
    words, model_type, files = FOLDERS[name]
    same_as_transformers(two_files(tmp_path, words, **{"model_type": model_type} | files))


@pytest.mark.parametrize(
    "name", ["gpt2, added tokens", "qwen of the new files", "qwen of the old files", "roberta"]
)
def test_rows_past_the_tokens_change_no_id(name, tmp_path):
    words, model_type, files = FOLDERS[name]
    folder = two_files(tmp_path, words, **{"model_type": model_type} | files)
    ours, judge = same_as_transformers(folder, SIZE + 64)
    assert ours.vocab_size == SIZE + 64 > len(judge)


GENERIC = "PreTrainedTokenizerFast"
ADDING = {
    "added_tokens_decoder": settings(
        GENERIC,
        eos_token=END_OF_TEXT,
        added_tokens_decoder={
            str(SIZE): token(END_OF_TEXT),
            str(SIZE + 1): token("<tool_call>", special=False),
            str(SIZE + 2): token("<|im_end|>"),
        },
    ),
    "added_tokens.json": {"added_tokens": {"<extra>": SIZE + 1, "<tool_call>": SIZE + 2}},
    "a role": settings(GENERIC, pad_token="[PAD]"),
    "a role of the old file": special(pad="[PAD]"),
    "an end that is added": settings(
        GENERIC, eos_token="<|im_end|>", extra_special_tokens=["<extra>"]
    ),
}


@pytest.mark.parametrize("files", ADDING.values(), ids=ADDING)
def test_other_files_extend_a_tokenizer_json_as_in_transformers(files, tmp_path):
    made = library()
    made.add_special_tokens([END_OF_TEXT])
    made.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, config={"model_type": "llama"}, **settings(GENERIC) | files)
    ours, _ = same_as_transformers(tmp_path)
    assert ours.vocab_size > SIZE + 1


# --- one pad token more than rows -----------------------------------------------------------


def padded(folder: Path, *added: object, role: str | None = "[PAD]") -> Path:
    """A tokenizer.json with tokens that the model has no rows for."""
    made = library()
    made.add_special_tokens([END_OF_TEXT])
    for each in added:
        made.add_tokens([each])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    write(folder, tokenizer_config=config | ({} if role is None else {"pad_token": role}))
    return folder


@pytest.mark.parametrize("inside", [True, False], ids=["in tokenizer.json", "beside it"])
def test_a_pad_token_past_the_rows_is_dropped_with_a_note(inside, tmp_path):
    pad = tokenizers.AddedToken("[PAD]", special=True)
    folder = padded(tmp_path, *[pad] * inside)
    ours, notes = read_tokenizer(folder, SIZE + 1)
    assert ours.vocab_size == SIZE + 1
    assert ours.end_of_text == SIZE
    assert any("[PAD]" in note and "dropped" in note for note in notes)
    plain, _ = read_tokenizer(padded(tmp_path, role=None), SIZE + 1)
    for text in TEXTS:
        assert ours.encode_array(text).tolist() == plain.encode_array(text).tolist()


@pytest.mark.parametrize("inside", [True, False], ids=["in vocab.json", "in added_tokens.json"])
def test_a_pad_token_of_two_files_is_dropped_with_a_note(inside, tmp_path):
    files = {"special_tokens_map": {"pad_token": "[PAD]"}}
    files |= {} if inside else {"added_tokens": {"[PAD]": SIZE + 1}}
    folder = two_files(tmp_path, [END_OF_TEXT, *["[PAD]"] * inside], **files)
    ours, notes = read_tokenizer(folder, SIZE + 1)
    assert ours.vocab_size == SIZE + 1
    assert any("[PAD]" in note for note in notes)


def test_a_token_past_the_rows_that_text_is_encoded_to_is_refused(tmp_path):
    folder = padded(tmp_path, tokenizers.AddedToken("<tool_call>", special=False))
    with pytest.raises(InputError, match=r"'<tool_call>' with id .*resize_token_embeddings"):
        read_tokenizer(folder, SIZE + 1)


def test_an_end_of_text_token_past_the_rows_is_not_used(tmp_path):
    files = {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}}
    ours, notes = read_tokenizer(two_files(tmp_path, [END_OF_TEXT], **files), SIZE + 1)
    assert ours.end_of_text == SIZE
    assert any("<|im_end|>" in note and "dropped" in note for note in notes)


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"tokenizer_class": "CLIPTokenizer"}, "'CLIPTokenizer' is not one .*save_pretrained"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "'PreTrainedTokenizerFast' is not one"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder=.* must be an object"),
        ({"added_tokens_decoder": {"x": "y"}}, "the id 'x', which must be an integer"),
        ({"added_tokens_decoder": {"9": 3}}, "the token 3, which must be a text"),
        ({"added_tokens_decoder": {"9": {"content": "a", "lstrip": 3}}}, "lstrip=3 of the token"),
        ({"added_tokens_decoder": {"9999": token("<z>")}}, "'<z>'.* the file 9999"),
        ({"eos_token": 3}, "the token 3, which must be a text"),
        ({"extra_special_tokens": [3]}, "the token 3, which must be a text"),
    ],
)
def test_what_cannot_be_read_as_transformers_reads_it_is_refused(config, said, tmp_path):
    folder = two_files(tmp_path, [END_OF_TEXT], tokenizer_config=config)
    with pytest.raises(InputError, match=said) as caught:
        read_tokenizer(folder, 100_000)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", None])
def test_a_class_that_no_file_names_is_not_guessed(kind, tmp_path):
    folder = two_files(tmp_path, [END_OF_TEXT], config={"model_type": kind})
    with pytest.raises(InputError, match=r"its tokenizer_class '' is not one .*save_pretrained"):
        read_tokenizer(folder, SIZE + 1)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", None])
def test_a_folder_without_a_known_vocabulary_is_refused_with_the_remedy(name, tmp_path):
    if name is not None:
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=r"neither tokenizer.json nor .* or let transformers"):
        read_tokenizer(tmp_path, 5)
    (tmp_path / "tokenizer.json").write_text("[1")
    with pytest.raises(InputError, match="is not a tokenizer's JSON"):
        read_tokenizer(tmp_path, 5)


@pytest.mark.parametrize("line", ["a zzzz", "a b c"])
def test_lines_that_are_not_merges_of_the_vocabulary_are_refused(line, tmp_path):
    """The library would panic over them, and print its own lines."""
    folder = two_files(tmp_path, [END_OF_TEXT])
    with (folder / "merges.txt").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match=rf"the line '{line}' is not two tokens of vocab.json"):
        read_tokenizer(folder, SIZE + 1)
