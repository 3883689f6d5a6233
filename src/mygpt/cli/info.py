"""`mygpt info`: what is in a checkpoint."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

from mygpt.cli import options
from mygpt.cli.terminal import say, to_json

_MOST_ENDS = 8  # at most so many end-of-text tokens are listed
_USUAL_TOKENS = 200  # the default of `mygpt generate --max-new-tokens`


def info(checkpoint: options.Checkpoint = None, json: options.Json = False) -> None:
    """Check all digests of a checkpoint and show its contents and the engine that would run it.

    Example: mygpt info runs/poems
    """
    from mygpt.checkpoint.model_file import read_checkpoint, resolve
    from mygpt.decode.choice import choose_engine

    found = read_checkpoint(resolve(checkpoint))
    engine = choose_engine(found.config, tokens=_USUAL_TOKENS)
    if json:
        values = {
            "path": str(found.path),
            "config": found.config.to_dict(),
            "parameters": found.config.num_parameters(),
            "tokenizer": found.tokenizer.to_state(),
            "provenance": found.provenance,
            "engine": asdict(engine),
        }
        say(to_json(values, indent=2))
        return
    for name, value in _lines(found):
        say(f"{name + ':' if name else '':<13}{value}")
    say(f"{'engine:':<13}{engine.name}, for {_USUAL_TOKENS} tokens: {engine.reason}")


def _ends(tokenizer: Any) -> str:
    """The tokens that end a text, and those that begin one."""
    from mygpt.tokenization import ends_of

    def shown(ids: tuple[int, ...]) -> str:
        named = [f"{tokenizer.token_text(n)} (id {n})".lstrip() for n in ids[:_MOST_ENDS]]
        return ", ".join(named) + ", ..." * (len(ids) > _MOST_ENDS)

    begun = f"; {shown(tokenizer.beginning)} before each text" if tokenizer.beginning else ""
    ends = ends_of(tokenizer)
    return (shown(ends) if ends else "none: the model never ends a text by itself") + begun


def _lines(found: Any) -> list[tuple[str, str]]:
    """The contents as pairs of name and text, the most useful ones first."""
    config, tokenizer, origin = found.config, found.tokenizer, found.provenance
    block = (
        "the tutorial's"
        if config.is_tutorial_block
        else f"{config.norm} norm, {config.position} positions, {config.mlp}"
    )
    lines = [
        ("file", f"{found.path} ({found.path.stat().st_size:,} bytes, digests match)"),
        ("parameters", f"{config.num_parameters():,}"),
        (
            "shape",
            f"embed_dim {config.embed_dim}, {config.num_layers} layers, {config.num_heads} heads",
        ),
        ("block", block),
        ("window", f"{config.max_seq_len} tokens"),
        ("tokenizer", f"{tokenizer.kind}, vocabulary {tokenizer.vocab_size}"),
        ("end of text", _ends(tokenizer)),
    ]
    if tokenizer.kind == "char":
        lines.append(("characters", to_json("".join(tokenizer.chars))))
    provenance_lines = (
        ("trained", "{step:,} steps, {tokens:,} tokens"),
        ("loss", "{loss:.4f} nats per token, last batch"),
        ("validation", "{val_loss:.4f} nats per token, {val_bits_per_byte:.3f} bits per byte"),
        ("imported", "{imported[from]} ({imported[format]})"),
        ("began from", "{from[path]}"),
        ("corpus", "{corpus[name]}, {corpus[bytes]:,} bytes"),
        ("", "sha256 {corpus[sha256]}"),
        ("command", "{command}"),
        ("made with", "mygpt {mygpt}, torch {torch}"),
    )
    for name, form in provenance_lines:
        # A checkpoint's provenance may lack some of these entries or have other types.
        with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
            lines.append((name, form.format(**origin)))
    return lines
