"""What int8 weights cost: bits per character of a validation text, float32 beside int8.

Usage: python benchmarks/int8_quality.py CHECKPOINT TEXT
The last tenth of TEXT is predicted once, as training validates. The int8 engine multiplies by
whole numbers times one step a row; the same products with the rounded weights in float32 are
what is measured here, by the same pass as the float32 model.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch

from mygpt.checkpoint import read_checkpoint, resolve
from mygpt.engines.cpu.pack import quantize
from mygpt.evaluation import evaluate


def main(checkpoint_path: str, text_path: str) -> None:
    checkpoint = read_checkpoint(resolve(checkpoint_path))
    text = Path(text_path).read_text(encoding="utf-8")
    held = text[int(len(text) * 0.9) :]
    tokens = checkpoint.tokenizer.encode_array(held)
    model, config = checkpoint.build_model().eval(), checkpoint.config
    print(f"{config.num_parameters():,} parameters, {len(held):,} characters")
    bits = {}
    for name in ("float32", "int8"):
        if name == "int8":
            round_weights(model)
        lengths = checkpoint.tokenizer.byte_lengths()
        result = evaluate(model, tokens, config.max_seq_len, lengths)
        bits[name] = result.loss * result.tokens / math.log(2) / (len(held) - 1)
        print(f"{name:8} {bits[name]:.5f} bits per character, loss {result.loss:.5f}")
    print(f"int8 / float32: {bits['int8'] / bits['float32']:.5f}")


def round_weights(model: torch.nn.Module) -> None:
    """Replace each matrix that the engine packs by what its int8 form stands for."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.startswith("position"):
                whole, steps = quantize(parameter.numpy())
                parameter.copy_(torch.from_numpy(whole.astype(np.float32) * steps[:, None]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
