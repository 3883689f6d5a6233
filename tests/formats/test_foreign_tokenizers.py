"""Imported and exported tokenizers, compared with transformers' AutoTokenizer."""

from __future__ import annotations

import concurrent.futures
import json
import string
import threading
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from bpe_samples import LLAMA_3, PARAGRAPH, QWEN_2, ids_of
from mygpt.data import encode_documents
from mygpt.errors import InputError, StorageError, UnknownTokenError
from mygpt.formats.tokenizers import read_tokenizer, write_tokenizer
from mygpt.text import Document
from mygpt.tokenization import (
    END_OF_TEXT,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    ForeignTokenizer,
    from_state,
    load_tokenizer,
)

pytestmark = pytest.mark.slow

TEXT = (
    PARAGRAPH + "### a </s> heading ### and a second one </s>\n-----------\n   \n"
    "<|endoftext|> and again the quick brown fox, <s> the quicker the better.\n"
) * 8
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_end|>", "<|begin_of_text|>", END_OF_TEXT]
_parts = st.sampled_from(
    [" ", "  ", "   ", "\n", "\r\n", "\t", "'s", "'LL", "the", " quick", "12", "4567", "½", "é",
     "e\u0301", "\u0301", "\u1112\u1161\u11ab", "\u212b", "\ufb01", "\u00a0", "\u2028", "\u0085",
     "\u200b", "\ufeff", "京", "🙂", "👍🏽", "!", " .", " n't", "###", "--", "_", "▁", "\x00", "İ",
     "<0xE4>", "<0x", "##", "Ġ", "𝔸", "<tool_call>", "<|", "</", "s>", *SPECIAL]
)  # fmt: skip
texts = st.lists(st.one_of(_parts, st.characters(codec="utf-8")), max_size=16).map("".join)
many_texts = st.lists(texts, min_size=10, max_size=10)
NASTY = [
    "", " ", "  a", "a  ", "\n", "\r\n\r\n", "\t\ta\u0301\u0301", "\u0301", "👩‍👩‍👧‍👦 🇩🇪", "▁a▁",
    "a" * 700, " " * 300 + "x" + "\n" * 300, "".join(map(chr, range(0x180))), "<0xE4><0xBD>",
    "</s></s> <s>", END_OF_TEXT * 2, "x\u2028y\u0085z\x1c\x00", "ﬁ Å Å 한 한",
]  # fmt: skip


def save(folder, library, config, model_type):
    """A Hugging Face folder."""
    library.save(str(folder / "tokenizer.json"))
    settings = {"clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


def auto(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def train(library, special, size=420, alphabet=()):
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    library.train_from_iterator([TEXT], trainer)


def byte_level(special, pattern=None, normalizer=None):
    library = tokenizers.Tokenizer(models.BPE())
    if pattern is None:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    if normalizer is not None:
        library.normalizer = normalizer
    library.decoder = decoders.ByteLevel()
    train(library, [], alphabet=pre_tokenizers.ByteLevel.alphabet())
    library.add_special_tokens(special)
    return library


def gpt2(folder):
    save(folder, byte_level([END_OF_TEXT]), {"tokenizer_class": "GPT2Tokenizer"}, "gpt2")


def gpt2_of_two_files(folder):
    """As GPT-2 was before there was a tokenizer.json; its merges begin with "#" here and there."""
    byte_level([]).model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocab, END_OF_TEXT: len(vocab)}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "\n# #\n" in (folder / "merges.txt").read_text()


def llama3(folder):
    library = byte_level(["<|begin_of_text|>", "<|end_of_text|>"], LLAMA_3)
    library.add_tokens(["<tool_call>"])
    library.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A $B",
        special_tokens=[("<|begin_of_text|>", library.token_to_id("<|begin_of_text|>"))],
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}
    save(folder, library, config, "llama")
    description = json.loads((folder / "tokenizer.json").read_text())
    description["model"]["ignore_merges"] = True
    (folder / "tokenizer.json").write_text(json.dumps(description))


