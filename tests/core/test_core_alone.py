"""`core/` and `errors.py`, copied into an empty folder, train and sample the tutorial's model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mygpt

pytestmark = pytest.mark.slow

PACKAGE = Path(mygpt.__file__).parent

CYCLE = """
import torch
from mygpt.core.data import random_batches
from mygpt.core.model import GPT
from mygpt.core.training import AdamW, TorchGradients, train_steps
from mygpt.core.tutorial import set_seed

data = torch.tensor([0, 1, 2, 3] * 64)
set_seed(0)
model = GPT(vocab_size=4, embed_dim=8, num_heads=2, num_layers=2, max_seq_len=64)
set_seed(42)
batches = (batch for batch, _ in zip(random_batches(data, 4, 8), range(200)))
for step in train_steps(batches, TorchGradients(model), AdamW(model), lambda step: 1e-2):
    if step.number in (1, 10, 50, 100, 200):
        print(f"step {step.number:>3}  loss {step.loss.item():.4f}")
"""

SAMPLE = """
import sys
from mygpt.core.config import SamplingConfig
from mygpt.core.generation import (
    GenerationCall, UncachedDecoder, autoregressive_loop, generate,
)
from mygpt.core.tokenizer import CharTokenizer
from mygpt.core.tutorial import VOCAB, to_ids

def show(ids):
    print(" ".join(VOCAB[i] for i in ids[0].tolist()))

prompt = to_ids(["I"]).unsqueeze(0)
show(autoregressive_loop(model, prompt, 7, lambda logits: logits.argmax(-1, keepdim=True)))
show(generate(model, prompt, 7, top_k=1))
show(generate(model, prompt, 12, top_k=1))
set_seed(0)
sampled = generate(model, prompt, 100, temperature=5.0)
set_seed(0)
call = GenerationCall(model, prompt, 100, SamplingConfig(5.0), None, "crop")
uncached = call.result(UncachedDecoder(model))
assert (sampled == uncached).all() and sampled.shape == (1, 101)
seeded = generate(model, prompt.expand(3, 1), 20, 2.0, 3, top_p=0.9, seed=1, overflow="refill")
assert (seeded[:1] == generate(model, prompt, 20, 2.0, 3, top_p=0.9, seed=1)).all()

tokenizer = CharTokenizer.from_text("hello world")
print(tokenizer.vocab_size, tokenizer.decode(tokenizer.encode("low")))
ours = {name for name in sys.modules if name.startswith("mygpt.")}
assert {name.split(".")[1] for name in ours} == {"core", "errors"}, ours
assert "numba" not in sys.modules
"""

SHUFFLED = """
import math
from itertools import islice
import numpy as np
import torch
from mygpt.core.data import ShuffledWindows, shuffled_batches, split_point
from mygpt.core.model import GPT
from mygpt.core.training import AdamW, TorchGradients, train_steps
from mygpt.core.tutorial import set_seed

tokens = np.array([0, 1, 2, 3] * 100)
cut = split_point(len(tokens), 0.1)
windows = ShuffledWindows(tokens[:cut], seq_len=8, seed=0)

def rate(step):
    return 1e-2 * min((step + 1) / 7, 1.0, (60 - step) / 54)  # up to step 6, then down

def train(steps, model, optimizer, first=0):
    batches = islice(shuffled_batches(windows, 4, first), steps)
    return list(train_steps(batches, TorchGradients(model), optimizer, rate, max_norm=1.0))

set_seed(0)
other = GPT(vocab_size=4, embed_dim=8, num_heads=2, num_layers=2, max_seq_len=64)
taken = train(60, other, AdamW(other))
with torch.no_grad():
    ids = torch.from_numpy(tokens[cut:][None, :33])
    _, loss = other(ids[:, :-1], ids[:, 1:])
assert loss < 1.0 < taken[0].loss, (loss, taken[0].loss)
assert all(math.isfinite(step.norm) for step in taken)
assert [step.number for step in taken] == list(range(1, 61))
assert max(step.lr for step in taken) == rate(6) == 1e-2
"""


def test_the_tutorials_output_is_printed_to_the_digit(tmp_path: Path) -> None:
    """Experiments 28, 30, 32 and 33; sampling, seeds and the tokenizer run too.

    So do shuffled batches, a schedule and clipping. In a folder that holds mygpt/core/ and
    mygpt/errors.py, and nothing else.
    """
    shutil.copytree(PACKAGE / "core", tmp_path / "mygpt" / "core")
    shutil.copy(PACKAGE / "errors.py", tmp_path / "mygpt")
    (tmp_path / "mygpt" / "__init__.py").touch()  # else Python prefers the installed mygpt
    file = tmp_path / "script.py"
    file.write_text(CYCLE + SHUFFLED + SAMPLE)
    command = [sys.executable, "-W", "error", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "step   1  loss 5.2739",
        "step  10  loss 1.6107",
        "step  50  loss 0.3453",
        "step 100  loss 0.0162",
        "step 200  loss 0.0035",
        "I love AI ! I love AI !",
        "I love AI ! I love AI !",
        "I love AI ! I love AI ! I AI ! ! love",
        "8 low",
    ]
