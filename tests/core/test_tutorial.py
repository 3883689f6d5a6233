"""tutorial.py, and the tutorial's printed digits that depend on the model and the batches."""

from __future__ import annotations

import pytest
import torch

from mygpt import GPT, VOCAB, generate, get_batch, set_seed, to_ids
from mygpt.core.tutorial import train_gpt
from mygpt.errors import InputError

CYCLE = [0, 1, 2, 3]


def test_vocabulary_and_ids():
    assert VOCAB == ("I", "love", "AI", "!")
    ids = to_ids(["I", "love", "!", "AI"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [0, 1, 3, 2]
    assert to_ids([]).shape == (0,)
    assert to_ids([]).dtype == torch.int64


def test_unknown_words_are_listed():
    """A KeyError and a ValueError, whose message is not shown as a repr."""
    with pytest.raises(KeyError) as caught:
        to_ids(["I", "hate", "AI", "?"])
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith("['hate', '?'] not in the vocabulary ['I', 'love'")


def test_what_is_no_list_of_words_is_refused():
    with pytest.raises(InputError, match="tokens=None must be a list of words"):
        to_ids(None)
    with pytest.raises(InputError, match="seed=None must be a whole number"):
        set_seed(None)


def test_set_seed_seeds_torch():
    """Seed 0 by default."""
    set_seed()
    first = torch.rand(3)
    set_seed(0)
    assert torch.equal(torch.rand(3), first)
    set_seed(1)
    assert not torch.equal(torch.rand(3), first)
    torch.manual_seed(42)
    expected = torch.rand(3)
    set_seed(42)
    assert torch.equal(torch.rand(3), expected)


def test_experiment_27_get_batch():
    """The chapter's first rows after set_seed(42); y is x one position later."""
    set_seed(42)
    x, y = get_batch(torch.tensor(CYCLE * 64), 4, 8)
    assert x.shape == y.shape == (4, 8)
    assert x.dtype == y.dtype == torch.int64
    assert x[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert y[0].tolist() == [1, 2, 3, 0, 1, 2, 3, 0]


def test_get_batch_cuts_where_the_chapters_one_draw_says():
    """One torch.randint a call, whose bound leaves the last window out."""
    data = torch.arange(100)
    for seed in range(20):
        set_seed(seed)
        x, y = get_batch(data, 5, 7)
        after = torch.get_rng_state()
        set_seed(seed)
        starts = torch.randint(0, len(data) - 7 - 1, (5,))
        assert torch.equal(after, torch.get_rng_state())
        for b, start in enumerate(starts.tolist()):
            assert x[b].tolist() == list(range(start, start + 7))
            assert y[b].tolist() == list(range(start + 1, start + 8))


def test_get_batch_reaches_all_starts_but_the_last():
    """A corpus of T + 2 tokens has one start; one more token gives one more."""
    assert {int(x) for x in get_batch(torch.arange(10), 200, 8)[0][:, 0]} == {0}
    assert {int(x) for x in get_batch(torch.arange(12), 200, 8)[0][:, 0]} == {0, 1, 2}


@pytest.mark.parametrize("length", [0, 1, 8, 9])
def test_get_batch_names_the_lengths_of_too_short_a_corpus(length):
    with pytest.raises(ValueError, match=rf"{length} tokens .*seq_len=8.* at least 10"):
        get_batch(torch.zeros(length, dtype=torch.int64), 4, 8)


@pytest.fixture(scope="module")
def experiment_28() -> tuple[GPT, list[float]]:
    """The trained model of chapter 14 and its 200 losses."""
    data = torch.tensor(CYCLE * 64)
    set_seed(0)
    model = GPT(vocab_size=4, embed_dim=8, num_heads=2, num_layers=2, max_seq_len=64, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    set_seed(42)
    losses = []
    for _ in range(200):
        x, y = get_batch(data, 4, 8)
        _, loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize(
    ("step", "printed"),
    [(1, "5.2739"), (10, "1.6107"), (50, "0.3453"), (100, "0.0162"), (200, "0.0035")],
)
def test_experiment_28_losses(experiment_28, step, printed):
    assert f"{experiment_28[1][step - 1]:.4f}" == printed


def test_experiment_29_next_token_of_every_prefix(experiment_28):
    model = experiment_28[0].eval()
    for length in range(1, 9):
        prefix = torch.tensor([(CYCLE * 2)[:length]])
        with torch.no_grad():
            assert int(model(prefix)[0][0, -1].argmax()) == length % 4


@pytest.mark.parametrize("greedy", [{"top_k": 1}, {"temperature": 0.0}, {"temperature": 1e-3}])
def test_experiments_30_and_32_write_the_cycle(experiment_28, greedy):
    out = generate(experiment_28[0], to_ids(["I"]).unsqueeze(0), max_new_tokens=7, **greedy)
    assert [VOCAB[i] for i in out[0].tolist()] == ["I", "love", "AI", "!"] * 2


def test_experiment_33_drifts_past_the_trained_positions_as_printed(experiment_28):
    out = generate(experiment_28[0], to_ids(["I"]).unsqueeze(0), max_new_tokens=12, top_k=1)
    printed = ["I", "love", "AI", "!", "I", "love", "AI", "!", "I", "AI", "!", "!", "love"]
    assert [VOCAB[i] for i in out[0].tolist()] == printed


def test_the_trained_model_has_the_recorded_losses_and_drifts_as_recorded():
    """Experiments 28 and 33: losses to four decimals, and the text past position 8."""
    losses = {}
    model = train_gpt(losses.__setitem__)
    assert list(losses) == list(range(1, 201))
    recorded = {1: 5.2739, 10: 1.6107, 50: 0.3453, 100: 0.0162, 200: 0.0035}
    assert {step: round(losses[step], 4) for step in recorded} == recorded
    assert sum(p.numel() for p in model.parameters()) == 2_240
    assert not model.training
    ids = generate(model, to_ids(["I"])[None], 12, top_k=1)[0].tolist()
    assert ids == [0, 1, 2, 3, 0, 1, 2, 3, 0, 2, 3, 3, 1]
