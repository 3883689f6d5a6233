"""`mygpt doctor`: this machine's set-up and speed, and whether a run's files are intact."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mygpt.cli.terminal import new_console, say, to_json, visible

if TYPE_CHECKING:
    from mygpt.cli.environment import Environment
    from mygpt.training.checkup import Finding

_STYLES = {"ok": "green", "warning": "yellow", "damaged": "bold red"}
_NAME_WIDTH = 13  # as `mygpt info` has it
_WIDEST = 28  # "previous.state.safetensors"; temporary files have longer names


def doctor(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN|CKPT",
            help="A run's folder or a checkpoint. Its files are checked too.",
            show_default=False,
        ),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe/--no-probe", help="Measure the speed; takes up to five seconds."),
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Show this machine's set-up and speed, and how to fix what is wrong.

    With a run or a checkpoint, all its files are read and checked; none is changed. The exit
    code is 2 if one is damaged, else 0.

    Example: mygpt doctor runs/poems
    """
    from mygpt.cli.environment import advice, inspect_environment

    here = inspect_environment()
    findings = _check(path, here)  # before anything is printed, since the path may be wrong
    if json:
        measured = _measure(here) if probe else {}
        values = {
            "environment": asdict(here),
            "probe": measured,
            "advice": advice(here, measured),
            "files": [{**asdict(found), "file": str(found.file)} for found in findings],
        }
        say(to_json(values, indent=2))
        return _exit_code(findings)
    page = _Page()
    for name, value in _lines(here):
        page.say(name and f"{name}:", value)
    measured = _measure(here) if probe else {}
    if measured:
        page.say("measured:", _speeds(measured))
    _show_findings(page, findings)
    lines = advice(here, measured)
    say("\n" * bool(lines), end="")
    for line in lines:
        page.say("advice:", line, style="yellow")
    if not lines and all(found.verdict == "ok" for found in findings):
        say("\nno problems found")
    return _exit_code(findings)


def _show_findings(page: _Page, findings: list[Finding]) -> None:
    names = [found.file.name or str(found.file) for found in findings]
    width = min(_WIDEST, max(map(len, names), default=0) + 2)
    say("\n" * bool(findings), end="")
    for name, found in zip(names, findings, strict=True):
        page.say(name, found.text, verdict=found.verdict, width=width)
        if found.remedy:
            page.say("", found.remedy, verdict="", width=width)


def _exit_code(findings: list[Finding]) -> int:
    return 2 if any(found.verdict == "damaged" for found in findings) else 0


def _check(path: Path | None, here: Environment) -> list[Finding]:
    from mygpt.errors import InputError

    if path is None:
        return []
    if here.torch is None:
        raise InputError(
            f"{path} is not checked, because torch cannot be imported ({here.torch_error}): "
            "reinstall it"
        )
    from mygpt.training.checkup import check

    return check(path)


def _measure(here: Environment) -> dict[str, float]:
    """Speeds by name and unit, within five seconds."""
    from mygpt.machine import gemm_rate, memory_bandwidth

    if here.torch is None:
        return {}
    speeds = {
        "memory_gb_per_s": memory_bandwidth(budget_s=0.8),
        "float32_gflop_per_s": gemm_rate(budget_s=1.0),
    }
    if here.torch.devices and not here.torch.build.startswith("CPU"):
        speeds["cuda_bfloat16_gflop_per_s"] = gemm_rate("cuda", "bfloat16", budget_s=0.5)
    return speeds


def _speeds(measured: dict[str, float]) -> str:
    forms = {
        "memory_gb_per_s": "memory bandwidth {:.1f} GB/s",
        "float32_gflop_per_s": "float32 matrix products {:,.1f} GFLOP/s",
        "cuda_bfloat16_gflop_per_s": "bfloat16 matrix products on the GPU {:,.0f} GFLOP/s",
    }
    return ", ".join(forms[name].format(value) for name, value in measured.items())


def _lines(here: Environment) -> Iterator[tuple[str, str]]:
    """The facts, name and value."""
    from mygpt.cli.environment import gib

    yield "python", f"{here.python} on {here.system}"
    yield "cpu", f"{here.cpu} ({', '.join(here.vectors) or 'vector extensions unknown'})"
    granted = "" if here.quota is None else f"; the control group's quota is {here.quota:g}"
    load = "" if here.load is None else f"; load {here.load:.1f}"
    yield "cores", f"{here.cores:g} usable, {_threads(here.threads, 'hardware ')}{granted}{load}"
    if here.memory_bytes is not None and here.free_memory_bytes is not None:
        yield "memory", f"{gib(here.memory_bytes)}, {gib(here.free_memory_bytes)} free"
    yield "mygpt", here.mygpt
    if here.torch is None:
        yield "torch", f"cannot be imported: {here.torch_error}"
    else:
        torch = here.torch
        parts = [f"{torch.build} build", *torch.libraries, torch.capability]
        yield "torch", f"{torch.version} ({', '.join([*parts, _threads(torch.threads)])})"
        for name, memory_bytes in torch.devices:
            yield "device", name if memory_bytes is None else f"{name}, {gib(memory_bytes)}"
        if not torch.devices:
            yield "device", "only the CPU"
    numba = f"{here.numba}, decoding loop {'compiled' if here.compiled else 'not compiled'}"
    yield "numba", numba if here.numba else "not used on this machine"
    yield "cache", f"{here.cache} ({'writable' if here.cache_writable else 'not writable'})"
    yield "disk", f"{gib(here.disk_free_bytes)} free where runs/ is"
    for number, (name, value) in enumerate(here.variables.items()):
        yield "" if number else "variables", f"{name}={value}"


def _threads(count: int, kind: str = "") -> str:
    return f"{count} {kind}thread{'s' * (count != 1)}"


class _Page:
    """Prints aligned lines. On a terminal they are wrapped and the verdicts are coloured."""

    def __init__(self) -> None:
        self.console = new_console(highlight=False, soft_wrap=True, emoji=False)

    def say(
        self, name: str, text: str, *, verdict: str | None = None, width: int = _NAME_WIDTH,
        style: str = "",
    ) -> None:  # fmt: skip
        """Print one line: a name, an optional verdict, and a text."""
        import textwrap

        from rich.text import Text

        line = Text(f"{visible(name, sys.stdout):<{width - 2}}  ", style=style)
        if verdict is not None:
            line.append(f"{verdict:<9}", style=_STYLES.get(verdict, ""))
        shown = [visible(text, sys.stdout)]
        if self.console.is_terminal:
            wrapper = textwrap.TextWrapper(break_on_hyphens=False, break_long_words=False)
            wrapper.width = max(20, self.console.width - len(line))
            shown = wrapper.wrap(shown[0]) or [""]
        line.append(f"\n{' ' * len(line)}".join(shown))
        self.console.print(line)
