"""Does TransformerLens compute the same activations, ablations and head scores as mygpt?

Usage: python -m benchmarks.inside [CHECKPOINT ...]
       python -m benchmarks.inside --times [--rounds 9]
in the folder above `benchmarks`; the first needs transformer-lens (benchmarks/peers.txt), the
second a machine that does nothing else.

Each model is exported as a Hugging Face folder, which TransformerLens loads. The largest absolute
differences are printed: of the logit lens, the contributions to logits, ablations, patches and head
scores (its detector needs a window above 64 tokens, or fewer than 32 tokens in the vocabulary).
Without a checkpoint the models are small ones of GPT-2's, Llama's and Qwen3's block with
random weights.

With --times, `mygpt serve` answers POST /api/inside for the tutorial's model (64 tokens, which
fill its window) and one of 10.65 million parameters (128 tokens). The time of an answer is that
until its last byte; each round has other texts, so that no pass is known before. Exit status 1 if
a median of ablations or patches is above its limit.
Letters: B batch, T time, C embedding, N blocks, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import string
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.generation.models import build
from benchmarks.serving.__main__ import CHARACTERS, free_port, running
from numpy.typing import NDArray

import mygpt
from mygpt.checkpoint.model_file import read_checkpoint, resolve
from mygpt.evaluation.inside import Inside
from mygpt.formats import export_checkpoint

VOCABULARY = len(string.ascii_lowercase)
GPT2 = mygpt.GPTConfig(VOCABULARY, 32, 4, 3, 64, mlp="gelu_tanh", attention_bias=True)
LLAMA = mygpt.GPTConfig(
    VOCABULARY, 32, 4, 3, 64, num_kv_heads=2, norm="rms", norm_eps=1e-5, position="rotary",
    mlp="swiglu", mlp_bias=False, tied=False,
)  # fmt: skip
QWEN3 = mygpt.GPTConfig(
    VOCABULARY, 32, 4, 3, 64, num_kv_heads=2, head_dim=12, norm="rms", position="rotary",
    mlp="swiglu", mlp_bias=False, qk_norm=True,
)  # fmt: skip
BLOCKS = {"GPT-2": GPT2, "Llama": LLAMA, "Qwen3": QWEN3}
SPREAD = 0.3  # of random weights around their first values: attention is far from uniform then
TOKENS = 8
LIMIT = 1e-4
_PLACES = {"attention": "hook_attn_out", "mlp": "hook_mlp_out", "block": "hook_resid_post"}


def random_model(folder: Path, name: str) -> Path:
    """A checkpoint of a small model with random weights, also of norms and biases."""
    torch.manual_seed(0)
    model = mygpt.GPT.from_config(BLOCKS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
    path = folder / f"{name}.safetensors"
    mygpt.save_checkpoint(path, model, mygpt.CharTokenizer(string.ascii_lowercase))
    return path


def load_bridge(path: Path, folder: Path) -> Any:
    """The model in TransformerLens, by way of its exported folder."""
    from transformer_lens.model_bridge import TransformerBridge

    export_checkpoint(read_checkpoint(resolve(path)), "hf", folder, overwrite=True)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    bridge.cfg.default_prepend_bos = False
    return bridge


def furthest(ours: Any, theirs: Any) -> float:
    """The largest absolute difference."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert np.shape(ours) == np.shape(theirs), (np.shape(ours), np.shape(theirs))
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max())


def contributions(inside: Inside, bridge: Any) -> Iterator[float]:
    """Differences of all contributions to the largest logit at each position.

    The bridge's final norm is folded into its head.
    """
    _, cache = bridge.run_with_cache(torch.from_numpy(inside.ids)[None])
    stack, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    for position in range(len(inside.ids)):
        ours = inside.contributions(position=position)
        theirs = cache.logit_attrs(stack, ours.token)[:, 0, position].detach().numpy()
        named = {label: theirs[row] for row, label in enumerate(labels)}
        yield abs(ours.total - ours.logit)
        yield abs(ours.embedding - named["embed"])
        yield abs(ours.position_embedding - named.get("pos_embed", 0.0))
        yield abs(ours.attention_biases.sum() - named["bias"])
        for n, heads in enumerate(ours.heads):
            yield abs(ours.mlps[n] - named[f"{n}_mlp_out"])
            yield furthest(heads, np.array([named[f"L{n}H{h}"] for h in range(len(heads))]))


