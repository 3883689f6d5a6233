"""nanoGPT's checkpoints: its model written again here, and imported to the same logits.

The reference model below is written from nanoGPT's layout alone and shares no code with mygpt.
"""

from __future__ import annotations

import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mygpt.checkpoint.model_file import Checkpoint
from mygpt.errors import InputError
from mygpt.formats import read_foreign
from mygpt.formats.state_dicts import read_state_dict
from mygpt.formats.tensors import Imported
from mygpt.formats.torch_files import read_plain_pickle
from mygpt.tokenization import ByteTokenizer, CharTokenizer

CHARS = list("\n !abcdefé")
SHAPE = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 11, "vocab_size": len(CHARS)}


# --- nanoGPT's model -------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        batch, time, width = x.shape
        parts = self.c_attn(x).reshape(batch, time, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) * (width // self.heads) ** -0.5
        later = torch.ones(time, time, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        return self.c_proj(torch.einsum("bhts,bhsd->bthd", weights, v).reshape(x.shape))


class Feed(nn.Module):
    def __init__(self, width, bias, tanh):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.gelu = nn.GELU("tanh" if tanh else "none")
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Layer(nn.Module):
    def __init__(self, width, heads, bias, tanh):
        super().__init__()
        self.ln_1, self.attn = Norm(width, bias), Attention(width, heads, bias)
        self.ln_2, self.mlp = Norm(width, bias), Feed(width, bias, tanh)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, bias, tanh=False):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList([Layer(n_embd, n_head, bias, tanh) for _ in range(n_layer)]),
                "ln_f": Norm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, ids):
        parts = self.transformer
        x = parts["wte"](ids) + parts["wpe"].weight[: ids.shape[1]]
        for layer in parts["h"]:
            x = layer(x)
        return self.lm_head(parts["ln_f"](x))


def nanogpt_model(bias=True, **changes) -> NanoGPT:
    torch.manual_seed(7)
    model = NanoGPT(**SHAPE | changes, bias=bias).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def checkpoint(gpt: NanoGPT, bias=True, **changes) -> dict:
    """What nanoGPT's train.py saves."""
    optimizer = torch.optim.AdamW(gpt.parameters())
    F.cross_entropy(gpt(torch.tensor([[1, 2]])).flatten(0, 1), torch.tensor([2, 3])).backward()
    optimizer.step()
    vocab_size = gpt.lm_head.weight.shape[0]
    content = {
        "model": gpt.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": SHAPE | {"vocab_size": vocab_size, "bias": bias, "dropout": 0.2},
        "iter_num": 500,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "compile": True, "betas": (0.9, 0.95)},
    }
    content |= changes
    return {name: value for name, value in content.items() if value is not None}


def meta(chars=CHARS, **changes) -> dict:
    """What nanoGPT's data/shakespeare_char/prepare.py writes."""
    itos = dict(enumerate(chars))
    return {
        "vocab_size": len(chars),
        "itos": itos,
        "stoi": {c: i for i, c in itos.items()},
    } | changes


