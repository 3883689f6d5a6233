"""`Writer`: a loaded model and its tokenizer, turning prompts into text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, overload

from mygpt.checkpoint.model_file import (
    Checkpoint,
    read_checkpoint,
    resolve,
    trained_length,
)
from mygpt.decode.choice import Backend
from mygpt.decode.completion import Completion
from mygpt.decode.draft_table import FILE_NAME, DraftTable, table_of_file
from mygpt.decode.options import TextOptions
from mygpt.decode.text_call import DEFAULTS, Prompts, TextCall
from mygpt.engine import Batch
from mygpt.errors import CheckpointError, InputError, require_int
from mygpt.options import names_of, require_known, shows_options
from mygpt.tokenization import Tokenizer

if TYPE_CHECKING:
    from mygpt.core.config import GPTConfig
    from mygpt.core.model import GPT
    from mygpt.cpu.decode.speculation import Drafts
    from mygpt.decode.numpy_network import Reading
    from mygpt.evaluation.head_scores import HeadScores
    from mygpt.evaluation.inside import Inside, Patch

_log = logging.getLogger("mygpt")
W = TypeVar("W", bound="Writer")


class Writer:
    """A model and its tokenizer, ready to continue text.

    Args:
        model: a `GPT`, on the device and in the number format it is to run in, or a
            checkpoint, whose weights then need no torch unless torch is to run them.
        tokenizer: the model's own.
        provenance: where the model comes from, as its checkpoint records it.
        device: for a checkpoint: "auto", or torch's name of a device.
        dtype: for a checkpoint: float32, bfloat16, float16 (torch), int8 or int4 (the cpu engine);
            "auto" is bfloat16 on a GPU that computes in it, else float32.
        engine: "auto", "numpy", "cpu" or "torch".
        compile: for torch: compile the step from one token to the next (see `TorchEngine`).
        speculate: for the cpu engine: guess the next tokens and check several at once. The text is
            the same, to the bit, and is there sooner where guesses are often right.
        drafts_from: what guesses come from, in addition to the text itself: a table of n-grams, or
            the file in which a run keeps it.
    """

    def __init__(
        self,
        model: GPT | Checkpoint,
        tokenizer: Tokenizer,
        provenance: dict[str, Any] | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        engine: str = "auto",
        compile: bool = False,
        speculate: bool = True,
        drafts_from: DraftTable | Path | None = None,
    ) -> None:
        if tokenizer.vocab_size != model.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the model "
                f"{model.config.vocab_size}: they are of different models"
            )
        self.config: GPTConfig = model.config
        self.tokenizer = tokenizer
        self.provenance = provenance or {}
        self._drafts_from, self._speculate = drafts_from, speculate
        self._engine_options: dict[str, Any] = {
            "device": device, "dtype": dtype, "engine": engine, "compile": compile
        }  # fmt: skip
        make_drafts = self._make_drafts if speculate else None
        self.backend = Backend(model, **self._engine_options, make_drafts=make_drafts)

    def __repr__(self) -> str:
        return (
            f"Writer({self.config.num_parameters():,} parameters, window "
            f"{self.config.max_seq_len}, {self.tokenizer.kind} tokens, vocabulary "
            f"{self.tokenizer.vocab_size})"
        )

    @property
    def model(self) -> GPT:
        """The model as a torch module; a checkpoint's is built at the first access."""
        return self.backend.model

    @property
    def trained_length(self) -> int | None:
        """The longest window in training, in tokens; None if it is not known."""
        return trained_length(self.config, self.provenance)

    def open_batch(self, size: int) -> Batch:
        """A batch of `size` slots, which requests join and leave between tokens, as in a server.

        Raises:
            InputError: for fewer than one slot, or an engine that is not available.
        """
        require_int("size", size, least=1)
        return self.backend.open(size)

    def read(self, ids: Sequence[int], shown: int | None = None) -> Reading:
        """The model's prediction at each position of a text, and its attention weights.

        Args:
            ids: the text, at most as long as the window.
            shown: for how many of the last positions the attention is kept; None is all.

        Raises:
            InputError: for no token, or more than fit in the window.
        """
        return self.backend.network().read_all(ids, shown)

    def inside(self, text: str | Sequence[int], patches: Sequence[Patch] = ()) -> Inside:
        """What happens inside the model as it reads a text; torch runs it.

        Args:
            text: a text or its ids, at most as long as the window.
            patches: activations of another text, from its `Inside.patch`, that replace this one's.

        Returns:
            Logits, losses, residual stream, heads and attention as arrays, with the logit lens and
            the contributions to a logit as methods; see `mygpt.evaluation.inside.Inside`.

        Raises:
            InputError: for ids or patches that do not fit the model or the text.
            UnknownTokenError: for characters outside the vocabulary.
        """
        from mygpt.evaluation.inside import read_activations

        ids = self.prompt_ids(text) if isinstance(text, str) else text
        return read_activations(self.backend.read_only_model, ids, patches)

    def ablated(self, *parts: str) -> Writer:
        """A `Writer` of the model with parts switched off; this one stays as it is.

        Args:
            parts: "1.3" is head 3 of block 1, counted from 1 as on the pages; "attention1", "mlp1"
                and "block1" are the attention, the MLP and both of block 1.

        Raises:
            InputError: for a part that the model does not have.
        """
        from mygpt.evaluation.ablation import Part, ablated

        found = [Part.parse(part, self.config) for part in parts]
        return self.like(type(self), ablated(self.backend.source, found))

    def like(self, kind: type[W], model: GPT | Checkpoint) -> W:
        """A writer of class `kind` with this one's tokenizer and options, of another model."""
        return kind(
            model,
            self.tokenizer,
            self.provenance,
            **self._engine_options,
            speculate=self._speculate,
            drafts_from=self._drafts_from,
        )

    def head_scores(self, *, seed: int = 0, text: str | None = None) -> HeadScores:
        """Which heads attend to the previous token, the same token before, or the one after that.

        Measured on random tokens that are repeated; see
        `mygpt.evaluation.head_scores.HeadScores`.

        Args:
            seed: draws the tokens.
            text: they are drawn from its tokens, so that the model's training text leaves out
                tokens that no training step has used. None draws from all tokens that are text:
                no control tokens, no parts of characters.
        """
        from mygpt.evaluation.head_scores import is_text, measure_heads

        among: Callable[[int], bool] = partial(is_text, self.tokenizer)
        if text is not None:
            among = frozenset(self.tokenizer.encode_array(text).tolist()).__contains__
        return measure_heads(self.backend.read_only_model, seed=seed, among=among)

    def _make_drafts(self) -> Drafts:
        """Drafts from the table, if there is one that can be used, and from the text itself."""
        from mygpt.cpu.decode.speculation import Drafts

        table = self._drafts_from
        if isinstance(table, Path):
            try:
                table = DraftTable.load(table, self.tokenizer)
            except CheckpointError as error:  # no text depends on it
                _log.warning("%s; generating without it", error)
                table = None
        if table is None:
            return Drafts()
        if table.vocab_size != self.config.vocab_size:
            raise InputError(
                f"drafts_from has {table.vocab_size} tokens and the model "
                f"{self.config.vocab_size}: count it with the model's tokenizer"
            )
        return table.drafts()

    def prompt_ids(self, prompt: str) -> list[int]:
        """Ids of a prompt, after the tokenizer's begin-of-text ids.

        An empty prompt becomes end-of-text, or a newline where the tokenizer has none.

        Raises:
            UnknownTokenError: for characters outside the vocabulary.
        """
        ids = [*self.tokenizer.beginning, *self.tokenizer.encode_array(prompt).tolist()]
        if ids:
            return ids
        if self.tokenizer.end_of_text is not None:
            return [self.tokenizer.end_of_text]
        try:
            newline: list[int] = self.tokenizer.encode_array("\n").tolist()
        except InputError:
            return [0]
        return newline or [0]  # some tokenizers drop white space

    @overload
    def generate(
        self, prompt: str = "", max_new_tokens: int = 200, **options: Unpack[TextOptions]
    ) -> str: ...

    @overload
    def generate(
        self, prompt: Prompts, max_new_tokens: int = 200, **options: Unpack[TextOptions]
    ) -> list[str]: ...

    @shows_options(TextOptions, DEFAULTS)
    def generate(
        self, prompt: str | Prompts = "", max_new_tokens: int = 200, **options: Unpack[TextOptions]
    ) -> str | list[str]:
        """`prompt` and its continuation as one text, or a list of these for a list of prompts.

        Options and errors as for `complete`.
        """
        call = TextCall(self, prompt, max_new_tokens, **options)
        texts = [completion.prompt + completion.text for completion in call.samples(1)]
        return texts[0] if isinstance(prompt, str) else texts

    @shows_options(TextOptions, DEFAULTS)
    def stream(
        self, prompt: str = "", max_new_tokens: int = 200, **options: Unpack[TextOptions]
    ) -> Iterator[str]:
        """The continuation in pieces as they become certain; options as for `complete`.

        A piece never ends within a character, nor in the beginning of a stop string.
        """
        if not isinstance(prompt, str):
            raise InputError(f"prompt={prompt!r:.40} must be text: a stream continues one prompt")
        job = TextCall(self, prompt, max_new_tokens, **options)
        return (piece for pieces in job.pieces() for piece in pieces if piece)

    @overload
    def complete(
        self,
        prompt: str = "",
        max_new_tokens: int = 200,
        num_samples: int = 1,
        **options: Unpack[TextOptions],
    ) -> list[Completion]: ...

    @overload
    def complete(
        self,
        prompt: Prompts,
        max_new_tokens: int = 200,
        num_samples: int = 1,
        **options: Unpack[TextOptions],
    ) -> list[list[Completion]]: ...

    @shows_options(TextOptions, DEFAULTS)
    def complete(
        self,
        prompt: str | Prompts = "",
        max_new_tokens: int = 200,
        num_samples: int = 1,
        **options: Unpack[TextOptions],
    ) -> list[Completion] | list[list[Completion]]:
        """`num_samples` continuations of `prompt`; for a list of prompts a list of these.

        Prompts of a list are decoded together. Each gets the samples that it would get alone: with
        a `seed` all prompts have the same, without one each draws its own.

        Args:
            prompt: the text to continue; empty starts from nothing. Or several, in a list.
            max_new_tokens: where to end at the latest.
            num_samples: how many continuations; number i depends on the seed and i alone.
            options: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` and
                `overflow` as for `mygpt.generate`; `seed` (None draws one, which the result
                contains); `stop`, strings that end the text and are not part of it;
                `logprobs`, how many alternatives to report for each token; `unknown`, "drop" to
                remove from the prompt what the tokenizer does not know ("error").

        Raises:
            InputError: for an option that does not exist, or a value outside its range.
            UnknownTokenError: for characters outside the vocabulary.
        """
        require_known(options, names_of(Writer.complete))
        require_int("num_samples", num_samples, least=1)
        call = TextCall(self, prompt, max_new_tokens, **options)
        found = list(call.samples(num_samples))
        if isinstance(prompt, str):
            return found
        return [found[n : n + num_samples] for n in range(0, len(found), num_samples)]

    @shows_options(TextOptions, DEFAULTS)
    def samples(
        self,
        prompt: str = "",
        max_new_tokens: int = 200,
        num_samples: int = 1,
        **options: Unpack[TextOptions],
    ) -> Iterator[Completion]:
        """The results of `complete` one by one, decoded in groups as large as memory allows."""
        require_known(options, names_of(Writer.samples))
        require_int("num_samples", num_samples, least=1)
        return TextCall(self, prompt, max_new_tokens, **options).samples(num_samples)


def load(
    path: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    engine: str = "auto",
    compile: bool = False,
    speculate: bool = True,
    drafts_from: str | Path | None = None,
) -> Writer:
    """The `Writer` of a run folder or checkpoint file; None takes the newest run.

    Options as for `Writer`, but `drafts_from` is a text file here; None takes the table that the
    run keeps beside its models, where there is one.

    Raises:
        CheckpointError: when there is none, or it is damaged, foreign or newer.
        InputError: for a device, a number format or an engine that is not available, or a text
            that cannot be read.
    """
    found = resolve(path)
    checkpoint = read_checkpoint(found)
    drafts: DraftTable | Path | None = table_beside(found)
    if drafts_from is not None:
        drafts = table_of_file(drafts_from, checkpoint.tokenizer)
    return Writer(
        checkpoint,
        checkpoint.tokenizer,
        checkpoint.provenance,
        device=device,
        dtype=dtype,
        engine=engine,
        compile=compile,
        speculate=speculate,
        drafts_from=drafts,
    )


def table_beside(model: Path) -> Path | None:
    """The table of the run that a model's file belongs to; None if there is none."""
    for folder in (model.with_name(f"{model.name}.run"), model.parent):
        if (path := folder / FILE_NAME).is_file():
            return path
    return None
