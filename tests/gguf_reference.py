"""A reference reader of GGUF files: it reads one, runs its model, and applies its merges.

Written from the description of the format and of the three architectures; it imports nothing of
mygpt. Letters: T time, C embedding, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 12: "d"}
F32, F16, Q8_0 = 0, 1, 8


class Tensor(NamedTuple):
    kind: int
    shape: tuple[int, ...]
    data: bytes

    def numbers(self) -> np.ndarray:
        if self.kind == Q8_0:
            blocks = np.frombuffer(self.data, np.uint8).reshape(-1, 34)
            scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
            return (blocks[:, 2:].view(np.int8) * scales).reshape(self.shape)
        return np.frombuffer(self.data, "<f4" if self.kind == F32 else "<f2").reshape(self.shape)


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, length: int) -> bytes:
        self.place += length
        assert self.place <= len(self.data)
        return self.data[self.place - length : self.place]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(NUMBERS[kind])


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Values and tensors; everything must be where the format wants it, and nothing else be."""
    file = _Bytes(path.read_bytes())
    assert file.take(4) == b"GGUF"
    assert file.number("I") == 3
    num_tensors, num_values = file.number("Q"), file.number("Q")
    values: dict[str, Any] = {}
    for _ in range(num_values):
        key = file.text()
        assert key not in values
        values[key] = file.value(file.number("I"))
    entries = []
    for _ in range(num_tensors):
        name = file.text()
        assert len(name.encode()) < 64
        shape = tuple(file.number("Q") for _ in range(file.number("I")))[::-1]
        entries.append((name, shape, file.number("I"), file.number("Q")))
    file.take(-file.place % 32)
    start = file.place
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in entries:
        assert name not in tensors
        assert offset == file.place - start, f"{name} does not follow the tensor before it"
        assert file.place % 32 == 0
        count = int(np.prod(shape))
        size = {F32: 4 * count, F16: 2 * count, Q8_0: count // 32 * 34}[kind]
        tensors[name] = Tensor(kind, shape, file.take(size))
        assert not any(file.take(-size % 32))
    assert file.place == len(file.data)
    return values, tensors


def run(values: dict[str, Any], tensors: dict[str, Tensor], ids: list[int]) -> np.ndarray:
    """Logits (T, V) in float64, as the architecture named in the file computes them."""
    name = values["general.architecture"]
    of = {key.removeprefix(f"{name}."): value for key, value in values.items()}
    w = {key: tensor.numbers().astype(np.float64) for key, tensor in tensors.items()}
    x = w["token_embd.weight"][ids]  # (T, C)
    if name == "gpt2":
        x = x + w["position_embd.weight"][: len(ids)]
    for n in range(of["block_count"]):
        layer = {k.removeprefix(f"blk.{n}."): v for k, v in w.items() if k.startswith(f"blk.{n}.")}
        x = x + _attention(name, of, layer, _norm(of, layer, "attn_norm", x))
        x = x + _mlp(name, layer, _norm(of, layer, "ffn_norm", x))
    x = _norm(of, w, "output_norm", x)
    return x @ w.get("output.weight", w["token_embd.weight"]).T


def _norm(of: dict[str, Any], w: dict[str, Any], name: str, x: np.ndarray) -> np.ndarray:
    if "attention.layer_norm_epsilon" in of:
        x = x - x.mean(-1, keepdims=True)
        root = np.sqrt((x**2).mean(-1, keepdims=True) + of["attention.layer_norm_epsilon"])
        return x / root * w[f"{name}.weight"] + w[f"{name}.bias"]
    root = np.sqrt((x**2).mean(-1, keepdims=True) + of["attention.layer_norm_rms_epsilon"])
    return x / root * w[f"{name}.weight"]


def _attention(name: str, of: dict[str, Any], w: dict[str, Any], x: np.ndarray) -> np.ndarray:
    heads, groups, d = (
        of["attention.head_count"],
        of["attention.head_count_kv"],
        of["attention.key_length"],
    )
    if name == "gpt2":
        fused = x @ w["attn_qkv.weight"].T + w["attn_qkv.bias"]
        q, k, v = np.split(fused, [heads * d, (heads + groups) * d], axis=-1)
    else:
        q, k, v = (x @ w[f"attn_{letter}.weight"].T for letter in "qkv")
    q, k, v = (part.reshape(len(x), -1, d) for part in (q, k, v))  # (T, H or G, D)
    if name == "qwen3":
        q, k = _norm(of, w, "attn_q_norm", q), _norm(of, w, "attn_k_norm", k)
    if name != "gpt2":
        assert of["rope.dimension_count"] == d
        pairs = "halves" if name == "qwen3" else "neighbours"
        q, k = turned(q, of["rope.freq_base"], pairs), turned(k, of["rope.freq_base"], pairs)
    mixed = np.zeros_like(q)
    for head in range(heads):
        key, value = k[:, head * groups // heads], v[:, head * groups // heads]
        for t in range(len(x)):
            scores = key[: t + 1] @ q[t, head] / np.sqrt(d)
            share = np.exp(scores - scores.max())
            mixed[t, head] = share / share.sum() @ value[: t + 1]
    out = mixed.reshape(len(x), -1) @ w["attn_output.weight"].T
    return out + w["attn_output.bias"] if name == "gpt2" else out


def turned(x: np.ndarray, base: float, pairs: str) -> np.ndarray:
    """Each pair of a head's numbers in (T, H, D), turned by its position's angle."""
    time, _, d = x.shape
    result = x.copy()
    for i in range(d // 2):
        first, second = (i, i + d // 2) if pairs == "halves" else (2 * i, 2 * i + 1)
        for t in range(time):
            angle = t * base ** (-2 * i / d)
            a, b = x[t, :, first], x[t, :, second]
            result[t, :, first] = a * np.cos(angle) - b * np.sin(angle)
            result[t, :, second] = a * np.sin(angle) + b * np.cos(angle)
    return result


def _mlp(name: str, w: dict[str, Any], x: np.ndarray) -> np.ndarray:
    up = x @ w["ffn_up.weight"].T
    if name == "gpt2":
        up = up + w["ffn_up.bias"]
        hidden = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        return hidden @ w["ffn_down.weight"].T + w["ffn_down.bias"]
    gate = x @ w["ffn_gate.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ w["ffn_down.weight"].T


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
SYMBOL = {b: chr(b) if b in _PRINTABLE else chr(256 + _HIDDEN.index(b)) for b in range(256)}
BYTE = {symbol: byte for byte, symbol in SYMBOL.items()}


def merged_ids(values: dict[str, Any], word: str) -> list[int]:
    """The ids of one word: pairs are merged, best rank first; symbols without an id are dropped."""
    ids = {token: number for number, token in enumerate(values["tokenizer.ggml.tokens"])}
    ranks = {tuple(m.split(" ")): n for n, m in enumerate(values["tokenizer.ggml.merges"])}
    parts = [SYMBOL[byte] for byte in word.encode()]
    while True:
        found = [(ranks[p], i) for i, p in enumerate(pairwise(parts)) if p in ranks]
        if not found:
            return [ids[part] for part in parts if part in ids]
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def sentencepiece_ids(values: dict[str, Any], text: str) -> list[int]:
    """The ids of a text: neighbours are joined, best score first; unknown characters are bytes."""
    tokens, scores = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.scores"]
    ids = {token: number for number, token in enumerate(tokens)}
    if values["tokenizer.ggml.add_space_prefix"] and text:
        text = f" {text}"
    parts = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(a + b, -i) for i, (a, b) in enumerate(pairwise(parts))]
        joined = [(scores[ids[token]], place) for token, place in pairs if token in ids]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found: list[int] = []
    for part in parts:
        in_bytes = [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
        found += [ids[part]] if part in ids else in_bytes
    return found
