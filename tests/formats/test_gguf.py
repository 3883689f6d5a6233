"""GGUF export: the file gives llama.cpp the same model, bitwise where the number type allows it.

`gguf_reference.py` reads and runs the file; the `gguf` package and llama.cpp judge where they are
installed.
"""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gguf_reference import F16, F32, Q8_0, SYMBOL, read_gguf, run, turned
from mygpt import GPTConfig
from mygpt.checkpoint.model_file import Checkpoint, model_arrays
from mygpt.errors import InputError
from mygpt.formats.gguf import pairs_from_halves, quantised, store, write_gguf
from mygpt.tokenization import ByteTokenizer, CharTokenizer
from shapes import CONFIGS, GPT2, LLAMA, MODERN, build, unchecked

WIDE = GPTConfig(
    vocab_size=9, embed_dim=64, num_heads=4, num_layers=2, max_seq_len=64, num_kv_heads=2,
    head_dim=16, mlp_dim=96, norm="rms", position="rotary", mlp="swiglu", mlp_bias=False,
)  # fmt: skip
WIDE_GPT2 = GPTConfig(9, 64, 4, 2, max_seq_len=64, mlp="gelu_tanh")
BLOCKS = {
    "qwen3": MODERN,
    "qwen3 untied": replace(MODERN, tied=False, rope_base=500.0),
    "llama": LLAMA,
    "llama tied, own head size": replace(LLAMA, tied=True, head_dim=8, num_kv_heads=2),
    "gpt2": GPT2,
    "gpt2 without attention biases": replace(GPT2, attention_bias=False),
    "gpt2 without any, untied, groups": replace(
        GPT2, attention_bias=False, mlp_bias=False, tied=False, num_heads=4, num_kv_heads=2
    ),
}


def checkpoint(config: GPTConfig, path: str = "runs/verse/best.safetensors") -> Checkpoint:
    """A model of random numbers, with a tokenizer that fills its vocabulary."""
    chars = "\n abcdefghijklm"[: config.vocab_size - 1]
    tokenizer = CharTokenizer(chars, end_of_text=True)
    return Checkpoint(Path(path), config, tokenizer, model_arrays(build(config, spread=0.3)), {})


