"""How a model wrote what it wrote: every token's chance, what else it might have been, and where
the model looked.

Letters: T time, S positions shown, H heads, L window, N layers, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mygpt.checkpoint import Checkpoint
from mygpt.core.config import (
    SamplingConfig,
    broken_model,
    check_max_new_tokens,
    overflowing_settings,
)
from mygpt.core.random import Stream
from mygpt.engines.contract import Request
from mygpt.engines.numpy_engine import NumpyEngine
from mygpt.engines.numpy_network import Floats
from mygpt.engines.numpy_sampling import probabilities, softmax
from mygpt.engines.reading import positions_to_show, read
from mygpt.generation.writer import Writer
from mygpt.tokenization import Tokenizer, ends_of
from mygpt.views.page import make_page

ALTERNATIVES = 12  # told of each token
_AT_THE_END = 100  # told of what may come next
_DIGITS = 6  # of a probability


@dataclass(frozen=True)
class Alternative:
    """A token that may come at some place.

    Attributes:
        id: the token.
        text: the token as text.
        before: its probability under the model itself.
        after: its probability after penalty, temperature and filters; 0 where they drop it.
    """

    id: int
    text: str
    before: float
    after: float


@dataclass(frozen=True)
class Prediction:
    """What may come at one place.

    Attributes:
        likeliest: tokens, the likeliest under the model first.
        others: how many more there are.
        kept: how many tokens the filters leave.
    """

    likeliest: list[Alternative]
    others: int
    kept: int


@dataclass(frozen=True)
class Place:
    """One token of the text.

    Attributes:
        id: the token.
        text: the token as text.
        written: whether the model wrote it; else it is the prompt's.
        window_start: the first token that the model saw when it predicted this one.
        before: the token's probability under the model itself; None where nothing predicted it.
        after: its probability after the filters.
        prediction: what else might have come; None likewise.
    """

    id: int
    text: str
    written: bool
    window_start: int
    before: float | None
    after: float | None
    prediction: Prediction | None


@dataclass(frozen=True)
class Attention:
    """Who looks at whom as the model predicts what comes after the text.

    Attributes:
        start: the first token that is shown.
        weights: (N, H, S, S) float32 over the text's last S tokens; see `engines.reading`.
    """

    start: int
    weights: Floats

    def to_data(self) -> dict[str, Any]:
        """Thousandths of each row's weights up to its own place, row after row."""
        shown = self.weights.shape[-1]
        rows, columns = np.tril_indices(shown)
        whole = np.rint(1000 * self.weights[:, :, rows, columns]).astype(int)
        return {"start": self.start, "size": shown, "thousandths": whole.tolist()}


@dataclass(frozen=True)
class Explanation:
    """A prompt, its continuation, and how it came about.

    Attributes:
        places: all tokens.
        next: what may come after them.
        attention: of the pass behind `next`.
        window_start: the first token that this pass saw.
        seed: of the draws.
        sampling: how they were made.
    """

    places: list[Place]
    next: Prediction
    attention: Attention
    window_start: int
    seed: int
    sampling: SamplingConfig

    @property
    def written(self) -> list[Place]:
        """The tokens that the model wrote."""
        return [place for place in self.places if place.written]


def explain(
    checkpoint: Checkpoint,
    prompt: str,
    *,
    max_new_tokens: int = 40,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
) -> Explanation:
    """Continue `prompt` as `mygpt generate --engine numpy` does, and keep what it rests on.

    Past the window the model sees the last L tokens.

    Args:
        checkpoint: the model.
        prompt: the text to continue; empty starts from nothing.
        max_new_tokens: where to end at the latest; 0 looks at the prompt alone.
        sampling: how to draw; None draws from the model's own distribution.
        seed: decides the draws.

    Raises:
        InputError: when a value is out of range, or the model predicts no numbers.
        UnknownTokenError: for characters the model never saw.
    """
    check_max_new_tokens(max_new_tokens)
    checkpoint.check_shapes()
    writer = Writer(checkpoint, checkpoint.tokenizer, engine="numpy")
    teller = _Teller(checkpoint, sampling or SamplingConfig())
    teller.read_prompt(writer.prompt_ids(prompt))
    teller.write(max_new_tokens, Stream(seed))
    return teller.end(seed)


