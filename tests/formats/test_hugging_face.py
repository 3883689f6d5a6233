"""Hugging Face folders: logits are compared with transformers' for import and export.

Tokenizers have tests of their own; but for one test, a stand-in takes their place here.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hugging_face_samples import PROVENANCE, as_pickles, characters, checkpoint_of, edit, refused
from mygpt import CharTokenizer, GPTConfig, save_checkpoint
from mygpt.checkpoint.model_file import Checkpoint, read_checkpoint
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.errors import InputError, StorageError
from mygpt.formats import export_checkpoint, hugging_face
from mygpt.formats.hugging_face import read_hugging_face, write_hugging_face
from shapes import (
    CONFIGS,
    GPT2,
    LLAMA,
    MIXED,
    MODERN,
    ROTARY_LAYER_NORM,
    TUTORIAL,
    build,
    unchecked,
)

EXPORTED = {
    "tutorial": TUTORIAL,
    "tutorial with dropout": replace(TUTORIAL, dropout=0.25),
    "gpt2": GPT2,
    "gpt2 untied": replace(GPT2, tied=False),
    "odd": CONFIGS["odd"],
    "llama": LLAMA,
    "llama tied, no groups": replace(LLAMA, num_kv_heads=None, tied=True, dropout=0.1),
    "llama with biases": replace(LLAMA, attention_bias=True, mlp_bias=True),
    "llama, wide heads": replace(LLAMA, head_dim=8),
    "qwen3": MODERN,
    "qwen3 untied, biases": replace(MODERN, tied=False, attention_bias=True),
}
pytestmark = pytest.mark.usefixtures("tokenizers")
exported = pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)


def model_of(imported) -> torch.nn.Module:
    return Checkpoint(
        Path("imported"), imported.config, imported.tokenizer, imported.arrays, {}
    ).build_model()


def ids_for(config: GPTConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (3, config.max_seq_len), generator=generator)


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(ids)
    return found[0] if isinstance(found, tuple) else found.logits


def same_arrays(one, other) -> None:
    assert list(one) == list(other) or set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype == np.float32, name
        assert one[name].shape == other[name].shape, name
        assert one[name].tobytes() == other[name].tobytes(), name


# --- transformers is the judge --------------------------------------------------------------


_SIZE = {"vocab_size": 11, "bos_token_id": None, "eos_token_id": None}
_GPT2 = {"n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 3, **_SIZE}
_LLAMA = {
    "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16, "rms_norm_eps": 1e-4, **_SIZE,
}  # fmt: skip
_EXACT = {"activation_function": "gelu", "n_inner": 20, "layer_norm_epsilon": 1e-3}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 10}
_BIASED = {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
_EQUAL = {"num_key_value_heads": 4, "head_dim": 4}
_TIED = {"tie_word_embeddings": True}
THEIRS = {
    "gpt2": _GPT2,
    "gpt2 tanh": _GPT2 | {"activation_function": "gelu_pytorch_tanh"},
    "gpt2 exact": _GPT2 | _EXACT,
    "gpt2 untied": _GPT2 | {"tie_word_embeddings": False},
    "llama": _LLAMA | {"rope_theta": 300.0},
    "llama grouped, tied": _LLAMA | _GROUPED | _TIED,
    "llama biased": _LLAMA | _BIASED,
    "qwen3": _LLAMA | {"num_key_value_heads": 2, "head_dim": 8, "rope_theta": 1e6},
    "qwen3 tied, biased": _LLAMA | _EQUAL | _TIED | {"attention_bias": True},
}


def theirs(kind: str):
    """A random tiny model that transformers made."""
    hf = pytest.importorskip("transformers")
    family = {"gpt2": "GPT2", "llama": "Llama", "qwen3": "Qwen3"}[kind.split()[0]]
    config = getattr(hf, f"{family}Config")(**THEIRS[kind])
    torch.manual_seed(3)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", THEIRS)
def test_an_import_has_the_logits_that_transformers_has(kind, tmp_path):
    """And export gives transformers the tensors back, bit for bit."""
    model = theirs(kind)
    model.save_pretrained(tmp_path / "theirs")
    imported = read_hugging_face(tmp_path / "theirs")
    assert "a note" in imported.notes
    ids = ids_for(imported.config)
    ours = model_of(imported)
    assert (logits_of(ours, ids) - logits_of(model, ids)).abs().max() < 1e-5

    checkpoint = Checkpoint(
        tmp_path, imported.config, imported.tokenizer, imported.arrays, imported.origin
    )
    write_hugging_face(checkpoint, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours")
    state = model.state_dict()
    assert set(again.state_dict()) == set(state)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    back = read_hugging_face(tmp_path / "ours")
    assert back.config == imported.config
    same_arrays(back.arrays, imported.arrays)


@exported
def test_transformers_has_the_logits_of_an_export(config, tmp_path):
    hf = pytest.importorskip("transformers")
    checkpoint = checkpoint_of(config)
    write_hugging_face(checkpoint, tmp_path / "out")
    model, loading = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert model.dtype == torch.float32
    ids = ids_for(config)
    ours = logits_of(checkpoint.build_model(), ids)
    assert (logits_of(model, ids) - ours).abs().max() < 1e-5
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == config.tied
    assert model.config.tie_word_embeddings == config.tied  # older versions go by it alone


def test_only_an_end_of_text_token_ends_generation_in_transformers(tmp_path):
    """Llama's and GPT-2's default end tokens, 2 and 50256, could be characters of a vocabulary."""
    hf = pytest.importorskip("transformers")
    for config in (LLAMA, TUTORIAL, MODERN):
        path = tmp_path / config.position / str(config.qk_norm)
        write_hugging_face(checkpoint_of(config), path)
        model = hf.AutoModelForCausalLM.from_pretrained(path)
        for place in (model.config, model.generation_config):
            assert place.eos_token_id is None
            assert place.bos_token_id is None
        torch.manual_seed(0)
        start = torch.zeros(8, 1, dtype=torch.int64)
        assert model.generate(start, max_new_tokens=8).shape == (8, 9)
    notes = write_hugging_face(checkpoint_of(MODERN, end_of_text=True), tmp_path / "out")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 4
    assert not any("end-of-text" in note for note in notes)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_all_number_types_become_float32(dtype, pickled, tmp_path, monkeypatch):
    """In many pieces, too. Only what is rounded gives a note."""
    monkeypatch.setattr(hugging_face, "_PIECE", 7)
    model = theirs("llama").to(dtype)
    model.save_pretrained(tmp_path)
    if pickled:
        as_pickles(tmp_path)
    found = read_hugging_face(tmp_path)
    for ours, name in (("head", "lm_head"), ("token_embedding", "model.embed_tokens")):
        wanted = model.state_dict()[f"{name}.weight"].float().numpy()
        assert np.array_equal(found.arrays[f"{ours}.weight"], wanted)
        assert found.arrays[f"{ours}.weight"].dtype == np.float32
    rounded = [note for note in found.notes if "float64" in note and "rounded" in note]
    assert len(rounded) == (dtype == torch.float64)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_shards_are_one_model(kind, pickled, tmp_path):
    """And a missing one is named before anything is read."""
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    wanted = read_hugging_face(tmp_path).arrays
    if pickled:
        as_pickles(tmp_path, 3)
    else:
        (tmp_path / "model.safetensors").unlink()
        model.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("*-of-*"))
    assert len(shards) > 1
    same_arrays(read_hugging_face(tmp_path).arrays, wanted)
    shards[1].unlink()
    assert shards[1].name in refused(tmp_path, "1 of .* shards .* missing")


def test_safetensors_come_before_pytorch_files(tmp_path):
    model = theirs("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    read_hugging_face(tmp_path)


WRAPPED = {
    "DataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "inside": lambda name: name.replace("layers.0.", "layers.0._orig_mod.").replace(
        "h.1.", "h.1._checkpoint_wrapped_module."
    ),
    "Lightning": lambda name: f"model.{name}",
    "a class around it": lambda name: f"net.gpt.{name}",
    "no prefix": lambda name: name.removeprefix("transformer.").removeprefix("model."),
    "a class without one": lambda name: (
        f"net.{name.removeprefix('transformer.').removeprefix('model.')}"
    ),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama grouped, tied", "qwen3"])
def test_prefixes_of_wrappers_are_removed_from_tensor_names(kind, wrap, tmp_path):
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    wanted = read_hugging_face(tmp_path).arrays
    (tmp_path / "model.safetensors").unlink()
    state = {wrap(name): tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    same_arrays(read_hugging_face(tmp_path).arrays, wanted)


def test_an_adapter_that_was_not_merged_is_refused_with_the_remedy(tmp_path):
    """By its tensor's name in the file; tests of state dicts have the other errors of tensors."""
    model = theirs("gpt2")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    extra = "module.transformer.h.0.attn.c_attn.lora_A.weight"
    torch.save(state | {extra: torch.ones(3)}, tmp_path / "pytorch_model.bin")
    found = refused(tmp_path, f"{extra}.* is not part of the model")
    assert "merge_and_unload" in found


