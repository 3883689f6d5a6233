"""Report of the measurements: a page with tables, a JSON file and a chart of the ratios."""

from __future__ import annotations

import json
import os
import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.generation.cases import Case
from benchmarks.generation.models import CONFIGS, matrix_parameters
from benchmarks.generation.rounds import TOLERATED_CORES

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "transformers",
    "ctranslate2",
    "llama-cpp-python",
    "ik-llama-cpp-python",
    "openvino",
    "nncf",
    "onnxruntime-genai",
    "gguf",
)

# What has to be known of programs, by a part of their names.
_NOTES = {
    "OpenVINO": "OpenVINO runs the model of transformers (of Q the one that `mygpt export` "
    "writes), converted with the cache as its state and called for every token. Its weights of 8 "
    "and 4 bits are those of NNCF, as optimum-intel uses it: INT8_ASYM; INT4_ASYM in groups of 64, "
    "with embedding and head of 8 bits. With float32 weights it computes in float32 and has a "
    "float32 cache; with the others its own defaults apply.",
    "onnxruntime-genai": "ONNX Runtime GenAI has the exported model as its own builder writes it, "
    "with its defaults for fp32, int8 and int4, embedding and head too.",
    "lookup": "R is L with position embeddings that make it repeat a passage of 60 tokens, which "
    "its prompt has twice. The drafts of mygpt, of `prompt_lookup_num_tokens` of transformers and "
    "of `LlamaPromptLookupDecoding` of llama-cpp-python (10 drafts each) are copied from the text "
    "so far, and all are right: no text can gain more. All rates include the time to read the "
    "prompt. A share of reading above 100% means several tokens for each reading of the weights.",
}


