"""Writing: `generate` and `stream` on token ids, and `Writer`, which speaks text."""

from mygpt.generation.completion import Completion, TokenLogprob
from mygpt.generation.tokens import generate, stream
from mygpt.generation.writer import Writer, load

__all__ = ["Completion", "TokenLogprob", "Writer", "generate", "load", "stream"]