@pytest.mark.parametrize("kind", ["gpt2", "llama grouped, tied", "qwen3 tied, biased"])
def test_a_tied_model_without_its_head_uses_the_embedding(kind, tmp_path):
    model = theirs(kind)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "base")
    architecture = json.loads((tmp_path / "base" / "config.json").read_text())["architectures"]
    assert architecture[0] in ("GPT2Model", "LlamaModel", "Qwen3Model")
    found = read_hugging_face(tmp_path / "base")
    same_arrays(found.arrays, read_hugging_face(tmp_path / "whole").arrays)
    assert any(architecture[0] in note and "head" in note for note in found.notes)


@pytest.mark.parametrize("kind", ["gpt2 untied", "llama", "qwen3"])
def test_an_untied_model_without_its_head_is_refused(kind, tmp_path):
    theirs(kind).base_model.save_pretrained(tmp_path)
    refused(tmp_path, "Model, without the head")


def test_the_only_variant_of_the_weights_is_read_with_a_note(tmp_path):
    model = theirs("llama").half()
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "model.fp16.safetensors").is_file()
    found = read_hugging_face(tmp_path)
    assert any("model.fp16.safetensors" in note for note in found.notes)
    model.save_pretrained(tmp_path, variant="other")
    assert "model.other.safetensors" in refused(tmp_path, "several variants")
    model.save_pretrained(tmp_path)
    assert not any("variant" in note for note in read_hugging_face(tmp_path).notes)
    model.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="4KB")
    assert (tmp_path / "shards" / "model.safetensors.index.fp16.json").is_file()
    assert any("index.fp16.json" in note for note in read_hugging_face(tmp_path / "shards").notes)


