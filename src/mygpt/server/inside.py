"""The route of the page's panel "Inside": lens, contributions, names of heads, ablation, patching.

Letters: T time, N blocks, H heads, S the last positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from mygpt.core.config import GPTConfig, SamplingConfig
from mygpt.decode.writer import Writer
from mygpt.errors import InputError
from mygpt.evaluation.ablation import Part, ablated
from mygpt.server.playground import MOST_POSITIONS
from mygpt.server.prompts import encode
from mygpt.server.requests import InsideRequest, convert, invalid, parse_object
from mygpt.server.settings import ServerSettings
from mygpt.server.threads import Threads, while_connected
from mygpt.tokenization import Tokenizer, ends_of

if TYPE_CHECKING:
    from mygpt.core.model import GPT
    from mygpt.evaluation.inside import Contributions, Inside, Patch

LENS_TOKENS = 5  # the most probable ones at each depth
NEXT_TOKENS = 8  # the most probable ones before or after a change
THUMBNAIL = 32  # positions of a head's attention, S
NEW_TOKENS = 16  # of a continuation
# With fewer parameters torch uses one thread: two wait for each other at every operation. While
# other programs used two cores, an ablation of 10.65 million parameters took 5 s with two threads
# and 1 s with one; of the tutorial's model, 1 s and 0.1 s.
_WORTH_THREADS = 30_000_000
_KEPT = 4  # passes, of which each has the logits of up to 128 positions


@dataclass(frozen=True)
class Question:
    """A valid request: which pass, and which prediction of it.

    Attributes:
        ids: what is read, at most `MOST_POSITIONS`.
        start: how many tokens of the text are before `ids`.
        position: index in `ids`; the prediction after it is shown.
        token: whose logit is shown; None is the token that follows, or else the most probable.
        parts: what is off, in the order of their names.
        patched: what is replaced by that of another text.
        other: the other text, as long as `ids`.
        patch_position: index of the position where it is replaced; None is all.
    """

    ids: tuple[int, ...]
    start: int
    position: int
    token: int | None
    parts: tuple[Part, ...]
    patched: tuple[Part, ...] = ()
    other: tuple[int, ...] = ()
    patch_position: int | None = None


class InsideRoute:
    """POST /api/inside."""

    def __init__(self, writer: Writer, settings: ServerSettings, threads: Threads) -> None:
        self._writer, self._settings, self._threads = writer, settings, threads
        self._passes = Passes(writer, threads.forward.check_cancelled)

    async def answer(self, request: HttpRequest) -> Response:
        """What the model computes for the last positions, as it is or with changed parts."""
        question = await self._threads.parse(request, self._question)
        work = self._threads.forward.run(self._content, question)
        content = await while_connected(request.receive, work)
        return await self._threads.answer(request, lambda: content)

    def _content(self, question: Question) -> dict[str, Any]:
        import torch

        threads = torch.get_num_threads()
        if self._writer.config.num_parameters() < _WORTH_THREADS:
            torch.set_num_threads(1)
        try:
            return self._passes.content(question)
        except InputError as error:  # of a model that cannot be shown
            raise invalid(None, str(error)) from None
        finally:
            torch.set_num_threads(threads)

    def _question(self, body: bytes) -> Question:
        wanted, config = convert(parse_object(body), InsideRequest), self._writer.config
        ids = encode(self._writer, wanted.ids, self._settings.max_prompt_tokens, "ids").ids.tolist()
        start = max(0, len(ids) - min(MOST_POSITIONS, config.max_seq_len))
        last = len(ids) - 1
        for name in ("position", "patch_position"):
            value = getattr(wanted, name)
            if value is not None and not start <= value <= last:
                problem = f"{name}={value} must be {start} to {last}: other tokens are not read"
                raise invalid(name, problem)
        if wanted.token is not None and wanted.token >= config.vocab_size:
            problem = f"token={wanted.token} must be 0 to {config.vocab_size - 1}"
            raise invalid("token", problem)
        off, patched = self._parts("ablate", wanted.ablate), self._parts("patch", wanted.patch)
        if off and patched:
            raise invalid("patch", "ablate and patch cannot be combined: send one of them")
        position = last if wanted.position is None else wanted.position
        at = None if wanted.patch_position is None else wanted.patch_position - start
        other = self._other(wanted.other, len(ids))[start:] if patched else ()
        read = tuple(ids[start:])
        return Question(read, start, position - start, wanted.token, off, patched, other, at)

    def _parts(self, field: str, names: list[str]) -> tuple[Part, ...]:
        """Parts in the order of their names, each once."""
        config = self._writer.config
        try:
            found = {str(part): part for part in (Part.parse(name, config) for name in names)}
        except InputError as error:
            raise invalid(field, str(error)) from None
        return tuple(found[name] for name in sorted(found))

    def _other(self, text: str, count: int) -> tuple[int, ...]:
        """The ids of the text that patches come from: exactly `count`."""
        try:
            ids = self._writer.prompt_ids(text)
        except InputError as error:
            raise invalid("other", f"the second text: {error}") from None
        if len(ids) != count:
            raise invalid(
                "other",
                f"the second text has {len(ids)} tokens and the first {count}: a patch needs the "
                "same number of tokens",
            )
        return tuple(ids)


class Passes:
    """Forward passes of a model and of changed ones; the last few are kept. For one thread.

    torch runs them, with one copy of the weights: an ablated model has its own arrays only where
    parts are off.
    """

    def __init__(self, writer: Writer, check_cancelled: Callable[[], None]) -> None:
        self._writer, self._check_cancelled = writer, check_cancelled
        self._model = lru_cache(_KEPT)(self._ablated_model)
        self._inside = lru_cache(_KEPT)(self._read)
        self._continuation = lru_cache(_KEPT)(self._continue)

    def content(self, question: Question) -> dict[str, Any]:
        """The response; see `mygpt.server.openapi.Inside`.

        Raises:
            InputError: for a model with its own forward, or with logits that are not finite.
        """
        ids, position, parts = question.ids, question.position, question.parts
        config = self._writer.config
        whole = self._inside(ids, ())
        shown = self._patched(question) if question.patched else self._inside(ids, parts)
        token = question.token
        if token is None:
            following = ids[position + 1 : position + 2]
            token = following[0] if following else int(whole.logits[position].argmax())
        # Of a replaced residual stream there are none: it is not the sum of what the parts add.
        replaced = any(part.kind == "block" for part in question.patched)
        sums = None if replaced else shown.contributions(token, position)
        found: dict[str, Any] = {
            "start": question.start,
            "position": question.start + position,
            "token": self._tokens([token])[0],
            "names": self._names,
            "lens": lens_rows(shown, position, token, self._writer.tokenizer),
            "contributions": None if sums is None else contribution_list(sums, config),
            "logit": float(shown.logits[position, token]),
            "total": None if sums is None else sums.total,
            "attention": shown.attention[:, :, -THUMBNAIL:, -THUMBNAIL:].round(2),
            "loss": _loss(whole),
            "continuation": self._tokens(self._continuation(ids, ())),
        }
        change = {
            "parts": [str(part) for part in parts or question.patched],
            **self._next(whole.logits[-1], shown.logits[-1]),
            "loss": _loss(shown),
        }
        if question.patched:
            found["patch"] = change
        elif parts:
            continuation = self._tokens(self._continuation(ids, parts))
            found["ablation"] = change | {"continuation": continuation}
        return found

    @cached_property
    def _names(self) -> list[list[tuple[str, float]]] | None:
        """Each head's kind with the largest relative score, and this score: [N][H]."""
        if self._writer.config.max_seq_len < 2:  # heads are measured on repeated tokens
            return None
        from mygpt.evaluation.head_scores import KINDS

        relative = self._writer.head_scores().relative
        kinds, scores = list(KINDS.values()), np.stack([relative[kind] for kind in KINDS])
        best, largest = scores.argmax(0).tolist(), scores.max(0).astype(float)  # (N, H)
        return [
            [(kinds[kind], score) for kind, score in zip(*rows, strict=True)]
            for rows in zip(best, largest.round(4).tolist(), strict=True)
        ]

    def _ablated_model(self, parts: tuple[Part, ...]) -> GPT:
        model = self._writer.backend.read_only_model
        return ablated(model, parts) if parts else model

    def _patched(self, question: Question) -> Inside:
        other = self._inside(question.other, ())
        patches = [other.patch(part, question.patch_position) for part in question.patched]
        return self._read(question.ids, (), patches)

    def _read(
        self, ids: tuple[int, ...], parts: tuple[Part, ...], patches: Sequence[Patch] = ()
    ) -> Inside:
        from mygpt.evaluation.inside import read_activations

        self._check_cancelled()
        inside = read_activations(self._model(parts), ids, patches)
        if not np.isfinite(inside.logits).all():
            raise InputError(
                "the model's logits are not finite, so nothing can be computed from them: train "
                "again, or serve another checkpoint"
            )
        return inside

    def _continue(self, ids: tuple[int, ...], parts: tuple[Part, ...]) -> list[int]:
        """The most probable next tokens, one after the other."""
        import torch

        from mygpt.core.generation import decode, torch_decoder

        model = self._model(parts)
        prompt = torch.tensor([ids], device=model.token_embedding.weight.device)
        decoder = torch_decoder(model, 1, "crop", len(ids) + NEW_TOKENS)
        found: list[int] = []
        for new_ids, _ in decode(decoder, prompt, NEW_TOKENS, SamplingConfig(0.0), None):
            self._check_cancelled()
            found.append(int(new_ids[0]))
            if found[-1] in ends_of(self._writer.tokenizer):
                break
        return found

    def _next(self, whole: NDArray[np.float32], changed: NDArray[np.float32]) -> dict[str, Any]:
        """The probabilities of the next token before and after a change."""
        before, after = _softmax(whole), _softmax(changed)
        largest = np.argsort(-np.maximum(before, after), kind="stable")[:NEXT_TOKENS]
        shown = sorted(largest.tolist(), key=lambda i: (-before[i], i))
        rows = [(i, self._text(i), float(before[i]), float(after[i])) for i in shown]
        rest = [max(0.0, 1.0 - float(probs[shown].sum())) for probs in (before, after)]
        return {"next": rows, "others": (len(before) - len(shown), *rest)}

    def _text(self, token: int) -> str:
        return self._writer.tokenizer.token_text(token)

    def _tokens(self, ids: Iterable[int]) -> list[dict[str, Any]]:
        return [{"id": i, "text": self._text(i)} for i in ids]


