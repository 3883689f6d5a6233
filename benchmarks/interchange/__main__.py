"""A trained model in mygpt, transformers and llama.cpp: the same tokens from the same prompts?

Usage: python -m benchmarks.interchange RUN TEXT [--prompts 20] [--tokens 64]
       [--only-server] [--out docs/benchmarks]
in the folder above `benchmarks`; needs transformers and llama-cpp-python (benchmarks/peers.txt)
and, for the last figures, lm-eval[api] (left out where it is missing).
--only-server measures `mygpt serve` alone and keeps the other figures.

All continue passages of TEXT greedily. Where one chooses another token, its two best logits are
looked at: within 1e-3 the order is a matter of rounding. Then all go on from mygpt's token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.interchange.harness import judge_by_harness, judge_server
from benchmarks.interchange.programs import by_llama_cpp, by_mygpt, by_transformers
from numpy.typing import NDArray

from mygpt.checkpoint import Checkpoint, read_checkpoint, resolve
from mygpt.formats import export_checkpoint

ROOT = Path(__file__).resolve().parents[2]
NEAR = 1e-3  # logits closer than this are a tie of rounding
PROMPT_CHARS = 24  # of a prompt


@dataclass
class Verdict:
    """How one program's choices compare with mygpt's.

    Attributes:
        program: its name and version.
        prompts: how many were tokenized as mygpt does.
        same: tokens chosen alike.
        near: others, whose two best logits were within `NEAR`.
        wrong: others still.
        furthest: largest difference of any logit.
        early: generations of the program's own that ended before their length.
    """

    program: str
    prompts: int = 0
    same: int = 0
    near: int = 0
    wrong: int = 0
    furthest: float = 0.0
    early: int = 0

    def compare(
        self, written: list[int], ours: NDArray[np.float32], theirs: NDArray[np.float32]
    ) -> None:
        """Count the choices of one continuation that mygpt wrote, from logits (tokens, V)."""
        self.furthest = max(self.furthest, float(np.abs(ours - theirs).max()))
        for token, own, other in zip(written, ours, theirs, strict=True):
            first, second = np.sort(own)[:-3:-1]
            if other.argmax() == token:
                self.same += 1
            elif first - second <= NEAR:
                self.near += 1
            else:
                self.wrong += 1


def passages(text: str, count: int, length: int = PROMPT_CHARS) -> list[str]:
    """Beginnings of so many passages, spread evenly over a text."""
    apart = (len(text) - length) // count
    return [text[start : start + length] for start in range(0, apart * count, apart)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All programs on all prompts, as plain values."""
    found = read_checkpoint(resolve(options.run))
    prompts = passages(options.text.read_text(encoding="utf-8"), options.prompts)
    with tempfile.TemporaryDirectory() as work:
        folder, file = Path(work) / "hf", Path(work) / "model.gguf"
        export_checkpoint(found, "hf", folder)
        export_checkpoint(found, "gguf", file, number_type="f32")
        ours = by_mygpt(found)
        verdicts = []
        for program in (by_transformers(folder), by_llama_cpp(file, found.config.max_seq_len)):
            verdict = Verdict(program.name)
            for prompt in prompts:
                ids, continuation = ours.continue_greedily(prompt, options.tokens)
                verdict.prompts += program.encode(prompt) == ids
                logits = [each.logits(ids, continuation) for each in (ours, program)]
                verdict.compare(continuation, *logits)
                theirs = program.continue_greedily(prompt, options.tokens)[1]
                verdict.early += len(theirs) < len(continuation)
            verdicts.append(vars(verdict))
        harness = judge_by_harness(found, folder, prompts, Path(work))
    return {
        "model": described(found),
        "prompts": options.prompts,
        "tokens": options.tokens,
        "programs": verdicts,
        "harness": harness,
        "server": measure_server(options),
    }


def described(found: Checkpoint) -> str:
    return f"{found.config.num_parameters():,} parameters, {found.tokenizer.kind}"


def measure_server(options: argparse.Namespace) -> dict[str, Any] | None:
    """Our server beside the exported folder, as the harness asks them, on longer passages."""
    found = read_checkpoint(resolve(options.run))
    length = min(4 * PROMPT_CHARS, found.config.max_seq_len)
    texts = passages(options.text.read_text(encoding="utf-8"), options.prompts, length)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "hf"
        export_checkpoint(found, "hf", folder)
        judged = judge_server(found, folder, texts, Path(work))
    return None if judged is None else {"model": described(found), **judged}


def page(results: dict[str, Any]) -> str:
    """The results in words."""
    lines = [
        "# The same model elsewhere",
        "",
        f"`python -m benchmarks.interchange`: a model trained here ({results['model']}), exported, "
        f"continues {results['prompts']} prompts greedily, {results['tokens']} tokens each, all "
        "programs in float32 from mygpt's tokens. A choice counts as near where mygpt's two best "
        f"logits are within {NEAR:g}.",
        "",
        "| program | prompts tokenized alike | same choice | near | another | largest difference "
        "of a logit | ended early |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {v['program']} | {v['prompts']} of {results['prompts']} | {v['same']:,} | {v['near']} "
        f"| {v['wrong']} | {v['furthest']:.1e} | {v['early']} |"
        for v in results["programs"]
    ]
    harness = results["harness"]
    if harness is not None:
        lines += [
            "",
            f"{harness['program']} on the exported folder gives {harness['texts']} such prompts a "
            f"loglikelihood of {harness['theirs']:.4f} in all (each "
            f"after its first character), `mygpt eval`'s evaluation {harness['ours']:.4f}; the "
            f"largest difference of one is {harness['furthest']:.1e}.",
        ]
    server = results.get("server")
    if server is not None:
        lines += [
            "",
            f"{server['program']} asks `mygpt serve` (model type local-completions) and "
            f"transformers, on the exported folder, for the loglikelihoods of {server['pairs']} "
            f"continuations ({server['model']}), {server['greedy']} of which are the greedy ones: "
            f"the largest difference of one is {server['furthest']:.1e}, and "
            f"{server['flags_alike']} of {server['pairs']} flags of greediness are the same.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder or a checkpoint")
    parser.add_argument("text", type=Path, help="a text of its kind")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only-server", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    file = options.out / "interchange.json"
    if options.only_server:
        results = {**json.loads(file.read_text()), "server": measure_server(options)}
    else:
        results = measure(options)
    file.write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "interchange.md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
