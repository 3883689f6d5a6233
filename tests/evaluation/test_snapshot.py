"""Snapshots: their figures are those of a plain computation, and they are small."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mygpt import GPT, CharTokenizer, GPTConfig
from mygpt.evaluation.head_scores import KINDS, measure_heads
from mygpt.evaluation.inside import read_activations
from mygpt.evaluation.snapshot import DIMENSIONS, MOST_SHOWN, Probe, Snapshot, kind_of
from shapes import CONFIGS, LLAMA, build

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,\n"
T = 8


def probe_of(model: GPT, num_tokens: int = 5 * T + 3, seq_len: int = T) -> tuple[Probe, np.ndarray]:
    vocab = model.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocab, num_tokens)
    tokenizer = CharTokenizer("".join(chr(0x4E00 + n) for n in range(vocab)))
    return Probe(tokens, tokenizer, model.config, seq_len), tokens


def snapshot_of(model: GPT, **fields: object) -> Snapshot:
    record = {"step": 7, "took_s": 0.5, "sample": "ab", **probe_of(model)[0].measure(model)}
    return Snapshot.from_record(json.loads(json.dumps({**record, **fields})))


@pytest.mark.parametrize("config", [CONFIGS["gpt2"], LLAMA], ids=["gpt2", "llama"])
def test_losses_are_those_of_the_logit_lens_in_windows(config):
    model = build(config)
    probe, tokens = probe_of(model)
    expected = []
    for start in range(0, 5 * T, T):
        inside = read_activations(model, tokens[start : start + T].tolist())
        logits = inside.lens()[::2].astype(np.float64)  # (N + 1, T, V)
        log_sum = np.log(np.exp(logits).sum(-1))
        chosen = logits[:, np.arange(T), tokens[start + 1 : start + T + 1]]
        expected.append(log_sum - chosen)
    found = probe.measure(model)
    losses = np.concatenate(expected, axis=1)  # (N + 1, 5 T)
    assert found["lens"] == pytest.approx(losses.mean(1), abs=1e-3)
    assert found["kinds"] == {"other letters": [pytest.approx(losses[-1].mean(), abs=1e-3), 5 * T]}


def test_the_loss_of_each_kind_is_the_mean_over_its_tokens():
    config = GPTConfig(len(LETTERS), 8, 2, 1, max_seq_len=T)
    model, tokenizer = build(config), CharTokenizer(LETTERS)
    tokens = tokenizer.encode_array("An owl, 12 cats\nand I")
    found = Probe(tokens, tokenizer, config, 20).measure(model)
    by_kind: dict[str, list[float]] = {}
    for start in (0, T):  # the model's window is shorter
        part = tokens[start : start + T + 1]
        losses = read_activations(model, part[:-1].tolist()).logits.astype(np.float64)
        for row, target in zip(losses, part[1:], strict=True):
            kind = kind_of(tokenizer.decode([int(target)]))
            by_kind.setdefault(kind, []).append(np.log(np.exp(row).sum()) - row[target])
    assert found["kinds"] == {
        kind: [pytest.approx(np.mean(own), abs=1e-3), len(own)] for kind, own in by_kind.items()
    }
    assert found["kinds"]["digits"][1] == 2


def test_scores_are_those_of_measure_heads():
    model = build(LLAMA)
    used = probe_of(model)[1].tolist()
    found, expected = snapshot_of(model), measure_heads(model, among=used.__contains__)
    for kind in KINDS:
        np.testing.assert_allclose(found.scores[kind], expected.scores[kind], atol=1e-4)
        np.testing.assert_allclose(found.relative[kind], expected.relative[kind], atol=3e-4)
    assert found.uniform == pytest.approx(expected.uniform)


def test_distances_between_embeddings_are_kept_as_far_as_the_axes_reach():
    config = GPTConfig(20, DIMENSIONS, 1, 1, max_seq_len=T)
    model = build(config)
    found = snapshot_of(model)
    with torch.no_grad():
        rows = model.token_embedding.weight.double()
    assert len(found.tokens) == 18  # two are not in the text
    order = [ord(text) - 0x4E00 for text in found.tokens]
    expected = torch.cdist(rows[order], rows[order])
    places = torch.from_numpy(found.embedding).double()
    torch.testing.assert_close(torch.cdist(places, places), expected, atol=1e-3, rtol=0)
    apart = rows[order] - rows[order].mean(0)
    assert found.variance == pytest.approx(float(apart.square().sum()))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a", "vowels"), ("é", "vowels"), ("о", "vowels"), ("b", "consonants"), ("Q", "capitals"),
        ("7", "digits"), (" ", "space"), ("\t", "space"), ("\n", "newline"), (" \n", "newline"),
        (".", "punctuation"), ("'s", "punctuation"), ("the", "word parts"), ("字", "other letters"),
        (" the", "word beginnings"), (" The", "capitals"), (" 12", "digits"),
        (" a", "word beginnings"), ("\ufffd", "other bytes"), ("", "space"),
    ],
)  # fmt: skip
def test_the_kind_of_a_token_is_that_of_its_text(text, kind):
    assert kind_of(text) == kind


def test_a_snapshot_draws_no_random_number_and_leaves_the_model_alone():
    model = build(LLAMA).train()
    probe, _ = probe_of(model)
    before = torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert probe.measure(model) == probe.measure(model)
    assert (torch.get_rng_state() == before).all()
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_the_largest_snapshot_has_50_kilobytes():
    """A thousand heads, and tokens of 16 characters that JSON escapes."""
    config = GPTConfig(200, 40, 40, 25, max_seq_len=64)
    model = build(config)
    tokens = np.arange(1000) % 200
    tokenizer = CharTokenizer("".join(chr(0x10000 + n) for n in range(200)))
    record = Probe(tokens, tokenizer, config, 64).measure(model)
    assert len(record["tokens"]) == MOST_SHOWN
    record["tokens"] = [16 * "\U00010000"] * MOST_SHOWN
    record = {"step": 10**9, "took_s": 1.5, **record, "sample": 300 * "\U00010000"}
    size = len(json.dumps(record, separators=(",", ":")))
    assert 20_000 < size < 50_000


@pytest.mark.parametrize(
    "fields",
    [
        {"lens": []}, {"lens": [1.0]}, {"lens": [1.0, float("nan"), 1.0]}, {"scores": {}},
        {"embedding": [[1.0]]}, {"tokens": 5}, {"kinds": {"a": "b"}}, {"variance": "x"},
        {"largest": dict.fromkeys(KINDS, 0.0)}, {"took_s": None}, {"kinds": [1]},
    ],
)  # fmt: skip
def test_what_is_no_snapshot_is_refused(fields):
    model = build(LLAMA)
    assert snapshot_of(model).step == 7
    with pytest.raises(ValueError, match=r"."):
        snapshot_of(model, **fields)
