"""`mygpt.generate` and `mygpt.stream`: prompts as tensors, arrays or lists of ids.

Letters: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mygpt.core.config import SamplingConfig
from mygpt.decode import tokens
from mygpt.decode.options import DrawOptions
from mygpt.errors import InputError
from mygpt.options import defaults_of, names_of, require_known, shows_options

Ids = torch.Tensor | NDArray[np.integer[Any]] | Sequence[int] | Sequence[Sequence[int]]


@shows_options(DrawOptions, defaults_of(tokens.checked_call))
def generate(
    model: nn.Module,
    prompt_ids: Ids,
    max_new_tokens: int,
    temperature: float = SamplingConfig.temperature,
    top_k: int | None = SamplingConfig.top_k,
    **options: Unpack[DrawOptions],
) -> torch.Tensor:
    """Append `max_new_tokens` tokens to each row of `prompt_ids` (chapter 15, section 15.7).

    This is `mygpt.core.generation.generate` with checked arguments and the fastest decoder:
    machine code on the CPU, or torch.

    Args:
        model: a `GPT`, or any module whose forward returns `(logits, anything)` and that has
            `max_seq_len`. It runs in eval mode; afterwards its mode is what it was.
        prompt_ids: (B, T) int64 tensor; longer than the window is fine, B may be 0. Or one
            prompt, (T,). Arrays and lists of whole numbers are taken too; rows have one length.
        max_new_tokens: how many tokens to append.
        temperature: below 1 sharpens, above 1 flattens; 0 is argmax.
        top_k: draw from the k likeliest tokens alone; None or 0 is off.
        options: `top_p`: draw from the smallest set of likeliest tokens that reaches this
            probability. `min_p`: drop tokens below this fraction of the likeliest token's
            probability. `repetition_penalty`: above 1 makes tokens that occurred before less
            likely.

            `seed`: None draws from torch's global generator, as the chapter does. A seed gives
            row i the numbers of `Stream(seed, i)`: the same text for any batch size.

            `overflow`: past the window, "crop" reads the last `max_seq_len` tokens at each step
            (the chapter's way), "refill" keeps the newer half when the window is full, "stop"
            ends when the window is full.

    Returns:
        (B, T + max_new_tokens) int64, prompt included, on the prompt's device (of a list or array:
        the model's); for one prompt (T + max_new_tokens,). Shorter only where "stop" ended it.

    Raises:
        InputError: for an option that does not exist, or a value outside its range, naming the
            range (a ValueError).
    """
    require_known(options, names_of(generate))
    rows, is_one = _rows(model, prompt_ids)
    call = tokens.checked_call(model, rows, max_new_tokens, temperature, top_k, **options)
    found = call.result(tokens.fastest_decoder(call))
    return found[0] if is_one else found


@shows_options(DrawOptions, defaults_of(tokens.checked_call))
def stream(
    model: nn.Module,
    prompt_ids: Ids,
    max_new_tokens: int,
    temperature: float = SamplingConfig.temperature,
    top_k: int | None = SamplingConfig.top_k,
    **options: Unpack[DrawOptions],
) -> Iterator[torch.Tensor]:
    """The new tokens of `generate`, one step at a time: each (B,) int64, for one prompt ().

    Takes `generate`'s arguments and raises what it raises, at once rather than at the first
    step.
    """
    require_known(options, names_of(stream))
    rows, is_one = _rows(model, prompt_ids)
    call = tokens.checked_call(model, rows, max_new_tokens, temperature, top_k, **options)
    found = tokens.stream(call)
    return (new[0] for new in found) if is_one else found


def _rows(model: nn.Module, prompt_ids: Any) -> tuple[Any, bool]:
    """The prompt as a (B, T) tensor, and whether it is one prompt without rows.

    What is neither a tensor, an array nor a list is returned as it is: it is refused later.
    """
    ids = prompt_ids
    if isinstance(ids, (list, tuple)):
        ids = _array(ids)
    if isinstance(ids, np.ndarray):
        if ids.size and ids.dtype.kind not in "iu":
            raise InputError(f"prompt_ids has numbers of type {ids.dtype}: ids are whole numbers")
        ids = torch.from_numpy(ids.astype(np.int64)).to(_device_of(model))
    if isinstance(ids, torch.Tensor) and ids.ndim == 1:
        return ids[None], True
    return ids, False


def _array(ids: Sequence[Any]) -> NDArray[np.int64]:
    """A list of ids, or of lists of them, as (T,) or (B, T)."""
    has_rows = bool(ids) and all(isinstance(row, (list, tuple)) for row in ids)
    rows = ids if has_rows else [ids]
    for number, row in enumerate(rows):
        wrong = [i for i in row if isinstance(i, bool) or not isinstance(i, Integral)]
        wrong += [i for i in row if not wrong and abs(int(i)) >= 2**63]
        if wrong:
            raise InputError(
                f"prompt_ids has {wrong[0]!r:.40}: ids are whole numbers (tokenizer.encode(text) "
                "gives them, and Writer.generate takes text)"
            )
        if len(row) != len(rows[0]):
            raise InputError(
                f"prompt_ids[{number}] has {len(row)} ids and prompt_ids[0] {len(rows[0])}: rows "
                "have one length (Writer.generate takes texts of any lengths)"
            )
    return np.array(ids, np.int64)


def _device_of(model: Any) -> torch.device:
    """Where the model's weights are; the CPU for what has none."""
    weights = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((weight.device for weight in weights), torch.device("cpu"))
