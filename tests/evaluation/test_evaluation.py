"""Evaluation against a loop that predicts one token at a time; nanoGPT's random windows."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers

from mygpt.core.model import GPT
from mygpt.core.tutorial import set_seed
from mygpt.data import encode_documents, first_part, predicted_size
from mygpt.errors import InputError
from mygpt.evaluation import losses as evaluation
from mygpt.evaluation.losses import Evaluation, evaluate, evaluate_nanogpt
from mygpt.text import Document
from mygpt.text.documents import TextSize
from mygpt.tokenization import ByteTokenizer, CharTokenizer, ForeignTokenizer, Tokenizer


def slow_loss(model: GPT, tokens: np.ndarray, starts: list[int]) -> float:
    """Sum of the losses; each token is predicted alone, in the first window that contains it."""
    total = 0.0
    for i in range(1, len(tokens)):
        start = next(s for s in starts if i <= s + 8)
        with torch.no_grad():
            logits, _ = model(torch.from_numpy(tokens[start:i].astype(np.int64))[None])
        total -= float(logits[0, -1].double().log_softmax(-1)[int(tokens[i])])
    return total


@pytest.fixture
def model() -> GPT:
    set_seed(3)
    return GPT(5, 8, 2, 1, max_seq_len=8).train()


@pytest.mark.parametrize("length", [2, 7, 8, 9, 25, 1030])
def test_every_token_but_the_first_is_predicted_once(model: GPT, length: int) -> None:
    """For full windows, with a shorter last window, with a last window of one token."""
    tokens = np.random.default_rng(0).integers(0, 5, length).astype(np.uint16)
    result = evaluate(model, tokens, 8, TextSize(length - 1, 3 * length, 2 * length))
    assert model.training
    total = slow_loss(model.eval(), tokens, list(range(0, length, 8)))
    assert result.tokens == length - 1
    assert result.loss == pytest.approx(total / (length - 1), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / (3 * length), rel=1e-5)
    assert result.bits_per_char == pytest.approx(total / math.log(2) / (2 * length), rel=1e-5)


class Peaked(GPT):
    """Predicts a repetition of the last token with probability 9/12: losses are known by hand."""

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert not self.training
        return torch.nn.functional.one_hot(ids, self.config.vocab_size) * math.log(9.0), None


def peaked(max_seq_len: int) -> Peaked:
    """With four tokens, a repeated token has loss log(12/9), another one log(12)."""
    return Peaked(4, 4, 1, 1, max_seq_len=max_seq_len)


REPEATED, OTHER = math.log(12 / 9), math.log(12)


def test_the_standard_error_is_that_of_the_windows() -> None:
    """Three windows with 0, 1 and 4 tokens that are no repetition, computed by hand."""
    tokens = np.array([0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1])
    result = evaluate(peaked(4), tokens, 4, TextSize(1, 1))
    losses = [REPEATED, (3 * REPEATED + OTHER) / 4, OTHER]
    assert result.loss == pytest.approx(np.mean(losses))
    assert result.standard_error == pytest.approx(np.std(losses, ddof=1) / math.sqrt(3))
    assert result.seq_len == 4


def test_a_short_last_window_is_weighted_by_its_length() -> None:
    """A last window of one token has the weight of one token in the loss and its error."""
    result = evaluate(peaked(4), np.array([0, 0, 0, 0, 0, 1]), 4, TextSize(1, 1))
    assert result.loss == pytest.approx((4 * REPEATED + OTHER) / 5)
    deviations = np.array([4 * REPEATED - 4 * result.loss, OTHER - result.loss])
    assert result.standard_error == pytest.approx(math.sqrt((deviations**2).sum() * 2) / 5)


def test_one_window_has_no_standard_error() -> None:
    result = evaluate(peaked(8), np.zeros(9, int), 8, TextSize(8, 8))
    assert math.isnan(result.standard_error)
    assert result.perplexity == pytest.approx(12 / 9)
    assert result.bits_per_char is None
    assert Evaluation(1e9, 1, 1.0).perplexity == math.inf


def test_predicted_characters() -> None:
    """Characters of the first token are not predicted, unless it is an end-of-text token."""
    documents = [Document("", "é🙂x"), Document("", "<x>", 1, 2)]
    char = CharTokenizer("é🙂x", end_of_text=True)
    assert predicted_size(documents, np.array([3, 0, 1, 2, 3, 2]), char).num_chars == 4
    assert predicted_size(documents, np.array([0, 1, 2, 3, 2]), char).num_chars == 3
    assert predicted_size([Document("", b"abc")], np.array([97]), ByteTokenizer()).num_chars is None


def foreign(normalizer: object = None, pre_tokenizer: object = None) -> Tokenizer:
    """A word tokenizer with a vocabulary of three words."""
    library = tokenizers.Tokenizer(
        models.WordLevel({"<unk>": 0, "the": 1, "cafe": 2, "sea": 3}, unk_token="<unk>")
    )
    library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
    return ForeignTokenizer(json.loads(library.to_str()))


PLAIN = normalizers.BertNormalizer(lowercase=True, strip_accents=True)


@pytest.mark.parametrize(
    ("normalizer", "text", "first"),
    [
        (None, "the quick🙂 sea the\n\ncafé ", "the"),
        (None, "  🙂🙂 sea", "  🙂🙂"),
        (PLAIN, "Café THE sea", "Café"),
        (PLAIN, "Cafe\u0301 the", "Cafe"),
        (normalizers.NFKC(), "ｔｈｅ ｓｅａ", "ｔｈｅ"),
        (normalizers.Replace(tokenizers.Regex("[0-9]"), ""), "the 12 sea34", "the"),
    ],
)
def test_bytes_and_characters_are_those_of_the_original_text(
    normalizer: object, text: str, first: str
) -> None:
    """Not of the decoded tokens: with an unknown token or a normalizer these have fewer bytes,
    and bits per byte were several times too high."""
    tokenizer = foreign(normalizer)
    documents = [Document("", f"<{text}>", 1, len(text) + 1), Document("", "the 🙂")]
    tokens = encode_documents(documents, tokenizer)
    size = predicted_size(documents, tokens, tokenizer)
    rest = text.removeprefix(first) + "the 🙂"
    assert size == TextSize(len(tokens) - 1, len(rest.encode()), len(rest))
    loss = evaluate(peaked(8), np.minimum(tokens, 3), 2, size)
    bits = loss.loss / math.log(2) * (len(tokens) - 1)
    assert loss.bits_per_byte == pytest.approx(bits / len(rest.encode()))
    assert loss.bits_per_char == pytest.approx(bits / len(rest))


def test_the_text_of_the_first_tokens_is_found() -> None:
    """A long text is validated on its first tokens: their text is a part of the documents."""
    tokenizer = foreign(PLAIN)
    documents = [Document("", "Thé  quick " * 900), Document("", "sea sea"), Document("", "the")]
    total = len(encode_documents(documents, tokenizer))
    for count in (0, 1, 2, 3, 1799, 1800, 1801, 1802, 1803):
        found = first_part(documents, tokenizer, count, total)
        assert len(encode_documents(found, tokenizer)) == count
        assert all(whole.whole == part.whole for whole, part in zip(documents, found, strict=False))
    assert "".join(str(document.text) for document in found) == "Thé  quick " * 900 + "sea seathe"


@pytest.mark.parametrize("length", [2, 8, 9, 10, 12, 25, 40])
@pytest.mark.parametrize("stride", [1, 3, 4, 7, 8])
def test_with_a_stride_predictions_have_more_context(model: GPT, length: int, stride: int) -> None:
    """A window begins every `stride` tokens; the last one early enough to be of full length."""
    tokens = np.random.default_rng(0).integers(0, 5, length)
    starts = list(range(0, max(1, length - 8), stride))
    last = starts[-1] + 8
    if last < length - 1:
        starts.append(last if stride == 8 else length - 9)
    result = evaluate(model.eval(), tokens, 8, TextSize(1, 1), stride=stride)
    assert result.loss == pytest.approx(slow_loss(model, tokens, starts) / (length - 1), rel=1e-5)
    assert result.tokens == length - 1
    if stride == 8:
        assert evaluate(model, tokens, 8, TextSize(1, 1)).loss == result.loss


def test_overlapping_windows_are_not_treated_as_independent() -> None:
    """Text with runs of 50 equally hard tokens: a small stride does not make the error smaller."""
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(20):
        easy = np.repeat(generator.random(40) < 0.5, 50)
        tokens = np.cumsum(~easy) % 4
        errors = [
            evaluate(peaked(64), tokens, 64, TextSize(1, 1), stride=n).standard_error
            for n in (64, 4)
        ]
        ratios.append(errors[1] / errors[0])
    assert np.mean(ratios) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("stride", [-1, 0, 9])
def test_strides_out_of_range_are_refused(model: GPT, stride: int) -> None:
    with pytest.raises(InputError, match=f"stride={stride} must be at least 1 and at most"):
        evaluate(model, np.zeros(9, int), 8, TextSize(8, 8), stride=stride)


def test_large_vocabularies_are_evaluated_in_smaller_batches(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the logits fit in memory; the loss is the same."""
    size = TextSize(1, 1)
    tokens = np.random.default_rng(0).integers(0, 5, 100)
    expected = evaluate(model, tokens, 8, size)
    rows: list[int] = []
    monkeypatch.setattr(evaluation, "LOGITS_PER_BATCH", 5 * 16)
    hook = model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    assert evaluate(model, tokens, 8, size).loss == pytest.approx(expected.loss, rel=1e-6)
    hook.remove()
    assert max(rows) == 2
    monkeypatch.undo()
    assert evaluation.rows_at_once(64, 65) == 128
    assert evaluation.rows_at_once(1024, 50_257) == 1


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer batches; more than one forward pass for each."""
    monkeypatch.setattr(evaluation, "NANOGPT_BATCHES", 5)
    monkeypatch.setattr(evaluation, "TOKENS_PER_BATCH", 100)


@pytest.mark.usefixtures("few")
def test_windows_are_drawn_as_in_nanogpts_train_py(model: GPT) -> None:
    """There: `torch.randint(len(data) - block_size, (batch_size,))`, and the mean of the means."""
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 5, 300))
    generator = torch.Generator().manual_seed(7)
    means = []
    for _ in range(5):
        starts = torch.randint(len(data) - 8, (64,), generator=generator)
        x = torch.stack([data[i : i + 8] for i in starts])
        y = torch.stack([data[i + 1 : i + 9] for i in starts])
        means.append(model(x, y)[1].item())
    size = TextSize(299, 598, 299)
    result = evaluate_nanogpt(model, data.numpy(), size, seed=7)
    assert result.loss == pytest.approx(np.mean(means), rel=1e-6)
    assert (result.tokens, result.seq_len) == (5 * 64 * 8, 8)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 2)
    assert result.bits_per_char == pytest.approx(result.loss / math.log(2))
    assert model.training
    assert evaluate_nanogpt(model, data.numpy(), size, seed=7) == result
    assert evaluate_nanogpt(model, data.numpy(), size, seed=8).loss != result.loss


@pytest.mark.usefixtures("few")
def test_the_standard_error_of_random_windows() -> None:
    """Over many seeds the loss has this standard deviation, around the loss of the whole text."""
    tokens = np.cumsum(np.random.default_rng(0).random(3000) < 0.1) % 4
    results = [evaluate_nanogpt(peaked(8), tokens, TextSize(1, 1), seed=seed) for seed in range(60)]
    spread = np.std([result.loss for result in results], ddof=1)
    error = np.mean([result.standard_error for result in results])
    assert spread == pytest.approx(error, rel=0.3)
    full = evaluate(peaked(8), tokens, 8, TextSize(1, 1)).loss
    assert np.mean([result.loss for result in results]) == pytest.approx(full, abs=error)


def test_random_windows_are_of_256_tokens_or_the_models_window() -> None:
    assert evaluation.NANOGPT_BATCHES == 200
    with pytest.raises(InputError, match="256 tokens is too short for windows of 256"):
        evaluate_nanogpt(peaked(300), np.zeros(256, int), TextSize(1, 1))
    with pytest.raises(InputError, match="choose at most 9"):
        evaluate_nanogpt(peaked(16), np.zeros(10, int), TextSize(1, 1))


@pytest.mark.usefixtures("few")
def test_an_error_restores_the_mode_of_the_model(model: GPT) -> None:
    with pytest.raises(InputError, match="exceeds"):
        evaluate(model, np.zeros(30, int), 9, TextSize(29, 29))
    assert model.training