def test_rope_theta_is_found_wherever_transformers_keeps_it(tmp_path):
    """Version 5 writes "rope_parameters", before it was "rope_theta" beside "rope_scaling"."""
    model = theirs("llama")
    model.save_pretrained(tmp_path)
    assert read_hugging_face(tmp_path).config.rope_base == 300.0
    config = tmp_path / "config.json"
    assert json.loads(config.read_text())["rope_parameters"]["rope_theta"] == 300.0
    edit(config, rope_parameters=..., rope_theta=400.0, rope_scaling=None)
    assert read_hugging_face(tmp_path).config.rope_base == 400.0
    edit(config, rope_theta=..., rope_scaling={"type": "default"})
    assert read_hugging_face(tmp_path).config.rope_base == 10_000.0


def test_a_pytorch_file_is_the_same_model(tmp_path):
    """It holds a tied head twice, and GPT-2's first files lacked the prefix and had masks."""
    model = theirs("gpt2")
    model.save_pretrained(tmp_path)
    wanted = read_hugging_face(tmp_path).arrays
    (tmp_path / "model.safetensors").unlink()
    state = {k.removeprefix("transformer."): v for k, v in model.state_dict().items()}
    assert "wte.weight" in state
    state["h.0.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "pytorch_model.bin")
    same_arrays(read_hugging_face(tmp_path).arrays, wanted)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "tie_word_embeddings")
    del state["wte.weight"]
    state["lm_head.weight"] -= 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    imported = read_hugging_face(tmp_path)
    assert imported.arrays["token_embedding.weight"].shape == (11, 12)


