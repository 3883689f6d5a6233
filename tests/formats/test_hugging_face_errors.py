"""What an import of a Hugging Face folder refuses, and in which words."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable

import pytest
import torch

from hugging_face_samples import checkpoint_of, edit, refused
from mygpt import GPTConfig
from mygpt.errors import OutOfMemoryError
from mygpt.formats.hugging_face import read_hugging_face, write_hugging_face
from refusals import Malice
from shapes import GPT2, LLAMA, MODERN

pytestmark = pytest.mark.usefixtures("tokenizers")

UNSUPPORTED_LLAMA = [
    ({"model_type": "mistral"}, "mistral.*GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM"),
    ({"model_type": ..., "architectures": ...}, "None.*only GPT2LMHeadModel"),
    (
        {"model_type": ..., "architectures": ["FalconForCausalLM"]},
        "FalconForCausalLM.*only GPT2LMHeadModel",
    ),
    (
        {"architectures": ["LlamaForSequenceClassification"]},
        "SequenceClassification.*only GPT2LMHeadModel",
    ),
    ({"architectures": "LlamaForCausalLM"}, "must be a list of names"),
    ({"model_type": ["llama"]}, "only GPT2LMHeadModel"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.*'llama3'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*'linear'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.*'yarn'"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "only one set"),
    ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"rope_parameters": {"rope_theta": "big"}}, "rope_base='big'"),
    ({"sliding_window": 8}, "sliding_window=8.*max_position_embeddings=16"),
    ({"sliding_window": "wide"}, "sliding_window='wide'"),
    ({"layer_types": ["sliding_attention"]}, "layer_types.*'sliding_attention'"),
    ({"hidden_size": ...}, "config.json has no 'hidden_size'"),
    ({"vocab_size": 0}, "vocab_size=0"),
    ({"vocab_size": "x"}, "vocab_size='x'"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps='x'"),
    ({"tie_word_embeddings": 1}, "tied=1"),
    ({"attention_bias": "yes"}, "attention_bias='yes'"),
    ({"num_key_value_heads": 3}, "num_kv_heads=3"),
    ({"attention_bias": True}, "no tensor 'model.layers.0.self_attn.q_proj.bias'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    (
        {"vocab_size": 7},
        r"'model.embed_tokens.weight' has shape \(6, 24\).*needs \(7, 24\)",
    ),
    ({"vocab_size": 2**31}, "has shape"),
    ({"num_hidden_layers": 2}, "no tensor 'model.layers.1."),
    ({"num_hidden_layers": 2**31}, "12 tensors.*2,147,483,648 layers"),
    ({"model_type": "qwen3", "architectures": ...}, "no tensor.*q_norm"),
]
UNSUPPORTED_GPT2 = [
    ({"activation_function": "relu"}, "activation_function='relu'.*gelu_new"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ({"add_cross_attention": True}, "add_cross_attention=True"),
    ({"n_embd": ...}, "has no 'n_embd'"),
    ({"n_head": 0}, "num_heads=0"),
    ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon='x'"),
    ({"resid_pdrop": 2}, "dropout=2"),
]


@pytest.mark.parametrize(
    ("config", "changes", "match"),
    [(LLAMA, *case) for case in UNSUPPORTED_LLAMA] + [(GPT2, *case) for case in UNSUPPORTED_GPT2],
    ids=lambda value: "" if isinstance(value, GPTConfig) else str(value),
)
def test_an_unsupported_configuration_is_refused_by_name(config, changes, match, tmp_path):
    write_hugging_face(checkpoint_of(config), tmp_path / "model")
    edit(tmp_path / "model" / "config.json", **changes)
    assert str(tmp_path / "model") in refused(tmp_path / "model", match)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 16},
        {"sliding_window": 4, "use_sliding_window": False},
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
        {"layer_types": ["full_attention", "full_attention"]},
        {"rope_scaling": {}},
        {"partial_rotary_factor": 1.0},
        {"model_type": ...},
        {"architectures": ...},
    ],
    ids=str,
)
def test_settings_without_effect_are_accepted(changes, tmp_path):
    """A sliding window that is switched off is accepted: Qwen3's own files have one."""
    write_hugging_face(checkpoint_of(MODERN), tmp_path / "qwen3")
    wanted = read_hugging_face(tmp_path / "qwen3").config
    edit(tmp_path / "qwen3" / "config.json", **changes)
    assert read_hugging_face(tmp_path / "qwen3").config == wanted


