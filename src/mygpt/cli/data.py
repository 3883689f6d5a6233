"""`mygpt data`: download texts to train on and check their digests."""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path
from typing import Annotated

import typer

from mygpt.cli.help import Command, Group
from mygpt.cli.options import option
from mygpt.cli.terminal import say, waiting
from mygpt.errors import InputError

_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_BYTES = 1_115_394

data_app = typer.Typer(
    cls=Group, help="Download texts to train on.", no_args_is_help=True, rich_markup_mode=None
)


@data_app.callback()
def _root() -> None:
    """Download texts to train on.

    Example: mygpt data shakespeare
    """


@data_app.command(cls=Command)
def shakespeare(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write it.")] = Path(
        "tinyshakespeare.txt"
    ),
    url: Annotated[
        str,
        option(
            "Where to download it; its SHA-256 is checked. Default: char-rnn's repository.",
            metavar="URL",
        ),
    ] = _URL,
) -> None:
    """Download Tiny Shakespeare (1.1 MB, 40,000 lines of the plays) and check its SHA-256.

    Example: mygpt data shakespeare && mygpt train tinyshakespeare.txt
    """
    if output.exists():
        if output.is_file() and _digest(output.read_bytes()) == _SHA256:
            say(f"{output} exists already; its digest is correct")
            return
        raise InputError(f"{output} exists and is another file: choose another --output")
    data = _fetch(url)
    if _digest(data) != _SHA256:
        raise InputError(
            f"{url} gave {len(data):,} bytes that are not Tiny Shakespeare (SHA-256 "
            f"{_digest(data)[:12]}..., expected {_SHA256[:12]}...): nothing was written"
        )
    from mygpt.checkpoint.durable import write_durably

    write_durably(output, [data])
    say(f"{output}: {len(data):,} bytes, digest checked")
    say(f"next: mygpt train {shlex.quote(str(output))}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _fetch(url: str) -> bytes:
    """The bytes at `url`, at most one more than expected."""
    import http.client
    import urllib.error
    import urllib.request

    if not url.startswith(("https://", "http://", "file://")):
        raise InputError(f"url={url!r} must begin with https://, http:// or file://")
    try:
        with (
            waiting(f"fetching {_BYTES:,} bytes"),
            urllib.request.urlopen(url, timeout=30) as answer,
        ):
            data: bytes = answer.read(_BYTES + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason: object = getattr(error, "reason", None) or error
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            reason = error  # with its number
        raise InputError(
            f"cannot fetch {url}: {reason}; try again, or give another address with --url"
        ) from None
    return data
