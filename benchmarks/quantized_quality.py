"""What weights of 8 and of 4 bits cost: bits per character of a text, with each number format.

The engine that generates predicts characters at random places of the last tenth of the text, each
after as many tokens as fit into the window; all formats predict the same ones.

Usage: python -m benchmarks.quantized_quality CHECKPOINT TEXT [PLACES]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mygpt.checkpoint.model_file import read_checkpoint, resolve
from mygpt.core.config import SamplingConfig
from mygpt.core.random import Stream
from mygpt.cpu.decode.engine import CpuEngine
from mygpt.engine import Request

_AT_ONCE = 32  # texts


def losses(engine: CpuEngine, texts: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """The loss in nats of each text's last token, after the tokens before it."""
    found = []
    for first in range(0, len(texts), _AT_ONCE):
        some = texts[first : first + _AT_ONCE]
        sampling = SamplingConfig(temperature=0.0)
        decoding = engine.start([Request(text[:-1], 1, sampling, Stream(0)) for text in some])
        decoding.advance(1)
        for row, text in enumerate(some):
            logits = decoding.logits(row).astype(np.float64)
            largest = logits.max()
            found.append(largest + np.log(np.exp(logits - largest).sum()) - logits[text[-1]])
    return np.array(found)


def main(checkpoint_path: str, text_path: str, places: int = 2000) -> None:
    """Print each format's bits per character, and its ratio to float32's."""
    checkpoint = read_checkpoint(resolve(checkpoint_path))
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    text = Path(text_path).read_text(encoding="utf-8")
    validation = text[int(len(text) * 0.9) :]
    tokens = tokenizer.encode_array(validation)
    window = config.max_seq_len
    ends = np.random.default_rng(0).integers(window + 1, len(tokens), places)
    texts = [tokens[end - window - 1 : end] for end in ends]
    scale = len(tokens) / len(validation) / math.log(2)
    print(f"{config.num_parameters():,} parameters, {places:,} of {len(tokens):,} tokens")
    plain = None
    for weights in ("float32", "int8", "int4"):
        engine = CpuEngine(config, checkpoint.arrays, weights=weights)
        nats = losses(engine, texts)
        plain = nats if plain is None else plain
        more = nats - plain
        spread = more.std() / math.sqrt(places) / plain.mean()
        print(
            f"{weights:8} {nats.mean() * scale:.5f} bits per character, "
            f"{nats.mean() / plain.mean():.5f} +- {spread:.5f} of float32's, "
            f"{engine.model.weight_bytes / 1e6:.1f} MB of matrices",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