def test_different_rates_of_dropout_give_a_note(tmp_path):
    write_hugging_face(checkpoint_of(GPT2), tmp_path / "gpt2")
    edit(tmp_path / "gpt2" / "config.json", resid_pdrop=0.2)
    imported = read_hugging_face(tmp_path / "gpt2")
    assert imported.config.dropout == 0.2
    assert any("embd_pdrop=0.0" in note for note in imported.notes)
    write_hugging_face(checkpoint_of(LLAMA), tmp_path / "llama")
    edit(tmp_path / "llama" / "config.json", attention_dropout=0.3)
    imported = read_hugging_face(tmp_path / "llama")
    assert imported.config.dropout == 0.0
    assert any("attention_dropout=0.3" in note for note in imported.notes)


def rewritten(change) -> Callable[[bytes], bytes]:
    """Let `change` alter a safetensors file's header (a dict) or give another body."""

    def write(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        body = change(header) or data[8 + length :]
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    return write


def with_head(**entries) -> Callable[[bytes], bytes]:
    return rewritten(lambda header: header["lm_head.weight"].update(entries))


def renamed(header: dict) -> None:
    """One tensor is missing and one unknown."""
    header["model.layers.0.self_attn.q_proj.bias"] = header.pop("model.norm.weight")


def headed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (rewritten(renamed), "q_proj.bias' is not part of the model"),
        (with_head(dtype="I32"), "'I32'.*F32, F16, BF16"),
        (with_head(dtype="F16"), "damaged"),
        (with_head(shape=[24, 6]), r"has shape \(24, 6\)"),
        (with_head(shape=[-6, -24]), "damaged"),
        (with_head(shape=[6.0, 24]), "damaged"),
        (with_head(data_offsets=[4, 580]), "damaged"),
        (rewritten(lambda header: header.update(x=3)), "damaged"),
        (rewritten(lambda header: b"short"), "truncated"),
        (b"", "truncated"),
        (b"\xff" * 64, "truncated"),
        (b"version https://git-lfs.example/spec/v1\noid sha256:00\n", "git lfs pull"),
        (headed(b"[[[[["), "damaged"),
        (headed(b"[]"), "damaged"),
        (headed(b"[" * 60_000), "damaged"),
    ],
    ids=[
        "unknown", "dtype", "dtype of another size", "shape", "negative", "float", "overlap",
        "no entry", "cut", "empty", "noise", "git lfs", "not a JSON object", "a list", "deep",
    ],
)  # fmt: skip
def test_a_file_of_weights_that_does_not_fit_is_refused(content, match, folder):
    path = folder / "model.safetensors"
    path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))
    refused(folder, match)


def test_incomplete_folders_are_refused(folder, tmp_path):
    refused(tmp_path / "nowhere", "is not a folder")
    refused(folder / "config.json", "is not a folder")
    refused(tmp_path, "config.json is missing")
    (folder / "model.safetensors").unlink()
    refused(folder, "has no weights")
    (folder / "config.json").write_text("{")
    refused(folder, "not a JSON object")
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, "not a JSON object")
    (folder / "config.json").write_text("[1]")
    refused(folder, "not a JSON object")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # reading it would wait for ever
    refused(folder, "a file is expected")


@pytest.mark.parametrize(
    ("index", "match"),
    [
        (
            {"weight_map": {"a": "../model.safetensors"}},
            "not the name of a file in the same folder",
        ),
        ({"weight_map": {"a": 3}}, "not the name of a file in the same folder"),
        ({"weight_map": {}}, "weight_map"),
        (
            {"weight_map": {"a": "b.safetensors"}},
            "1 of 1 shards .* missing, the first is b.safetensors",
        ),
        ({"weight_map": {"a": "shard"}}, "no tensor 'a'"),
    ],
    ids=str,
)
def test_an_index_that_does_not_fit_is_refused(index, match, folder):
    (folder / "model.safetensors").rename(folder / "shard")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, match)


@pytest.mark.parametrize("write", [torch.save, lambda e, p: p.write_bytes(pickle.dumps(e))])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "shard.bin"])
def test_a_malicious_pickle_runs_nothing(write, name, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    write({"lm_head.weight": Malice(tmp_path / "ran")}, folder / name)
    if name == "shard.bin":
        index = {"weight_map": {"lm_head.weight": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(folder, name)
    assert not (tmp_path / "ran").exists()


def test_weights_larger_than_the_free_memory_are_refused_before_allocation(folder, monkeypatch):
    monkeypatch.setattr("mygpt.machine.free_memory_bytes", lambda: 1000)
    with pytest.raises(OutOfMemoryError, match="1,000 bytes of memory are free"):
        read_hugging_face(folder)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("tf_model.h5", "from_tf"),
        ("flax_model.msgpack", "from_flax"),
        ("model-q8_0.gguf", "GGUF"),
        ("model.onnx", "ONNX"),
        ("consolidated.00.pth", "conversion"),
        ("zero_to_fp32.py", "pytorch_model.bin"),
        ("weights.safetensors", "rename it"),
    ],
)
def test_weights_of_other_programs_are_named_with_the_remedy(name, remedy, folder):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"x")
    assert remedy in refused(folder, name)