@pytest.mark.parametrize("name", BLOCKS)
def test_the_model_in_the_file_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    """Names, order of rows, tied heads, epsilons and rotary bases, all at once."""
    config = BLOCKS[name]
    path = tmp_path / "m.gguf"
    write_gguf(checkpoint(config), path)
    values, tensors = read_gguf(path)
    assert values["general.architecture"] == name.split()[0]
    assert ("output.weight" in tensors) == (not config.tied)
    ids = [3 % config.vocab_size, 0, 1, 2, 2, 4, 1, 0]
    with torch.no_grad():
        ours = build(config, spread=0.3)(torch.tensor([ids]))[0][0]
    np.testing.assert_allclose(run(values, tensors, ids), ours, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("config", [MODERN, LLAMA, GPT2], ids=["qwen3", "llama", "gpt2"])
def test_every_parameter_is_stored_once(config: GPTConfig, kind: str, tmp_path: Path) -> None:
    """Bitwise in f32, rounded to float16 in f16; vectors and positions stay float32."""
    held = checkpoint(config)
    path = tmp_path / "m.gguf"
    assert [n for n in write_gguf(held, path, kind=kind) if "gpt2" not in n] == []
    values, tensors = read_gguf(path)
    assert values["general.file_type"] == (0 if kind == "f32" else 1)
    theirs: dict[int, list[bytes]] = {F32: [], F16: []}
    for name, tensor in tensors.items():
        vector = len(tensor.shape) == 1 or name == "position_embd.weight"
        assert tensor.kind == (F32 if vector or kind == "f32" else F16), name
        theirs[tensor.kind].append(tensor.data)
    ours: dict[int, list[np.ndarray]] = {F32: [], F16: []}
    for name, array in held.arrays.items():
        vector = array.ndim == 1 or name.startswith("position")
        ours[F32 if vector or kind == "f32" else F16].append(array.reshape(-1))
    for number, dtype in ((F32, "<f4"), (F16, "<f2")):
        found = np.frombuffer(b"".join(theirs[number]), dtype)
        wanted = np.concatenate([np.empty(0, np.float32), *ours[number]]).astype(dtype)
        np.testing.assert_array_equal(np.sort(found), np.sort(wanted))


def test_reordered_rows_give_the_same_attention_scores() -> None:
    """llama.cpp's "llama" rotates (2i, 2i + 1); mygpt's rows were trained for (i, i + D/2)."""
    r = np.random.default_rng(0)
    time, width, heads, d = 5, 6, 2, 8
    x = r.normal(size=(time, width))
    query, key = r.normal(size=(2, heads * d, width))

    def scores(pairs: str, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        q, k = (turned((x @ m.T).reshape(time, heads, d), 100.0, pairs) for m in (q, k))
        return np.einsum("thd,shd->hts", q, k)

    ours = scores("halves", query, key)
    moved = scores("pairs_from_halves", pairs_from_halves(query, d), pairs_from_halves(key, d))
    np.testing.assert_allclose(moved, ours, atol=1e-12)
    assert np.abs(scores("pairs_from_halves", query, key) - ours).max() > 0.1  # it does matter


def slow_q8_0(numbers: np.ndarray) -> bytes:
    """A reference implementation: block by block, value by value."""
    written = b""
    for start in range(0, numbers.size, 32):
        block = numbers.reshape(-1)[start : start + 32]
        scale = np.float32(max(abs(float(x)) for x in block)) / np.float32(127)
        inverse = np.float32(1) / scale if scale > 1e-38 else np.float32(0)
        written += struct.pack("<e", scale)
        for x in block:
            exact = float(x * inverse)
            whole = math.floor(abs(exact) + 0.5)  # in float64, where adding a half is exact
            written += struct.pack("b", whole if exact > 0 else -whole)
    return written


def test_q8_0_equals_its_reference_implementation_and_ggmls() -> None:
    """Halves are rounded away from zero; blocks of zeros or tiny values do not divide by zero."""
    r = np.random.default_rng(1)
    rows = r.normal(size=(40, 96)).astype(np.float32) * 10.0 ** r.integers(-9, 5, size=(40, 1))
    rows = rows.astype(np.float32)
    rows[0] = 0.0
    rows[1, :32] = np.array([127.0, 0.5, -0.5, 1.5, -1.5, 2.5, 0.49999997, -126.5] * 4)
    rows[2] = 1e-42
    assert quantised(rows).tobytes() == slow_q8_0(rows)
    rows[2] = 1.0  # the package divides by such a scale, to no use
    package = pytest.importorskip("gguf")
    theirs = package.quants.quantize(rows, package.GGMLQuantizationType.Q8_0)
    assert quantised(rows).tobytes() == theirs.tobytes()


def test_a_number_type_without_an_encoding_is_an_error() -> None:
    """It was written as float16."""
    with pytest.raises(ValueError, match="number type 12"):
        store("w", np.zeros((1, 32), np.float32), 12)


def test_q8_0_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    held = checkpoint(WIDE)
    assert write_gguf(held, path, kind="q8_0") == []
    values, tensors = read_gguf(path)
    assert values["general.file_type"] == 7
    assert values["general.quantization_version"] == 2
    down = tensors["blk.1.ffn_down.weight"]
    assert down.kind == Q8_0
    assert down.data == slow_q8_0(held.arrays["blocks.1.mlp.output.weight"])
    assert tensors["blk.1.ffn_norm.weight"].kind == F32


def test_rows_that_q8_0_cannot_divide_are_written_as_f16_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    notes = write_gguf(checkpoint(replace(WIDE, mlp_dim=40)), path, kind="q8_0")
    assert notes == [
        "blk.0.ffn_down.weight and 1 more written as f16, since the length of their rows is not a "
        "multiple of 32"
    ]
    assert read_gguf(path)[1]["blk.0.ffn_down.weight"].kind == F16


def test_values_beyond_float16_are_written_as_float32_with_a_note(tmp_path: Path) -> None:
    """They would become infinite."""
    held = checkpoint(WIDE)
    held.arrays["blocks.0.mlp.output.weight"][0, 0] = 70000.0
    notes = write_gguf(held, tmp_path / "m.gguf", kind="f16")
    assert notes == [
        "blk.0.ffn_down.weight written as f32, since they have values too large for f16"
    ]
    assert read_gguf(tmp_path / "m.gguf")[1]["blk.0.ffn_down.weight"].numbers()[0, 0] == 70000.0


def test_the_files_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(checkpoint(LLAMA), path)
    values = {k: v for k, v in read_gguf(path)[0].items() if not k.startswith("tokenizer")}
    assert values == {
        "general.architecture": "llama", "general.type": "model", "general.name": "verse",
        "general.file_type": 0, "general.quantization_version": 2,
        "llama.context_length": 16, "llama.embedding_length": 24, "llama.block_count": 1,
        "llama.feed_forward_length": 64, "llama.vocab_size": 6,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 6, "llama.attention.value_length": 6,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 6, "llama.rope.freq_base": 500.0,
    }  # fmt: skip


def test_a_name_that_llama_cpp_interprets_is_replaced(tmp_path: Path) -> None:
    """llama.cpp searches the name for "phi3", then requires tokens of that family."""
    for path, name in (("runs/my-Phi3/best.safetensors", "mygpt"), ("odes.ckpt", "odes")):
        write_gguf(checkpoint(MODERN, path), tmp_path / "m.gguf", overwrite=True)
        assert read_gguf(tmp_path / "m.gguf")[0]["general.name"] == name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mlp=gelu_tanh, and this model has mlp=gelu, the tutorial's exact GELU": (
        {"config": CONFIGS["tutorial"]}, "--to hf"),
    "norm=layer, and this model has norm=rms": ({"config": CONFIGS["mixed"]}, "--preset"),
    "norm=rms, and this model has norm=layer": (
        {"config": CONFIGS["rotary_layer_norm"]}, "--preset"),
    "attention_bias=False, and this model has attention_bias=True": (
        {"config": replace(LLAMA, attention_bias=True)}, "--preset"),
    "qk_norm=False, and this model has qk_norm=True": (
        {"config": replace(GPT2, qk_norm=True)}, "--preset"),
    "this model has 3 * 5": ({"config": replace(GPT2, head_dim=5)}, "--preset"),
    "position=learned, and this model has position=alibi": (
        {"config": unchecked(GPT2, position="alibi"), "built": GPT2}, "--preset"),
    "no end-of-text token": (
        {"config": MODERN, "tokenizer": CharTokenizer("abcde")}, "--preset tutorial"),
    "the tokenizer has 257 ids and the model 5": (
        {"config": MODERN, "tokenizer": ByteTokenizer()}, "with its own tokenizer"),
    "type='q4_0' is not known": ({"config": MODERN, "kind": "q4_0"}, "q8_0"),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_models_that_llama_cpp_does_not_support_are_refused(said: str, tmp_path: Path) -> None:
    """One line, and nothing is written."""
    case, remedy = REFUSED[said]
    held = replace(checkpoint(MODERN), config=case["config"])
    held = replace(held, arrays=model_arrays(build(case.get("built", case["config"]))))
    held = replace(held, tokenizer=case.get("tokenizer", held.tokenizer))
    with pytest.raises(InputError) as raised:
        write_gguf(held, tmp_path / "m.gguf", kind=case.get("kind", "f32"))
    text = str(raised.value)
    assert said in text
    assert remedy in text
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_without_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"dear")
    with pytest.raises(InputError, match="--overwrite"):
        write_gguf(checkpoint(MODERN), path)
    assert path.read_bytes() == b"dear"
    write_gguf(checkpoint(MODERN), path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]
    first = path.read_bytes()
    write_gguf(checkpoint(MODERN), path, overwrite=True)
    assert path.read_bytes() == first  # nothing of the time or the place is in it
    with pytest.raises(InputError, match=r"is a folder: give a file, .*model\.gguf"):
        write_gguf(checkpoint(MODERN), tmp_path, overwrite=True)


