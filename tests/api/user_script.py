"""A program that calls every public function with every option; mypy --strict checks it.

It is not run. Each line with an ignore is an error that mypy must find: where it is strict, an
ignore that nothing needs is an error itself.
"""
# mypy: warn-return-any

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import mygpt
from mygpt.decode.completion import Completion


def trains(folder: Path, lines: Iterator[str]) -> mygpt.Writer:
    mygpt.train(
        [folder / "a.txt", "b.txt"], output=folder, overwrite=True, resume="auto", preset="nano",
        tokenizer="char", val_file=None, encoding="latin-1", field="text", split_documents=True,
        unknown="keep", device="cpu", init_from=None, began=0.0, listener=print, report=False,
        command="mine", embed_dim=8, num_heads=2, num_layers=1, max_seq_len=16, dropout=0.1,
        batch_size="auto", seq_len=8, lr=1e-3, steps=3, tokens=None, minutes=None,
        stages=[(0.5, 16, 4)], reserve_s=0.0, micro_batch=2, engine="torch", dtype="float32",
        compile=False, checkpoint_activations=False, shard=False, optimizer="muon",
        schedule="linear", warmup_ratio=0.1, min_lr_ratio=0.1, ngram_smoothing=0.1,
        weight_decay=0.1, decay_all=False, beta1=0.9, beta2=0.99, grad_clip=1.0,
        data_order="shuffled", val_fraction=0.1, val_tokens=0, seed=1, print_every=1,
        eval_every=1, eval_shares=[0.5], patience=2, sample_tokens=0, save_every=1,
        save_seconds=1.0,
    )  # fmt: skip
    mygpt.train(texts=lines, minutes=0.1)
    mygpt.train("a.txt", listener=[
        print, mygpt.CsvListener(folder / "losses.csv"), mygpt.TensorBoardListener(log_dir=folder),
        mygpt.WandbListener("poems", name="one", config={"note": 1}, run=None),
        lambda event: print(type(event)),
    ])  # fmt: skip
    mygpt.train("a.txt", listener=3)  # type: ignore[arg-type]
    mygpt.train(texts=["a", "b"], batch_size=4)
    mygpt.train("a.txt", minuts=5)  # type: ignore[call-arg]
    mygpt.train("a.txt", schedule="square")  # type: ignore[arg-type]
    mygpt.train("a.txt", steps="5")  # type: ignore[arg-type]
    mygpt.resume(folder, minutess=5)  # type: ignore[call-arg]
    mygpt.replay(folder, output="new", overwritten=True)  # type: ignore[call-arg]
    mygpt.replay(
        folder, output="new", files=["a.txt"], val_file="b.txt", overwrite=True, device="cpu",
        listener=lambda event: None, report=False, command="mine",
    )  # fmt: skip
    return mygpt.resume(folder, ["a.txt"], val_file="b.txt", device="cpu", steps=9, lr=1e-3)


def writes(folder: Path) -> list[str]:
    writer = mygpt.load(
        folder, device="cpu", dtype="int8", engine="cpu", compile=False, speculate=True,
        drafts_from="a.txt",
    )  # fmt: skip
    mygpt.load(folder, enginee="cpu")  # type: ignore[call-arg]
    one: str = writer.generate(
        "far", 9, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.1,
        seed=np.int64(3), overflow="stop", stop=["."], logprobs=2, unknown="drop",
    )  # fmt: skip
    several: list[str] = writer.generate(["far", "near"], max_new_tokens=3)
    pieces: Iterator[str] = writer.stream("far", 9, seed=1)
    samples: list[Completion] = writer.complete("far", 9, 3, seed=1)
    tables: list[list[Completion]] = writer.complete(["far", "near"], num_samples=2)
    writer.generate("far", temprature=0.5)  # type: ignore[call-overload]
    writer.generate("far", overflow="wrap")  # type: ignore[call-overload]
    writer.complete("far", topk=3)  # type: ignore[call-overload]
    writer.stream("far", sede=3)  # type: ignore[call-arg]
    writer.generate("far", stop=".")  # type: ignore[call-overload]
    losses: list[float] = [report.loss for report in writer.history.reports]
    saved: Path = writer.save(folder / "m.safetensors", overwrite=True)
    page: Path = writer.report(folder / "page.html", overwrite=True)
    found = [one, *several, *pieces, samples[0].text, tables[0][0].text, str(saved), str(page)]
    return [*found, str(losses)]


def generates(model: mygpt.GPT) -> torch.Tensor:
    ids: torch.Tensor = mygpt.generate(
        model, [0, 1], 3, 0.5, 2, top_p=0.9, min_p=0.1, repetition_penalty=1.1,
        seed=np.uint64(3), overflow="refill",
    )  # fmt: skip
    mygpt.generate(model, np.array([0, 1]), 3)
    mygpt.generate(model, ids, 3, sed=3)  # type: ignore[call-arg]
    mygpt.stream(model, ids, 3, topp=0.3)  # type: ignore[call-arg]
    return next(mygpt.stream(model, [[0, 1]], 3, seed=3))


def other_names(model: mygpt.GPT, path: Path) -> None:
    config = mygpt.GPTConfig(vocab_size=4, embed_dim=8, num_heads=2, num_layers=1)
    mygpt.GPTConfig(vocab_size=4, embed_dims=8)  # type: ignore[call-arg]
    mygpt.SamplingConfig(temperature=0.5, topk=3)  # type: ignore[call-arg]
    tokenizer = mygpt.CharTokenizer("abc", end_of_text=True)
    mygpt.save_checkpoint(path, model, tokenizer, {"note": "mine"})
    loaded, read = mygpt.load_checkpoint(path)
    mygpt.Writer(loaded, read, {}, device="cpu", dtype="auto", engine="auto", compile=False,
                 speculate=False, drafts_from=None)  # fmt: skip
    mygpt.Writer(loaded, read, enginee="cpu")  # type: ignore[call-arg]
    mygpt.set_seed(config.vocab_size)
