"""`Writer` on machine code: samples in batches, streams in blocks, and what is not imported."""

from __future__ import annotations

import pytest

from decoding import assert_runs, engine_of, model_of, request, written
from mygpt import CharTokenizer, Writer, save_checkpoint
from mygpt.cpu.decode.engine import CpuEngine
from mygpt.decode import text_call

pytestmark = pytest.mark.kernels


CHARS = CharTokenizer("abcde")


def test_samples_do_not_depend_on_the_size_of_their_batches(monkeypatch):
    """Sample i is row i of the engine alone; at most 64 rows are ever decoded together."""
    w = Writer(model_of("tutorial"), CHARS, engine="cpu")
    sizes, start = [], CpuEngine.start

    def watched(self, requests):
        sizes.append(len(requests))
        return start(self, requests)

    monkeypatch.setattr(CpuEngine, "start", watched)
    samples = w.complete("ab", 15, 130, seed=5)
    assert sizes == [64, 64, 2]
    assert [sample.index for sample in samples] == list(range(130))
    monkeypatch.setattr(text_call, "_MAX_GROUP", 7)
    assert w.complete("ab", 15, 130, seed=5) == samples
    assert max(sizes[3:]) == 7
    for i in (0, 63, 64, 129):
        alone = written(engine_of("tutorial"), request([0, 1], 15, seed=5, index=i))
        assert [samples[i].token_ids] == alone


def test_a_billion_samples_are_generated_one_by_one():
    w = Writer(model_of("tutorial"), CHARS, engine="cpu")
    endless = w.samples("ab", 5, 10**9, seed=5)
    assert [next(endless), next(endless)] == w.complete("ab", 5, 2, seed=5)


def test_streaming_in_blocks_is_the_whole_text():
    """The cpu engine is asked for as many tokens as fit in a moment."""
    w = Writer(model_of("tutorial"), CHARS, engine="cpu")
    pieces = list(w.stream("ab", 400, seed=3, overflow="refill"))
    assert len(pieces) == 400
    text = w.complete("ab", 400, seed=3, overflow="refill", logprobs=1)[0].text
    assert "".join(pieces) == text


def test_writing_from_a_checkpoint_imports_neither_torch_nor_numba(tmp_path):
    """Where the machine code is at hand; torch and Numba take seconds to import."""
    model = model_of("modern")
    save_checkpoint(tmp_path / "model.safetensors", model, CHARS)
    program = """
import sys
from mygpt.decode.writer import load
w = load(sys.argv[1])
print(w.backend.choose(40).name, w.generate("ab", 40, seed=3, temperature=0.9, top_p=0.95))
assert not {"torch", "numba", "scipy"} & set(sys.modules)
"""
    found = assert_runs(program, str(tmp_path / "model.safetensors"))
    expected = Writer(model, CHARS).generate("ab", 40, seed=3, temperature=0.9, top_p=0.95)
    assert found == f"cpu {expected}\n"