def test_the_tutorials_block_survives_transformers_and_its_training(tmp_path):
    """The zeros written for missing biases are dropped again, unless they were trained."""
    hf = pytest.importorskip("transformers")
    checkpoint = checkpoint_of(TUTORIAL)
    write_hugging_face(checkpoint, tmp_path / "out")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")
    imported = read_hugging_face(tmp_path / "saved")
    assert imported.config == TUTORIAL
    same_arrays(imported.arrays, checkpoint.arrays)

    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.bias[3] = 0.5
    model.save_pretrained(tmp_path / "trained")
    imported = read_hugging_face(tmp_path / "trained")
    assert imported.config == replace(TUTORIAL, attention_bias=True)
    assert any("attention_bias" in note for note in imported.notes)
    ids = ids_for(TUTORIAL)
    assert (logits_of(model_of(imported), ids) - logits_of(model, ids)).abs().max() < 1e-5


# --- round trips -----------------------------------------------------------------------------


shapes = st.builds(
    GPTConfig,
    vocab_size=st.integers(1, 9),
    embed_dim=st.sampled_from([4, 8, 12]),
    num_heads=st.sampled_from([1, 2, 4]),
    num_layers=st.integers(1, 2),
    max_seq_len=st.integers(1, 5),
    dropout=st.sampled_from([0.0, 0.1]),
    norm_eps=st.sampled_from([None, 1e-5, 1e-3]),
    mlp_dim=st.sampled_from([None, 5]),
    attention_bias=st.booleans(),
    tied=st.booleans(),
)
with_position_embedding = st.builds(
    lambda config, mlp, biased: replace(config, mlp=mlp, mlp_bias=biased),
    shapes, st.sampled_from(["gelu", "gelu_tanh"]), st.booleans(),
)  # fmt: skip
rotary = st.builds(
    lambda config, groups, d, qk_norm: replace(
        config, num_kv_heads=1 if groups else None, head_dim=d, qk_norm=qk_norm, norm="rms",
        position="rotary", mlp="swiglu", mlp_bias=False,
    ),
    shapes, st.booleans(), st.sampled_from([2, 6]), st.booleans(),
)  # fmt: skip


@given(config=with_position_embedding | rotary | st.sampled_from([*EXPORTED.values()]))
@settings(max_examples=40)
def test_a_round_trip_is_bitwise(config, tmp_path_factory):
    """Neither export nor import needs a library of Hugging Face's."""
    folder = tmp_path_factory.mktemp("round") / "out"
    checkpoint = checkpoint_of(config)
    with pytest.MonkeyPatch.context() as patch:
        for library in ("transformers", "safetensors", "huggingface_hub"):
            patch.setitem(sys.modules, library, None)
        write_hugging_face(checkpoint, folder)
        imported = read_hugging_face(folder)
    for name in ("head_size", "kv_heads", "mlp_hidden", "eps", "is_tutorial_block", "dropout"):
        assert getattr(imported.config, name) == getattr(config, name), name
    assert imported.config.rope_base == config.rope_base
    assert parameter_shapes(imported.config) == parameter_shapes(config)
    same_arrays(imported.arrays, checkpoint.arrays)
    write_hugging_face(replace(checkpoint, config=imported.config), folder, overwrite=True)
    assert read_hugging_face(folder).config == imported.config


# --- what an export writes -------------------------------------------------------------------


