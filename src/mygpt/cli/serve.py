"""`mygpt serve`: a model behind OpenAI's completions API, and the playground."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from mygpt.cli.terminal import say
from mygpt.errors import InputError


def serve(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="A run's folder or a file; without it the newest run."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen at; 0.0.0.0 is all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MYGPT_API_KEY",
            help="Ask every request for it, as a bearer token.",
            show_default=False,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name that the server may be called by; may be given again.",
            show_default=False,
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; more are told to come back.")
    ] = 64,
    max_tokens: Annotated[int, typer.Option(help="The most new tokens of one text.")] = 4096,
    slots: Annotated[int, typer.Option(help="Texts that are written at the same time.")] = 32,
    max_choices: Annotated[
        int, typer.Option(help="The most texts of one request, all its prompts together.")
    ] = 128,
    max_stops: Annotated[int, typer.Option(help="The most stop strings of one request.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(help="The longest prompt.")] = 16384,
    max_connections: Annotated[
        int, typer.Option(help="Open connections; the system's limit of open files may say fewer.")
    ] = 640,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16 (torch), int8 (cpu engine), or auto.")
    ] = "auto",
    engine: Annotated[str, typer.Option(help="auto, numpy, cpu or torch.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for each request.")] = False,
) -> None:
    """Serve a model: OpenAI's /v1/completions, and a page that shows how tokens are picked.

    Programs that speak that API work with it: give them http://127.0.0.1:8000/v1 as the base URL.
    The page is at http://127.0.0.1:8000. Only this machine can reach it unless --host says more.

    Example: mygpt serve runs/poems --port 8001 --api-key "$KEY"
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise InputError(
            "serving needs Starlette and uvicorn, which are not installed: "
            "pip install 'mygpt[serve]'"
        ) from None
    if engine in ("auto", "cpu") and find_spec("numba"):
        _spare_cores()
    from mygpt.checkpoint import resolve
    from mygpt.server.settings import ServerSettings

    if api_key is None and os.environ.get("MYGPT_API_KEY") == "":
        raise InputError("MYGPT_API_KEY is set and empty: give it a key, or unset it for none")
    path = resolve(checkpoint)
    settings = ServerSettings(
        name=_name_of(path),
        checkpoint=str(path.parent if _in_run(path) else path),
        slots=slots,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
        max_choices=max_choices,
        max_stops=max_stops,
        max_prompt_tokens=max_prompt_tokens,
        max_connections=max_connections,
        api_key=api_key,
        hosts=tuple(allow_host or ()),
        log=None if quiet else _tell,
    )
    from mygpt.generation.writer import load
    from mygpt.server.log import unblocked_stderr
    from mygpt.server.serving import ServerDied
    from mygpt.server.serving import serve as run

    writer = load(path, device=device, dtype=dtype, engine=engine)
    if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
        _tell(f"note: whoever reaches {host} can use this model; --api-key asks for a key")
    with unblocked_stderr():
        try:
            run(writer, settings, host=host, port=port, tell=_tell)
        except ServerDied as error:
            _tell(f"mygpt: {error}")
            raise typer.Exit(error.exit_code) from None


def _spare_cores() -> None:
    """Have NumPy, which reads prompts beside the thread that decodes, take half of the cores.

    Its threads spin while they wait for each other. It reads this when it is first imported.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, (cores or 1) // 2)))


def _name_of(path: Path) -> str:
    """A run's model is called like its folder, another file like itself."""
    path = path.resolve()
    return (path.parent.name if _in_run(path) else path.stem) or "mygpt"


def _in_run(path: Path) -> bool:
    return path.name in ("best.safetensors", "last.safetensors")


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # whoever read the log may have gone
        say(line, file=sys.stderr, flush=True)
