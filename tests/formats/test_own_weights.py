"""State dicts of `mygpt.GPT`, as torch.save writes them, become checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mygpt import GPT, VOCAB, CharTokenizer, GPTConfig
from mygpt.checkpoint.model_file import Checkpoint, load_checkpoint, model_arrays
from mygpt.errors import InputError
from mygpt.formats import import_checkpoint, read_foreign
from shapes import CONFIGS, MODERN, build

CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?-+*/=<>()[]{}"


def characters(config: GPTConfig) -> CharTokenizer:
    return CharTokenizer([chr(0x100 + n) for n in range(config.vocab_size)])


def saved(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def refused(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        read_foreign(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same(found, model: GPT) -> None:
    wanted = model_arrays(model)
    assert found.arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found.arrays[name].dtype == array.dtype
        assert np.array_equal(found.arrays[name], array)
    built = Checkpoint(Path("x"), found.config, found.tokenizer, found.arrays, {}).build_model()
    ids = torch.randint(model.config.vocab_size, (2, model.config.max_seq_len))
    with torch.no_grad():
        assert torch.equal(built.eval()(ids)[0], model.eval()(ids)[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("place", ["bare", "model", "state_dict", "model_state_dict"])
def test_any_configuration_stored_with_its_weights_round_trips(name, place, tmp_path):
    """Also weights alone, if the tensors show learned positions and the number of heads."""
    config = CONFIGS[name]
    model = build(config)
    content = model.state_dict()
    if place != "bare":
        values = {**config.to_dict(), "learning_rate": 0.1}
        content = {place: content, "config": values, "step": 3, "optimizer": {"state": {}}}
    path = saved(tmp_path / "a.pt", content)
    tokenizer = characters(config)
    if place == "bare" and config.position == "rotary":
        message = refused(path, tokenizer=tokenizer, num_heads=config.num_heads)
        assert "does not show its window" in message
        return
    heads = config.num_heads if place == "bare" else None
    if place == "bare" and (config.norm_eps or config.mlp == "gelu_tanh"):
        pytest.skip("its tensors do not say all")
    found = read_foreign(str(path), tokenizer=tokenizer, num_heads=heads)
    same(found, model)
    meanings = ("kv_heads", "head_size", "mlp_hidden", "eps", "norm", "position", "mlp", "tied")
    assert all(getattr(found.config, m) == getattr(config, m) for m in meanings)
    assert found.notes == []
    assert found.origin == {"format": "mygpt", "file": "a.pt"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_removed_from_tensor_names(prefix, tmp_path):
    model = GPT(vocab_size=len(CHARS), embed_dim=8, num_heads=2, num_layers=2, max_seq_len=16)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = saved(tmp_path / "a.pt", state)
    same(read_foreign(str(path), tokenizer=CharTokenizer(CHARS), num_heads=2), model)


def test_a_model_with_n_gram_tables_is_refused(tmp_path):
    """Models of version 0.1 could have them."""
    model = GPT.from_config(MODERN)
    tables = {"ngram_embedding.tables.0": torch.zeros(5, MODERN.embed_dim)}
    path = saved(tmp_path / "a.pt", {"model": {**model.state_dict(), **tables}})
    message = refused(path, tokenizer=characters(MODERN))
    assert "tensor ngram_embedding.tables.0 is an n-gram input table" in message
    assert "train the model again" in message


def test_the_model_of_experiment_28_is_imported(tmp_path):
    """Four words, which are shown by their first letters: there is no tokenizer of words."""
    model = GPT(vocab_size=len(VOCAB), embed_dim=8, num_heads=2, num_layers=2, max_seq_len=64)
    path = saved(tmp_path / "trained_gpt.pt", model.state_dict())
    written, notes = import_checkpoint(str(path), tmp_path / "out")
    loaded, tokenizer = load_checkpoint(written)
    assert loaded.config == model.config
    assert tokenizer.decode([0, 1, 2, 3]) == "IlA!"
    assert any("I love AI !" in note for note in notes)
    assert any("num_heads=2 is assumed" in note for note in notes)


def test_the_shakespeare_model_of_the_experiments_uses_the_tokenizer_in_its_folder(tmp_path):
    model = GPT(vocab_size=65, embed_dim=64, num_heads=4, num_layers=4, max_seq_len=64)
    path = saved(tmp_path / "shakespeare_gpt.pt", model.state_dict())
    CharTokenizer(CHARS[:65]).save(tmp_path / "shakespeare_tokenizer.json")
    found = read_foreign(str(path))
    same(found, model)
    assert found.tokenizer.decode([0, 1]) == "ab"


VOCABULARIES = {
    "characters": ("chars", list("abcd"), "abcd"),
    "one text of them": ("tokenizer_chars", "abcd", "abcd"),
    "by id": ("itos", {0: "a", 1: "b", 2: "c", 3: "d"}, "abcd"),
    "by character": ("vocab", {"b": 1, "a": 0, "d": 3, "c": 2}, "abcd"),
    "words": ("vocab", ["I", "love", "AI", "!"], "IlA!"),
    "a tokenizer's state": ("tokenizer", CharTokenizer("abcd").to_state(), "abcd"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_in_the_file_is_used(name, tmp_path):
    key, value, wanted = VOCABULARIES[name]
    model = GPT(vocab_size=4, embed_dim=8, num_heads=2, num_layers=1, max_seq_len=16)
    path = saved(tmp_path / "a.pt", {"model": model.state_dict(), key: value, "num_heads": 2})
    found = read_foreign(str(path))
    assert found.tokenizer.decode([0, 1, 2, 3]) == wanted
    assert bool(found.notes) == (name == "words")


def test_words_with_equal_first_letters_are_refused(tmp_path):
    model = GPT(vocab_size=3, embed_dim=8, num_heads=2, num_layers=1, max_seq_len=16)
    words = {"model": model.state_dict(), "vocab": ["tick", "tock", "boom"], "num_heads": 2}
    assert "--tokenizer" in refused(saved(tmp_path / "a.pt", words))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vocab_size": 5}, "vocab_size=5, and its tensors have 4"),
        ({"num_layers": 9}, "num_layers=9"),
        ({"max_seq_len": 32}, "max_seq_len=32"),
        ({"position": "rotary"}, "position='rotary'"),
        ({"num_heads": 3}, "into heads of one size"),
        ({"num_heads": "x"}, "num_heads='x'"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"mlp": "swiglu"}, "mlp='swiglu'"),
        ({"mlp": "relu"}, "mlp='relu'"),
        ({"dropout": 3.0}, "dropout=3.0"),
    ],
)
def test_a_configuration_of_another_model_is_refused(config, said, tmp_path):
    model = GPT(vocab_size=4, embed_dim=8, num_heads=2, num_layers=1, max_seq_len=16)
    content = {"model": model.state_dict(), "chars": "abcd", "config": {"num_heads": 2} | config}
    assert said in refused(saved(tmp_path / "a.pt", content))


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    model = GPT(vocab_size=4, embed_dim=8, num_heads=2, num_layers=2, max_seq_len=16)
    tokenizer = CharTokenizer("abcd")

    def message(change, **options):
        state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        change(state)
        return refused(saved(tmp_path / "a.pt", state), tokenizer=tokenizer, **options)

    norm = "module.blocks.1.mlp_norm.weight"
    assert f"no tensor '{norm}'" in message(lambda s: s.pop(norm), num_heads=2)
    assert norm in message(lambda s: s.update({norm: torch.ones(3)}), num_heads=2)
    odd = {"module.blocks.1.gate.weight": torch.ones(3)}
    assert "is not part of the model" in message(lambda s: s.update(odd), num_heads=2)
    assert "give --num-heads with one of 1, 2, 4, 8" in message(lambda s: None, num_heads=3)
    assert "give --num-heads with one of" in message(lambda s: None, num_heads=0)


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    model = GPT(vocab_size=4, embed_dim=8, num_heads=2, num_layers=2, max_seq_len=16)
    path = saved(tmp_path / "a.pt", model.state_dict())
    assert "has 3 ids and the model 4" in refused(path, tokenizer=CharTokenizer("abc"))
    model = GPT(vocab_size=5, embed_dim=8, num_heads=2, num_layers=2, max_seq_len=16)
    assert "--tokenizer" in refused(saved(tmp_path / "b" / "b.pt", model.state_dict()))
    (tmp_path / "b" / "b_tokenizer.json").write_text(json.dumps({"chars": list("abcde")}))
    read_foreign(str(tmp_path / "b" / "b.pt"))


def test_empty_matrices_are_refused(tmp_path):
    model = GPT(vocab_size=4, embed_dim=8, num_heads=2, num_layers=1, max_seq_len=16)
    state = {name: tensor[:0] for name, tensor in model.state_dict().items()}
    path = saved(tmp_path / "a.pt", state)
    assert "not a model of this kind" in refused(path, tokenizer=CharTokenizer("abcd"))
