"""State dicts of `mygpt.GPT` that `torch.save` wrote, bare or in a dict with more in it.

The shape is read off the tensors; what they do not say (the number of heads, of rotary positions
the window) comes from a configuration in the same file, from the user, or is the tutorial's.
Letters: C embedding, D head size, G key/value heads, H heads, L window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mygpt.core.config import GPTConfig
from mygpt.errors import InputError
from mygpt.formats.imported import Imported
from mygpt.formats.state_dict import StateDict
from mygpt.formats.torch_files import OWN_EMBEDDING, own_state, read_torch_file
from mygpt.formats.tutorial import HEADS_BY_WIDTH, tokenizer_beside
from mygpt.tokenization import CharTokenizer, Tokenizer, from_state

_BLOCK = "blocks.0."
_CONFIGS = ("config", "model_config", "model_args", "args", "hparams", "hyper_parameters")
_VOCABULARIES = ("vocab", "words", "chars", "tokenizer_chars", "itos", "tokenizer")
_NAMES = frozenset(field.name for field in fields(GPTConfig))
# What tensors do not say, and a file without a configuration leaves at its default.
_UNSEEN = ("dropout", "norm_eps", "rope_base", "mlp")


def read_own(
    path: Path, *, num_heads: int | None = None, tokenizer: Tokenizer | None = None
) -> Imported:
    """Read the weights of a `mygpt.GPT`.

    Args:
        path: what `torch.save` wrote.
        num_heads: H, where neither the tensors nor a configuration say it; None is what the
            tutorial has then, with a note.
        tokenizer: None is the file's own, or the JSON beside it.

    Raises:
        InputError: naming what is wrong with the file, and what to do.
        OutOfMemoryError: where it does not fit into memory.
    """
    found = own_state(read_torch_file(path))
    if found is None:
        raise InputError(f"{path} holds no weights of mygpt: it has no {OWN_EMBEDDING}")
    weights, beside = found
    state = StateDict(path, weights, anchors=(OWN_EMBEDDING,))
    if (table := "ngram_embedding.tables.0") in state:
        raise InputError(
            f"{path}: its tensor {table} is an n-gram input table, which this version of mygpt "
            "does not support: train the model again"
        )
    config, notes = _config(path, state, _settings(beside), num_heads)
    if tokenizer is None:
        tokenizer, line = _vocabulary(path, beside, config.vocab_size)
        notes += [] if line is None else [line]
    if tokenizer.vocab_size != config.vocab_size:
        raise InputError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids and the model "
            f"{config.vocab_size}: give the model's own with --tokenizer PATH"
        )
    arrays: dict[str, NDArray[Any]] = {
        name: state.take(name, shape) for name, shape in config.parameter_shapes().items()
    }
    notes += state.finish()
    return Imported(config, arrays, tokenizer, notes, {"format": "mygpt", "file": path.name})


def _settings(beside: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `GPTConfig` that the file says, in a dict of their own or beside others."""
    places = [beside[name] for name in _CONFIGS if isinstance(beside.get(name), Mapping)]
    found: dict[str, Any] = {}
    for place in [beside, *places]:
        found |= {k: v for k, v in place.items() if k in _NAMES and not isinstance(v, Mapping)}
    return found


