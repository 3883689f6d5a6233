"""The map of a validation text's losses in a report: characters, hardest passages, copied ones.

Letters: N tokens, K characters, V vocabulary, S positions of attention.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.model_file import Checkpoint
from mygpt.data import cached_tokens
from mygpt.decode.numpy_network import Network
from mygpt.decode.numpy_sampling import softmax
from mygpt.engine import only_in_torch
from mygpt.errors import InputError, MygptError
from mygpt.evaluation.character_losses import (
    CharacterLosses,
    Floats,
    characters_of,
    losses_in_time,
)  # fmt: skip
from mygpt.evaluation.copied import COPIED_CHARS, shared_spans
from mygpt.text import Document
from mygpt.training.gradients import cpu_token_losses
from mygpt.views.explain import ALTERNATIVES, attention_data, prediction_of, rounded
from mygpt.views.page import embedded_json
from mygpt.views.run import Run
from mygpt.views.training_place import training_place

# Fractions of the time for a map: losses, readings of passages, search in the training text.
_LOSSES, _READINGS, _SEARCH = 0.5, 0.25, 0.2
_MOST_PARAMETERS = 200_000_000  # a window of a larger model alone would take too long
# The page must stay under 3 MB: bytes of the text with its losses, attention weights of a passage.
_MOST_BYTES, _MOST_WEIGHTS, _MOST_POSITIONS = 800_000, 20_000, 64
_MOST_TOKENS = 2**19  # so many have more characters than fit
_LEVELS, _UNKNOWN = 254, 255  # a character's loss is one byte
_PASSAGE = 80  # characters
_HARDEST, _EASIEST, _COPIES, _MOST_SPANS = 10, 5, 8, 400
# Characters with fewer tokens of context, at the beginning of a window, are hard for that reason.
_LEAST_CONTEXT = 16
# Characters of the first and of the last parts to search for; of the longest text to search.
_FIRST_SLICE, _LAST_SLICE, _MOST_SEARCHED = 256, 4096, 2**24


def loss_map(run: Run, budget_s: float) -> dict[str, Any] | None:
    """The losses of the validation text under the best model, as plain JSON values.

    None without a model, or without a validation text in memory. Of a text that takes more than
    `budget_s` seconds, or too much of the page, it is the first part.
    """
    model, source = run.model, run.source
    if model is None or source is None or not source.val_documents:
        return None
    try:
        tokens = cached_tokens(source.val_documents, model.tokenizer, continued=source.continued)
        return _LossMap(model, tokens, source.train_documents, budget_s).data()
    except MygptError as error:
        run.notes.append(f"the losses of the validation text are not shown: {error}")
        return None


class _LossMap:
    """The losses of the first part of a text, and the passages to list.

    Args:
        model: computes the losses.
        tokens: (N,) ids of the text.
        documents: the training text.
        budget_s: about how many seconds it may take.
    """

    def __init__(
        self,
        model: Checkpoint,
        tokens: NDArray[np.integer],
        documents: Sequence[Document],
        budget_s: float,
    ) -> None:
        self.model, self.documents, self.budget_s = model, documents, budget_s
        self.total = len(tokens)
        self.found, self.tokens = _measured(model, tokens, _LOSSES * budget_s)
        self.losses = self.found.characters  # (K,)

    def data(self) -> dict[str, Any]:
        """The map as plain JSON values; "losses" is one byte a character in base64.

        A character whose byte is b has a loss of largest * (b / 254)**2, which is precise where
        losses are small; 255 is unknown.
        """
        found, known = self.found, self.losses[~np.isnan(self.losses)]
        largest = float(known.max(initial=0.0)) or 1.0
        levels = np.rint(_LEVELS * np.sqrt(self.losses / largest))
        levels = np.where(np.isnan(levels), _UNKNOWN, levels).astype(np.uint8)
        return {
            "text": found.text,
            "losses": base64.b64encode(levels.tobytes()).decode(),
            "largest": largest,
            "mean": found.mean,  # nats per token
            "mean_of_characters": float(known.mean()) if len(known) else None,
            "tokens": len(found.losses),
            "all_tokens": self.total - 1,
            "window": found.seq_len,
            "by_character": self.model.tokenizer.kind == "char",
            "least_context": self._least_context(),
            **self._passages(),
            "copied": self._copied(),
        }

    def _least_context(self) -> int:
        return min(_LEAST_CONTEXT, max(1, self.found.seq_len // 4))

    def _passages(self) -> dict[str, list[dict[str, Any]]]:
        """The passages with the highest and the lowest mean loss; the highest with a reading."""
        length = min(_PASSAGE, len(self.losses))
        counted = self.found.context[self.found.tokens] >= self._least_context()
        counted &= ~np.isnan(self.losses)
        sums = _sums(np.where(counted, self.losses, 0.0), length)
        counts = _sums(counted, length)
        means = np.where(counts * 2 >= length, sums / np.maximum(1, counts), np.nan)
        fits = len(self.losses) // (3 * length)  # of a short text fewer, so that they differ
        hardest = _extremes(means, min(_HARDEST, max(1, fits)), length)
        easiest = _extremes(-means, min(_EASIEST, fits), length)
        listed = {
            name: [{"start": at, "end": at + length, "loss": float(means[at])} for at in starts]
            for name, starts in (("hardest", hardest), ("easiest", easiest))
        }
        self._add_readings(listed["hardest"])
        return listed

    def _add_readings(self, passages: list[dict[str, Any]]) -> None:
        """Add the prediction at the worst token of each passage, as far as time permits."""
        config = self.model.config
        if only_in_torch(config) is not None:
            return
        began = last = time.monotonic()
        network = Network(config, self.model.arrays)
        for passage in passages:
            worst = self._worst_token(passage["start"], passage["end"])
            passage["worst"] = self._characters_of(worst)
            passage["reading"] = self._reading(network, worst)
            now = time.monotonic()
            if now + (now - last) > began + _READINGS * self.budget_s:
                break
            last = now

    def _worst_token(self, start: int, end: int) -> int:
        """The token with the highest loss of those that complete the characters of a passage."""
        own = np.unique(self.found.tokens[start:end])
        own = own[self.found.context[own] >= self._least_context()]
        return int(own[self.found.losses[own - 1].argmax()])

    def _characters_of(self, token: int) -> tuple[int, int]:
        first = int(self.found.ends[token - 1])
        return first, int(self.found.ends[token])

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")
    def _reading(self, network: Network, at: int) -> dict[str, Any]:
        """The prediction of token `at` from its context in its window, and the attention there."""
        begin = (at - 1) // self.found.seq_len * self.found.seq_len
        ids = self.tokens[begin:at].tolist()
        heads = self.model.config.num_layers * self.model.config.num_heads
        most = max(1, min(_MOST_POSITIONS, math.isqrt(2 * _MOST_WEIGHTS // heads)))
        reading = network.read_all(ids, min(most, len(ids)))
        probs = softmax(reading.logits[-1].astype(np.float64)).astype(np.float32)  # (V,)
        tokenizer, came = self.model.tokenizer, int(self.tokens[at])
        shown = ids[-reading.weights.shape[-1] :]
        prob = float(probs[came])
        token = {"id": came, "text": tokenizer.token_text(came), "before": prob, "after": prob}
        return {
            "context": len(ids),
            "loss": float(self.found.losses[at - 1]),
            "came": rounded(token),
            "prediction": rounded(asdict(prediction_of(probs, probs, ALTERNATIVES, tokenizer))),
            "tokens": [{"id": each, "text": tokenizer.token_text(each)} for each in shown],
            "attention": attention_data(reading.weights, len(shown)),
        }

    def _copied(self) -> dict[str, Any]:
        """The passages that are in the training text too, and the places of the longest ones."""
        text = self.found.text
        spans, searched = _copied_spans(text, self.documents, _SEARCH * self.budget_s)
        longest = sorted(spans, key=lambda span: span[0] - span[1])[:_COPIES]
        places = [
            {"start": a, "end": b, "place": training_place(text[a:b], self.documents)}
            for a, b in longest
        ]
        return {"spans": spans, "longest": places, "searched": searched, "least": COPIED_CHARS}


def _copied_spans(
    text: str, documents: Sequence[Document], budget_s: float
) -> tuple[list[tuple[int, int]], int]:
    """The passages of `text` that are in the documents, and how many characters were searched.

    The text is searched in parts, the first ones short, since a repetitive text takes long. A
    passage that reaches the end of a part is found with the next part.
    """
    spans: list[tuple[int, int]] = []
    if sum(map(len, documents)) > _MOST_SEARCHED:
        return spans, 0
    start, end, size = 0, 0, _FIRST_SLICE
    began = last = time.monotonic()
    while end < len(text) and len(spans) < _MOST_SPANS:
        end = min(start + size, len(text))
        found = shared_spans(text[start:end], documents, COPIED_CHARS)
        here = [(start + a, start + b) for a, b in found if b - a >= COPIED_CHARS]
        cut = [a for a, b in here if start < a and b == end < len(text)]
        spans += [span for span in here if span[0] not in cut]
        complete = any(span == (start, end) for span in here)
        start = min(cut, default=end if complete else end - COPIED_CHARS + 1)
        size = min(2 * size, _LAST_SLICE)
        now = time.monotonic()
        if now + 2 * (now - last) > began + budget_s:
            break
        last = now
    return spans, end


def _measured(
    model: Checkpoint, tokens: NDArray[np.integer], budget_s: float
) -> tuple[CharacterLosses, NDArray[np.integer]]:
    """The losses of as many tokens as fit into the time and the page, and these tokens."""
    if len(tokens) < 2:
        raise InputError("the text has fewer than 2 tokens")
    if model.config.num_parameters() > _MOST_PARAMETERS:
        raise InputError(f"the model has more than {_MOST_PARAMETERS:,} parameters")
    text, ends = characters_of(tokens[:_MOST_TOKENS], model.tokenizer)
    fitting = int(np.searchsorted(ends, _fitting(text), side="right"))
    torch_model = model.build_model()
    losses = losses_in_time(
        torch_model,
        tokens[: max(2, fitting)],
        budget_s=budget_s,
        token_losses=cpu_token_losses(torch_model),
    )
    if not np.isfinite(losses).all():
        raise InputError("the model's losses are not finite")
    count = len(losses) + 1
    if not ends[count - 1]:
        raise InputError("its tokenizer gives no characters before the end of a text")
    ends = ends[:count]
    found = CharacterLosses(text[: ends[-1]], ends, losses, model.config.max_seq_len)
    return found, tokens[:count]


def _fitting(text: str) -> int:
    """How many characters of a text fit into the page with their losses."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    in_ascii = np.array([len(embedded_json(chr(n))) - 2 for n in range(128)])
    escaped = np.where(points < 2**16, 6, 12)
    sizes = np.where(points < 128, in_ascii[np.minimum(points, 127)], escaped) + 4 / 3
    return int(np.searchsorted(sizes.cumsum(), _MOST_BYTES, side="right"))


def _sums(values: NDArray[Any], length: int) -> Floats:
    """The sums of all parts of `length` values."""
    sums = np.concatenate([[0.0], values.cumsum(dtype=np.float64)])
    return sums[length:] - sums[:-length]


def _extremes(means: Floats, most: int, length: int) -> list[int]:
    """The starts of the passages with the highest means, which do not overlap, highest first."""
    left = np.where(np.isnan(means), -np.inf, means)
    found: list[int] = []
    while len(found) < most and np.isfinite(left.max()):
        start = int(left.argmax())
        found.append(start)
        left[max(0, start - length + 1) : start + length] = -np.inf
    return found
