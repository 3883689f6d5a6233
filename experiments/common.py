"""What several experiments share: the small GPT, files of earlier ones, the corpus."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

import torch

from mygpt import GPT, VOCAB

CHECKPOINT = "trained_gpt.pt"
SHAKESPEARE_MODEL = "shakespeare_gpt.pt"
SHAKESPEARE_TOKENIZER = "shakespeare_tokenizer.json"


def stop(message: str) -> NoReturn:
    """End the script as a usage error: one line on stderr, exit code 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def require(name: str, maker: str) -> None:
    """Stop unless the current folder has the file that another experiment makes."""
    if not Path(name).is_file():
        stop(f"{name} is not in this folder: run experiments/{maker} first")


def tiny_gpt() -> GPT:
    """The 2,240-parameter model of chapters 14 and 15, freshly drawn."""
    return GPT(vocab_size=len(VOCAB), embed_dim=8, num_heads=2, num_layers=2, max_seq_len=64)


def load_trained() -> GPT:
    """The model that experiment 28 trained, ready to predict."""
    require(CHECKPOINT, "28_train_gpt.py")
    model = tiny_gpt()
    model.load_state_dict(torch.load(CHECKPOINT, weights_only=True))
    return model.eval()


def words(ids: torch.Tensor) -> list[str]:
    """The words of a 1-D tensor of ids."""
    return [VOCAB[i] for i in ids.tolist()]


def corpus_parser(description: str | None) -> argparse.ArgumentParser:
    """A command line whose one positional argument is the corpus."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("path", nargs="?", type=Path, default=Path("tinyshakespeare.txt"))
    return parser


def read_corpus(path: Path) -> str:
    """The text of the corpus; stops with the way to get it where there is none."""
    if not path.is_file():
        stop(f"{path} is missing: `mygpt data shakespeare` writes it into the current folder")
    return path.read_text(encoding="utf-8")