class _Teller:
    """Follows a text from token to token and notes what is to be told."""

    def __init__(self, checkpoint: Checkpoint, sampling: SamplingConfig) -> None:
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.engine = NumpyEngine(checkpoint.config, checkpoint.arrays)
        self.window = checkpoint.config.max_seq_len
        self.sampling = sampling
        self.ids: list[int] = []
        self.places: list[Place] = []

    def read_prompt(self, ids: list[int]) -> None:
        """Take in the prompt; its tokens inside the window are judged in one pass."""
        start = max(0, len(ids) - self.window)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            logits = read(self.engine.network, ids[start:], 1).logits  # (T, V)
        for at, token in enumerate(ids):
            seen = logits[at - start - 1] if at > start else None
            self._take(token, seen, written=False, window_start=min(at, start))

    def write(self, most: int, stream: Stream) -> None:
        """Draw up to `most` tokens."""
        request = Request(
            np.array(self.ids, np.int64), most, self.sampling, stream,
            end=ends_of(self.tokenizer),
        )  # fmt: skip
        decoding = self.engine.start([request])
        while new := decoding.advance(1)[0]:
            start = max(0, len(self.ids) - self.window)
            self._take(new[0], decoding.logits(0), written=True, window_start=start)

    def end(self, seed: int) -> Explanation:
        """Look once more, at what would come next."""
        start = max(0, len(self.ids) - self.window)
        shown = positions_to_show(self.engine.network, len(self.ids) - start)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            reading = read(self.engine.network, self.ids[start:], shown)
        before, after = self._distributions(reading.logits[-1])
        return Explanation(
            self.places,
            self._prediction(before, after, _AT_THE_END),
            Attention(len(self.ids) - shown, reading.weights),
            start,
            seed,
            self.sampling,
        )

    def _take(self, token: int, logits: Floats | None, *, written: bool, window_start: int) -> None:
        text = self.tokenizer.token_text(token)
        if logits is None:
            self.places.append(Place(token, text, written, window_start, None, None, None))
        else:
            before, after = self._distributions(logits)
            told = self._prediction(before, after, ALTERNATIVES)
            chances = float(before[token]), float(after[token])
            self.places.append(Place(token, text, written, window_start, *chances, told))
        self.ids.append(token)

    def _distributions(self, logits: Floats) -> tuple[Floats, Floats]:
        """The model's own (V,), and the one that is drawn from."""
        if not math.isfinite(logits.max()):
            raise broken_model()
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            after = probabilities(logits, self.sampling, self.ids)
        if not math.isfinite(after.sum()):
            raise overflowing_settings(self.sampling)
        return softmax(logits.astype(np.float64)).astype(np.float32), after

    def _prediction(self, before: Floats, after: Floats, most: int) -> Prediction:
        best = np.argsort(-before, kind="stable")[:most].tolist()
        text = self.tokenizer.token_text
        likeliest = [Alternative(i, text(i), float(before[i]), float(after[i])) for i in best]
        return Prediction(likeliest, len(before) - len(best), int(np.count_nonzero(after)))


def about(checkpoint: Checkpoint, *, name: str, command: str) -> dict[str, Any]:
    """What a page says of the model; `command` writes the same text."""
    return {
        "name": name,
        "command": command,
        "parameters": checkpoint.config.num_parameters(),
        "tokenizer": checkpoint.tokenizer.kind,
        "vocab_size": checkpoint.config.vocab_size,
        "window": checkpoint.config.max_seq_len,
    }


def explain_page(explanation: Explanation, *, about: dict[str, Any]) -> str:
    """The explanation as one offline page.

    Args:
        explanation: what to show.
        about: what `about` gives.
    """
    return make_page("pages/explain.js", page_data(explanation, about), title="mygpt explain")


def page_data(explanation: Explanation, about: dict[str, Any]) -> dict[str, Any]:
    """What the page is made of, as plain JSON values."""
    return {
        "about": about,
        "seed": str(explanation.seed),  # 64 bits are more than a number of JavaScript's holds
        "sampling": asdict(explanation.sampling),
        "tokens": [_token(place) for place in explanation.places],
        "next": _listed(explanation.next),
        "window_start": explanation.window_start,
        "attention": explanation.attention.to_data(),
    }


def _token(place: Place) -> dict[str, Any]:
    return {
        "id": place.id,
        "text": place.text,
        "written": place.written,
        "window_start": place.window_start,
        "before": _short(place.before),
        "after": _short(place.after),
        "prediction": None if place.prediction is None else _listed(place.prediction),
    }


def _listed(prediction: Prediction) -> dict[str, Any]:
    return {
        "likeliest": [
            [one.id, one.text, _short(one.before), _short(one.after)]
            for one in prediction.likeliest
        ],
        "others": prediction.others,
        "kept": prediction.kept,
    }


def _short(probability: float | None) -> float | None:
    """With the digits that a page shows, and those that tell a small one from nothing."""
    return None if probability is None else float(f"{probability:.{_DIGITS}g}")
