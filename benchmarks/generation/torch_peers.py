"""Generation in plain PyTorch: the chapter's loop, nanoGPT's variant, transformers' generate.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.generation.models import as_transformers, build
from numpy.typing import NDArray

Run = Callable[[int], list[list[int]]]


def chapter_generate(
    model: Any,
    prompt_ids: torch.Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> torch.Tensor:
    """`generate` of section 15.7 of the chapter, unchanged."""
    model.eval()
    ids = prompt_ids
    for _ in range(max_new_tokens):
        ids_cond = ids[:, -model.max_seq_len :] if ids.shape[1] > model.max_seq_len else ids
        with torch.no_grad():
            logits, _ = model(ids_cond)
        logits = logits[:, -1, :] / temperature
        if top_k is not None:
            v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
            logits[logits < v[:, [-1]]] = -float("inf")
        probs = F.softmax(logits, dim=-1)
        next_ids = torch.multinomial(probs, num_samples=1)
        ids = torch.cat([ids, next_ids], dim=1)
    return ids


class LastOnly:
    """A GPT that computes only the last position's logits, as nanoGPT does in generation."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.max_seq_len = model.max_seq_len

    def eval(self) -> None:
        self.model.eval()

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.model(ids, last_only=True)


def chapter(size: str, prompt: NDArray[np.int64], *, gelu_tanh: bool = False) -> Run:
    """The chapter's loop, greedy by top_k=1."""
    model, ids = build(size, gelu_tanh=gelu_tanh), torch.tensor(prompt)
    return lambda n: chapter_generate(model, ids, n, top_k=1)[:, ids.shape[1] :].tolist()


def chapter_draw(size: str, prompt: NDArray[np.int64]) -> Run:
    """The chapter's loop, sampling with torch's global generator, temperature 1, no top-k."""
    model, ids = build(size), torch.tensor(prompt)

    def run(n: int) -> list[list[int]]:
        torch.default_generator.manual_seed(0)
        return chapter_generate(model, ids, n)[:, ids.shape[1] :].tolist()

    return run


def nanogpt(size: str, prompt: NDArray[np.int64]) -> Run:
    """The same loop with only the last position's logits."""
    model, ids = LastOnly(build(size)), torch.tensor(prompt)
    return lambda n: chapter_generate(model, ids, n, top_k=1)[:, ids.shape[1] :].tolist()


def transformers(size: str, prompt: NDArray[np.int64], **options: Any) -> Run:
    """transformers' `generate`: greedy, with its KV cache and more of its options."""
    model, ids = as_transformers(build(size)), torch.tensor(prompt)
    mask = torch.ones_like(ids)

    def run(n: int) -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                **options,
            )
        return out[:, ids.shape[1] :].tolist()

    return run


def transformers_prefill(size: str, prompt: NDArray[np.int64]) -> Run:
    """One forward pass of transformers over the prompt, with only the last position's logits."""
    model, ids = as_transformers(build(size)), torch.tensor(prompt)

    def run(_: int) -> list[list[int]]:
        with torch.inference_mode():
            logits = model(ids, use_cache=True, logits_to_keep=1).logits  # (B, 1, V)
        return logits.argmax(-1).tolist()

    return run
