"""`mygpt info`: what is in a checkpoint."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mygpt.cli import options
from mygpt.cli.terminal import at_words, say, to_json

_AS_THEY_ARE = ("characters", "words", "command")  # lines that are never broken
_MOST_ENDS = 8  # at most so many end-of-text tokens are listed
_MOST_WORDS = 50  # and so many words of a vocabulary
_MOST_PRODUCTS = 4_000_000_000  # for a text that is only measured: about half a second
_USUAL_TOKENS = 200  # the default of `mygpt generate --max-new-tokens`


def info(
    checkpoint: options.Checkpoint = None,
    json: options.Json = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Show what can be checked of a model from somebody else: digests, that no code is "
            "in it, the origin that it states. Reads exported folders and other safetensors files "
            "too. The exit code is 2 if a check fails.",
        ),
    ] = False,
) -> int:
    """Check all digests of a checkpoint and show its contents and the engine that would run it.

    Example: mygpt info runs/poems --verify
    """
    from mygpt.checkpoint.model_file import read_checkpoint, resolve
    from mygpt.decode.choice import choose_engine

    if verify:
        return _verify(checkpoint, json)
    found = read_checkpoint(resolve(checkpoint))
    engine = choose_engine(found.config, tokens=_USUAL_TOKENS)
    if json:
        values = {
            "path": str(found.path),
            "config": found.config.to_dict(),
            "parameters": found.config.num_parameters(),
            "tokenizer": found.tokenizer.to_state(),
            "trained_length": found.trained_length,
            "provenance": found.provenance,
            "engine": asdict(engine),
            "drafts": _drafts(found, engine.name),
        }
        say(to_json(values, indent=2))
        return 0
    for name, value in _lines(found):
        line = f"{name + ':':<13}{value}"
        say(line if name in _AS_THEY_ARE else at_words(line, sys.stdout, 13))
    reason = f"{'engine:':<13}{engine.name}, for {_USUAL_TOKENS} tokens: {engine.reason}"
    say(at_words(reason, sys.stdout, 13))
    drafts = _drafts(found, engine.name)
    if drafts is not None:
        say(f"{'drafts:':<13}n-grams of the training text, {drafts['bytes']:,} bytes")
        if drafts["tokens_a_pass"] is not None:
            say(f"{'':<13}{drafts['tokens_a_pass']:.1f} tokens a pass at temperature 0.8")
    return 0


def _verify(path: Path | None, json: bool) -> int:
    """Print what can be checked of a model; the exit code."""
    from mygpt.checkpoint.model_file import resolve
    from mygpt.formats.verification import is_exported, verify

    result = verify(path if path is not None and is_exported(path) else resolve(path))
    if json:
        files = [{**asdict(file), "path": str(file.path)} for file in result.files]
        checks = [asdict(check) for check in result.checks]
        say(to_json({"passed": result.passed, "files": files, "checks": checks}, indent=2))
        return 0 if result.passed else 2
    for file in result.files:
        say(f"{'sha256:':<13}{file.sha256}  {file.path} ({file.size:,} bytes)")
    for check in result.checks:
        say(f"{check.name + ':':<13}{check.verdict:<8}{check.text}")
    failed = sum(check.verdict == "failed" for check in result.checks)
    if failed:
        say(f"\n{failed} of these checks failed: do not use this model; copy it again")
        return 2
    say("\nno check failed; what is stated can be compared, for instance with sha256sum TEXT")
    return 0


def _drafts(found: Any, engine: str) -> dict[str, Any] | None:
    """The table that drafts are drawn from, and what it gives in a short text; None for none."""
    from mygpt.cpu.common.build import has_machine_code
    from mygpt.decode.writer import load, table_beside

    table = table_beside(found.path)
    if table is None:
        return None
    values: dict[str, Any] = {"bytes": table.stat().st_size, "tokens_a_pass": None}
    quick = found.config.num_parameters() * _USUAL_TOKENS <= _MOST_PRODUCTS
    if engine == "cpu" and quick and has_machine_code():
        (sample,) = load(found.path).complete(
            "", _USUAL_TOKENS, temperature=0.8, seed=0, overflow="refill"
        )
        if sample.passes:
            values["tokens_a_pass"] = len(sample.token_ids) / sample.passes
    return values


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
    from mygpt.formats.origin import shown

    config, tokenizer, origin = found.config, found.tokenizer, found.provenance
    length = found.trained_length
    trained = "" if length is None else f", longest in training {length}"
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
        ("window", f"{config.max_seq_len} tokens{trained}"),
        ("tokenizer", f"{tokenizer.kind}, vocabulary {tokenizer.vocab_size}"),
        ("end of text", _ends(tokenizer)),
    ]
    if tokenizer.kind == "char":
        lines.append(("characters", to_json("".join(tokenizer.chars))))
    if tokenizer.kind == "word":
        words = tokenizer.words
        more = f" and {len(words) - _MOST_WORDS:,} more" if len(words) > _MOST_WORDS else ""
        lines.append(("words", to_json(" ".join(words[:_MOST_WORDS])) + more))
    provenance_lines = (
        ("trained", "{step:,} steps, {tokens:,} tokens"),
        ("loss", "{loss:.4f} nats per token, last batch"),
        ("validation", "{val_loss:.4f} nats per token, {val_bits_per_byte:.3f} bits per byte"),
        ("imported", "{imported[from]} ({imported[format]})"),
        ("began from", "{from[path]}"),
        ("corpus", "{corpus[name]}, {corpus[bytes]:,} bytes"),
        ("sha256", "{corpus[sha256]}"),
        ("command", "{command}"),
        ("made with", "mygpt {mygpt}, torch {torch}"),
    )
    for name, form in provenance_lines:
        # A checkpoint's provenance may lack some of these entries or have other types.
        with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):
            lines.append((name, shown(form.format(**origin))))
    return lines
