"""CTranslate2, llama.cpp, ik_llama.cpp and ONNX Runtime, each called as in its own programs.

Letters: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.generation.models import CONFIGS, files
from benchmarks.generation.torch_peers import Run
from numpy.typing import NDArray


def ctranslate2(
    size: str, prompt: NDArray[np.int64], *, work: Path, threads: int, compute: str = "float32"
) -> Run:
    """Greedy search of CTranslate2's Generator; min_length prevents an early end."""
    from ctranslate2 import Generator

    path = files(size, "ct2", work)
    generator = Generator(
        str(path), device="cpu", compute_type=compute, intra_threads=threads, inter_threads=1
    )
    tokens = [[f"t{i}" for i in row] for row in prompt.tolist()]

    def run(n: int) -> list[list[int]]:
        found = generator.generate_batch(
            tokens,
            beam_size=1,
            sampling_topk=1,
            min_length=n,
            max_length=n,
            include_prompt_in_result=False,  # so that it reads the prompt in one pass
        )
        return [result.sequences_ids[0] for result in found]

    return run


class LlamaCpp:
    """One context of llama.cpp for a GGUF file, with one sequence per row."""

    def __init__(self, path: Path, size: str, prompt: NDArray[np.int64], threads: int) -> None:
        self.lib = llama_cpp = self.library()
        self.prompt = prompt
        self.vocab_size = CONFIGS[size].vocab_size
        rows, length = prompt.shape
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = rows * CONFIGS[size].max_seq_len
        params.n_seq_max = rows
        params.n_batch = params.n_ubatch = max(512, rows * length)
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, params)
        assert self.context, "llama.cpp could not make a context"
        self.batch = llama_cpp.llama_batch_init(rows * length, 0, 1)
        view = np.ctypeslib.as_array
        self.tokens = view(self.batch.token, (rows * length,))
        self.positions = view(self.batch.pos, (rows * length,))
        self.wanted = view(self.batch.logits, (rows * length,))

    def run(self, n: int) -> list[list[int]]:
        """Read the prompts, then decode `n` tokens per row."""
        rows, length = self.prompt.shape
        lib, context, batch = self.lib, self.context, self.batch
        self.clear()
        self.tokens[:] = self.prompt.reshape(-1)
        self.positions[:] = np.tile(np.arange(length), rows)
        self.wanted[:] = np.arange(rows * length) % length == length - 1
        for i in range(rows * length):
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = i // length
        batch.n_tokens = rows * length
        drawn = []
        for step in range(n):
            if step == 1:
                batch.n_tokens = rows
                self.wanted[:rows] = 1
                for i in range(rows):
                    batch.seq_id[i][0] = i
            if step:
                self.tokens[:rows] = drawn[-1]
                self.positions[:rows] = length + step - 1
            assert lib.llama_decode(context, batch) == 0
            drawn.append(self.best())
        return np.array(drawn).T.tolist()

    def library(self) -> Any:
        """The bindings; nothing is logged."""
        import llama_cpp

        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        self.sampler = llama_cpp.llama_sampler_init_greedy()
        return llama_cpp

    def clear(self) -> None:
        """Forget the tokens of the last run."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def best(self) -> NDArray[np.int64] | int:
        """The best token of every row: by llama.cpp's sampler for one small row, else by argmax."""
        rows = len(self.prompt)
        if rows == 1 and self.vocab_size < 1000:
            return [self.lib.llama_sampler_sample(self.sampler, self.context, -1)]
        pointer = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (rows, self.vocab_size)).argmax(-1)


class IkLlamaCpp(LlamaCpp):
    """The same in ik_llama.cpp, for one row; its bindings have fewer functions."""

    def library(self) -> Any:
        from ik_llama_cpp import _ctypes_api

        return _ctypes_api

    def clear(self) -> None:
        self.lib.llama_kv_cache_clear(self.context)

    def best(self) -> NDArray[np.int64]:
        pointer = self.lib.llama_get_logits_ith(self.context, self.batch.n_tokens - 1)
        return np.ctypeslib.as_array(pointer, (1, self.vocab_size)).argmax(-1)


def llama_cpp(
    size: str, prompt: NDArray[np.int64], *, work: Path, threads: int, kind: str = "F32"
) -> Run:
    """llama.cpp, greedy, with a file whose matrices are of this kind."""
    return LlamaCpp(files(size, kind, work), size, prompt, threads).run


def llama_cpp_lookup(
    size: str, prompt: NDArray[np.int64], *, work: Path, threads: int, drafts: int
) -> Run:
    """The Python class of llama-cpp-python, greedy, with so many drafts copied from the text."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    model = Llama(
        str(files(size, "F32", work)),
        n_threads=threads,
        n_threads_batch=threads,
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=drafts),
        verbose=False,
    )
    (ids,) = prompt.tolist()

    def run(n: int) -> list[list[int]]:
        model.reset()  # it would keep the prompt of the last run
        return [list(islice(model.generate(ids, temp=0.0), n))]

    return run


def ik_llama_cpp(
    size: str, prompt: NDArray[np.int64], *, work: Path, threads: int, kind: str = "F32"
) -> Run:
    """ik_llama.cpp, likewise."""
    return IkLlamaCpp(files(size, kind, work), size, prompt, threads).run


def onnxruntime_genai(
    size: str, prompt: NDArray[np.int64], *, work: Path, threads: int, kind: str = "fp32"
) -> Run:
    """ONNX Runtime GenAI, greedy, for one row, with a model that its own builder wrote."""
    import onnxruntime_genai

    path = work / f"{size}-onnx-{kind}"
    if not path.exists():
        build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", kind]
        build += ["-i", str(files(size, "hf", work)), "-o", str(path), "-c", str(work / "cache")]
        subprocess.run(build, check=True)
    config = onnxruntime_genai.Config(str(path))
    session = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = onnxruntime_genai.Model(config)
    ids = prompt.astype(np.int32)

    def run(n: int) -> list[list[int]]:
        params, length = onnxruntime_genai.GeneratorParams(model), ids.shape[1] + n
        # min_length prevents an early end.
        params.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(ids)
        found = []
        for _ in range(n):
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        return [found]

    return run
