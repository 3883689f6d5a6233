"""Head scores: hand-built heads score 1, and the definition is TransformerLens' detector's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bpe_samples import BPE
from mygpt import GPT, CharTokenizer, GPTConfig, Writer
from mygpt.errors import InputError
from mygpt.evaluation.head_scores import KINDS, is_text, measure_heads
from mygpt.evaluation.inside import read_activations
from mygpt.evaluation.snapshot import Probe
from shapes import CONFIGS, LLAMA, build, own_forward

WINDOW = 12
# The residual stream is a token and a position, each as a one-hot vector.
WIDE = GPTConfig(6, 6 + WINDOW, 1, 1, max_seq_len=WINDOW, mlp_bias=False)


def hand_built(kind: str) -> GPT:
    """A model with one head that attends to one position with nearly all its weight."""
    model = build(WIDE, spread=None)
    c, v = WIDE.embed_dim, WIDE.vocab_size
    with torch.no_grad():
        model.token_embedding.weight.copy_(torch.eye(v, c))
        model.position_embedding.weight.copy_(torch.eye(WINDOW, c).roll(v, 1))
        query, key = torch.zeros(c, c), torch.zeros(c, c)
        if kind == "previous_token":
            query[v : v + WINDOW - 1, v + 1 : v + WINDOW] = torch.eye(WINDOW - 1)
            key[v : v + WINDOW, v : v + WINDOW] = torch.eye(WINDOW)
        else:  # positions t - 6, or t - 5: the tokens of the first half, in the second one
            back = 6 if kind == "duplicate_token" else 5
            query[v : v + WINDOW - back, v + back : v + WINDOW] = torch.eye(WINDOW - back)
            key[v : v + WINDOW, v : v + WINDOW] = torch.eye(WINDOW)
        rows = torch.cat([100 * query, 100 * key, torch.eye(c)])
        model.blocks[0].attention.query_key_value.weight.copy_(rows)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_hand_built_head_scores_1_and_is_named(kind):
    found = measure_heads(hand_built(kind))
    assert found.relative[kind] == pytest.approx(1.0, abs=1e-3)
    assert found.scores[kind] == pytest.approx(found.largest[kind], abs=1e-3)
    assert found.names() == {(0, 0): KINDS[kind]}
    assert found.names(threshold=1.01) == {}


def detector_score(weights: np.ndarray, ids: list[int], kind: str) -> float:
    """The sum of a head's weights (T, T) at the tokens of a kind, over the sum of all of them."""
    total = 0.0
    for t in range(len(ids)):
        for s in range(t + 1):
            earlier = kind == "previous_token" and s == t - 1
            same = kind == "duplicate_token" and s < t and ids[s] == ids[t]
            after = kind == "induction" and s >= 1 and ids[s - 1] == ids[t] and s - 1 < t
            if earlier or same or after:
                total += weights[t, s]
    return total / weights.sum()


@pytest.mark.parametrize("config", [CONFIGS["gpt2"], LLAMA], ids=["gpt2", "llama"])
def test_scores_are_the_fraction_of_attention_to_tokens_of_the_kind(config):
    model = build(config)
    found = measure_heads(model, seed=3)
    time = found.ids.shape[1]
    weights = [read_activations(model, ids.tolist()).attention for ids in found.ids]
    for kind in KINDS:
        assert found.scores[kind].shape == (config.num_layers, config.num_heads)
        for block in range(config.num_layers):
            for head in range(config.num_heads):
                expected = np.mean([
                    detector_score(w[block, head], ids.tolist(), kind)
                    for w, ids in zip(weights, found.ids, strict=True)
                ])  # fmt: skip
                assert found.scores[kind][block, head] == pytest.approx(expected, abs=1e-6)
    half = time // 2
    assert found.largest == pytest.approx(
        {"previous_token": (time - 1) / time, "duplicate_token": 0.5, "induction": 0.5}
    )
    equal = np.tril(np.ones((time, time))) / np.arange(1, time + 1)[:, None]
    for kind in KINDS:
        expected = np.mean([detector_score(equal, ids, kind) for ids in found.ids.tolist()])
        assert found.uniform[kind] == pytest.approx(expected, abs=1e-6)
    assert (found.ids[:, :half] == found.ids[:, half:]).all()
    assert all(len(set(row)) == half for row in found.ids[:, :half].tolist())


def test_the_tokens_are_a_function_of_the_seed():
    model = build(LLAMA)
    first, again, other = (measure_heads(model, seed=seed) for seed in (1, 1, 2))
    assert (first.ids == again.ids).all()
    assert (first.ids != other.ids).any()


def test_the_tokens_are_text():
    """Two fifths of a vocabulary of 512 were bytes that no text has: heads scored less for them."""
    others = [i for i in range(BPE.vocab_size) if not is_text(BPE, i)]
    # 128 bytes of longer characters, the control characters but two, and the end of text.
    assert sum(i <= BPE.end_of_text for i in others) == 128 + 31 + 1
    assert not np.isin(BPE.encode_array("Ab\n\t ~1"), others).any()
    model = build(GPTConfig(BPE.vocab_size, 8, 2, 1, max_seq_len=64))
    assert np.isin(measure_heads(model).ids, others).any()
    writer = Writer(model, BPE)
    assert not np.isin(writer.head_scores().ids, others).any()
    text = "the quick brown fox jumps over the lazy dog, and again: THE QUICK BROWN FOX"
    tokens = BPE.encode_array(text)
    found = writer.head_scores(text=text)
    assert len(set(tokens.tolist())) > 32
    assert np.isin(found.ids, tokens).all()
    scores = Probe(tokens, BPE, model.config, 16).measure(model)["scores"]
    np.testing.assert_allclose(scores["induction"], found.scores["induction"], atol=1e-4)


def test_where_too_few_tokens_are_text_others_are_used():
    model = build(GPTConfig(6, 8, 2, 1, max_seq_len=12))
    found = Writer(model, CharTokenizer("\x00\x01\x02\x03ab")).head_scores()
    for row in found.ids[:, :6].tolist():
        assert sorted(row) == list(range(6))


def test_a_window_of_one_token_and_another_forward_are_refused():
    with pytest.raises(InputError, match="a window of 1 token has none"):
        measure_heads(GPT(3, 4, 1, 1, max_seq_len=1))
    with pytest.raises(InputError, match="has its own forward"):
        measure_heads(own_forward())