def test_the_model_card_has_the_runs_figures(tmp_path):
    write_hugging_face(checkpoint_of(MODERN), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for figure in (
        "1.2346",
        "1.5000",
        "2.1250",
        "1,234",
        "poems.txt",
        "98,765",
        "ab" * 32,
        "their/model",
    ):
        assert figure in card, figure
    assert "mygpt train poems.txt" in card
    assert "Qwen3ForCausalLM" in card
    assert 'AutoModelForCausalLM.from_pretrained("FOLDER")' in card


@pytest.mark.parametrize(
    "provenance",
    [{}, {"corpus": 3, "loss": "low"}, {"command": "a\n# b", "corpus": {"name": "\udce9\x1b[2J"}}],
    ids=["none", "other types", "control characters"],
)
def test_a_model_card_with_malicious_provenance_is_plain_text(provenance, tmp_path):
    """A checkpoint is not trusted: its provenance cannot break the card or add headings."""
    write_hugging_face(replace(checkpoint_of(LLAMA), provenance=provenance), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.count("\n#") == 1
    assert "\x1b" not in card


def test_an_existing_folder_is_replaced_only_if_it_is_an_export(tmp_path):
    """`--overwrite` on a run's or a home folder by mistake must lose nothing."""
    out = tmp_path / "out"
    write_hugging_face(checkpoint_of(TUTORIAL), out)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="--overwrite"):
        write_hugging_face(checkpoint_of(TUTORIAL, seed=1), out)
    assert (out / "model.safetensors").read_bytes() == before
    write_hugging_face(checkpoint_of(TUTORIAL, seed=1), out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    (out / "letters").mkdir()
    (tmp_path / "file").write_text("mine")
    for path, problem in ((out, "letters"), (tmp_path / "file", "is a file")):
        with pytest.raises(InputError, match=problem):
            write_hugging_face(checkpoint_of(TUTORIAL), path, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_export_is_atomic(overwrite, tmp_path, tokenizers):
    def fail(*_):
        raise StorageError("no space")

    if overwrite:
        write_hugging_face(checkpoint_of(TUTORIAL), tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.glob("out/*")}
    tokenizers.write_tokenizer = fail
    with pytest.raises(StorageError, match="no space"):
        write_hugging_face(checkpoint_of(GPT2), tmp_path / "out", overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_hugging_face(checkpoint_of(TUTORIAL), tmp_path / "file" / "out")


def test_an_exports_notes(tmp_path):
    notes = "\n".join(write_hugging_face(checkpoint_of(TUTORIAL), tmp_path / "a"))
    assert "attention_bias=false" in notes
    assert "end-of-text" in notes
    notes = "\n".join(
        write_hugging_face(checkpoint_of(replace(LLAMA, dropout=0.1)), tmp_path / "b")
    )
    assert "dropout=0.1" in notes


@pytest.mark.parametrize(
    ("config", "switch"),
    [
        (MIXED, "norm=rms"),
        (ROTARY_LAYER_NORM, "norm=layer"),
        (replace(TUTORIAL, qk_norm=True), "qk_norm=True"),
        (replace(TUTORIAL, mlp="swiglu", mlp_dim=8), "mlp=swiglu"),
        (replace(TUTORIAL, num_kv_heads=1), "num_kv_heads=1"),
        (replace(TUTORIAL, head_dim=3), "head_dim=3"),
        (GPTConfig(5, 10, 3, 1, head_dim=3), "head_dim=3"),
        (replace(MODERN, mlp="gelu", mlp_dim=8), "mlp=gelu"),
        (replace(MODERN, mlp_bias=True), "mlp_bias=True"),
        (replace(LLAMA, embed_dim=22, head_dim=6), "embed_dim=22"),
        (unchecked(LLAMA, position="alibi"), "position=alibi"),
    ],
    ids=str,
)
def test_a_configuration_that_no_family_has_is_refused_by_its_setting(config, switch, tmp_path):
    checkpoint = Checkpoint(tmp_path, config, characters(config.vocab_size), {}, {})
    with pytest.raises(InputError, match=switch) as caught:
        write_hugging_face(checkpoint, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    checkpoint = checkpoint_of(MODERN)
    arrays = {k: v for k, v in checkpoint.arrays.items() if k != "final_norm.weight"}
    with pytest.raises(InputError, match="final_norm"):
        export_checkpoint(replace(checkpoint, arrays=arrays), "hf", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_round_trips_with_its_tokenizer(tmp_path, monkeypatch):
    """With the real tokenizers module; transformers loads the result."""
    hf = pytest.importorskip("transformers")
    monkeypatch.delitem(sys.modules, "mygpt.formats.tokenizers")
    chars = CharTokenizer(" AIl", end_of_text=True)
    save_checkpoint(tmp_path / "a.safetensors", build(MODERN), chars, PROVENANCE)
    checkpoint = read_checkpoint(tmp_path / "a.safetensors")
    write_hugging_face(checkpoint, tmp_path / "out")
    imported = read_hugging_face(tmp_path / "out")
    same_arrays(imported.arrays, checkpoint.arrays)
    assert imported.tokenizer.to_state() == chars.to_state()
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("Al I")["input_ids"] == chars.encode("Al I").tolist()
    assert theirs.eos_token_id == chars.end_of_text
    write_hugging_face(checkpoint, tmp_path / "out", overwrite=True)
