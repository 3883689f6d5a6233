"""Files of torch.save: of mygpt.GPT, of the tutorial and of nanoGPT, imported to the same logits.

`reference_models.py` has the models of the other two.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hugging_face_samples import characters
from mygpt import GPT, VOCAB
from mygpt.checkpoint.model_file import Checkpoint, load_checkpoint, model_arrays
from mygpt.formats import Imported, import_checkpoint, read_foreign
from mygpt.tokenization import ByteTokenizer, CharTokenizer
from reference_models import NanoGPT, TutorialGPT
from refusals import refusal
from shapes import CONFIGS, MODERN, build

V, C, H, N, L = 7, 24, 4, 2, 10  # of the tutorial's model in these tests
CHARS = list("\n abcd!")
NANO_CHARS = list("\n !abcdefé")
NANO = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 11, "vocab_size": 10}
MANY = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?-+*/=<>()[]{}"


def spread(model: nn.Module) -> nn.Module:
    """The model with random numbers in all parameters, also those of norms and biases."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def tutorial_model(**options) -> TutorialGPT:
    torch.manual_seed(5)
    return spread(TutorialGPT(**options))


def nanogpt_model(bias=True, **changes) -> NanoGPT:
    torch.manual_seed(7)
    return spread(NanoGPT(**NANO | changes, bias=bias))


def small_model(vocab_size=4, num_layers=1) -> GPT:
    """A mygpt.GPT."""
    return GPT(vocab_size, embed_dim=8, num_heads=2, num_layers=num_layers, max_seq_len=16)


def bundle(model: TutorialGPT) -> dict:
    """What the tutorial saves."""
    return {
        "model_state_dict": model.state_dict(),
        "tokenizer_chars": CHARS,
        "config": model.config | model.later,
        "tokenizer_kind": "char",
        "tokenizer_state": {"chars": CHARS},
    }


def nanogpt_file(gpt: NanoGPT, bias=True) -> dict:
    """What nanoGPT's train.py saves."""
    optimizer = torch.optim.AdamW(gpt.parameters())
    F.cross_entropy(gpt(torch.tensor([[1, 2]])).flatten(0, 1), torch.tensor([2, 3])).backward()
    optimizer.step()
    vocab_size = gpt.lm_head.weight.shape[0]
    return {
        "model": gpt.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": NANO | {"vocab_size": vocab_size, "bias": bias, "dropout": 0.2},
        "iter_num": 500,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "compile": True, "betas": (0.9, 0.95)},
    }


def meta(chars=NANO_CHARS, **changes) -> dict:
    """What nanoGPT's data/shakespeare_char/prepare.py writes."""
    itos = dict(enumerate(chars))
    stoi = {c: i for i, c in itos.items()}
    return {"vocab_size": len(chars), "itos": itos, "stoi": stoi} | changes