def test_the_gguf_package_reads_the_file(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    for kind, dtype in (("f32", "F32"), ("f16", "F16"), ("q8_0", "Q8_0")):
        write_gguf(checkpoint(WIDE), path, kind=kind, overwrite=True)
        values, tensors = read_gguf(path)
        reader = package.GGUFReader(path)
        theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        empty = theirs.pop("tokenizer.ggml.merges")  # as it shows a list of nothing
        assert not empty
        assert theirs == {k: v for k, v in values.items() if k != "tokenizer.ggml.merges"}
        assert [t.name for t in reader.tensors] == list(tensors)
        for tensor in reader.tensors:
            ours = tensors[tensor.name]
            assert tensor.data.tobytes() == ours.data
            assert tuple(tensor.shape.tolist()) == ours.shape[::-1]
            assert tensor.tensor_type.name == (dtype if len(ours.shape) == 2 else "F32")
        del reader, tensor


def test_llama_cpp_computes_the_same_logits(tmp_path: Path) -> None:
    """llama.cpp reads GELU from a table of float16 values."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ids = [1, 2, 3, 4, 5, 6, 7, 0, 2, 4, 6]
    cases = {"llama": (WIDE, 1e-4), "qwen3": (replace(WIDE, qk_norm=True), 1e-4)}
    for config, tolerance in [*cases.values(), (WIDE_GPT2, 5e-3)]:
        path = tmp_path / "m.gguf"
        write_gguf(checkpoint(config), path, overwrite=True)
        model = llama_cpp.Llama(
            str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
        )
        model.eval(ids)
        with torch.no_grad():
            ours = build(config, spread=0.3)(torch.tensor([ids]))[0][0]
        np.testing.assert_allclose(model.scores[: len(ids)], ours, atol=tolerance)
        assert model.token_eos() == config.vocab_size - 1
        assert model.tokenize(b"ab\n ba", add_bos=True, special=False) == [2, 3, 0, 1, 3, 2]
        model.close()


def test_the_reference_readers_alphabet_is_the_librarys() -> None:
    """Else the tests of tokenizers would say nothing."""
    from tokenizers import pre_tokenizers

    assert set(SYMBOL.values()) == set(pre_tokenizers.ByteLevel.alphabet())