def qwen(folder):
    library = byte_level([END_OF_TEXT, "<|im_start|>", "<|im_end|>"], QWEN_2, normalizers.NFC())
    library.add_tokens(["<tool_call>"])
    end = {"content": "<|im_end|>", "__type": "AddedToken", "special": True}
    save(folder, library, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": end}, "qwen3")


def llama2(folder):
    """Its merges can form "</s>", which its training text contains."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    # Learned from lines: a text without an end is one word to it.
    library.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    train(library, ["<unk>", "<s>", "</s>", *in_bytes], 500, string.printable)
    library.pre_tokenizer = None
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    save(folder, library, config, "llama")
    description = json.loads((folder / "tokenizer.json").read_text())
    description["added_tokens"] = description["added_tokens"][:3]
    merges = [["<", "/"], ["</", "s"], ["</s", ">"]]
    description["model"]["merges"] = merges + description["model"]["merges"]
    names = {"</", "</s"} - description["model"]["vocab"].keys()
    size = len(description["model"]["vocab"])
    description["model"]["vocab"] |= {name: size + n for n, name in enumerate(sorted(names))}
    (folder / "tokenizer.json").write_text(json.dumps(description))


def t5(folder):
    """Unigram, with a normaliser that is not undone; "</s>" is one of its pieces."""
    library = tokenizers.Tokenizer(models.Unigram())
    library.normalizer = normalizers.NFKC()
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    library.train_from_iterator([TEXT], trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    save(folder, library, config, "llama")


def bert(folder):
    library = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    library.train_from_iterator([TEXT], trainer)
    save(folder, library, {"tokenizer_class": "PreTrainedTokenizerFast"}, "llama")


MAKERS = {make.__name__: make for make in (gpt2, gpt2_of_two_files, llama3, qwen, llama2, t5, bert)}


class Case:
    """A folder, transformers' tokenizer for it, and mygpt's."""

    def __init__(self, folder, padding):
        self.folder = folder
        self.judge = auto(folder)
        self.ours, self.notes = read_tokenizer(folder, len(self.judge) + padding)

    def judged_ids(self, many):
        found = self.judge(many, add_special_tokens=False, split_special_tokens=True)
        return found["input_ids"] if many else []

    def judged_text(self, ids):
        return self.judge.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module", params=MAKERS)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](folder)
    return Case(folder, 0 if "gpt2" in request.param else 5)


def made(tmp_path_factory, name, padding=0):
    folder = tmp_path_factory.mktemp(name)
    MAKERS[name](folder)
    return Case(folder, padding)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return made(tmp_path_factory, "llama2")


def streamed(decoder, ids):
    pieces = [decoder.push(i) for i in ids]
    return [*pieces, decoder.finish()]


# --- import: the same ids and text as transformers ----------------------------------------------


@settings(max_examples=100)
@given(many_texts)
@example(NASTY)
def test_ids_and_texts_are_those_of_transformers(case, many):
    """1,000 texts a kind: encoded, decoded, decoded one by one; and none becomes a control token.

    The judge lets Unigram and merges spell "</s>": of those texts no more is asked than that.
    """
    control = set(case.judge.all_special_ids) - {case.judge.unk_token_id}
    control -= {case.judge.get_vocab().get(name) for name in ("<unk>", "[UNK]")}
    for text, wanted in zip(many, case.judged_ids(many), strict=True):
        ids = case.ours.encode_array(text)
        assert ids.dtype == np.int64
        assert not control & set(ids.tolist())
        if not control & set(wanted):
            assert ids.tolist() == wanted
        decoded = case.judged_text(ids.tolist())
        assert case.ours.decode(ids) == decoded
        assert "".join(streamed(case.ours.decoder(), ids.tolist())) == decoded


@settings(max_examples=80)
@given(st.lists(st.lists(st.integers(0, 400), max_size=24), min_size=5, max_size=5))
def test_any_ids_decode_as_in_transformers_at_once_and_one_by_one(case, rows):
    """Ids that no text has: bytes that are not UTF-8, with control tokens and padding between."""
    for row in rows:
        ids = [i % case.ours.vocab_size for i in row]
        decoded = case.judged_text([i for i in ids if i < len(case.judge)])
        assert case.ours.decode(ids) == decoded
        assert "".join(streamed(case.ours.decoder(), ids)) == decoded


@settings(max_examples=100)
@given(st.lists(st.integers(0, 270), max_size=12))
@example([3 + 0xF0, 3 + 0x9F, 3 + 0x99, 3 + 0x82, 3 + 0xFF, 400])
def test_single_bytes_decode_as_in_the_library(llama, ids):
    """One byte too many, and the library makes every byte of the run a U+FFFD: all of it waits."""
    decoded = llama.judged_text(ids)
    assert llama.ours.decode(ids) == decoded
    assert "".join(streamed(llama.ours.decoder(), ids)) == decoded


def test_only_gpt2s_tokenizer_becomes_a_bpe_tokenizer(case):
    gpt2s = "gpt2" in case.folder.name
    assert type(case.ours) is (BPETokenizer if gpt2s else ForeignTokenizer)
    assert case.ours.vocab_size == len(case.judge) + (0 if gpt2s else 5)
    assert any("padding" in note for note in case.notes) != gpt2s


def test_tokens_added_before_a_text_are_added_to_prompts_and_documents(case):
    """Llama 3's begin-of-text: before prompts and documents, never from encoding itself."""
    text = "a lazy dog"
    begun = [*case.ours.beginning, *case.ours.encode_array(text).tolist()]
    assert begun == case.judge(text)["input_ids"][: len(begun)]
    assert len(case.ours.beginning) == ("llama3" in case.folder.name)
    row = encode_documents([Document("", text), Document("", text)], case.ours).tolist()
    ends = [] if case.ours.end_of_text is None else [case.ours.end_of_text]
    assert row == [*ends, *begun] * 2
    if (case.folder / "tokenizer.json").exists():  # by itself, as --tokenizer names it
        assert load_tokenizer(case.folder / "tokenizer.json").beginning == case.ours.beginning
    follows = encode_documents([Document("", text)], case.ours, continued=True).tolist()
    assert follows == case.ours.encode_array(text).tolist()


def test_gpt2s_tokenizer_for_a_padded_model_is_foreign_with_the_same_ids(tmp_path):
    gpt2(tmp_path)
    exact, _ = read_tokenizer(tmp_path, 417)
    padded, notes = read_tokenizer(tmp_path, 512)
    assert (exact.kind, padded.kind) == ("bpe", "foreign")
    assert padded.end_of_text == exact.end_of_text == 416
    assert notes == [
        "the model has 512 rows and the tokenizer 417 ids: the other rows are padding, "
        "and decode to an empty text"
    ]
    assert padded.encode_array(TEXT).tolist() == exact.encode(TEXT).tolist()
    assert padded.decode([40, 417, 511, 41]) == exact.decode([40, 41])
    assert padded.token_text(511) == ""
    assert padded.byte_lengths().tolist() == [*exact.byte_lengths().tolist(), *[0] * 95]
    assert [padded.token_text(i) for i in range(417)] == [exact.token_text(i) for i in range(417)]


def test_text_never_becomes_a_control_token(llama, tmp_path_factory):
    """Llama 2's merges, and Unigram's pieces, would encode the text "</s>" as id 2 or 1."""
    unigram = made(tmp_path_factory, "t5")
    for found in (llama, unigram):
        end = found.ours.end_of_text
        assert end == found.judge.eos_token_id
        assert end in found.judged_ids(["a </s> b"])[0]  # the trap is there
        ids = found.ours.encode_array("a </s> b").tolist()
        assert end not in ids
        assert found.ours.decode(ids) == "a </s> b"
        assert found.ours.decode([*ids, end]) == found.judged_text([*ids, end])
        assert found.ours.token_text(end) == "</s>"
        assert found.ours.byte_lengths()[end] == 0


def test_bytes_that_the_file_calls_special_are_text_all_the_same(tmp_path):
    """Training with the library can have them as special tokens only."""
    llama2(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    pattern = description["added_tokens"][0]
    description["added_tokens"] += [
        {**pattern, "id": number, "content": name}
        for name, number in description["model"]["vocab"].items()
        if name.startswith("<0x")
    ]
    tokenizer = ForeignTokenizer(description)
    text = "caf\u00e9 \U0001f389, and <0x41> is no A"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.token_text(int(tokenizer.encode("\x07")[-1])) == "\x07"


def test_text_that_only_a_control_token_encodes_is_refused(tmp_path):
    """A character's token cannot be hidden from text; an unknown token can be the end of text."""
    library = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    library.add_special_tokens(["b"])
    save(tmp_path, library, {}, "llama")
    tokenizer, _ = read_tokenizer(tmp_path, 3)
    assert tokenizer.encode("aab").tolist() == [0, 2]
    with pytest.raises(InputError, match="as the control token 'b': remove"):
        tokenizer.encode("ba")
    bert(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[UNK]"}))
    tokenizer, _ = read_tokenizer(tmp_path, 300)
    assert tokenizer.end_of_text == 0
    assert tokenizer.encode_array("the quick").tolist()
    with pytest.raises(InputError, match=r"as the control token '\[UNK\]': remove characters"):
        tokenizer.encode("the \u4e00")


def test_decoded_text_is_returned_as_soon_as_it_cannot_change(llama):
    ids = llama.ours.encode_array("the quick 𝔸 fox").tolist()
    pieces = streamed(llama.ours.decoder(), ids)
    assert "".join(pieces) == "the quick 𝔸 fox"
    assert pieces[-1] == ""
    waiting = [i for i, piece in zip(ids, pieces[:-1], strict=True) if not piece]
    assert [i - 3 for i in waiting] == list("𝔸".encode())  # the bytes of one character alone


def test_a_continuation_keeps_the_space_before_its_first_word(llama):
    """A whole text loses it, since the tokenizer added it."""
    ids = llama.ours.encode_array("the quick").tolist()
    assert llama.ours.decode(ids) == "the quick"
    assert "".join(streamed(llama.ours.decoder(), ids)) == "the quick"
    assert "".join(streamed(llama.ours.decoder(continued=True), ids)) == " the quick"


@settings(max_examples=60)
@given(texts)
def test_byte_lengths_add_up_to_the_decoded_text(case, text):
    ids = case.ours.encode_array(text).tolist()
    unknown = "bert" in case.folder.name or ("t5" in case.folder.name and 2 in ids)
    if not unknown:  # it stands for no bytes, and BERT drops spaces
        shown = "".join(streamed(case.ours.decoder(continued=True), ids))
        assert case.ours.byte_lengths()[ids].sum() == len(shown.encode())


def test_pieces_and_the_state_give_the_same_ids(case):
    ours = case.ours
    expected = ours.encode_array(TEXT).tolist()
    pieces = [TEXT[start : start + 37] for start in range(0, len(TEXT), 37)]
    assert ids_of(ours, pieces) == ours.encode(TEXT).tolist() == expected
    again = from_state(json.loads(json.dumps(ours.to_state())))
    assert type(again) is type(ours)
    assert again.to_state() == ours.to_state()
    assert again.end_of_text == ours.end_of_text
    assert again.encode_array(TEXT).tolist() == expected
    for bad, words in ((b"bytes", "bytes"), ("a\ud800", "lone surrogate")):
        with pytest.raises(InputError, match=words):
            ours.encode_array(bad)


def test_a_long_text_is_encoded_while_other_threads_run(case, monkeypatch):
    """The library held the interpreter lock: one second for a million characters."""
    size = 4_000_000 if "gpt2" in case.folder.name else 400_000  # GPT-2's takes 0.1 s per million
    text, turns, over = TEXT * (size // len(TEXT)), [], threading.Event()

    def count() -> None:
        while not over.wait(0.0005):
            turns.append(time.perf_counter())

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        counting = other.submit(count)
        ids = case.ours.encode_array(text).tolist()
        over.set()
        counting.result()
    assert len(turns) > 2
    monkeypatch.setattr("mygpt.tokenization.library._LONG", 10**9)
    assert case.ours.encode_array(text).tolist() == ids


def test_a_decoder_that_changes_earlier_text_waits_for_the_end(tmp_path):
    """BPE with an end-of-word mark drops it from the last token alone."""
    library = tokenizers.Tokenizer(models.BPE({"a</w>": 0, "b": 1}, [], end_of_word_suffix="</w>"))
    library.decoder = decoders.BPEDecoder()
    save(tmp_path, library, {}, "llama")
    tokenizer, _ = read_tokenizer(tmp_path, 2)
    assert streamed(tokenizer.decoder(), [0, 1, 0]) == ["", "", "", tokenizer.decode([0, 1, 0])]
    assert tokenizer.decode([0, 1, 0]) == library.decode([0, 1, 0]) == "a ba"


def test_spaces_before_a_text_are_dropped_over_several_tokens(llama, tmp_path):
    """The first two spaces of a text may be tokens of their own, which decode to nothing alone."""
    (tmp_path / "tokenizer.json").write_text((llama.folder / "tokenizer.json").read_text())
    change(tmp_path, lambda d: d["decoder"]["decoders"][-1].update(start=2))
    tokenizer, _ = read_tokenizer(tmp_path, 600)
    space, letter = (llama.judge.convert_tokens_to_ids(name) for name in ("▁", "a"))
    ids = [space, 599, space, space, letter]
    assert streamed(tokenizer.decoder(), ids) == ["", "", "", " ", "a", ""]
    assert tokenizer.decode(ids) == " a"


def test_the_unknown_token_has_a_length_of_zero_bytes(tmp_path_factory):
    """Its number of characters is unknown; counting some would improve bits per byte wrongly."""
    unigram = made(tmp_path_factory, "t5").ours
    ids = unigram.encode_array("\u4e00").tolist()
    assert unigram.token_text(ids[-1]) == "<unk>"
    assert unigram.byte_lengths()[ids[-1]] == 0


# --- import: what ends a text --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "end", "note"),
    [
        ({}, 416, None),
        (
            {"tokenizer_config": {"eos_token": "a"}},
            416,
            "'a', not a special token: ignored",
        ),
        ({"tokenizer_config": {"eos_token": "Ġthe"}}, " the", None),
        ({"tokenizer_config": {"eos_token": {"content": END_OF_TEXT}}}, 416, None),
        (
            {"tokenizer_config": {"eos_token": "</s>"}},
            416,
            "'</s>', not a special token: ignored",
        ),
        ({"special_tokens_map": {"eos_token": END_OF_TEXT}}, 416, None),
        ({"generation_config": {"eos_token_id": 417}}, 417, "'<|im_end|>', id 417, of generation"),
        (
            {"generation_config": {"eos_token_id": [417, 416]}},
            417,
            r"'<\|endoftext\|>' in generation_config.json also ends a text",
        ),
        ({"generation_config": {"eos_token_id": [416, {}, "417"]}}, 416, "id 416, from generation"),
        ({"config": {"eos_token_id": 417}}, 417, "from config.json"),
        ({"config": {"eos_token_id": 50256}}, 416, r"\[50256\], not a special token: ignored"),
        ({"config": {"eos_token_id": 5}}, 416, r"\[5\], not a special token: ignored"),
    ],
)
def test_what_ends_a_text(tmp_path, files, end, note):
    """The first file with a usable one decides; an ordinary id in a model's config is ignored."""
    byte_level([END_OF_TEXT, "<|im_end|>"]).save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tokenizer, notes = read_tokenizer(tmp_path, 418)
    found = tokenizer.end_of_text
    assert (tokenizer.decode([found]) if isinstance(end, str) else found) == end
    ids = tokenizer.encode_array("a banana, the the<|im_end|>").tolist()
    assert found not in ids
    assert tokenizer.decode(ids) == "a banana, the the<|im_end|>"
    assert bool(notes) == bool(note)
    if note:
        with pytest.raises(AssertionError, match=note):
            raise AssertionError(notes)


# --- import: what is refused ----------------------------------------------------------------------


def change(folder, do):
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    do(description)
    path.write_text(json.dumps(description))


WRONG = [
    (lambda d: d["added_tokens"].append({**d["added_tokens"][0], "id": 600, "content": "<z>"}),
     "'<z>' the id 5.., the file 600: ids of added tokens must follow"),
    (lambda d: d["added_tokens"].append({**d["added_tokens"][0], "content": "<z>"}),
     "'<unk>' and '<z>' share an id"),
    (lambda d: d["model"].update(dropout=0.1), "dropout encodes at random"),
    (lambda d: d["model"]["vocab"].update({"zz": -1}), "has the id -1 for 'zz'"),
    (lambda d: d["model"]["vocab"].update({"zz": "1"}), "has the id '1' for 'zz'"),
    (lambda d: d["model"].pop("vocab"), r"incomplete \(KeyError"),
    (lambda d: d["added_tokens"][0].pop("special"), "incomplete"),
    (lambda d: d.update(added_tokens=["<z>"]), "incomplete"),
    (lambda d: d["model"].update(merges=[7]), "incomplete"),
    (lambda d: d["model"].update(merges=[["qq", "zz"]]), "rejects this tokenizer's JSON"),
    (lambda d: d.update(decoder={"type": "Magic"}), "rejects this tokenizer's JSON"),
    (lambda d: d.update(decoder=7), "incomplete|rejects"),
    (lambda d: d.update(post_processor={"type": "TemplateProcessing"}), "incomplete"),
    (lambda d: d.update(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]),
     "has no tokens"),
    (lambda d: d.update(model=7), "incomplete"),
]  # fmt: skip


@pytest.mark.parametrize(("do", "message"), WRONG, ids=[message for _, message in WRONG])
def test_incomplete_files_are_refused_in_one_line(llama, tmp_path, do, message):
    (tmp_path / "tokenizer.json").write_text((llama.folder / "tokenizer.json").read_text())
    change(tmp_path, do)
    with pytest.raises(InputError, match=message) as caught:
        read_tokenizer(tmp_path, 700)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_model_is_refused(case):
    with pytest.raises(InputError, match="only 100 rows: use the tokenizer that belongs"):
        read_tokenizer(case.folder, 100)


# --- export: what transformers makes of ours ------------------------------------------------------

CHARS = sorted({*TEXT, *"\r\n\t \x00\u2028\u0085\u0301▁Ġé🙂\u1112\u1161\u11ab\u212b\ufb01\ufeff"})
OURS = {
    "characters": CharTokenizer(CHARS),
    "characters with an end": CharTokenizer(CHARS, end_of_text=True),
    "characters in another order": CharTokenizer(CHARS[::-1], end_of_text=True),
    "bytes": ByteTokenizer(),
    "bpe": BPETokenizer.train([TEXT], 400),
}
char_texts = st.lists(st.sampled_from([*CHARS, "  ", "\r\n", " .", " n't", "e\u0301"]), max_size=20)


@pytest.fixture(scope="module", params=OURS)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    write_tokenizer(OURS[request.param], folder, 64)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return folder, OURS[request.param], auto(folder)


@settings(max_examples=100)
@given(st.lists(char_texts.map("".join), min_size=10, max_size=10), st.lists(st.integers(0, 400)))
@example([text for text in NASTY if set(text) <= set(CHARS)], [])
@example([*CHARS, "".join(CHARS), " " * 99, "\n" * 99, "\r\n" * 9, "x\u0301\u0301"], [])
def test_transformers_encodes_and_decodes_exported_tokenizers_alike(exported, many, ids):
    """1,000 texts a kind, by the library and by transformers; and any ids."""
    folder, ours, judge = exported
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = judge(many, split_special_tokens=True)["input_ids"]
    assert found == [ours.encode_array(text).tolist() for text in many]
    assert found == judge(many, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    library.encode_special_tokens = True
    assert found == [row.ids for row in library.encode_batch(many)]
    assert judge.batch_decode(found) == many
    assert library.decode_batch(found, skip_special_tokens=False) == many
    ids = [i % ours.vocab_size for i in ids]
    assert judge.decode(ids) == ours.decode(ids)


@settings(max_examples=100)
@given(texts)
def test_any_text_gives_the_same_ids_or_an_error_in_both(exported, text):
    """A character unknown to a character tokenizer becomes no other one, and is not dropped."""
    _, ours, judge = exported
    try:
        wanted = ours.encode_array(text).tolist()
    except UnknownTokenError:
        with pytest.raises(Exception, match="Missing \\[UNK\\] token"):
            judge(text, split_special_tokens=True)
        return
    assert judge(text, split_special_tokens=True)["input_ids"] == wanted
    assert judge.decode(wanted) == text


def test_only_end_of_text_is_special(exported):
    """A tokenizer without an end token must not get one: a real character would end the text."""
    _, ours, judge = exported
    end = ours.end_of_text
    assert len(judge) == ours.vocab_size
    assert sorted(judge.get_vocab().values()) == list(range(ours.vocab_size))
    assert judge.eos_token_id == judge.bos_token_id == end
    assert judge.all_special_ids == ([] if end is None else [end])
    assert judge.unk_token is judge.pad_token is None
    assert judge.model_max_length == 64
    if end is not None:  # transformers' way, which a file cannot change
        assert judge(END_OF_TEXT)["input_ids"] == [end]
        assert judge.decode([end, end], skip_special_tokens=True) == ""


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3", None])
@pytest.mark.parametrize("name", OURS)
def test_it_loads_in_a_folder_with_a_model_of_each_family(tmp_path, name, model_type):
    """transformers has tokenizer classes of its own for some families, with their own rules."""
    ours = OURS[name]
    write_tokenizer(ours, tmp_path, 64)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    judge = auto(tmp_path)
    assert judge(TEXT, split_special_tokens=True)["input_ids"] == ours.encode_array(TEXT).tolist()
    assert judge.eos_token_id == ours.end_of_text
    assert len(judge) == ours.vocab_size


def test_a_round_trip_gives_the_same_tokenizer(exported, tmp_path):
    """From mygpt's files, and from those that transformers writes after reading them."""
    folder, ours, judge = exported
    judge.save_pretrained(str(tmp_path))
    for place in (folder, tmp_path):
        again, notes = read_tokenizer(place, ours.vocab_size)
        assert type(again) is type(ours)
        assert notes == []
        if place is folder or ours.kind != "bpe":  # a BPE's state is its file
            assert again.to_state() == ours.to_state()
        assert again.encode_array(TEXT).tolist() == ours.encode_array(TEXT).tolist()
        assert again.end_of_text == ours.end_of_text


def test_a_foreign_tokenizer_round_trips(case, tmp_path):
    write_tokenizer(case.ours, tmp_path, 99)
    again, _ = read_tokenizer(tmp_path, case.ours.vocab_size)
    assert again.to_state() == case.ours.to_state()
    judge = auto(tmp_path)
    assert judge.eos_token_id == case.ours.end_of_text
    many = [text for text in NASTY if not any(name in text for name in SPECIAL)]
    found = judge(many, add_special_tokens=False)["input_ids"]
    assert found == [case.ours.encode_array(text).tolist() for text in many]


def test_the_tokenizer_of_a_padded_character_model_is_foreign(tmp_path):
    """More rows than characters: a character tokenizer has no such ids."""
    ours = OURS["characters with an end"]
    write_tokenizer(ours, tmp_path, 64)
    padded, notes = read_tokenizer(tmp_path, 128 + ours.vocab_size)
    assert (padded.kind, padded.end_of_text, len(notes)) == ("foreign", ours.end_of_text, 1)
    assert padded.encode_array(TEXT).tolist() == ours.encode_array(TEXT).tolist()
    lengths = padded.byte_lengths()
    assert lengths[: ours.vocab_size].tolist() == ours.byte_lengths().tolist()
    with pytest.raises(InputError, match="could not encode this text: WordLevel error"):
        padded.encode("\u4e00")


@pytest.mark.parametrize(
    "do",
    [
        lambda d: d["model"]["vocab"].update({"ab": len(d["model"]["vocab"])}),
        lambda d: d.update(normalizer={"type": "NFC"}),
        lambda d: d["model"].update(unk_token="a"),
        lambda d: d.update(decoder=None),
    ],
)
def test_a_slightly_changed_export_is_not_read_as_mygpts_tokenizer(tmp_path, do):
    write_tokenizer(OURS["characters"], tmp_path, 64)
    change(tmp_path, do)
    assert read_tokenizer(tmp_path, 200)[0].kind == "foreign"
    size = len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"])
    assert read_tokenizer(tmp_path, size)[0].kind == "foreign"


def test_export_to_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        write_tokenizer(ByteTokenizer(), tmp_path / "file" / "inside", 64)