def lens_rows(
    inside: Inside, position: int, token: int, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The logit lens after the embedding and after each block.

    Args:
        inside: the pass.
        position: index of the token whose next one is predicted.
        token: whose probability and rank (1 is the most probable) each row has.
        tokenizer: gives texts of tokens.
    """
    rows = []
    for block, logits in enumerate(inside.lens(position)[::2]):  # (V,)
        probs = _softmax(logits)
        best = np.argsort(-logits, kind="stable")[:LENS_TOKENS].tolist()
        rows.append(
            {
                "name": f"block{block}" if block else "embedding",
                "top": [(i, tokenizer.token_text(i), float(probs[i])) for i in best],
                "probability": float(probs[token]),
                "rank": 1 + int((logits > logits[token]).sum()),
            }
        )
    return rows


def contribution_list(found: Contributions, config: GPTConfig) -> list[tuple[str, float]]:
    """Names and contributions of all parts that the model has."""
    parts = [("embedding", found.embedding)]
    if config.position == "learned":
        parts.append(("position_embedding", found.position_embedding))
    for block, heads in enumerate(found.heads, 1):
        parts += [(f"{block}.{head}", float(value)) for head, value in enumerate(heads, 1)]
        if config.attention_bias:
            parts.append((f"attention_bias{block}", float(found.attention_biases[block - 1])))
        parts.append((f"mlp{block}", float(found.mlps[block - 1])))
    if config.norm == "layer":
        parts.append(("norm_bias", found.norm_bias))
    return parts


def _loss(inside: Inside) -> float | None:
    """Nats per token; None for one token."""
    return inside.loss if len(inside.losses) else None


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities (V,)."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(powers / powers.sum())
