"""The validation pass against a loop that predicts one token at a time; and the baselines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mygpt.baselines import uniform_loss, unigram_loss
from mygpt.evaluation import evaluate
from mygpt.model import GPT
from mygpt.tokenization import CharTokenizer
from mygpt.tutorial import set_seed


@pytest.mark.parametrize("length", [2, 7, 8, 9, 25, 1030])
def test_every_token_but_the_first_is_predicted_once(length: int) -> None:
    """Lengths on all sides of a window: whole windows, a rest, a rest of one."""
    tokenizer = CharTokenizer("aé🙂x", end_of_text=True)
    set_seed(3)
    model = GPT(5, 8, 2, 1, max_seq_len=8).train()
    tokens = np.random.default_rng(0).integers(0, 5, length).astype(np.uint16)
    total = 0.0
    for i in range(1, length):
        start = (i - 1) // 8 * 8
        with torch.no_grad():
            logits, _ = model(torch.from_numpy(tokens[start:i].astype(np.int64))[None])
        total -= float(logits[0, -1].double().log_softmax(-1)[int(tokens[i])])
    result = evaluate(model, tokens, 8, tokenizer.byte_lengths())
    assert result.tokens == length - 1
    assert result.loss == pytest.approx(total / (length - 1), rel=1e-5)
    num_bytes = len(tokenizer.decode([t for t in tokens[1:].tolist() if t != 4]).encode())
    expected = total / math.log(2) / max(1, num_bytes)
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_baselines_by_hand() -> None:
    assert uniform_loss(4) == pytest.approx(1.386294, abs=1e-6)
    train, test = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    # counts + 1 = 4, 2, 1 of 7
    expected = -(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3
    assert unigram_loss(train, test, 3) == pytest.approx(expected)
