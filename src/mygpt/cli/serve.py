"""`mygpt serve`: serve a model by OpenAI's completions API, with a playground page."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mygpt.cli import options
from mygpt.cli.terminal import say
from mygpt.errors import InputError, install_extra
from mygpt.server.settings import ServerSettings

if TYPE_CHECKING:
    from mygpt.decode.writer import Writer


def _limit(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel="Limits")


def serve(
    checkpoint: options.Checkpoint = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is every network interface.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port; 0 chooses a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="MYGPT_API_KEY",
            help="Require this key as a bearer token in every request.",
            show_default=False,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        options.option("A further host name that requests may use. May be repeated."),
    ] = None,
    max_waiting: Annotated[
        int, _limit("Requests that may wait in the queue; further ones get status 429.")
    ] = ServerSettings.max_waiting,
    max_tokens: Annotated[
        int, _limit("The largest number of new tokens for each completion.")
    ] = ServerSettings.max_tokens,
    slots: Annotated[
        int, _limit("Completions that are generated at the same time.")
    ] = ServerSettings.slots,
    max_choices: Annotated[
        int, _limit("The largest number of completions for each request.")
    ] = ServerSettings.max_choices,
    max_stops: Annotated[
        int, _limit("The largest number of stop strings for each request.")
    ] = ServerSettings.max_stops,
    max_prompt_tokens: Annotated[
        int, _limit("The largest prompt length in tokens.")
    ] = ServerSettings.max_prompt_tokens,
    max_connections: Annotated[
        int, _limit("Open connections; the system's limit of open files may lower it.")
    ] = ServerSettings.max_connections,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    engine: options.Engine = "auto",
    speculate: options.Speculate = True,
    quiet: Annotated[
        bool, options.option("Do not log a line for each request.", "--quiet")
    ] = False,
) -> None:
    """Serve a model: OpenAI's /v1/completions, and a page that shows how tokens are sampled.

    Programs for that API can use it with http://127.0.0.1:8000/v1 as the base URL. The page is at
    http://127.0.0.1:8000, and one for writing with the model at http://127.0.0.1:8000/write. By
    default only this machine can reach the server (see --host).

    Example: mygpt serve runs/poems --port 8001 --api-key "$KEY"
    """
    prepare_to_serve(engine)
    from mygpt.checkpoint.model_file import resolve

    if api_key is None and os.environ.get("MYGPT_API_KEY") == "":
        raise InputError("MYGPT_API_KEY is empty: set it to a key, or unset it to require none")
    path = resolve(checkpoint)
    settings = ServerSettings(
        name=name_of(path),
        checkpoint=str(path.parent if in_run(path) else path),
        slots=slots,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
        max_choices=max_choices,
        max_stops=max_stops,
        max_prompt_tokens=max_prompt_tokens,
        max_connections=max_connections,
        api_key=api_key,
        hosts=tuple(allow_host or ()),
        log=None if quiet else log,
    )
    from mygpt.decode.writer import load

    writer = load(path, device=device, dtype=dtype, engine=engine, speculate=speculate)
    if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
        log(f"note: everyone who can reach {host} can use this model; --api-key requires a key")
    run_server(writer, settings, host, port)


def prepare_to_serve(engine: str) -> None:
    """Check that the extra is installed, and limit NumPy's threads; before NumPy is imported.

    Raises:
        InputError: naming what is missing.
    """
    try:
        import msgspec  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"serving needs {error.name}, which is not installed: {install_extra('serve')}"
        ) from None
    if engine in ("auto", "cpu") and find_spec("numba"):
        _spare_cores()


def run_server(
    writer: Writer,
    settings: ServerSettings,
    host: str,
    port: int,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Serve until a signal; `on_start` is called with the URL once the server listens."""
    from mygpt.server.log import nonblocking_stderr
    from mygpt.server.serving import ServerDied
    from mygpt.server.serving import serve as run

    with nonblocking_stderr():
        try:
            run(writer, settings, host=host, port=port, notify=log, on_start=on_start)
        except ServerDied as error:
            log(f"mygpt: {error}")
            raise typer.Exit(error.exit_code) from None


def _spare_cores() -> None:
    """Limit NumPy, which reads prompts while another thread decodes, to half of the cores.

    OpenBLAS's threads use CPU time even while they wait for each other. OpenBLAS reads this
    variable when NumPy is first imported.
    """
    from mygpt.machine import available_cores

    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, available_cores() // 2)))


def name_of(path: Path) -> str:
    """The model's name: the folder's name for a run's checkpoint, else the file's name."""
    path = path.resolve()
    return (path.parent.name if in_run(path) else path.stem) or "mygpt"


def in_run(path: Path) -> bool:
    """Whether a checkpoint's file is named as those of a run."""
    return path.name in ("best.safetensors", "last.safetensors")


def log(line: str) -> None:
    """Print a line on standard error."""
    with contextlib.suppress(OSError):  # the reader of the log may be gone
        say(line, file=sys.stderr, flush=True)