def _config(
    path: Path, state: StateDict, said: dict[str, Any], num_heads: int | None
) -> tuple[GPTConfig, list[str]]:
    """The shape by the tensors, and by what the file says of the rest."""
    vocab_size, width = state.matrix(OWN_EMBEDDING)  # (V, C)
    inner = state.matrix(f"{_BLOCK}mlp.input.weight")[0]
    hidden = state.matrix(f"{_BLOCK}mlp.output.weight")[1]
    heads_width = state.matrix(f"{_BLOCK}attention.output.weight")[1]  # H * D
    grouped = state.matrix(f"{_BLOCK}attention.query_key_value.weight")[0] - heads_width  # 2 G D
    if min(vocab_size, width, inner, hidden, heads_width, grouped) < 1:
        raise InputError(f"{path}: its matrices have no rows or columns: it is no model")
    normed = f"{_BLOCK}attention.query_norm.weight"
    learned = "position_embedding.weight" in state
    seen: dict[str, Any] = {
        "vocab_size": vocab_size,
        "embed_dim": width,
        "num_layers": state.numbered("blocks."),
        "norm": "layer" if "final_norm.bias" in state else "rms",
        "position": "learned" if learned else "rotary",
        "attention_bias": f"{_BLOCK}attention.output.bias" in state,
        "mlp_bias": f"{_BLOCK}mlp.output.bias" in state,
        "qk_norm": normed in state,
        "tied": "head.weight" not in state,
    }
    if learned:
        seen["max_seq_len"] = state.matrix("position_embedding.weight")[0]
    for name, value in seen.items():
        of_file = said.get(name, value)
        if (tuple(of_file) if isinstance(of_file, list) else of_file) != value:
            raise InputError(
                f"{path}: its configuration says {name}={of_file!r:.60}, and its tensors are for "
                f"{value}: they are of different models"
            )
    if not learned and "max_seq_len" not in said:
        raise InputError(
            f"{path} does not say its window, since its positions are rotary: save it with "
            "mygpt.save_checkpoint, or as a dict with model.state_dict() and "
            '"config": model.config.to_dict()'
        )
    heads, notes = _heads(path, state, normed, heads_width, width, said, num_heads)
    if heads_width % heads or heads > heads_width or grouped % (2 * heads_width // heads):
        raise InputError(
            f"{path}: queries of {heads_width} and keys of {grouped // 2} rows are no whole heads "
            f"with num_heads={heads}: give another --num-heads"
        )
    size = heads_width // heads  # D
    unseen = {name: said[name] for name in (*_UNSEEN, "max_seq_len") if name in said}
    gated = inner == 2 * hidden
    try:
        shape = GPTConfig(**{
            "num_heads": heads,
            "num_kv_heads": None if grouped == 2 * heads_width else grouped // (2 * size),
            "head_dim": None if heads_width == width else size,
            "mlp": "swiglu" if gated else "gelu",
            **seen,
            **unseen,
            "mlp_dim": hidden,
        })  # fmt: skip
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if (shape.mlp == "swiglu") != gated:
        raise InputError(
            f"{path}: its configuration says mlp={shape.mlp!r}, and its tensors are of another "
            "kind: they are of different models"
        )
    return _shorter(shape), notes


def _shorter(shape: GPTConfig) -> GPTConfig:
    """The same shape without a width of the MLP that is the default's."""
    values = shape.to_dict() | {"mlp_dim": None}
    plain = GPTConfig.from_dict(values)
    return plain if plain.mlp_hidden == shape.mlp_hidden else shape


def _heads(
    path: Path,
    state: StateDict,
    normed: str,
    heads_width: int,
    width: int,
    said: dict[str, Any],
    num_heads: int | None,
) -> tuple[int, list[str]]:
    """H: by the size of a head's norm, by the configuration, by the user, or the tutorial's."""
    known = said.get("num_heads")
    if normed in state:
        size = (state.shape(normed) or (1,))[0]
        known = max(1, heads_width // max(1, size))
    if known is not None:
        if type(known) is not int or known < 1:
            raise InputError(f"{path}: num_heads={known!r:.20} in its configuration is no number")
        if num_heads not in (None, known):
            raise InputError(
                f"num_heads={num_heads} is not what {path} says, {known}: leave it out"
            )
        return known, []
    if num_heads is not None:
        if num_heads < 1:
            raise InputError(f"num_heads={num_heads} must be at least 1")
        return num_heads, []
    assumed = HEADS_BY_WIDTH.get(width, 4)
    return assumed, [
        f"num_heads={assumed} is assumed, as the tutorial has it: a bare state dict does not say; "
        "if the text makes no sense, give --num-heads"
    ]


def _vocabulary(
    path: Path, beside: Mapping[str, Any], vocab_size: int
) -> tuple[Tokenizer, str | None]:
    """The tokenizer that the file has, or the one beside it."""
    for name in _VOCABULARIES:
        kept = beside.get(name)
        if isinstance(kept, Mapping) and "kind" in kept:
            return from_state(dict(kept)), None
        if isinstance(kept, Mapping):  # words by id, or ids by word
            words = {v: k for k, v in kept.items()} if _ids(kept.values()) else dict(kept)
            kept = [words.get(n) for n in range(len(words))]
        if isinstance(kept, str):
            kept = list(kept)
        if isinstance(kept, (list, tuple)) and len(kept) == vocab_size:
            return _of_words(path, name, [str(word) for word in kept])
    return tokenizer_beside(path, vocab_size)


def _ids(values: Any) -> bool:
    return all(type(value) is int for value in values)


def _of_words(path: Path, name: str, words: list[str]) -> tuple[Tokenizer, str | None]:
    """Characters, or the first letter of each word: there is no tokenizer of words."""
    letters = [word[:1] for word in words]
    if not all(letters) or len(set(letters)) < len(letters):
        raise InputError(
            f"{path}: its {name} is of words, which no tokenizer of mygpt has, and their first "
            "letters are not all different: give a tokenizer with --tokenizer PATH"
        )
    if letters == words:
        return CharTokenizer(letters), None
    shown = " ".join(words[:12]) + " ..." * (len(words) > 12)
    return CharTokenizer(letters), (
        f"its tokens are the words {shown:.200}, and are shown as their first letters"
    )