def describe_machine() -> dict[str, Any]:
    """Processor, number of cores, versions of the packages."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
        model = names[0] if names else model
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def headline(measured: dict[str, Any]) -> dict[str, Any] | None:
    """mygpt with its own number of threads, the fastest peer, and the ratio of each round.

    None where one of them was not measured.
    """
    case, timed = measured["case"], [c for c in measured["contestants"] if c["tokens_per_s"]]
    ours = [c for c in timed if c["engine"] == case["ours"]]
    peers = [c for c in timed if not c["engine"].startswith("mygpt")]
    own = next((c for c in ours if c["threads"] is None), None)
    if own is None or not peers:
        return None
    best = max(peers, key=_median)
    ratios = [a / b for a, b in zip(own["tokens_per_s"], best["tokens_per_s"], strict=True)]
    loops = [c for c in peers if c["engine"].startswith("chapter")]
    chapter = _median(max(loops, key=_median)) if loops else None
    return {
        "own": _median(own),
        "peer": best["label"],
        "peer_rate": _median(best),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "over_chapter": _median(own) / chapter if chapter else None,
    }


def _median(contestant: dict[str, Any]) -> float:
    return statistics.median(contestant["tokens_per_s"])


def share_of_limit(case: Case, tokens_per_s: float, limits: dict[str, dict[str, float]]) -> float:
    """The rate as a fraction of the machine's limit for the case.

    Bandwidth: bytes of the weights, read once per step, over the bandwidth for that many bytes.
    GEMM: two operations per weight and token, over the GEMM rate; past the window with overflow
    "crop", the model reads a full window for every token.
    """
    config = CONFIGS[case.size]
    weights = matrix_parameters(config)
    if case.limit == "gemm":
        flops = 2 * weights * tokens_per_s
        head = config.vocab_size * config.embed_dim
        if case.prefill:  # the head is computed for the last position only
            flops = 2 * (weights - head) * tokens_per_s
        if case.prompt == config.max_seq_len:
            flops = 2 * ((weights - head) * config.max_seq_len + head) * tokens_per_s
        return flops / 1e9 / max(found["gemm"] for found in limits.values())
    size_mb = weights * case.weight_bytes / 1e6
    names = ("0.8 MB", "42 MB", "500 MB")
    name = names[0] if size_mb < 5 else names[1] if size_mb < 100 else names[2]
    gb_per_s = size_mb * tokens_per_s / case.batch / 1e3
    return gb_per_s / max(found[name] for found in limits.values())


def markdown(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        "# Generation, side by side",
        "",
        "Random weights, the same for all programs; tokens per second; medians over the rounds of "
        "one run in which all programs were measured in turns. mygpt chooses its number of "
        "threads; of a peer, the faster of one and two threads is shown. S has 207,296 parameters "
        "and a window of 64, M 10.7 million and 256, L 124 million and 1,024 (GPT-2 small), Q 88 "
        "million and 1,024 (Qwen3's block).",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores; Python {machine['python']}, "
        f"{versions}. {_disturbance(results['cases'])}",
        "",
        "| case | mygpt | best peer | its tokens/s | ratio (least to most) "
        "| over the chapter's loop | share of the limit |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    lines += [_row(measured, results["limits"]) for measured in results["cases"]]
    lines += ["", "![Ratios](generation.svg)", *_cold(results["cold"]), *_limits(results["limits"])]
    lines += ["", "## All programs", ""]
    lines += [
        "Equal tokens: how many of the first tokens are equal to those of the chapter's loop in "
        "float32 (with tanh GELU for llama.cpp, which has no exact GELU). Others: processor cores "
        "that other programs used during the timings, median.",
        "",
        *_notes(results["cases"]),
        "| case | contestant | tokens/s | least to most | equal tokens | others |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for measured in results["cases"]:
        title = measured["case"]["title"]
        lines += [f"| {title} | {_contestant_cells(one)} |" for one in measured["contestants"]]
    return "\n".join(lines) + "\n"


def _notes(cases: list[dict[str, Any]]) -> list[str]:
    """The notes on the programs that were measured, each a paragraph."""
    names = {one["engine"] for measured in cases for one in measured["contestants"]}
    found = [note for part, note in _NOTES.items() if any(part in name for name in names)]
    return [line for note in found for line in (note, "")]


def _disturbance(cases: list[dict[str, Any]]) -> str:
    loads = [load for m in cases for one in m["contestants"] for load in one["others_cores"]]
    busy = sum(load > TOLERATED_CORES for load in loads)
    return (
        f"Other programs used more than {TOLERATED_CORES} cores during {busy} of {len(loads)} "
        "timings; these are inaccurate, especially with two threads."
    )


def _row(measured: dict[str, Any], limits: dict[str, dict[str, float]]) -> str:
    case, head = Case(**measured["case"]), headline(measured)
    if head is None:
        return f"| {case.title} | - | - | - | - | - | - |"
    share = share_of_limit(case, head["own"], limits)
    over = f"{head['over_chapter']:,.1f}" if head["over_chapter"] else "-"
    limit = "reading" if case.limit == "bandwidth" else "GEMM"
    return (
        f"| {case.title} | {_number(head['own'])} | {head['peer']} | {_number(head['peer_rate'])} "
        f"| {head['ratio']:.2f} ({head['least']:.2f} to {head['most']:.2f}) | {over} "
        f"| {share:.0%} of {limit} |"
    )


def _number(rate: float) -> str:
    return f"{rate:,.1f}" if rate < 100 else f"{rate:,.0f}"


def _contestant_cells(one: dict[str, Any]) -> str:
    rates = one["tokens_per_s"]
    if not rates:
        return f"{one['label']} | failed | - | - | -"
    equal = "{} of {}".format(*one["equal_tokens"]) if one["equal_tokens"] else "-"
    return (
        f"{one['label']} | {_number(_median(one))} | {_number(min(rates))} to "
        f"{_number(max(rates))} | {equal} | {statistics.median(one['others_cores']):.2f}"
    )


def _cold(cold: list[dict[str, Any]]) -> list[str]:
    if not cold:
        return []
    lines = [
        "",
        "## From process start to end",
        "",
        "`python -m mygpt generate` with model S, machine code from the disk cache, compared with "
        "a minimal program with the chapter's loop.",
        "",
        "| characters | mygpt, s | MB | chapter, s | MB | times faster (least to most) |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for found in cold:
        mine, loop = found["runs"]["mygpt"], found["runs"]["chapter"]
        ratios = [b[0] / a[0] for a, b in zip(mine, loop, strict=True)]
        cells = []
        for runs in (mine, loop):
            cells.append(f"{statistics.median(run[0] for run in runs):.2f}")
            cells.append(f"{statistics.median(run[1] for run in runs):.0f}")
        lines.append(
            f"| {found['characters']:,} | {' | '.join(cells)} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return lines


def _limits(limits: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        "",
        "## The machine's limits",
        "",
        "Bandwidth in GB/s (the faster of torch.sum and torch.mv on memory written before), GEMM "
        "in GFLOP/s (torch.mm, float32, 1024 x 1024 x 1024); the fastest repetition.",
        "",
        "| threads | 500 MB | 42 MB | 0.8 MB | GEMM |",
        "|---:|---:|---:|---:|---:|",
    ]
    for threads, found in limits.items():
        cells = " | ".join(f"{found[name]:.1f}" for name in ("500 MB", "42 MB", "0.8 MB", "gemm"))
        lines.append(f"| {threads} | {cells} |")
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """A bar chart of the ratios, logarithmic, with minima and maxima."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mygpt"
    from matplotlib import pyplot

    heads = [(m["case"]["title"], headline(m)) for m in results["cases"]]
    shown = [(title, head) for title, head in heads if head is not None][::-1]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.4 * len(shown)))
    values = [head["ratio"] for _, head in shown]
    below = [head["ratio"] - head["least"] for _, head in shown]
    above = [head["most"] - head["ratio"] for _, head in shown]
    colors = ["#2a7f62" if value >= 1 else "#b5533c" for value in values]
    # Bars begin at 1, equal speed.
    widths = [value - 1 for value in values]
    titles = [f"{title}\nvs {head['peer']}" for title, head in shown]
    axes.barh(titles, widths, left=1, xerr=(below, above), color=colors, capsize=2)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("mygpt's tokens/s over the best peer's")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(results: dict[str, Any], folder: Path) -> None:
    """Write `generation.json`, `generation.md` and `generation.svg` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (folder / "generation.json").write_text(text, encoding="utf-8")
    (folder / "generation.md").write_text(markdown(results), encoding="utf-8")
    draw(results, folder / "generation.svg")
