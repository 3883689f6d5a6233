"""A snapshot of a model in training: some thousand measured numbers, for its run's report.

Letters: B batch, T time, C embedding, N blocks, H heads, K tokens shown, D dimensions kept of their
embeddings, V vocabulary.
"""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mygpt.core.config import GPTConfig
from mygpt.core.model import GPT
from mygpt.evaluation.activations import Floats, head_of, run_blocks
from mygpt.evaluation.head_scores import KINDS, measure_heads
from mygpt.tokenization import Tokenizer

MOST_SHOWN, DIMENSIONS = 96, 6  # K and D
_LONGEST_NAME = 16  # characters of a token's text
# Predicted tokens: as many as give the losses by kind two digits, fewer where logits are large.
_MOST_PREDICTED, _LEAST_PREDICTED, _MOST_LOGITS = 512, 128, 2**24
_MOST_COUNTED = 2**20  # tokens in which the most frequent ones are counted
# Latin, Cyrillic and Greek; accents are removed before.
_VOWELS = frozenset("aeiouаеиоуыэюяєіαεηιουω")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One snapshot, as it is read from a file.

    Attributes:
        step: the step after which it was taken.
        took_s: how long that took.
        scores: for each kind of head (N, H), as `HeadScores.scores`.
        largest: as `HeadScores.largest`.
        uniform: as `HeadScores.uniform`.
        lens: (N + 1,), the loss of the residual stream after the embedding and after each block,
            through the final norm and the head; nats per token. The last is the model's loss.
        kinds: by kind of predicted token, its loss in nats per token and the number of tokens.
        tokens: (K,), the texts of the most frequent tokens.
        embedding: (K, D), their embeddings less the mean, along their own main axes.
        variance: of these embeddings along all axes, summed over the tokens.
        sample: a text that the model generated.
    """

    step: int
    took_s: float
    scores: dict[str, Floats]
    largest: dict[str, float]
    uniform: dict[str, float]
    lens: Floats
    kinds: dict[str, tuple[float, int]]
    tokens: list[str]
    embedding: Floats
    variance: float
    sample: str

    @property
    def loss(self) -> float:
        """The model's loss on the passage, nats per token."""
        return float(self.lens[-1])

    @property
    def relative(self) -> dict[str, Floats]:
        """As `HeadScores.relative`."""
        return {kind: scores / self.largest[kind] for kind, scores in self.scores.items()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Snapshot:
        """Check a record, which may come from anywhere; `ValueError` if it is not a snapshot's."""
        try:
            found = cls(
                int(record["step"]),
                float(record["took_s"]),
                {kind: _floats(record["scores"][kind], 2) for kind in KINDS},
                {kind: float(record["largest"][kind]) for kind in KINDS},
                {kind: float(record["uniform"][kind]) for kind in KINDS},
                _floats(record["lens"], 1),
                {str(k): (float(loss), int(n)) for k, (loss, n) in record["kinds"].items()},
                [str(text)[:_LONGEST_NAME] for text in record["tokens"]],
                _floats(record["embedding"], 2),
                float(record["variance"]),
                str(record["sample"]),
            )
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None
        shapes = {scores.shape for scores in found.scores.values()}
        numbers = [found.took_s, found.variance, *found.uniform.values()]
        numbers += [loss for loss, _ in found.kinds.values()]
        if (
            len(shapes) != 1
            or found.embedding.shape != (len(found.tokens), DIMENSIONS)
            or len(found.lens) != len(found.scores["induction"]) + 1
            or not all(map(math.isfinite, numbers))
            or not all(0 < value <= 1 for value in found.largest.values())
        ):
            raise ValueError("its arrays do not fit together")
        return found


def _floats(value: Any, ndim: int) -> Floats:
    array = np.asarray(value, np.float32)
    if array.ndim != ndim or not array.size or not np.isfinite(array).all():
        raise ValueError("an array is not one of numbers")
    return array


class Probe:
    """What the snapshots of a run are measured on: the same for all of them.

    Args:
        tokens: 1-D ids of a validation text; the passage is their beginning.
        tokenizer: the model's.
        config: the model's.
        seq_len: T, the windows in which the passage is read.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        tokenizer: Tokenizer,
        config: GPTConfig,
        seq_len: int,
    ) -> None:
        logits = config.vocab_size * (config.num_layers + 1)
        most = max(_LEAST_PREDICTED, min(_MOST_PREDICTED, _MOST_LOGITS // logits))
        seq_len = min(seq_len, config.max_seq_len, most, len(tokens) - 1)
        rows = max(1, min(most, len(tokens) - 1) // seq_len)
        passage = torch.from_numpy(np.asarray(tokens[: rows * seq_len + 1]).astype(np.int64))
        self._inputs = passage[:-1].view(rows, seq_len)  # (B, T)
        self._targets = passage[1:].view(rows, seq_len)
        counts = np.bincount(np.asarray(tokens[:_MOST_COUNTED]), minlength=config.vocab_size)
        self._used = frozenset(np.flatnonzero(counts).tolist())
        shown = np.argsort(-counts, kind="stable")[:MOST_SHOWN]
        self._shown = torch.from_numpy(shown[counts[shown] > 0])  # (K,)
        self._names = [tokenizer.decode([i])[:_LONGEST_NAME] for i in self._shown.tolist()]
        ids, places = np.unique(self._targets.numpy(), return_inverse=True)
        kinds = [kind_of(tokenizer.decode([i])) for i in ids.tolist()]
        self._kinds = sorted(set(kinds))
        of_id = np.array([self._kinds.index(kind) for kind in kinds])
        self._kind_of_target = of_id[places.reshape(-1)]  # (B T,)

    def measure(self, model: GPT) -> dict[str, Any]:
        """All of a snapshot but step, time and sample, as JSON values; draws no random number."""
        heads = measure_heads(model, among=self._used.__contains__)
        by_depth = _losses_by_depth(model, self._inputs, self._targets)  # (N + 1, B T)
        counts = np.bincount(self._kind_of_target)
        sums = np.bincount(self._kind_of_target, by_depth[-1])
        weight = model.token_embedding.weight.detach()
        positions, variance = _main_axes(weight[self._shown.to(weight.device)].float().cpu())
        return {
            "scores": {kind: _rounded(scores) for kind, scores in heads.scores.items()},
            "largest": heads.largest,
            "uniform": heads.uniform,
            "lens": _rounded(by_depth.mean(1, dtype=np.float64)),
            "kinds": {
                kind: [round(float(sums[n] / counts[n]), 4), int(counts[n])]
                for n, kind in enumerate(self._kinds)
            },
            "tokens": self._names,
            "embedding": _rounded(positions),
            "variance": float(variance),
        }


def _rounded(array: NDArray[np.floating]) -> list[Any]:
    found: list[Any] = np.round(array.astype(np.float64), 4).tolist()
    return found


@torch.no_grad()
def _losses_by_depth(model: GPT, inputs: Tensor, targets: Tensor) -> Floats:
    """The loss of each target after the embedding and after each block, (N + 1, B T)."""
    device = model.token_embedding.weight.device
    wanted, head = targets.flatten().to(device), head_of(model)
    found: list[Floats] = []

    def at(name: str, n: int, x: Tensor) -> Tensor:
        if name == "residual" and n % 2 == 0:
            logits = F.linear(model.final_norm(x), head).flatten(0, 1).float()  # (B T, V)
            found.append(F.cross_entropy(logits, wanted, reduction="none").cpu().numpy())
        return x

    run_blocks(model, inputs.to(device), at)
    return np.stack(found)


def _main_axes(rows: Tensor) -> tuple[Floats, float]:
    """Rows (K, C) less their mean, along the D axes of largest variance; their whole variance."""
    # By torch, whose threads the training has set: NumPy's would compete with those.
    left, sizes, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = np.zeros((len(rows), DIMENSIONS), np.float32)
    kept = min(DIMENSIONS, len(sizes))
    found[:, :kept] = (left * sizes)[:, :kept].numpy()
    return found, float(sizes.square().sum())


def kind_of(text: str) -> str:
    """The kind of a token, by its text: letters, digits, spaces and so on.

    A token of several letters, as of BPE, is the beginning of a word if a space comes first.
    """
    bare = text.strip()
    if not bare:
        return "newline" if "\n" in text else "space"
    first = unicodedata.normalize("NFD", bare)[0]
    if first.isdigit():
        return "digits"
    if not first.isalpha():
        return "other bytes" if first == "\ufffd" else "punctuation"
    if first.isupper():
        return "capitals"
    if len(bare) > 1 or text != bare:
        return "word parts" if text[:1] == bare[:1] else "word beginnings"
    if not first.islower():  # of a script without capitals
        return "other letters"
    return "vowels" if first in _VOWELS else "consonants"
