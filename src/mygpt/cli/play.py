"""`mygpt play`: a guided tour of the tutorial's chapter 15 in the browser."""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from mygpt.cli.browser import has_browser, open_page
from mygpt.cli.serve import in_run, log, name_of, prepare_to_serve, run_server
from mygpt.server.settings import ServerSettings
from mygpt.signals import ExitAction

_HOST = "127.0.0.1"
_SHOWN_STEPS = (1, 10, 50, 100, 200)  # as chapter 14 prints them


def play(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="A run's folder or a checkpoint file. Default: the chapter's word model, which "
            "is trained now.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port; 0 chooses a free one.")
    ] = 0,
    open_browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser.")
    ] = True,
) -> None:
    """Show how a GPT generates: a guided tour of the tutorial's chapter 15, in the browser.

    Without RUN it trains the chapter's model of four words in a few seconds. The tour has eight
    steps: loop, greedy, sampling, temperature, top-k, top-p, window, drift. Only this machine can
    reach the page. Ctrl-C ends it.

    Example: mygpt play runs/poems --port 8001 --no-open
    """
    prepare_to_serve("numpy" if checkpoint is None else "auto")
    if checkpoint is None:
        with tempfile.TemporaryDirectory(prefix="mygpt-play-") as folder:
            path = Path(folder) / "chapter-15.safetensors"
            with ExitAction(lambda: path.unlink(missing_ok=True)):
                _train(path)
                _serve(path, "numpy", port, open_browser=open_browser)
        return
    from mygpt.checkpoint.model_file import resolve

    _serve(resolve(checkpoint), "auto", port, open_browser=open_browser)


def _train(path: Path) -> None:
    """Train the chapter's model, and write it with its words to a checkpoint file."""
    import torch

    from mygpt import __version__
    from mygpt.checkpoint.model_file import save_checkpoint
    from mygpt.core.tutorial import TRAINED_LENGTH, VOCAB, train_gpt
    from mygpt.tokenization import WordTokenizer

    torch.set_num_threads(1)  # the matrices are too small for more; the losses are the same
    log(f"training the chapter's model on {' '.join(VOCAB)}")

    def report(step: int, loss: float) -> None:
        if step in _SHOWN_STEPS:
            log(f"step {step:>3}  loss {loss:.4f}")

    model = train_gpt(report)
    provenance = {
        "mygpt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": "mygpt play",
        "trained_length": TRAINED_LENGTH,
    }
    save_checkpoint(path, model, WordTokenizer(VOCAB), provenance)


def _serve(path: Path, engine: str, port: int, *, open_browser: bool) -> None:
    """Serve a checkpoint with the tour until a signal."""
    from mygpt.decode.writer import load

    settings = ServerSettings(
        name=name_of(path),
        checkpoint=str(path.parent if in_run(path) else path),
        tour=True,
    )
    writer = load(path, engine=engine)
    run_server(writer, settings, _HOST, port, open_page if open_browser and has_browser() else None)
