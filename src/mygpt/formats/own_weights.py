"""State dicts of `mygpt.GPT` written by `torch.save`, alone or in a dict with other entries.

The configuration is inferred from the tensors' shapes. What shapes do not show (the number of
heads; with rotary positions, the window) comes from a configuration in the same file, from the
user, or is assumed to be the tutorial's.
Letters: C embedding, D head size, G key/value heads, H heads, L window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from mygpt.checkpoint.model_file import config_from_json
from mygpt.checkpoint.parameter_shapes import parameter_shapes
from mygpt.core.config import GPTConfig
from mygpt.errors import InputError
from mygpt.formats.imported import Imported
from mygpt.formats.state_dict import StateDict
from mygpt.formats.torch_files import OWN_EMBEDDING, own_state, read_torch_file
from mygpt.formats.tutorial import HEADS_BY_WIDTH, adjacent_tokenizer
from mygpt.tokenization import CharTokenizer, Tokenizer, from_state

_BLOCK = "blocks.0."
_QUERY_NORM = f"{_BLOCK}attention.query_norm.weight"
_CONFIGS = ("config", "model_config", "model_args", "args", "hparams", "hyper_parameters")
_VOCABULARIES = ("vocab", "words", "chars", "tokenizer_chars", "itos", "tokenizer")
_NAMES = frozenset(field.name for field in fields(GPTConfig))
# Fields that the tensors' shapes do not show; without a configuration they have their defaults.
_HIDDEN_FIELDS = ("dropout", "norm_eps", "rope_base", "mlp")


class _Widths(NamedTuple):
    """Sizes of the first block's matrices."""

    vocabulary: int  # V
    embedding: int  # C
    mlp_in: int  # rows of the MLP's first matrix: twice `mlp_hidden` if it is gated
    mlp_hidden: int
    queries: int  # H * D
    keys_values: int  # 2 * G * D


def read_own(
    path: Path, *, num_heads: int | None = None, tokenizer: Tokenizer | None = None
) -> Imported:
    """Read a state dict of a `mygpt.GPT`.

    Args:
        path: a file that `torch.save` wrote.
        num_heads: H, needed if neither the tensors nor a configuration give it; with None the
            tutorial's number is assumed then, with a note.
        tokenizer: None is the tokenizer in the file, or in a JSON file in its folder.

    Raises:
        InputError: naming the problem with the file, and the remedy.
        OutOfMemoryError: if it needs more memory than is free.
    """
    found = own_state(read_torch_file(path))
    if found is None:
        raise InputError(
            f"{path} is not a state dict of mygpt.GPT: it has no tensor {OWN_EMBEDDING}"
        )
    weights, extra = found
    state = StateDict(path, weights, anchors=(OWN_EMBEDDING,))
    if (table := "ngram_embedding.tables.0") in state:
        raise InputError(
            f"{path}: its tensor {table} is an n-gram input table, which this version of mygpt "
            "does not support: train the model again"
        )
    config, notes = _config(path, state, _settings(extra), num_heads)
    if tokenizer is None:
        tokenizer, line = _vocabulary(path, extra, config.vocab_size)
        notes += [] if line is None else [line]
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{config.vocab_size}: give the model's own tokenizer with --tokenizer PATH"
        )
    arrays: dict[str, NDArray[Any]] = {
        name: state.take(name, shape) for name, shape in parameter_shapes(config).items()
    }
    notes += state.finish()
    return Imported(config, arrays, tokenizer, notes, {"format": "mygpt", "file": path.name})


def _settings(extra: Mapping[str, Any]) -> dict[str, Any]:
    """The `GPTConfig` fields in the file's other entries, directly or in a configuration dict."""
    configs = [extra[name] for name in _CONFIGS if isinstance(extra.get(name), Mapping)]
    found: dict[str, Any] = {}
    for entries in [extra, *configs]:
        found |= {k: v for k, v in entries.items() if k in _NAMES and not isinstance(v, Mapping)}
    return found