def saved(path: Path, content, meta_at: Path | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    place = path.with_name("meta.pkl") if meta_at is None else meta_at
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(pickle.dumps(meta()))
    return path


def assert_same_logits(found: Imported, model: NanoGPT) -> None:
    built = Checkpoint(Path("x"), found.config, found.tokenizer, found.arrays, {}).build_model()
    ids = torch.randint(0, found.config.vocab_size, (3, SHAPE["block_size"]))
    with torch.no_grad():
        logits, _ = built.eval()(ids)
        expected = model(ids)[..., : found.config.vocab_size]
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-5
    assert all(array.dtype == np.float32 for array in found.arrays.values())


# --- imports ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "model."])
def test_a_checkpoint_imports_to_the_same_logits(tmp_path, bias, prefix):
    model = nanogpt_model(bias)
    content = checkpoint(model, bias)
    content["model"] = {prefix + name: tensor for name, tensor in content["model"].items()}
    path = saved(tmp_path / "ckpt.pt", content)
    for place in (path, tmp_path):
        found = read_foreign(str(place))
        assert_same_logits(found, model)
    assert found.config.tied
    assert found.config.mlp == "gelu"
    assert found.config.dropout == 0.2
    assert found.tokenizer.to_state() == CharTokenizer(CHARS).to_state()
    assert found.notes == [f"the vocabulary was read from {tmp_path / 'meta.pkl'}"]
    assert found.origin == {
        "format": "nanogpt", "file": "ckpt.pt", "step": 500, "val_loss": 1.5
    }  # fmt: skip


def test_float64_is_rounded_with_the_same_note_as_for_folders(tmp_path):
    model = nanogpt_model().double()
    content = checkpoint(model)
    found = read_state_dict(saved(tmp_path / "ckpt.pt", content))
    assert any("float64" in note and "rounded" in note for note in found.notes)
    assert found.arrays["token_embedding.weight"].dtype == np.float32


@pytest.mark.parametrize(
    "place",
    ["out/meta.pkl", "data/shakespeare_char/meta.pkl", "out/data/shakespeare_char/meta.pkl"],
)
def test_the_vocabulary_is_found_where_nanogpt_keeps_it(tmp_path, place):
    path = saved(tmp_path / "out/ckpt.pt", checkpoint(nanogpt_model()), tmp_path / place)
    assert read_state_dict(path).tokenizer.decode([3, 9]) == "aé"


def test_the_vocabulary_below_the_working_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta_at = tmp_path / "data/shakespeare_char/meta.pkl"
    path = saved(tmp_path / "far/away/out/ckpt.pt", checkpoint(nanogpt_model()), meta_at)
    assert read_state_dict(path).tokenizer.vocab_size == len(CHARS)


@pytest.mark.parametrize("name", ["../../secret", "/secret", "a/../../secret", "C:\\x", "..\\x"])
def test_a_datasets_name_cannot_lead_to_another_folder(tmp_path, name):
    content = checkpoint(nanogpt_model(), config={"dataset": name})
    path = saved(tmp_path / "repo/out/ckpt.pt", content, tmp_path / "repo/secret/meta.pkl")
    (tmp_path / "repo/out/data/a").mkdir(parents=True)
    (tmp_path / "repo/data").mkdir()
    assert "has no vocabulary" in refused(read_state_dict, path)


def test_a_checkpoint_of_early_2023_has_gpt2s_gelu(tmp_path):
    """Then model_args had no bias, attention kept its mask, and GELU was the tanh one."""
    model = nanogpt_model(tanh=True)
    content = checkpoint(model)
    del content["model_args"]["bias"], content["config"]
    for n in range(SHAPE["n_layer"]):
        content["model"][f"transformer.h.{n}.attn.bias"] = torch.ones(1, 1, 11, 11).tril()
    found = read_state_dict(saved(tmp_path / "ckpt.pt", content))
    assert_same_logits(found, model)
    assert "tanh" in found.notes[0]


def test_a_separate_head_is_kept(tmp_path):
    model = nanogpt_model()
    model.lm_head.weight = nn.Parameter(torch.randn(len(CHARS), SHAPE["n_embd"]))
    found = read_state_dict(saved(tmp_path / "ckpt.pt", checkpoint(model)))
    assert not found.config.tied
    assert_same_logits(found, model)


def test_rows_that_pad_the_vocabulary_are_dropped(tmp_path):
    """nanoGPT pads to a multiple of 64: GPT-2's 50,257 ids become 50,304 rows."""
    model = nanogpt_model(vocab_size=320)
    path = saved(tmp_path / "ckpt.pt", checkpoint(model))
    found = read_state_dict(path, tokenizer=ByteTokenizer())
    assert found.config.vocab_size == 257
    assert found.arrays["token_embedding.weight"].shape == (257, 24)
    assert found.notes == ["ids 257 to 319 only pad the vocabulary and were dropped"]
    assert_same_logits(found, model)


def test_a_given_tokenizer_is_used_in_place_of_meta(tmp_path):
    path = saved(tmp_path / "ckpt.pt", checkpoint(nanogpt_model()))
    found = read_state_dict(path, tokenizer=CharTokenizer("0123456789"))
    assert found.tokenizer.decode([3]) == "3"


# --- refusals --------------------------------------------------------------------------------


def refused(call, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.isprintable(), message  # one line
    assert ": " in message
    return message


def args(**changes) -> dict:
    values = SHAPE | {"bias": True, "dropout": 0.0} | changes
    return {"model_args": {k: v for k, v in values.items() if v is not None}}


def state(**changes) -> dict:
    names = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    values = nanogpt_model().state_dict() | names
    return {"model": {k: v for k, v in values.items() if v is not None}}


WRONG = {
    "is of no known format": {"model_args": None},
    "does not hold a state dict": {"model": {}},
    "of type list": {"model_args": SHAPE | {"bias": [1]}},
    "has no model_args": {"model_args": [1]},
    "its model_args has no n_head": args(n_head=None),
    "its model_args has 'use_rmsnorm', which nanoGPT does not have": args(use_rmsnorm=True),
    "bias='yes'": args(bias="yes"),
    "num_layers=3, and its tensors have 2": args(n_layer=3),
    "num_heads=5 does not divide the 24 rows": args(n_head=5),
    "num_heads='3'": args(n_head="3"),
    "max_seq_len=1000000000, and its tensors have 11": args(block_size=10**9),
    "dropout=2.0 must be": args(dropout=2.0),
    "attention_bias=False, and its tensors have True": args(bias=False),
    "norm='layer', and its tensors have rms": state(transformer__ln_f__bias=None),
    "no tensor 'transformer.wte.weight'": state(transformer__wte__weight=None),
    "tensor 'transformer.h.1.attn.c_attn.weight' has shape (24, 72)": (
        state(transformer__h__1__attn__c_attn__weight=torch.zeros(24, 72))
    ),
    "tensor 'transformer.h.0.attn.rotary' is not part of the model": (
        state(transformer__h__0__attn__rotary=torch.ones(2))
    ),
    "'iter' is of type int, not a plain tensor": state(iter=3),
}


@pytest.mark.parametrize("expected", WRONG)
def test_what_does_not_fit_is_named(tmp_path, expected):
    path = saved(tmp_path / "ckpt.pt", checkpoint(nanogpt_model(), **WRONG[expected]))
    message = refused(read_state_dict, path)
    assert expected in message
    assert "ckpt.pt" in message


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_gpt2s_vocabulary_must_be_given(tmp_path, vocab_size):
    model = NanoGPT(1, 1, 2, 4, vocab_size, bias=True)
    content = {
        "model": model.state_dict(),
        "model_args": {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 4, "bias": True}
        | {"vocab_size": vocab_size},
        "config": {"dataset": "openwebtext"},
    }
    torch.save(content, tmp_path / "ckpt.pt")
    message = refused(read_state_dict, tmp_path / "ckpt.pt")
    assert "give GPT-2's tokenizer.json with --tokenizer PATH" in message
    message = refused(read_state_dict, tmp_path / "ckpt.pt", tokenizer=ByteTokenizer())
    assert f"the tokenizer has 257 ids and the model {vocab_size}" in message


def test_a_missing_vocabulary_is_an_error(tmp_path):
    path = saved(tmp_path / "ckpt.pt", checkpoint(nanogpt_model()))
    (tmp_path / "meta.pkl").unlink()
    message = refused(read_state_dict, path)
    assert "copy the meta.pkl of its dataset ('shakespeare_char') into its folder" in message


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
    path = saved(tmp_path / "ckpt.pt", checkpoint(nanogpt_model()))
    for values in METAS[expected]:
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(values))
        assert expected in refused(read_state_dict, path)


# --- pickles ---------------------------------------------------------------------------------


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("inside", [True, False])
def test_a_malicious_vocabulary_runs_nothing(tmp_path, protocol, inside):
    evil = Evil(tmp_path / "ran")
    path = saved(tmp_path / "ckpt.pt", checkpoint(nanogpt_model()))
    hostile = pickle.dumps(meta(extra=evil) if inside else evil, protocol)
    (tmp_path / "meta.pkl").write_bytes(hostile)
    message = refused(read_state_dict, path)
    assert "was not loaded, since it could run code" in message
    assert not (tmp_path / "ran").exists()
    pickle.loads(hostile)
    assert (tmp_path / "ran").exists()  # so the test could have failed


def test_the_second_check_of_a_vocabulary_is_sufficient_alone(tmp_path, monkeypatch):
    """If a pickle passes the first check, it still cannot load any class or function."""
    monkeypatch.setattr("mygpt.formats.torch_files.check_pickle", lambda *a, **k: None)
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    assert "it would load posix.mkdir" in refused(read_plain_pickle, path)
    assert not (tmp_path / "ran").exists()


def test_a_malicious_checkpoint_runs_nothing(tmp_path):
    marker = tmp_path / "ran"
    path = saved(tmp_path / "ckpt.pt", checkpoint(nanogpt_model(), config={"hook": Evil(marker)}))
    for call in (read_state_dict,):
        assert "mkdir" in refused(call, path)
    assert not marker.exists()


PICKLES = {
    "pickle's STACK_GLOBAL": pickle.dumps(OrderedDict(a=1)),
    "pickle's GLOBAL": pickle.dumps(os.system, 0),
    "pickle's PERSID": b"Pname\n.",
    "pickle's INST": b"(ios\nsystem\n.",
    "pickle's EXT1": b"\x80\x02\x82\x01.",
    "pickle's BINFLOAT": pickle.dumps({0.5: "a"}),
    "is damaged (expected 1099511627776 bytes": b"\x80\x04\x8d" + (2**40).to_bytes(8, "little"),
    "is damaged (it has a memo index that is out of range)": b"\x80\x02}r\xff\xff\xff\x7f.",
    "is damaged (": b"\x80\x04}(X\x01",
    "is damaged (u": b"\x80\x02}]K\x01s.",
}


@pytest.mark.parametrize("expected", PICKLES)
def test_only_plain_values_are_unpickled(tmp_path, expected):
    path = tmp_path / "meta.pkl"
    path.write_bytes(PICKLES[expected])
    assert expected in refused(read_plain_pickle, path)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.integers() | st.text(), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=60)
@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_values_of_every_protocol_are_read(tmp_path_factory, value, protocol):
    path = tmp_path_factory.getbasetemp() / "plain.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert read_plain_pickle(path) == value


def test_a_damaged_vocabulary_ends_in_one_line(tmp_path):
    path, draw = tmp_path / "meta.pkl", random.Random(1)
    data = pickle.dumps(meta())
    for place in range(len(data)):
        path.write_bytes(data[:place])
        refused(read_plain_pickle, path)
    read = 0
    for _ in range(400):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            read_plain_pickle(path)
            read += 1
        except InputError as error:
            message = str(error)
            if not message.isprintable():
                pytest.fail(message)
    assert 0 < read < 400


def test_other_files_than_nanogpts_are_refused(tmp_path):
    assert "No such file" in refused(read_state_dict, tmp_path / "ckpt.pt")
    (tmp_path / "ckpt.pt").write_bytes(b"text")
    assert "is not a torch file" in refused(read_foreign, str(tmp_path))
    torch.save([1], tmp_path / "ckpt.pt")
    assert "is of no known format" in refused(read_foreign, str(tmp_path))
