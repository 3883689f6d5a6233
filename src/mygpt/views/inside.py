"""The part "Inside" of the page of `mygpt explain`, computed before the page is written.

Letters: T time, N blocks, H heads, S positions of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mygpt.checkpoint.model_file import Checkpoint
from mygpt.core.config import GPTConfig
from mygpt.decode.writer import Writer
from mygpt.evaluation.ablation import Part, ablated
from mygpt.tokenization import Tokenizer

if TYPE_CHECKING:
    from mygpt.evaluation.inside import Inside

_MOST_POSITIONS = 128  # as many as the served page reads
_MOST_VALUES = 60_000  # of lenses and contributions: about half a megabyte
# Multiplications and additions of all passes, a few seconds of one core: 10.65 million parameters,
# 54 parts and 122 tokens need 0.8e11.
_MOST_OPERATIONS = 1.5e11
_HEAD_SCORE_TOKENS = 256  # at most


def inside_data(checkpoint: Checkpoint, ids: Sequence[int]) -> dict[str, Any]:
    """What the panel shows of a text, with each part switched off alone; torch runs the model.

    Args:
        checkpoint: a model whose logits are finite.
        ids: the text, of which the last tokens that fit are read.

    Returns:
        {"refused": why} for a model that would take too long, else plain values for
        `pages/precomputed.js`, which lists them.
    """
    config = checkpoint.config
    read = list(ids[-positions_to_read(config) :])
    parts = all_parts(config)
    if operations(config, len(read)) > _MOST_OPERATIONS:
        return {
            "refused": f"This part of the page would need {len(parts) + 1} passes of the model, "
            f"too many for {config.num_parameters():,} parameters and {len(read)} tokens. "
            "mygpt serve shows it: there each pass is computed when it is requested."
        }
    from mygpt.evaluation.activations import suitable_threads

    writer = Writer(checkpoint, checkpoint.tokenizer, device="cpu", dtype="float32")
    with suitable_threads(config.num_parameters()):
        return {"start": len(ids) - len(read)} | _values(writer, read, parts)


def all_parts(config: GPTConfig) -> list[Part]:
    """Each head, and attention, MLP and both of each block."""
    found = []
    for block in range(config.num_layers):
        found += [Part("head", block, head) for head in range(config.num_heads)]
        found += [Part("attention", block), Part("mlp", block), Part("block", block)]
    return found


def positions_to_read(config: GPTConfig) -> int:
    """T: how many of a text's last tokens are read, of all of which a page has the values."""
    from mygpt.evaluation.inside_values import LENS_TOKENS

    depths, parts = config.num_layers + 1, config.num_layers * (config.num_heads + 2) + 3
    values = (LENS_TOKENS + 1) * (parts + 2 * depths) + 3 * LENS_TOKENS * depths
    return max(1, min(config.max_seq_len, _MOST_POSITIONS, _MOST_VALUES // values))


def operations(config: GPTConfig, time: int) -> float:
    """Estimated operations of all passes: without a part, those blocks before it are known."""
    passes = 1 + len(all_parts(config)) / 2
    lens = time * (config.num_layers + 1) * config.vocab_size * config.embed_dim
    return 2 * (config.num_parameters() * (passes * time + _HEAD_SCORE_TOKENS) + lens)


def _values(writer: Writer, ids: list[int], parts: list[Part]) -> dict[str, Any]:
    from mygpt.evaluation.inside import read_activations
    from mygpt.evaluation.inside_values import (
        contribution_list,
        head_names,
        loss_of,
        next_tokens,
        thumbnails,
    )

    model, tokenizer = writer.backend.read_only_model, writer.tokenizer
    whole = read_activations(model, ids)
    without = {}
    for part in parts:
        changed = read_activations(ablated(model, [part]), ids, known=(whole, part.block))
        tokens = next_tokens(whole.logits[-1], changed.logits[-1], tokenizer)
        without[str(part)] = {"loss": loss_of(changed), **tokens}
    pictures = thumbnails(whole)  # (N, H, S, S)
    triangles = pictures[:, :, *np.tril_indices(pictures.shape[-1])]
    positions = [_position(whole, position, tokenizer) for position in range(len(ids))]
    return {
        "parts": [name for name, _ in contribution_list(whole.contributions(), writer.config)],
        "loss": loss_of(whole),
        "names": head_names(writer.head_scores()) if writer.config.max_seq_len > 1 else None,
        "size": pictures.shape[-1],
        "hundredths": np.rint(100 * triangles).astype(int).tolist(),
        "positions": positions,
        "without": without,
    }


def _position(inside: Inside, position: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """The prediction at a position: of the token that follows, and of the most probable ones."""
    from mygpt.evaluation.inside_values import (
        LENS_TOKENS,
        contribution_list,
        largest,
        lens_rows,
    )

    config = inside.model.config
    following = inside.ids[position + 1 : position + 2].tolist()
    likeliest = largest(inside.logits[position], LENS_TOKENS)
    tokens = list(dict.fromkeys([*following, *likeliest]))
    rows = lens_rows(inside, position, tokens, tokenizer)
    found = []
    for n, sums in enumerate(inside.contributions_of(tokens, position)):
        found.append(
            {
                "id": sums.token,
                "text": tokenizer.token_text(sums.token),
                "logit": sums.logit,
                "total": sums.total,
                "ranks": [row.ranks[n] for row in rows],
                "contributions": [value for _, value in contribution_list(sums, config)],
            }
        )
    return {"top": [row.top for row in rows], "tokens": found}