def hooked(
    bridge: Any, ids: NDArray[np.int64], place: str, change: Callable[[Any], None]
) -> NDArray[np.float32]:
    """The bridge's logits (T, V) with an activation changed in place."""

    def hook(activation: Any, hook: Any) -> Any:
        activation = activation.clone()
        change(activation)
        return activation

    with torch.no_grad():
        logits = bridge.run_with_hooks(torch.from_numpy(ids)[None], fwd_hooks=[(place, hook)])
    return logits[0].numpy()


def parts(config: mygpt.GPTConfig) -> Iterator[tuple[str, str, Any]]:
    """Name of a part, and where TransformerLens has it: the hook, and the index after [B, T]."""
    for n in range(config.num_layers):
        for h in range(config.num_heads):
            yield f"{n + 1}.{h + 1}", f"blocks.{n}.attn.hook_z", (h,)
        for kind, hook in _PLACES.items():
            yield f"{kind}{n + 1}", f"blocks.{n}.{hook}", ()


def ablations(writer: mygpt.Writer, inside: Inside, bridge: Any) -> Iterator[float]:
    """Differences of the logits without each head, attention and MLP."""

    def switch_off(index: Any, activation: Any) -> None:
        activation[(slice(None), slice(None), *index)] = 0

    for name, place, index in parts(writer.config):
        if not name.startswith("block"):
            ours = writer.ablated(name).inside(inside.ids.tolist()).logits
            yield furthest(ours, hooked(bridge, inside.ids, place, partial(switch_off, index)))


def patches(writer: mygpt.Writer, inside: Inside, other: Inside, bridge: Any) -> Iterator[float]:
    """Differences of the logits with each activation of `other`, at each position."""
    _, cache = bridge.run_with_cache(torch.from_numpy(other.ids)[None])
    for name, place, index in parts(writer.config):
        if name.startswith("attention"):
            continue  # mygpt patches the heads' values, before the projection
        for position in range(len(inside.ids)):

            def put(activation: Any, at: Any = (0, position, *index), place: str = place) -> None:
                activation[at] = cache[place][at]

            ours = writer.inside(inside.ids.tolist(), [other.patch(name, position)]).logits
            yield furthest(ours, hooked(bridge, inside.ids, place, put))


def head_scores(writer: mygpt.Writer, bridge: Any) -> Iterator[float]:
    """Differences of the scores of all heads."""
    from transformer_lens.head_detector import detect_head

    ours = writer.head_scores()
    texts = [writer.tokenizer.decode(row.tolist()) for row in ours.ids]
    for text, row in zip(texts, ours.ids, strict=True):
        assert bridge.to_tokens(text)[0].tolist() == row.tolist()
    for kind, scores in ours.scores.items():
        yield furthest(scores, detect_head(bridge, texts, f"{kind}_head"))


