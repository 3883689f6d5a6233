"""The tutorial's checkpoints: its model written again here, and imported to the same logits.

The reference model below is written from the tutorial's description; no code is shared with mygpt.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mygpt.checkpoint.model_file import Checkpoint
from mygpt.errors import InputError
from mygpt.formats.state_dicts import read_state_dict
from mygpt.formats.tensors import Imported
from mygpt.formats.torch_files import read_torch_file
from mygpt.tokenization import ByteTokenizer, CharTokenizer

V, C, H, N, L = 7, 24, 4, 2, 10
CHARS = list("\n abcd!")


# --- the tutorial's model --------------------------------------------------------------------


class Rms(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight


class Embedding(nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)


class Mha(nn.Module):
    def __init__(self, width, heads, kv_heads, window, rope):
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.W_Q = nn.Linear(width, width, bias=False)
        self.W_K = nn.Linear(width, kv_heads * self.size, bias=False)
        self.W_V = nn.Linear(width, kv_heads * self.size, bias=False)
        self.W_O = nn.Linear(width, width, bias=False)
        mask = torch.full((window, window), -math.inf).triu(1)
        self.register_buffer("causal_mask", mask)
        self.rope = rope
        if rope:
            frequencies = 10_000.0 ** (-torch.arange(0, self.size, 2) / self.size)
            angles = torch.arange(window)[:, None] * frequencies
            self.register_buffer("rope_cos", angles.cos())
            self.register_buffer("rope_sin", angles.sin())

    def turn(self, x):  # each pair of neighbours is a complex number, turned by its angle
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        turns = torch.complex(self.rope_cos, self.rope_sin)[: x.shape[2]]
        return torch.view_as_real(pairs * turns).flatten(-2)

    def forward(self, x):
        time = x.shape[1]
        q, k, v = (
            w(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for w in (self.W_Q, self.W_K, self.W_V)
        )
        if self.rope:
            q, k = self.turn(q), self.turn(k)
        group = self.heads // self.kv_heads
        mixed = []
        for head in range(self.heads):
            scores = q[:, head] @ k[:, head // group].transpose(1, 2) / math.sqrt(self.size)
            weights = (scores + self.causal_mask[:time, :time]).softmax(-1)
            mixed.append(weights @ v[:, head // group])
        return self.W_O(torch.cat(mixed, dim=-1))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        hidden = self.fc1(x)
        return self.fc2(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))


class Block(nn.Module):
    def __init__(self, width, heads, kv_heads, window, norm, rope):
        super().__init__()
        self.ln1, self.ln2 = norm(width), norm(width)
        self.mha = Mha(width, heads, kv_heads, window, rope)
        self.mlp = Mlp(width)

    def forward(self, x):
        x = x + self.mha(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class TutorialGPT(nn.Module):
    def __init__(
        self, v=V, c=C, h=H, n=N, window=L, kv=None, norm="layer", position="learned", tied=True
    ):
        super().__init__()
        kind = nn.LayerNorm if norm == "layer" else Rms
        rope = position == "rope"
        self.token_embedding = Embedding(v, c)
        if not rope:
            self.position_embedding = nn.Embedding(window, c)
        self.blocks = nn.Sequential(*[Block(c, h, kv or h, window, kind, rope) for _ in range(n)])
        self.ln_f = kind(c)
        if not tied:
            self.head = nn.Linear(c, v, bias=False)
        self.tied = tied
        self.config = {
            "vocab_size": v,
            "embed_dim": c,
            "num_heads": h,
            "num_layers": n,
            "max_seq_len": window,
        }
        self.later = {"num_kv_heads": kv or h, "norm_type": norm, "position_type": position}

    def forward(self, ids):
        x = self.token_embedding.embedding(ids)
        if hasattr(self, "position_embedding"):
            x = x + self.position_embedding.weight[: ids.shape[1]]
        x = self.ln_f(self.blocks(x))
        return x @ (self.token_embedding.embedding if self.tied else self.head).weight.T


def tutorial_model(**options) -> TutorialGPT:
    torch.manual_seed(5)
    model = TutorialGPT(**options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases get numbers of their own
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def bundle(model: TutorialGPT, **changes) -> dict:
    content = {
        "model_state_dict": model.state_dict(),
        "tokenizer_chars": CHARS,
        "config": model.config | model.later,
        "tokenizer_kind": "char",
        "tokenizer_state": {"chars": CHARS},
    }
    content |= changes
    return {name: value for name, value in content.items() if value is not None}


def saved(path: Path, content) -> Path:
    torch.save(content, path)
    return path


def assert_same_logits(found: Imported, model: TutorialGPT) -> None:
    built = Checkpoint(Path("x"), found.config, found.tokenizer, found.arrays, {}).build_model()
    ids = torch.randint(0, model.config["vocab_size"], (3, model.config["max_seq_len"]))
    with torch.no_grad():
        logits, _ = built.eval()(ids)
        expected = model(ids)
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-5
    assert all(array.dtype == np.float32 for array in found.arrays.values())


# --- imports ---------------------------------------------------------------------------------

SHAPES = {
    "chapter 18": {},
    "rms": {"norm": "rms"},
    "rope": {"position": "rope"},
    "grouped": {"kv": 2},
    "one key": {"kv": 1, "position": "rope"},
    "modern": {"kv": 2, "norm": "rms", "position": "rope"},
    "untied": {"tied": False, "norm": "rms"},
}
every_shape = pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)


@every_shape
def test_a_bundle_imports_to_the_same_logits(tmp_path, options):
    model = tutorial_model(**options)
    path = saved(tmp_path / "model.ckpt", bundle(model))
    found = read_state_dict(path)
    assert_same_logits(found, model)
    assert found.notes == []
    assert (found.config.eps, found.config.rope_base) == (1e-5, 10_000.0)
    assert (found.config.mlp, found.config.mlp_bias) == ("gelu", True)
    assert found.tokenizer.to_state() == CharTokenizer(CHARS).to_state()
    assert found.origin == {"format": "tutorial", "file": "model.ckpt"}
    json.dumps(found.origin)


@every_shape
def test_a_bare_state_dict_imports_with_the_number_of_heads(tmp_path, options):
    model = tutorial_model(**options)
    path = saved(tmp_path / "shakespeare_gpt.pt", model.state_dict())
    CharTokenizer(CHARS).save(tmp_path / "shakespeare_tokenizer.json")
    CharTokenizer("xyz").save(tmp_path / "other_tokenizer.json")
    found = read_state_dict(path, num_heads=H)
    assert_same_logits(found, model)
    assert found.notes == ["the tokenizer is shakespeare_tokenizer.json in the same folder"]


def test_the_first_bundles_had_neither_kinds_nor_groups(tmp_path):
    """Those of chapter 18: five fields in config, and characters alone."""
    model = tutorial_model()
    content = bundle(model, config=model.config, tokenizer_kind=None, tokenizer_state=None)
    found = read_state_dict(saved(tmp_path / "a.ckpt", content))
    assert_same_logits(found, model)
    assert found.config.is_tutorial_block


def test_the_shakespeare_model_has_its_207_296_parameters(tmp_path):
    model = TutorialGPT(v=65, c=64, h=4, n=4, window=64)
    path = saved(tmp_path / "shakespeare_gpt.pt", model.state_dict())
    CharTokenizer(map(chr, range(65, 130))).save(tmp_path / "shakespeare_tokenizer.json")
    found = read_state_dict(path)
    assert found.config.num_parameters() == 207_296
    assert found.config.is_tutorial_block
    assert found.config.num_heads == 4
    assert "num_heads=4 is assumed" in found.notes[0]


def test_the_words_of_chapter_14_are_shown_by_their_first_letters(tmp_path):
    """`trained_gpt.pt` is older than tokenizers: its four ids are words."""
    model = TutorialGPT(v=4, c=8, h=2, n=2, window=64)
    found = read_state_dict(saved(tmp_path / "trained_gpt.pt", model.state_dict()))
    assert found.config.num_parameters() == 2_240
    assert (found.config.num_heads, found.tokenizer.decode([0, 1, 2, 3])) == (2, "IlA!")
    assert "I love AI !" in found.notes[1]


def test_a_rotary_table_gives_the_number_of_heads(tmp_path):
    model = tutorial_model(h=6, kv=3, position="rope")
    found = read_state_dict(
        saved(tmp_path / "a.pt", model.state_dict()), tokenizer=CharTokenizer(CHARS)
    )
    assert found.config.num_heads == 6
    assert found.notes == []
    assert_same_logits(found, model)


def test_a_table_of_another_layout_does_not_give_the_number_of_heads(tmp_path):
    """Each angle twice, as others write it, would halve the number of heads."""
    state = tutorial_model(position="rope").state_dict()
    for n in range(N):
        name = f"blocks.{n}.mha.rope_cos"
        state[name] = torch.cat([state[name], state[name]], dim=-1)
    found = read_state_dict(saved(tmp_path / "a.pt", state), tokenizer=CharTokenizer(CHARS))
    assert found.config.num_heads == 4
    assert "is assumed" in found.notes[0]


def test_a_head_that_is_the_embedding_is_tied_and_a_compiled_model_is_the_same(tmp_path):
    model = tutorial_model()
    state = model.state_dict()
    state["lm_head.weight"] = state["token_embedding.embedding.weight"]
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
    found = read_state_dict(saved(tmp_path / "a.ckpt", bundle(model, model_state_dict=compiled)))
    assert found.config.tied
    assert_same_logits(found, model)


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "model.", "net.gpt."])
def test_prefixes_of_wrappers_are_removed_from_tensor_names(tmp_path, prefix):
    model = tutorial_model()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    bundled = saved(tmp_path / "a.ckpt", bundle(model, model_state_dict=state))
    bare = saved(tmp_path / "a.pt", state)
    assert_same_logits(read_state_dict(bundled), model)
    assert_same_logits(read_state_dict(bare, num_heads=H, tokenizer=CharTokenizer(CHARS)), model)
    del state[f"{prefix}ln_f.weight"]
    with pytest.raises(InputError, match=rf"no tensor '{prefix}ln_f.weight'"):
        read_state_dict(saved(tmp_path / "b.ckpt", bundle(model, model_state_dict=state)))


def test_half_precision_becomes_the_same_numbers(tmp_path):
    model = tutorial_model().bfloat16()
    found = read_state_dict(saved(tmp_path / "a.ckpt", bundle(model)))
    assert found.notes == []
    name = "position_embedding.weight"
    assert np.array_equal(found.arrays[name], model.state_dict()[name].float().numpy())


def test_an_old_torch_file_is_read_too(tmp_path):
    model = tutorial_model()
    path = tmp_path / "old.ckpt"
    torch.save(bundle(model), path, _use_new_zipfile_serialization=False)
    assert_same_logits(read_state_dict(path), model)


def test_imported_arrays_do_not_depend_on_the_file(tmp_path):
    """Tensors come from a mapped file: a copy must be taken before it may change."""
    model = tutorial_model()
    path = saved(tmp_path / "a.ckpt", bundle(model))
    found = read_state_dict(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_logits(found, model)


def test_unknown_fields_give_a_note(tmp_path):
    model = tutorial_model()
    config = model.config | {"activation": "relu"}
    found = read_state_dict(saved(tmp_path / "a.ckpt", bundle(model, config=config)))
    assert len(found.notes) == 1
    assert "'activation'" in found.notes[0]


# --- refusals --------------------------------------------------------------------------------


def refused(call, *args, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert message.isprintable(), message  # one line
    assert ": " in message
    return message


def without(name: str) -> dict:
    return {k: v for k, v in tutorial_model().state_dict().items() if k != name}


def with_tensor(name: str, value) -> dict:
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
    "3 is of type Tensor, not a plain tensor with a name": tutorial_model().state_dict()
    | {3: torch.ones(3)},
}


@pytest.mark.parametrize("expected", STATES)
def test_tensors_that_do_not_fit_are_named(tmp_path, expected):
    path = saved(tmp_path / "a.ckpt", bundle(tutorial_model(), model_state_dict=STATES[expected]))
    assert expected in refused(read_state_dict, path)


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
}  # fmt: skip


@pytest.mark.parametrize("expected", FIELDS)
def test_fields_that_do_not_fit_are_named(tmp_path, expected):
    content = bundle(tutorial_model(), **FIELDS[expected])
    message = refused(read_state_dict, saved(tmp_path / "a.ckpt", content))
    assert expected in message
    assert "a.ckpt" in message


def test_impossible_numbers_of_heads_are_refused(tmp_path):
    bare = saved(tmp_path / "a.pt", tutorial_model(kv=2).state_dict())
    whole = saved(tmp_path / "a.ckpt", bundle(tutorial_model()))
    tokenizer = CharTokenizer(CHARS)
    for number in (5, 0, -4, True, 2.0):
        message = refused(read_state_dict, bare, num_heads=number, tokenizer=tokenizer)
        assert "one of 1, 2, 3, 4, 6, 8, 12, 24" in message
    assert "24 rows of the queries and the 12 of the keys" in refused(
        read_state_dict, bare, num_heads=1, tokenizer=tokenizer
    )
    assert "--num-heads 2 differs from the 4 heads" in refused(read_state_dict, whole, num_heads=2)


def test_a_bare_state_dict_needs_a_window(tmp_path):
    state = {
        name: tensor
        for name, tensor in tutorial_model(position="rope").state_dict().items()
        if not name.endswith("causal_mask")
    }
    message = refused(read_state_dict, saved(tmp_path / "a.pt", state), num_heads=H)
    assert "does not show its window" in message


def test_the_tokenizer_in_the_folder_of_a_state_dict_must_be_unambiguous(tmp_path):
    path = saved(tmp_path / "model.pt", tutorial_model().state_dict())
    assert "copy the tutorial's model_tokenizer.json there" in refused(read_state_dict, path)
    (tmp_path / "a_tokenizer.json").write_text('{"chars": ["a"]}')
    assert "the tokenizer has 1 ids and the model 7" in refused(read_state_dict, path)
    (tmp_path / "b_tokenizer.json").write_text('{"chars": ["b"]}')
    message = refused(read_state_dict, path)
    assert "has several tokenizers (a_tokenizer.json, b_tokenizer.json)" in message
    (tmp_path / "model_tokenizer.json").write_text('{"chars": ["a"], "merges": []}')
    assert "its tokenizer is 'bpe'" in refused(read_state_dict, path)
    (tmp_path / "model_tokenizer.json").write_text("[")
    assert "is not a tokenizer's JSON" in refused(read_state_dict, path)
    assert "257 ids" in refused(read_state_dict, path, tokenizer=ByteTokenizer())


# --- files that are damaged, foreign or hostile ------------------------------------------------


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_the_hostile_pickle_works_where_pickles_are_trusted(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", ["zip", "old", "plain", "inside", "object"])
def test_a_malicious_file_runs_nothing(tmp_path, way):
    marker, path = tmp_path / "ran", tmp_path / "shakespeare_gpt.pt"
    content = bundle(tutorial_model())
    if way == "zip":
        torch.save(Evil(marker), path)
    elif way == "old":
        torch.save(Evil(marker), path, _use_new_zipfile_serialization=False)
    elif way == "plain":
        path.write_bytes(pickle.dumps(Evil(marker)))
    elif way == "inside":
        torch.save(content | {"notes": Evil(marker)}, path)
    else:
        torch.save(nn.Linear(2, 2), path)  # a whole module is code too
    for call in (read_state_dict,):
        message = refused(call, path)
        said = {"plain": "Unsupported operand", "object": "Linear, code that"}
        assert (
            said.get(way, "mkdir, code that a model does not need, and was not loaded") in message
        )
    assert not marker.exists()


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    for content in (b"", b"x", b"cos\nsystem\n", b"hello, world", b"GGUF1234"):
        path.write_bytes(content)
        assert "is not a torch file" in refused(read_state_dict, path)
    for content in ([1, 2], {"weights": torch.ones(2)}, torch.ones(2), "text"):
        saved(path, content)
        assert "is of no known format" in refused(read_state_dict, path)
    assert "Is a directory" in refused(read_state_dict, tmp_path)
    assert "No such file" in refused(read_state_dict, tmp_path / "none.pt")
    os.mkfifo(tmp_path / "pipe.pt")


def test_a_compressed_file_is_not_unpacked(tmp_path):
    """A few kilobytes could become any number of gigabytes."""
    import zipfile

    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(10**6))
    assert "compressed record, 'a/data.pkl'" in refused(read_torch_file, path)


def test_every_truncation_is_detected(tmp_path):
    whole = {}
    for new in (True, False):
        torch.save(bundle(tutorial_model(n=1)), tmp_path / "x", _use_new_zipfile_serialization=new)
        whole[new] = (tmp_path / "x").read_bytes()
    for data in whole.values():
        for place in [*range(2, 40), *range(40, len(data) - 1, len(data) // 40), len(data) - 1]:
            (tmp_path / "x").write_bytes(data[:place])
            refused(read_state_dict, tmp_path / "x")


def test_no_damage_ends_in_a_traceback(tmp_path):
    """A flipped bit gives a short error, unless it is in a part that is not read."""
    model = tutorial_model(n=1)
    data = saved(tmp_path / "x", bundle(model)).read_bytes()
    draw, refusals = random.Random(3), []
    for _ in range(120):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "x").write_bytes(damaged)
        found = None
        try:
            found = read_state_dict(tmp_path / "x")
        except InputError as error:
            refusals.append(str(error))
        if found is not None:
            assert_same_logits(found, model)
    assert len(refusals) > 60
    assert all(message.isprintable() for message in refusals)
