"""Explain a generated text: each token's probability, its alternatives, and the attention.

Letters: T time, S positions shown, H heads, L window, N layers, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from mygpt.checkpoint.model_file import Checkpoint
from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.decode.numpy_engine import NumpyEngine
from mygpt.decode.numpy_network import Floats, Network
from mygpt.decode.numpy_sampling import probabilities, softmax
from mygpt.decode.writer import Writer
from mygpt.engine import Request
from mygpt.errors import broken_model, overflowing_settings, require_int
from mygpt.tokenization import Tokenizer, ends_of
from mygpt.views.page import make_page

ALTERNATIVES = 12  # alternatives listed for each token
_AT_THE_END = 100  # candidates listed for the token after the text
_DIGITS = 6  # significant digits of a probability in a page
# Attention weights in all, and positions. 16 heads have 128 positions, 144 have 43.
_MOST_WEIGHTS, _MOST_POSITIONS = 270_000, 128


class Alternative(NamedTuple):
    """A candidate for the token at some position."""

    id: int
    text: str
    before: float  # its probability under the model
    after: float  # and after penalty, temperature and filters; 0 if they exclude it


@dataclass(frozen=True)
class Prediction:
    """The distribution of the token at one position."""

    likeliest: list[Alternative]  # the most probable tokens under the model, best first
    others: int  # the number of tokens that are not listed
    kept: int  # the number of tokens that the filters keep


@dataclass(frozen=True)
class Place:
    """One token of the text; what belongs to its prediction is None if it was not predicted."""

    id: int
    text: str
    written: bool  # True if the model generated it, False if it belongs to the prompt
    window_start: int  # index of the first token in the context that predicted this one
    before: float | None  # its probability under the model
    after: float | None  # its probability after the filters
    prediction: Prediction | None


@dataclass(frozen=True)
class Explanation:
    """A prompt and its continuation, with probabilities and attention.

    Attributes:
        places: all tokens.
        next: the distribution of the token after them.
        weights: (N, H, S, S) float32, the attention of the pass that computed `next`, over the
            text's last S tokens; see `Network.read_all`.
        window_start: index of the first token in that pass's context.
        seed: the seed of the sampling.
        sampling: the sampling settings.
    """

    places: list[Place]
    next: Prediction
    weights: Floats
    window_start: int
    seed: int
    sampling: SamplingConfig

    @property
    def written(self) -> list[Place]:
        """The tokens that the model generated."""
        return [place for place in self.places if place.written]


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def explain(
    checkpoint: Checkpoint,
    prompt: str,
    *,
    max_new_tokens: int = 40,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
) -> Explanation:
    """Continue `prompt` as `mygpt generate` does, and record the probabilities.

    Past the window the model reads the last L tokens.

    Args:
        checkpoint: the model.
        prompt: the text to continue; may be empty.
        max_new_tokens: the largest number of new tokens; 0 explains only the prompt.
        sampling: the sampling settings; None samples from the model's distribution.
        seed: the seed of the sampling.

    Raises:
        InputError: if a value is out of range, or the model's logits are not finite.
        UnknownTokenError: for characters that the tokenizer does not know.
    """
    require_int("max_new_tokens", max_new_tokens, least=0)
    checkpoint.check_shapes()
    writer = Writer(checkpoint, checkpoint.tokenizer, engine="numpy")
    recorder = _Recorder(checkpoint, sampling or SamplingConfig())
    recorder.read_prompt(writer.prompt_ids(prompt))
    recorder.generate(max_new_tokens, Stream(seed))
    return recorder.finish(seed)


def positions_to_show(network: Network, time: int) -> int:
    """S: how many of a text's last positions a page shows."""
    heads = network.config.num_layers * network.config.num_heads
    return max(1, min(time, _MOST_POSITIONS, math.isqrt(_MOST_WEIGHTS // heads)))


class _Recorder:
    """Reads and generates a text token by token and records each token's probabilities."""

    def __init__(self, checkpoint: Checkpoint, sampling: SamplingConfig) -> None:
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self.engine = NumpyEngine(checkpoint.config, checkpoint.arrays)
        self.window = checkpoint.config.max_seq_len
        self.sampling = sampling
        self.ids: list[int] = []
        self.places: list[Place] = []

    def read_prompt(self, ids: list[int]) -> None:
        """Read the prompt; one pass gives the probabilities of its tokens inside the window."""
        start = max(0, len(ids) - self.window)
        logits = self.engine.network.read_all(ids[start:], 1).logits  # (T, V)
        for at, token in enumerate(ids):
            predicted = logits[at - start - 1] if at > start else None
            self._record(token, predicted, written=False, window_start=min(at, start))

    def generate(self, most: int, stream: Stream) -> None:
        """Sample up to `most` tokens."""
        request = Request(
            np.array(self.ids, np.int64), most, self.sampling, stream,
            end=ends_of(self.tokenizer),
        )  # fmt: skip
        decoding = self.engine.start([request])
        while new := decoding.advance(1)[0]:
            start = max(0, len(self.ids) - self.window)
            self._record(new[0], decoding.logits(0), written=True, window_start=start)

    def finish(self, seed: int) -> Explanation:
        """Compute the distribution and the attention after the last token."""
        start = max(0, len(self.ids) - self.window)
        shown = positions_to_show(self.engine.network, len(self.ids) - start)
        reading = self.engine.network.read_all(self.ids[start:], shown)
        after = prediction_of(*self._distributions(reading.logits[-1]), _AT_THE_END, self.tokenizer)
        return Explanation(self.places, after, reading.weights, start, seed, self.sampling)

    def _record(
        self, token: int, logits: Floats | None, *, written: bool, window_start: int
    ) -> None:
        predicted: tuple[Any, Any, Any] = (None, None, None)
        if logits is not None:
            before, after = self._distributions(logits)
            prediction = prediction_of(before, after, ALTERNATIVES, self.tokenizer)
            predicted = float(before[token]), float(after[token]), prediction
        text = self.tokenizer.token_text(token)
        self.places.append(Place(token, text, written, window_start, *predicted))
        self.ids.append(token)

    def _distributions(self, logits: Floats) -> tuple[Floats, Floats]:
        """The model's distribution (V,), and the one that tokens are sampled from (V,)."""
        if not math.isfinite(logits.max()):
            raise broken_model()
        after = probabilities(logits, self.sampling, self.ids)
        if not math.isfinite(after.sum()):
            raise overflowing_settings(self.sampling.temperature, self.sampling.repetition_penalty)
        return softmax(logits.astype(np.float64)).astype(np.float32), after


def prediction_of(before: Floats, after: Floats, most: int, tokenizer: Tokenizer) -> Prediction:
    """List the `most` most probable tokens of two distributions (V,): before and after filters."""
    best = np.argsort(-before, kind="stable")[:most].tolist()
    text = tokenizer.token_text
    likeliest = [Alternative(i, text(i), float(before[i]), float(after[i])) for i in best]
    return Prediction(likeliest, len(before) - len(best), int(np.count_nonzero(after)))


def about(checkpoint: Checkpoint, *, name: str, command: str) -> dict[str, Any]:
    """Facts about the model for a page; `command` is a command that generates the same text."""
    return {
        "name": name,
        "command": command,
        "parameters": checkpoint.config.num_parameters(),
        "tokenizer": checkpoint.tokenizer.kind,
        "vocab_size": checkpoint.config.vocab_size,
        "window": checkpoint.config.max_seq_len,
        "trained_length": checkpoint.trained_length,
    }


def explain_page(
    explanation: Explanation, about: dict[str, Any], inside: dict[str, Any] | None = None
) -> str:
    """The explanation as one offline page.

    Args:
        explanation: the text and its probabilities.
        about: the result of the function of that name.
        inside: the result of `mygpt.views.inside.inside_data`; None leaves this part out.
    """
    data = page_data(explanation, about, inside)
    return make_page("pages/explain.js", data, title="mygpt explain")


def page_data(
    explanation: Explanation, about: dict[str, Any], inside: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The page's data as plain JSON values; see `explain_page`."""
    return {
        "about": about,
        "seed": str(explanation.seed),  # JavaScript's numbers cannot represent all 64-bit integers
        "sampling": asdict(explanation.sampling),
        "tokens": [rounded(asdict(place)) for place in explanation.places],
        "next": rounded(asdict(explanation.next)),
        "window_start": explanation.window_start,
        "attention": attention_data(explanation.weights, len(explanation.places)),
        "inside": rounded(inside),
    }


def attention_data(weights: Floats, time: int) -> dict[str, Any]:
    """Attention weights (N, H, S, S) of the last S of T tokens as plain JSON values.

    Of each head they are the lower triangle, row by row, in thousandths.
    """
    shown = weights.shape[-1]
    triangles = weights[:, :, *np.tril_indices(shown)]
    thousandths = np.rint(1000 * triangles).astype(int).tolist()
    return {"start": time - shown, "size": shown, "thousandths": thousandths}


def rounded(value: Any) -> Any:
    """Numbers rounded to significant digits, so that small probabilities differ from 0."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