def compare(path: Path, folder: Path) -> dict[str, float]:
    """The largest differences for one model."""
    writer = mygpt.load(path, device="cpu", dtype="float32")
    bridge = load_bridge(path, folder)
    rng, time = np.random.default_rng(0), min(TOKENS, writer.config.max_seq_len)
    first, second = (
        writer.inside(rng.integers(0, writer.config.vocab_size, time).tolist()) for _ in range(2)
    )
    logits, cache = bridge.run_with_cache(torch.from_numpy(first.ids)[None])
    lens = cache.logit_lens(incl_mid=True, positions=None).values[:, 0]
    weights = torch.stack([cache["pattern", n][0] for n in range(writer.config.num_layers)])
    found = {
        "logits": furthest(first.logits, logits[0]),
        "attention": furthest(first.attention, weights),
        "logit lens": furthest(first.lens(), lens),
        "ablation": max(ablations(writer, first, bridge)),
        "patching": max(patches(writer, first, second, bridge)),
        "head scores": max(head_scores(writer, bridge)),
    }
    bridge.enable_compatibility_mode(
        disable_warnings=True, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    return found | {"contributions": max(contributions(first, bridge))}


# Tokens of a text, and the limit of an answer in milliseconds, by the name of a model.
TIMED = {"S": (64, 50), "M": (128, 300)}


def questions(config: mygpt.GPTConfig, ids: list[int], other: str) -> dict[str, dict[str, Any]]:
    """Requests about one text, in the order in which they are sent."""
    middle, last = config.num_layers // 2 + 1, config.num_layers
    return {
        "a new text": {},
        "without head 1.1": {"ablate": ["1.1"]},
        f"without head {middle}.2": {"ablate": [f"{middle}.2"]},
        f"without MLP {last}": {"ablate": [f"mlp{last}"]},
        "head 1.1 of a second text": {"patch": ["1.1"], "other": other},
        f"MLP {last} of that text": {"patch": [f"mlp{last}"], "other": other},
    }


def answer_times(size: str, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Milliseconds of each request of each round."""
    model, (tokens, _), path = build(size), TIMED[size], folder / f"{size}.safetensors"
    characters = CHARACTERS[: model.config.vocab_size]
    mygpt.save_checkpoint(path, model, mygpt.CharTokenizer(characters))
    rng, port, found = np.random.default_rng(0), free_port(), {}
    command = [sys.executable, "-m", "mygpt", "serve", str(path), "--quiet", "--port", str(port)]
    with running(command, port):
        for number in range(rounds + 1):
            ids, second = rng.integers(0, len(characters), (2, tokens)).tolist()
            other = "".join(characters[i] for i in second)
            for name, asked in questions(model.config, ids, other).items():
                body = json.dumps({"ids": ids, **asked}).encode()
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/api/inside",
                    body,
                    {"Content-Type": "application/json"},
                )
                began = time.perf_counter()
                with urllib.request.urlopen(request, timeout=60) as answer:
                    assert answer.read()
                if number:  # the first one loads torch and measures the heads
                    found.setdefault(name, []).append(1e3 * (time.perf_counter() - began))
    return found


def print_times(rounds: int) -> None:
    print("| model, request | median, ms | least to most |\n|---|---:|---:|")
    late = []
    with tempfile.TemporaryDirectory() as folder:
        for size, (_, limit_ms) in TIMED.items():
            for name, times in answer_times(size, rounds, Path(folder)).items():
                median = statistics.median(times)
                print(f"| {size}, {name} | {median:.0f} | {min(times):.0f} to {max(times):.0f} |")
                if median > limit_ms and name != "a new text":
                    late.append(f"{size}, {name}: {median:.0f} ms, above {limit_ms}")
    if late:
        sys.exit("\n".join(late))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.inside")
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.times:
        print_times(options.rounds)
    else:
        print_differences(options.checkpoints)


def print_differences(paths: list[str]) -> None:
    torch.set_num_threads(1)  # the models are too small for more
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {path: Path(path) for path in paths}
        models = models or {f"{block}'s block": random_model(folder, block) for block in BLOCKS}
        results = {name: compare(path, folder / "exported") for name, path in models.items()}
    print("| model |", " | ".join(next(iter(results.values()))), "|")
    for name, found in results.items():
        print(f"| {name} |", " | ".join(f"{value:.1e}" for value in found.values()), "|")
    if max(max(found.values()) for found in results.values()) > LIMIT:
        sys.exit(f"some differences are above {LIMIT}")


if __name__ == "__main__":
    main()