def saved(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def saved_nano(path: Path, content: dict, meta_at: str = "meta.pkl") -> Path:
    """With a vocabulary, `meta_at` relative to its folder."""
    place = path.parent / meta_at
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(pickle.dumps(meta()))
    return saved(path, content)


def read(path: Path, **options) -> Imported:
    return read_foreign(str(path), **options)


def refused(path: Path, **options) -> str:
    return refusal(read, path, **options)


def assert_same_logits(found: Imported, model: nn.Module) -> None:
    built = Checkpoint(Path("x"), found.config, found.tokenizer, found.arrays, {}).build_model()
    ids = torch.randint(0, found.config.vocab_size, (3, found.config.max_seq_len))
    with torch.no_grad():
        logits, expected = built.eval()(ids)[0], model.eval()(ids)
        expected = expected[0] if isinstance(expected, tuple) else expected
        expected = expected[..., : found.config.vocab_size]
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() < 1e-5 * max(1.0, expected.std().item())
    assert all(array.dtype == np.float32 for array in found.arrays.values())


def notes_without_heads(found: Imported) -> list[str]:
    return [note for note in found.notes if "num_heads" not in note]


# --- the tutorial's --------------------------------------------------------------------------

SHAPES = {
    "chapter 18": {},
    "rms": {"norm": "rms"},
    "rope": {"position": "rope"},
    "grouped": {"kv": 2},
    "one key": {"kv": 1, "position": "rope"},
    "modern": {"kv": 2, "norm": "rms", "position": "rope"},
    "untied": {"tied": False, "norm": "rms"},
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_a_tutorials_model_imports_to_the_same_logits(tmp_path, options):
    """As a bundle, and as a bare state dict with the number of heads and a tokenizer's file."""
    model = tutorial_model(**options)
    found = read(saved(tmp_path / "model.ckpt", bundle(model)))
    assert_same_logits(found, model)
    assert found.notes == []
    assert (found.config.eps, found.config.rope_base) == (1e-5, 10_000.0)
    assert (found.config.mlp, found.config.mlp_bias) == ("gelu", True)
    assert found.tokenizer.to_state() == CharTokenizer(CHARS).to_state()
    assert found.origin == {"format": "tutorial", "file": "model.ckpt"}
    json.dumps(found.origin)

    CharTokenizer(CHARS).save(tmp_path / "shakespeare_tokenizer.json")
    CharTokenizer("xyz").save(tmp_path / "other_tokenizer.json")
    found = read(saved(tmp_path / "shakespeare_gpt.pt", model.state_dict()), num_heads=H)
    assert_same_logits(found, model)
    assert found.notes == ["the tokenizer is shakespeare_tokenizer.json in the same folder"]


def test_the_first_bundles_had_neither_kinds_nor_groups(tmp_path):
    """Those of chapter 18: five fields in config, and characters alone."""
    model = tutorial_model()
    content = bundle(model) | {"config": model.config}
    del content["tokenizer_kind"], content["tokenizer_state"]
    found = read(saved(tmp_path / "a.ckpt", content))
    assert_same_logits(found, model)
    assert found.config.is_tutorial_block


@pytest.mark.parametrize("kind", [TutorialGPT, GPT])
def test_the_shakespeare_model_has_its_207_296_parameters(tmp_path, kind):
    model = kind(65, 64, 4, 4, 64)
    path = saved(tmp_path / "shakespeare_gpt.pt", model.state_dict())
    CharTokenizer(MANY[:65]).save(tmp_path / "shakespeare_tokenizer.json")
    found = read(path)
    assert found.config.num_parameters() == 207_296
    assert found.config.is_tutorial_block
    assert found.tokenizer.decode([0, 1]) == "ab"
    assert_same_logits(found, model)
    assert found.config.num_heads == 4
    assert "num_heads=4 is assumed" in found.notes[0]


@pytest.mark.parametrize("kind", [TutorialGPT, GPT])
def test_the_words_of_chapter_14_are_its_tokens(tmp_path, kind):
    """`trained_gpt.pt` is older than tokenizers: its four ids are words."""
    model = kind(len(VOCAB), 8, 2, 2, 64)
    path = saved(tmp_path / "trained_gpt.pt", model.state_dict())
    written, notes = import_checkpoint(str(path), tmp_path / "out")
    loaded, tokenizer = load_checkpoint(written)
    assert loaded.config.num_parameters() == 2_240
    assert (loaded.config.num_heads, tokenizer.decode([0, 1, 2, 3])) == (2, "I love AI !")
    assert "num_heads=2 is assumed" in notes[0]
    assert "I love AI !" in notes[1]


def test_a_rotary_table_gives_the_number_of_heads_unless_it_has_another_layout(tmp_path):
    """Each angle twice, as others write it, would halve the number of heads."""
    model = tutorial_model(h=6, kv=3, position="rope")
    tokenizer = CharTokenizer(CHARS)
    found = read(saved(tmp_path / "a.pt", model.state_dict()), tokenizer=tokenizer)
    assert (found.config.num_heads, found.notes) == (6, [])
    assert_same_logits(found, model)
    state = tutorial_model(position="rope").state_dict()
    for n in range(N):
        name = f"blocks.{n}.mha.rope_cos"
        state[name] = torch.cat([state[name], state[name]], dim=-1)
    found = read(saved(tmp_path / "a.pt", state), tokenizer=tokenizer)
    assert found.config.num_heads == 4
    assert "is assumed" in found.notes[0]


def test_a_head_that_is_the_embedding_is_tied(tmp_path):
    model = tutorial_model()
    state = model.state_dict()
    state["lm_head.weight"] = state["token_embedding.embedding.weight"]
    found = read(saved(tmp_path / "a.ckpt", bundle(model) | {"model_state_dict": state}))
    assert found.config.tied
    assert_same_logits(found, model)


def test_an_old_torch_file_is_read_too(tmp_path):
    model = tutorial_model()
    torch.save(bundle(model), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert_same_logits(read(tmp_path / "old.ckpt"), model)


def test_imported_arrays_do_not_depend_on_the_file(tmp_path):
    """Tensors come from a mapped file: a copy must be taken before it may change."""
    model = tutorial_model()
    path = saved(tmp_path / "a.ckpt", bundle(model))
    found = read(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_logits(found, model)


def test_unknown_fields_give_a_note(tmp_path):
    model = tutorial_model()
    config = model.config | {"activation": "relu"}
    (note,) = read(saved(tmp_path / "a.ckpt", bundle(model) | {"config": config})).notes
    assert "'activation'" in note


def without(name: str) -> dict:
    return {k: v for k, v in tutorial_model().state_dict().items() if k != name}


def with_tensor(name: object, value: object) -> dict:
    return tutorial_model().state_dict() | {name: value}


STATES = {
    "no tensor 'blocks.1.mha.W_V.weight'": without("blocks.1.mha.W_V.weight"),
    "says norm='layer', and its tensors have rms": without("ln_f.bias"),
    "tensor 'blocks.0.mlp.fc1.weight' has shape (96, 23), and its configuration needs (96, 24)": (
        with_tensor("blocks.0.mlp.fc1.weight", torch.zeros(96, 23))
    ),
    "'ln_f.weight' is of type list, not a plain tensor": with_tensor("ln_f.weight", [1.0] * C),
    "tensor 'ln_f.weight' has the number type 'int64'": with_tensor(
        "ln_f.weight", torch.zeros(C, dtype=torch.int64)
    ),
    "'ln_f.weight' is a sparse": with_tensor("ln_f.weight", torch.ones(C).to_sparse()),
    "'ln_f.weight' is a tensor without values": with_tensor(
        "ln_f.weight", torch.ones(C, device="meta")
    ),
    "'ln_f.weight' is an expanded view, larger than its stored values": with_tensor(
        "ln_f.weight", torch.ones(1).expand(C)
    ),
    "tensor 'gate.weight' is not part of the model": with_tensor("gate.weight", torch.ones(3)),
    "num_layers=2, and its tensors have 3": with_tensor("blocks.2.ln1.weight", torch.ones(C)),
    "no tensor 'blocks.1'": {
        k.replace("blocks.1", "blocks.7"): v for k, v in tutorial_model().state_dict().items()
    },
    "has shape (9, 24), and its configuration needs (10, 24)": with_tensor(
        "position_embedding.weight", torch.ones(9, C)
    ),
    "does not hold a state dict": {},
    "twice": with_tensor("_orig_mod.ln_f.weight", torch.ones(C)),
    "3 is of type Tensor, not a plain tensor with a name": with_tensor(3, torch.ones(3)),
}


def shape(**changes) -> dict:
    return {"config": tutorial_model().config | changes}


FIELDS = {
    "has no config": {"config": None},
    "norm='batch', and its tensors have layer": shape(norm_type="batch"),
    "position='alibi', and its tensors have learned": shape(position_type="alibi"),
    "num_heads=5 does not divide the 24 rows of the queries": shape(num_heads=5),
    "num_kv_heads=3, and its tensors have 4": shape(num_kv_heads=3),
    "num_heads='four' does not divide": shape(num_heads="four"),
    "'num_heads' in its config is of type Tensor": shape(num_heads=torch.ones(2)),
    "num_layers=1000000000, and its tensors have 2": shape(num_layers=10**9),
    "max_seq_len=1000000000, and its tensors have 10": shape(max_seq_len=10**9),
    "vocab_size=8, and its tensors have 7": shape(vocab_size=8),
    "the tokenizer has 3 ids and the model 7": {"tokenizer_state": {"chars": list("abc")}},
    "chars must be distinct single characters": {"tokenizer_state": {"chars": list("aabcdef")}},
    "has no tokenizer_chars": {"tokenizer_state": None, "tokenizer_chars": 7},
    "its tokenizer is 'bpe', and only one of characters": {"tokenizer_kind": "bpe"},
    "its tokenizer is 'words', and only one of characters": {"tokenizer_kind": "words"},
    **{expected: {"model_state_dict": state} for expected, state in STATES.items()},
}  # fmt: skip


def test_impossible_numbers_of_heads_are_refused(tmp_path):
    bare = saved(tmp_path / "a.pt", tutorial_model(kv=2).state_dict())
    bundled = saved(tmp_path / "a.ckpt", bundle(tutorial_model()))
    tokenizer = CharTokenizer(CHARS)
    for number in (5, 0, -4, True, 2.0):
        message = refused(bare, num_heads=number, tokenizer=tokenizer)
        assert "one of 1, 2, 3, 4, 6, 8, 12, 24" in message
    message = refused(bare, num_heads=1, tokenizer=tokenizer)
    assert "24 rows of the queries and the 12 of the keys" in message
    assert "--num-heads 2 differs from the 4 heads" in refused(bundled, num_heads=2)


def test_a_bare_state_dict_needs_a_window(tmp_path):
    state = tutorial_model(position="rope").state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.endswith("causal_mask")}
    message = refused(saved(tmp_path / "a.pt", state), num_heads=H)
    assert "does not show its window" in message


def test_the_tokenizer_in_the_folder_of_a_state_dict_must_be_unambiguous(tmp_path):
    path = saved(tmp_path / "model.pt", tutorial_model().state_dict())
    assert "copy the tutorial's model_tokenizer.json there" in refused(path)
    (tmp_path / "a_tokenizer.json").write_text('{"chars": ["a"]}')
    assert "the tokenizer has 1 ids and the model 7" in refused(path)
    (tmp_path / "b_tokenizer.json").write_text('{"chars": ["b"]}')
    assert "has several tokenizers (a_tokenizer.json, b_tokenizer.json)" in refused(path)
    (tmp_path / "model_tokenizer.json").write_text('{"chars": ["a"], "merges": []}')
    assert "its tokenizer is 'bpe'" in refused(path)
    (tmp_path / "model_tokenizer.json").write_text("[")
    assert "is not a tokenizer's JSON" in refused(path)
    assert "257 ids" in refused(path, tokenizer=ByteTokenizer())


# --- nanoGPT's -------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_imports_to_the_same_logits(tmp_path, bias):
    model = nanogpt_model(bias)
    path = saved_nano(tmp_path / "ckpt.pt", nanogpt_file(model, bias))
    for place in (path, tmp_path):
        found = read(place)
        assert_same_logits(found, model)
    assert (found.config.tied, found.config.mlp, found.config.dropout) == (True, "gelu", 0.2)
    assert found.tokenizer.to_state() == CharTokenizer(NANO_CHARS).to_state()
    assert found.notes == [f"the vocabulary was read from {tmp_path / 'meta.pkl'}"]
    assert found.origin == {
        "format": "nanogpt", "file": "ckpt.pt", "step": 500, "val_loss": 1.5
    }  # fmt: skip


@pytest.mark.parametrize(
    "place",
    ["meta.pkl", "../data/shakespeare_char/meta.pkl", "data/shakespeare_char/meta.pkl",
     "../../../../data/shakespeare_char/meta.pkl"],
)  # fmt: skip
def test_the_vocabulary_is_found_where_nanogpt_keeps_it(tmp_path, monkeypatch, place):
    """The last is below the working folder."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / ("far/away/else/out" if place.count("..") > 1 else "out")
    path = saved_nano(out / "ckpt.pt", nanogpt_file(nanogpt_model()), place)
    assert read(path).tokenizer.decode([3, 9]) == "aé"
    found = read(path, tokenizer=CharTokenizer("0123456789"))
    assert found.tokenizer.decode([3]) == "3"


@pytest.mark.parametrize("name", ["../../secret", "/secret", "a/../../secret", "C:\\x", "..\\x"])
def test_a_datasets_name_cannot_lead_to_another_folder(tmp_path, name):
    content = nanogpt_file(nanogpt_model()) | {"config": {"dataset": name}}
    path = saved_nano(tmp_path / "repo/out/ckpt.pt", content, "../secret/meta.pkl")
    (tmp_path / "repo/out/data/a").mkdir(parents=True)
    (tmp_path / "repo/data").mkdir()
    assert "has no vocabulary: copy the meta.pkl of its dataset" in refused(path)


def test_a_checkpoint_of_early_2023_has_gpt2s_gelu(tmp_path):
    """Then model_args had no bias, attention kept its mask, and GELU was the tanh one."""
    model = nanogpt_model(tanh=True)
    content = nanogpt_file(model)
    del content["model_args"]["bias"], content["config"]
    for n in range(NANO["n_layer"]):
        content["model"][f"transformer.h.{n}.attn.bias"] = torch.ones(1, 1, 11, 11).tril()
    found = read(saved_nano(tmp_path / "ckpt.pt", content))
    assert_same_logits(found, model)
    assert "tanh" in found.notes[0]


def test_a_separate_head_is_kept(tmp_path):
    model = nanogpt_model()
    model.lm_head.weight = nn.Parameter(torch.randn(len(NANO_CHARS), NANO["n_embd"]))
    found = read(saved_nano(tmp_path / "ckpt.pt", nanogpt_file(model)))
    assert not found.config.tied
    assert_same_logits(found, model)


def test_rows_that_pad_the_vocabulary_are_dropped(tmp_path):
    """nanoGPT pads to a multiple of 64: GPT-2's 50,257 ids become 50,304 rows."""
    model = nanogpt_model(vocab_size=320)
    path = saved(tmp_path / "ckpt.pt", nanogpt_file(model))
    found = read(path, tokenizer=ByteTokenizer())
    assert found.config.vocab_size == 257
    assert found.arrays["token_embedding.weight"].shape == (257, 24)
    assert found.notes == ["ids 257 to 319 only pad the vocabulary and were dropped"]
    assert_same_logits(found, model)


def args(**changes) -> dict:
    values = NANO | {"bias": True, "dropout": 0.0} | changes
    return {"model_args": {k: v for k, v in values.items() if v is not None}}


def state(name: str, tensor) -> dict:
    values = nanogpt_model().state_dict() | {name: tensor}
    return {"model": {k: v for k, v in values.items() if v is not None}}


WRONG = {
    "is of no known format": {"model_args": None},
    "does not hold a state dict": {"model": {}},
    "of type list": {"model_args": NANO | {"bias": [1]}},
    "has no model_args": {"model_args": [1]},
    "its model_args has no n_head": args(n_head=None),
    "its model_args has 'use_rmsnorm', which nanoGPT does not have": args(use_rmsnorm=True),
    "bias='yes'": args(bias="yes"),
    "num_layers=3, and its tensors have 2": args(n_layer=3),
    "num_heads=5 does not divide the 24 rows": args(n_head=5),
    "max_seq_len=1000000000, and its tensors have 11": args(block_size=10**9),
    "dropout=2.0 must be": args(dropout=2.0),
    "attention_bias=False, and its tensors have True": args(bias=False),
    "norm='layer', and its tensors have rms": state("transformer.ln_f.bias", None),
    "no tensor 'transformer.wte.weight'": state("transformer.wte.weight", None),
    "tensor 'transformer.h.1.attn.c_attn.weight' has shape (24, 72)": (
        state("transformer.h.1.attn.c_attn.weight", torch.zeros(24, 72))
    ),
    "'iter' is of type int, not a plain tensor": state("iter", 3),
}


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_gpt2s_vocabulary_must_be_given(tmp_path, vocab_size):
    model = NanoGPT(1, 1, 2, 4, vocab_size, bias=True)
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 4, "vocab_size": vocab_size}
    content = {"model": model.state_dict(), "model_args": sizes | {"bias": True}}
    path = saved(tmp_path / "ckpt.pt", content)
    assert "give GPT-2's tokenizer.json with --tokenizer PATH" in refused(path)
    message = refused(path, tokenizer=ByteTokenizer())
    assert f"the tokenizer has 257 ids and the model {vocab_size}" in message


METAS = {
    "has no itos": [{"stoi": {}}, [1], "text", {"itos": {}}, {"itos": 3}],
    "the ids of itos are not 0 to": [meta(itos={1: "a"}), meta(itos={0: "a", "1": "b"})],
    "are not single characters": [meta(["a", "bc"]), meta(["a", 5]), meta(["a", ""])],
    "stoi and itos do not agree": [meta(stoi={}), meta(stoi=[[[]]])],
    "vocab_size and itos do not agree": [meta(vocab_size=11), meta(vocab_size="ten")],
    "distinct single characters": [meta(["a", "a"], stoi=None)],
    "lone surrogate": [meta(["a", "\ud800"])],
    "the tokenizer has 2 ids and the model 10": [meta("ab")],
}


@pytest.mark.parametrize("expected", METAS)
def test_a_vocabulary_that_is_not_one_of_characters_is_refused(tmp_path, expected):
    path = saved_nano(tmp_path / "ckpt.pt", nanogpt_file(nanogpt_model()))
    for values in METAS[expected]:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(values))
        assert expected in refused(path)


# --- mygpt.GPT's -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("place", ["bare", "model", "state_dict", "model_state_dict"])
def test_any_configuration_stored_with_its_weights_round_trips(name, place, tmp_path):
    """Also weights alone, if the tensors show learned positions and the number of heads."""
    config = CONFIGS[name]
    model = build(config)
    content, tokenizer = model.state_dict(), characters(config.vocab_size)
    if place != "bare":
        values = {**config.to_dict(), "learning_rate": 0.1}
        content = {place: content, "config": values, "step": 3, "optimizer": {"state": {}}}
    path = saved(tmp_path / "a.pt", content)
    if place == "bare" and config.position == "rotary":
        message = refused(path, tokenizer=tokenizer, num_heads=config.num_heads)
        assert "does not show its window" in message
        return
    if place == "bare" and (config.norm_eps or config.mlp == "gelu_tanh"):
        pytest.skip("its tensors do not say all")
    heads = config.num_heads if place == "bare" else None
    found = read(path, tokenizer=tokenizer, num_heads=heads)
    wanted = model_arrays(model)
    assert found.arrays.keys() == wanted.keys()
    for tensor, array in wanted.items():
        assert found.arrays[tensor].tobytes() == array.tobytes()
    assert_same_logits(found, model)
    meanings = ("kv_heads", "head_size", "mlp_hidden", "eps", "norm", "position", "mlp", "tied")
    assert all(getattr(found.config, m) == getattr(config, m) for m in meanings)
    assert found.notes == []
    assert found.origin == {"format": "mygpt", "file": "a.pt"}


def test_a_model_with_n_gram_tables_is_refused(tmp_path):
    """Models of version 0.1 could have them."""
    model = GPT.from_config(MODERN)
    tables = {"ngram_embedding.tables.0": torch.zeros(5, MODERN.embed_dim)}
    path = saved(tmp_path / "a.pt", {"model": {**model.state_dict(), **tables}})
    message = refused(path, tokenizer=characters(5))
    assert "tensor ngram_embedding.tables.0 is an n-gram input table" in message
    assert "train the model again" in message


VOCABULARIES = {
    "characters": ("chars", list("abcd"), "abcd"),
    "one text of them": ("tokenizer_chars", "abcd", "abcd"),
    "by id": ("itos", {0: "a", 1: "b", 2: "c", 3: "d"}, "abcd"),
    "by character": ("vocab", {"b": 1, "a": 0, "d": 3, "c": 2}, "abcd"),
    "words": ("vocab", ["tick", "tock", "I", "!"], "tick tock I !"),
    "a tokenizer's state": ("tokenizer", CharTokenizer("abcd").to_state(), "abcd"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_in_the_file_is_used(name, tmp_path):
    key, value, wanted = VOCABULARIES[name]
    content = {"model": small_model().state_dict(), key: value, "num_heads": 2}
    found = read(saved(tmp_path / "a.pt", content))
    assert found.tokenizer.decode([0, 1, 2, 3]) == wanted
    assert found.notes == []


def test_a_state_dict_that_is_not_complete_or_has_no_tokenizer_is_refused(tmp_path):
    state, tokenizer = small_model().state_dict(), CharTokenizer("abcd")
    path = saved(tmp_path / "a.pt", state)
    assert "has 3 ids and the model 4" in refused(path, tokenizer=CharTokenizer("abc"))
    message = refused(path, tokenizer=tokenizer, num_heads=3)
    assert "give --num-heads with one of 1, 2, 4, 8" in message
    saved(path, {name: tensor[:0] for name, tensor in state.items()})
    assert "not a model of this kind" in refused(path, tokenizer=tokenizer)
    words = {"model": small_model(3).state_dict(), "vocab": ["tick", "tock", "big boom"]}
    assert "--tokenizer" in refused(saved(path, words))
    assert "--tokenizer" in refused(saved(path, small_model(5).state_dict()))
    (tmp_path / "a_tokenizer.json").write_text(json.dumps({"chars": list("abcde")}))
    read(path)


# --- all of them -----------------------------------------------------------------------------

FILES = {
    "tutorial": (tutorial_model, bundle, "model_state_dict"),
    "nanogpt": (nanogpt_model, nanogpt_file, "model"),
    "mygpt": (small_model, lambda model: {"model": model.state_dict(), "num_heads": 2}, "model"),
}
OTHERS = {
    "vocab_size=5, and its tensors have 4": {"vocab_size": 5},
    "num_layers=9": {"num_layers": 9},
    "max_seq_len=32": {"max_seq_len": 32},
    "position='rotary'": {"position": "rotary"},
    "into heads of one size": {"num_heads": 3},
    "num_heads='x'": {"num_heads": "x"},
    "num_heads=0": {"num_heads": 0},
    "mlp='swiglu'": {"mlp": "swiglu"},
    "mlp='relu'": {"mlp": "relu"},
    "dropout=3.0": {"dropout": 3.0},
}
UNFIT = [("tutorial", *case) for case in FIELDS.items()]
UNFIT += [("nanogpt", *case) for case in WRONG.items()]
UNFIT += [
    ("mygpt", said, {"chars": "abcd", "config": {"num_heads": 2} | config})
    for said, config in OTHERS.items()
]


@pytest.mark.parametrize(
    ("kind", "expected", "changes"),
    UNFIT,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(tmp_path, kind, expected, changes):
    make, pack, _ = FILES[kind]
    content = {k: v for k, v in (pack(make()) | changes).items() if v is not None}
    message = refused(saved_nano(tmp_path / "ckpt.pt", content))
    assert expected in message
    assert "ckpt.pt" in message


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.gpt."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", FILES)
def test_prefixes_of_wrappers_are_removed_from_tensor_names(tmp_path, kind, prefix):
    """And messages name the tensors as the file does."""
    make, pack, key = FILES[kind]
    model = make()
    content = pack(model)
    content[key] = {prefix + name: tensor for name, tensor in content[key].items()}
    first = next(iter(content[key]))
    tokenizer = characters(content[key][first].shape[0])
    path = saved(tmp_path / "a.ckpt", content)
    assert_same_logits(read(path, tokenizer=tokenizer), model)
    if kind == "tutorial":
        saved(path, content[key])
        assert_same_logits(read(path, tokenizer=tokenizer, num_heads=H), model)
    norm = next(name for name in content[key] if name.endswith(("mlp_norm.weight", "ln_f.weight")))
    whole = content[key].pop(norm)
    assert f"no tensor '{norm}'" in refused(saved(path, content), tokenizer=tokenizer)
    content[key] |= {norm: whole[:3]}
    assert f"tensor '{norm}' has shape (3,)" in refused(saved(path, content), tokenizer=tokenizer)
    content[key] |= {norm: whole, f"{prefix}gate.weight": whole}
    message = refused(saved(path, content), tokenizer=tokenizer)
    assert f"tensor '{prefix}gate.weight' is not part of the model" in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", FILES)
def test_other_number_types_are_converted_and_rounding_gives_a_note(tmp_path, kind, dtype):
    make, pack, _ = FILES[kind]
    model = make().to(dtype)
    vocab_size = next(model.parameters()).shape[0]
    path = saved(tmp_path / "a.ckpt", pack(model))
    found = read(path, tokenizer=characters(vocab_size))
    rounded = ["weights of type float64 are rounded to float32"] * (dtype == torch.float64)
    assert notes_without_heads(found) == rounded
    embedding = next(iter(model.state_dict().values())).float().numpy()
    assert np.array_equal(found.arrays["token_embedding.weight"], embedding)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    for content in ([1, 2], {"weights": torch.ones(2)}, torch.ones(2), "text"):
        assert "is of no known format" in refused(saved(path, content))