def _config(
    path: Path, state: StateDict, stated: dict[str, Any], num_heads: int | None
) -> tuple[GPTConfig, list[str]]:
    """The configuration: from the tensors, and from what the file states about the rest."""
    widths = _widths(path, state)
    visible = _visible_fields(path, state, widths, stated)
    heads, notes = _heads(path, state, widths, stated, num_heads)
    if widths.queries % heads or widths.keys_values % (2 * widths.queries // heads):
        raise InputError(
            f"{path}: num_heads={heads} does not divide the {widths.queries} rows of the queries "
            f"and the {widths.keys_values // 2} of the keys into heads of one size: give another "
            "--num-heads"
        )
    size = widths.queries // heads  # D
    grouped = widths.keys_values != 2 * widths.queries
    gated = widths.mlp_in == 2 * widths.mlp_hidden
    hidden = {name: stated[name] for name in (*_HIDDEN_FIELDS, "max_seq_len") if name in stated}
    try:
        config = GPTConfig(**{
            "num_heads": heads,
            "num_kv_heads": widths.keys_values // (2 * size) if grouped else None,
            "head_dim": None if widths.queries == widths.embedding else size,
            "mlp": "swiglu" if gated else "gelu",
            **visible,
            **hidden,
            "mlp_dim": widths.mlp_hidden,
        })  # fmt: skip
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if (config.mlp == "swiglu") != gated:
        raise InputError(
            f"{path}: its configuration says mlp={config.mlp!r}, and its tensors are of another "
            "kind of MLP: they are of different models"
        )
    return _without_default_width(config), notes


def _widths(path: Path, state: StateDict) -> _Widths:
    vocabulary, embedding = state.matrix(OWN_EMBEDDING)  # (V, C)
    queries = state.matrix(f"{_BLOCK}attention.output.weight")[1]
    widths = _Widths(
        vocabulary,
        embedding,
        mlp_in=state.matrix(f"{_BLOCK}mlp.input.weight")[0],
        mlp_hidden=state.matrix(f"{_BLOCK}mlp.output.weight")[1],
        queries=queries,
        keys_values=state.matrix(f"{_BLOCK}attention.query_key_value.weight")[0] - queries,
    )
    if min(widths) < 1:
        raise InputError(f"{path}: one of its matrices is empty: it is not a model")
    return widths


def _visible_fields(
    path: Path, state: StateDict, widths: _Widths, stated: dict[str, Any]
) -> dict[str, Any]:
    """The `GPTConfig` fields that the tensors show; `InputError` if the file states others."""
    learned = "position_embedding.weight" in state
    visible: dict[str, Any] = {
        "vocab_size": widths.vocabulary,
        "embed_dim": widths.embedding,
        "num_layers": state.count_blocks("blocks."),
        "norm": "layer" if "final_norm.bias" in state else "rms",
        "position": "learned" if learned else "rotary",
        "attention_bias": f"{_BLOCK}attention.output.bias" in state,
        "mlp_bias": f"{_BLOCK}mlp.output.bias" in state,
        "qk_norm": _QUERY_NORM in state,
        "tied": "head.weight" not in state,
    }
    if learned:
        visible["max_seq_len"] = state.matrix("position_embedding.weight")[0]
    for name, value in visible.items():
        found = stated.get(name, value)
        if (tuple(found) if isinstance(found, list) else found) != value:
            raise InputError(
                f"{path}: its configuration says {name}={found!r:.60}, and its tensors have "
                f"{value}: they are of different models"
            )
    if not learned and "max_seq_len" not in stated:
        raise InputError(
            f"{path} does not state its window (max_seq_len), which the tensors of a model with "
            "rotary positions do not show: save it with mygpt.save_checkpoint, or as a dict with "
            'model.state_dict() and "config": model.config.to_dict()'
        )
    return visible


def _without_default_width(config: GPTConfig) -> GPTConfig:
    """The same configuration, with mlp_dim=None if the MLP has the default width."""
    default = config_from_json(config.to_dict() | {"mlp_dim": None})
    return default if default.mlp_hidden == config.mlp_hidden else config


def _heads(
    path: Path, state: StateDict, widths: _Widths, stated: dict[str, Any], num_heads: int | None
) -> tuple[int, list[str]]:
    """H and notes: from the size of a head's norm, the file, the user, or else the tutorial's."""
    known = stated.get("num_heads")
    if _QUERY_NORM in state:
        size = (state.shape(_QUERY_NORM) or (1,))[0]
        known = max(1, widths.queries // max(1, size))
    if known is not None:
        if type(known) is not int or known < 1:
            raise InputError(
                f"{path}: num_heads={known!r:.20} in its configuration must be an integer above 0"
            )
        if num_heads not in (None, known):
            raise InputError(
                f"--num-heads {num_heads} differs from the {known} heads of {path}: leave it out"
            )
        return known, []
    if num_heads is not None:
        if num_heads < 1:
            raise InputError(f"num_heads={num_heads} must be at least 1")
        return num_heads, []
    assumed = HEADS_BY_WIDTH.get(widths.embedding, 4)
    return assumed, [
        f"num_heads={assumed} is assumed, as in the tutorial: a state dict does not state it; if "
        "the generated text makes no sense, give --num-heads"
    ]


def _vocabulary(
    path: Path, extra: Mapping[str, Any], vocab_size: int
) -> tuple[Tokenizer, str | None]:
    """The tokenizer in the file's other entries, or in its folder, and a note or None."""
    for name in _VOCABULARIES:
        kept = extra.get(name)
        if isinstance(kept, Mapping) and "kind" in kept:
            return from_state(dict(kept)), None
        if isinstance(kept, Mapping):  # words by id, or ids by word
            words = {v: k for k, v in kept.items()} if _ids(kept.values()) else dict(kept)
            kept = [words.get(n) for n in range(len(words))]
        if isinstance(kept, str):
            kept = list(kept)
        if isinstance(kept, (list, tuple)) and len(kept) == vocab_size:
            return _of_words(path, name, [str(word) for word in kept])
    return adjacent_tokenizer(path, vocab_size)


def _ids(values: Any) -> bool:
    return all(type(value) is int for value in values)


def _of_words(path: Path, name: str, words: list[str]) -> tuple[Tokenizer, str | None]:
    """A tokenizer of characters; for words, of their first letters, since mygpt has no other."""
    letters = [word[:1] for word in words]
    if not all(letters) or len(set(letters)) < len(letters):
        raise InputError(
            f"{path}: its {name} has whole words, which mygpt has no tokenizer for, and their "
            "first letters are not all different: give a tokenizer with --tokenizer PATH"
        )
    if letters == words:
        return CharTokenizer(letters), None
    shown = " ".join(words[:12]) + " ..." * (len(words) > 12)
    return CharTokenizer(letters), (
        f"its tokens are the words {shown:.200}; they are shown as their first letters"
    )
