"""The table of cases: what is decoded, by which programs, and which machine limit applies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Case:
    """One row of the comparison.

    Attributes:
        key: its name on the command line.
        title: its name in the table.
        size: the model, S, M, L, Q or R.
        tokens: new tokens per row and run.
        ours: the name of mygpt's engine.
        peers: the names of the other programs; each runs with one thread and with two. Another
            engine of mygpt may be among them, which is not compared as a peer.
        batch: rows.
        prompt: tokens of each row's prompt.
        prefill: whether the tokens of the prompt are counted instead of the new ones.
        overflow: what mygpt's engine does past the window.
        limit: what bounds the speed: memory bandwidth for the weights, or matrix products (GEMM).
        weight_bytes: bytes of one weight in mygpt's engine (of int4 in most matrices; embedding and
            head are int8).
    """

    key: str
    title: str
    size: str
    tokens: int
    ours: str
    peers: tuple[str, ...]
    batch: int = 1
    prompt: int = 1
    prefill: bool = False
    overflow: str = "crop"
    limit: Literal["bandwidth", "gemm"] = "bandwidth"
    weight_bytes: float = 4

    @property
    def checked_tokens(self) -> int:
        """Number of tokens of each row that are compared with the chapter's loop."""
        return min(self.tokens, 32 if self.batch == 1 else 8)


CASES = (
    Case(
        "s",
        "S, batch 1, inside the window",
        "S",
        63,
        "mygpt",
        ("CTranslate2", "llama.cpp", "transformers", "chapter"),
    ),
    Case("s-draw", "S, `generate` with torch's draw", "S", 63, "mygpt draw", ("chapter draw",)),
    Case(
        "s-crop",
        "S, past the window, crop",
        "S",
        256,
        "mygpt",
        ("nanoGPT", "chapter"),
        prompt=64,
        limit="gemm",
    ),
    Case(
        "s-refill",
        "S, past the window, refill",
        "S",
        256,
        "mygpt",
        ("nanoGPT", "chapter"),
        prompt=64,
        overflow="refill",
    ),
    Case(
        "m",
        "M, batch 1",
        "M",
        255,
        "mygpt",
        ("CTranslate2", "llama.cpp", "OpenVINO", "transformers", "chapter"),
    ),
    Case(
        "m-int8",
        "M, batch 1, int8",
        "M",
        255,
        "mygpt int8",
        ("CTranslate2 int8", "llama.cpp Q8_0", "OpenVINO INT8"),
        weight_bytes=1,
    ),
    Case(
        "m-int4",
        "M, batch 1, int4",
        "M",
        255,
        "mygpt int4",
        ("llama.cpp Q4_0", "OpenVINO INT4"),
        weight_bytes=4.5 / 8,
    ),
    Case(
        "m-batch",
        "M, batch 32",
        "M",
        128,
        "mygpt",
        ("CTranslate2", "llama.cpp", "transformers"),
        batch=32,
        limit="gemm",
    ),
    Case(
        "l",
        "L, batch 1",
        "L",
        64,
        "mygpt",
        ("CTranslate2", "llama.cpp", "OpenVINO", "transformers", "chapter"),
    ),
    Case(
        "l-int8",
        "L, batch 1, int8",
        "L",
        64,
        "mygpt int8",
        ("CTranslate2 int8", "llama.cpp Q8_0", "OpenVINO INT8"),
        weight_bytes=1,
    ),
    Case(
        "l-int4",
        "L, batch 1, int4",
        "L",
        64,
        "mygpt int4",
        ("llama.cpp Q4_0", "OpenVINO INT4"),
        weight_bytes=4.5 / 8,
    ),
    Case(
        "l-batch",
        "L, batch 32",
        "L",
        24,
        "mygpt",
        ("CTranslate2", "llama.cpp", "transformers"),
        batch=32,
        limit="gemm",
    ),
    Case(
        "l-prefill",
        "L, prompt of 512",
        "L",
        1,
        "mygpt",
        ("CTranslate2", "llama.cpp", "transformers prefill"),
        prompt=512,
        prefill=True,
        limit="gemm",
    ),
    Case(
        "q",
        "Q, batch 1",
        "Q",
        64,
        "mygpt",
        ("llama.cpp", "ik_llama.cpp", "OpenVINO", "onnxruntime-genai", "chapter"),
    ),
    Case(
        "q-int8",
        "Q, batch 1, int8",
        "Q",
        64,
        "mygpt int8",
        ("llama.cpp Q8_0", "ik_llama.cpp Q8_0", "OpenVINO INT8", "onnxruntime-genai int8"),
        weight_bytes=1,
    ),
    Case(
        "q-int4",
        "Q, batch 1, int4",
        "Q",
        64,
        "mygpt int4",
        (
            "llama.cpp Q4_0",
            "llama.cpp Q4_K_M",
            "ik_llama.cpp Q4_0",
            "ik_llama.cpp Q4_K_M",
            "OpenVINO INT4",
            "onnxruntime-genai int4",
        ),
        weight_bytes=4.5 / 8,
    ),
    Case(
        "r-drafts",
        "R, a text that repeats, drafts",
        "R",
        128,
        "mygpt drafts",
        ("mygpt", "llama.cpp lookup", "llama.cpp", "transformers lookup", "transformers"),
        prompt=120,
    ),
)

COLD_START = "cold"  # time from process start to end; see cold_start.py
