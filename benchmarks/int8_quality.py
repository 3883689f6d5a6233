"""Quality of int8 weights: bits per character of a validation text, float32 and int8.

Usage: python benchmarks/int8_quality.py CHECKPOINT TEXT
The last tenth of TEXT is predicted once, as in validation. Weights of the int8 engine are integers
times one scale per row; here the model is evaluated with these rounded weights in float32.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch

from mygpt.checkpoint.model_file import read_checkpoint, resolve
from mygpt.cpu.decode.pack import quantize
from mygpt.evaluation.losses import evaluate
from mygpt.text.documents import TextSize


def main(checkpoint_path: str, text_path: str) -> None:
    checkpoint = read_checkpoint(resolve(checkpoint_path))
    text = Path(text_path).read_text(encoding="utf-8")
    validation = text[int(len(text) * 0.9) :]
    tokens = checkpoint.tokenizer.encode_array(validation)
    model, config = checkpoint.build_model().eval(), checkpoint.config
    print(f"{config.num_parameters():,} parameters, {len(validation):,} characters")
    bits = {}
    for name in ("float32", "int8"):
        if name == "int8":
            round_weights(model)
        result = evaluate(model, tokens, config.max_seq_len, TextSize(1, 1))
        bits[name] = result.loss * result.tokens / math.log(2) / (len(validation) - 1)
        print(f"{name:8} {bits[name]:.5f} bits per character, loss {result.loss:.5f}")
    print(f"int8 / float32: {bits['int8'] / bits['float32']:.5f}")


def round_weights(model: torch.nn.Module) -> None:
    """Replace each matrix that the engine quantizes by its dequantized int8 form."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not name.startswith("position"):
                integers, scales = quantize(parameter.numpy())
                parameter.copy_(torch.from_numpy(integers.astype(np.float32) * scales[:, None]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
