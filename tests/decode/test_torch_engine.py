"""The torch engine: steps of fixed shapes, compiling and its failures, batches, number formats."""

from __future__ import annotations

import logging
import shutil
from functools import cache, partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode

from decoding import CPU, request
from mygpt import ByteTokenizer, CharTokenizer, GPTConfig, SamplingConfig, Writer, save_checkpoint
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.cli import main
from mygpt.core.generation import UncachedDecoder
from mygpt.core.kv_cache import KVCache
from mygpt.core.random import Stream
from mygpt.core.sampling import _only_where_probable, draw, next_ids
from mygpt.decode import torch_engine
from mygpt.decode.numpy_engine import NumpyEngine
from mygpt.decode.packing import arrays_of
from mygpt.decode.torch_engine import (
    CompiledDecoder,
    TorchCompiledStep,
    TorchEngine,
    read_token,
)
from mygpt.decode.writer import load
from mygpt.engine import Request
from mygpt.errors import InputError
from mygpt.machine import DTYPES, choose_dtype
from shapes import CONFIGS, LLAMA, MODERN, TUTORIAL, build

model_of = cache(lambda name: build(CONFIGS[name], spread=0.5))
calm_model_of = cache(lambda name: build(CONFIGS[name], spread=0.1))  # rounds by less than 1e-6
OVERFLOWS = ("crop", "refill", "stop")
COMPILE = torch.compile


def some_ids(vocab_size: int, batch: int, time: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, time), generator=generator)


def empty_cache(model, batch: int) -> KVCache:
    weight = model.token_embedding.weight
    return KVCache.empty(model.config, batch, device=weight.device, dtype=weight.dtype)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to rounding: 1e-6 of the largest logit, and of 1 where all are smaller."""
    size = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * size)


def lines(caplog) -> list[str]:
    """The log records of mygpt; torch logs too while it compiles."""
    return [record.getMessage() for record in caplog.records if record.name == "mygpt"]


@pytest.fixture
def uncompiled(monkeypatch) -> list[dict]:
    """Replaces torch.compile by the identity; the arguments of its calls."""
    calls = []

    def compile_(function, **options):
        calls.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    return calls


# --- the step of fixed shapes --------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_of_fixed_shapes_is_the_growing_one(name, batch):
    """At every position of the window, whatever the later positions hold."""
    model = calm_model_of(name)
    ids = some_ids(model.config.vocab_size, batch, model.max_seq_len)
    growing, fixed = empty_cache(model, batch), empty_cache(model, batch)
    for tensor in fixed.keys + fixed.values:
        tensor.fill_(9.0)
    with torch.no_grad():
        for t in range(model.max_seq_len):
            expected = model(ids[:, t : t + 1], cache=growing, last_only=True)[0][:, -1]
            found = read_token(
                model, ids[:, t : t + 1], fixed.keys, fixed.values, torch.tensor([t])
            )
            assert found.shape == (batch, model.config.vocab_size)
            assert_same(found, expected)
    for kind in ("keys", "values"):
        for mine, other in zip(getattr(fixed, kind), getattr(growing, kind), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.slow
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_reader_with_a_compiled_step_reads_as_the_plain_loop(uncompiled, name, overflow):
    """Inside the window and past it, from any prompt; all single tokens go through the step."""
    model = calm_model_of(name)
    window = model.max_seq_len
    end = window if overflow == "stop" else window + 8
    text = some_ids(model.config.vocab_size, 2, end, seed=1)
    for first in range(1, min(end, window + 3) + 1, 2):
        step = TorchCompiledStep(model)
        step.read, read = counted(step.read)
        cached = CompiledDecoder(model, 2, overflow, step, window)
        plain = UncachedDecoder(model, overflow)
        with torch.no_grad():
            for length in range(first, end + 1):
                found = cached.next_logits(text[:, :length])
                assert_same(found, plain.next_logits(text[:, :length]))
        inside = min(end, window) - first + (first == 1)
        assert next(read) >= max(0, inside)
    assert [options["fullgraph"] for options in uncompiled] == [True] * len(uncompiled)
    assert len(uncompiled) >= 1


def counted(function):
    """The function, and a counter whose next value is how often it was called."""
    calls = count()

    def counting(*args):
        next(calls)
        return function(*args)

    return counting, calls


def test_without_compiling_the_filled_part_alone_is_read(monkeypatch):
    """On the CPU that is less work than the whole window under a mask."""
    monkeypatch.setattr(torch_engine, "FixedShapes", None)
    monkeypatch.setattr(torch, "compile", None)
    assert tokens_of(TorchEngine(model_of("modern")), [ask()])


# --- batches -------------------------------------------------------------------------------

ALL = SamplingConfig(1.1, 4, 0.95, 0.05, 1.2)


def ask(prompt=(1, 2, 0), new=20, sampling=None, index=0, **options) -> Request:
    return request(prompt, new, sampling, 7, index, **options)


RAGGED = [
    ask(),
    ask(index=1),
    ask((2,), sampling=ALL, overflow="refill", end=1),
    ask((0,), sampling=ALL, overflow="refill", end=2),
    ask(tuple([0, 1, 2] * 7), new=9),
    ask((1, 1, 0), overflow="stop", index=3),
    ask((1, 1, 0), overflow="stop", index=4, end=0),
    ask((2, 2), sampling=SamplingConfig(0.0, repetition_penalty=1.3), index=5),
    ask((2, 2), new=0),
    ask((0, 2), new=3, index=6),
]


def tokens_of(engine, requests, blocks=(1, 2, 50)) -> list[list[int]]:
    """All tokens of each row, asked for in blocks of these lengths in turn."""
    decoding = engine.start(requests)
    rows: list[list[int]] = [[] for _ in requests]
    for number in count():
        new = decoding.advance(blocks[number % len(blocks)])
        if not any(new):
            return rows
        assert max(map(len, new)) <= blocks[number % len(blocks)]
        for row, ids in zip(rows, new, strict=True):
            row.extend(ids)
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].vocab_size > 2])
def test_ragged_requests_have_the_tokens_of_the_numpy_engine(uncompiled, name, compile):
    """Prompts of any length, ends, policies and ways of drawing, together and alone."""
    model = model_of(name)
    numpy_engine = NumpyEngine(model.config, arrays_of(model))
    engine = TorchEngine(model, compile=compile)
    expected = tokens_of(numpy_engine, RAGGED)
    assert tokens_of(engine, RAGGED) == expected
    assert tokens_of(engine, RAGGED, blocks=(100,)) == expected
    assert [tokens_of(engine, [request])[0] for request in RAGGED] == expected
    assert len(uncompiled) == compile
    assert len({len(row) for row in expected}) > 3, "the rows do end at different places"


def test_each_rows_logits_are_those_behind_its_last_token():
    """Also of rows that ended, by their token or by `end`, while others continue."""
    model = model_of("modern")
    numpy_engine = NumpyEngine(model.config, arrays_of(model))
    together = [ask(index=i, new=15, end=i % 2) for i in range(8)]
    for blocks in ([1] * 15, [4, 4, 7], [15]):
        decodings = [engine.start(together) for engine in (TorchEngine(model), numpy_engine)]
        for number, block in enumerate(blocks):
            new = [decoding.advance(block) for decoding in decodings]
            assert new[0] == new[1]
            for row in range(8):
                found, expected = (decoding.logits(row) for decoding in decodings)
                assert found.dtype == np.float32
                np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)
            if number == 1:
                for decoding in decodings:
                    decoding.end(5)
                    decoding.end(5)
        assert [decoding.advance(9) for decoding in decodings] == [[[]] * 8] * 2


def test_nothing_is_read_once_all_rows_have_ended():
    model = build(TUTORIAL)
    reads = []
    model.token_embedding.register_forward_hook(lambda *_: reads.append(1))
    decoding = TorchEngine(model).start([ask(index=i, new=50) for i in range(3)])
    assert [len(row) for row in decoding.advance(5)] == [5, 5, 5]
    decoding.end(0)
    assert [len(row) for row in decoding.advance(5)] == [0, 5, 5]
    decoding.end(1)
    decoding.end(2)
    assert decoding.advance(5) == [[], [], []]
    assert len(reads) == 10
    ends = [ask(new=50, sampling=SamplingConfig(9.0), end=end) for end in range(5)]
    longest = max(map(len, TorchEngine(model).start(ends).advance(50)))
    assert longest < 50
    assert len(reads) == 10 + longest


def test_before_the_first_token_there_are_no_logits():
    with pytest.raises(ValueError, match="no token was drawn yet"):
        TorchEngine(model_of("modern")).start([ask()]).logits(0)


def test_dropout_is_off_though_the_model_was_trained_between_the_calls():
    """The engine is kept; training puts the model in training mode again."""
    model = build(GPTConfig(5, 8, 2, 2, max_seq_len=12, dropout=0.5))
    engine = TorchEngine(model)
    expected = tokens_of(engine, [ask()])
    model.train()
    assert tokens_of(engine, [ask()]) == expected


# --- compiling -----------------------------------------------------------------------------


@pytest.fixture
def stats():
    """Dynamo's count of graphs, from zero."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    return counters["stats"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with g++")
def test_a_compiled_step_writes_the_same_and_is_compiled_once(monkeypatch, tmp_path, stats, caplog):
    """By the real compiler; 20 steps, a second text of another length, weights that changed."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = build(GPTConfig(5, 8, 2, 1, max_seq_len=24))
    plain, compiled = TorchEngine(model), TorchEngine(model, compile=True)
    # Known from the processor's flags; to try them out takes longer than all the rest. More threads
    # would be processes that import torch.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True, "compile_threads": 1}):
        assert tokens_of(compiled, [ask()]) == tokens_of(plain, [ask()])
    assert stats["unique_graphs"] == 1
    assert list(tmp_path.rglob("*.cpp"))
    for prompt in ((4,), (0, 1, 2, 3, 4, 0)):
        request = ask(prompt, new=40, overflow="refill")
        assert tokens_of(compiled, [request]) == tokens_of(plain, [request])
    with torch.no_grad():
        model.final_norm.weight.mul_(-1)
    assert tokens_of(compiled, [ask()]) == tokens_of(plain, [ask()])
    assert stats["unique_graphs"] == 1
    assert lines(caplog) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["modern", "gpt2"])
def test_few_graphs_serve_all_batch_sizes(monkeypatch, stats, name, caplog):
    """Traced, not compiled: one graph for a row alone, one more for any number of rows."""
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend="eager"))
    model = build(CONFIGS[name], spread=0.7)
    plain, compiled = TorchEngine(model), TorchEngine(model, compile=True)
    for size in (1, 2, 3, 5, 1, 4):
        requests = [ask(index=i, overflow="refill") for i in range(size)]
        assert tokens_of(compiled, requests) == tokens_of(plain, requests)
    assert stats["unique_graphs"] == 2
    assert lines(caplog) == []


def failing_compile(message: str, at: str):
    def compile_(function, **options):
        if at == "once":
            raise RuntimeError(message)

        def step(*args):
            if at == "call":
                raise RuntimeError(message)
            logits = function(*args)
            if int(args[-1]) == 6:
                raise RuntimeError(message)
            return logits

        return step

    return compile_


@pytest.mark.slow
@pytest.mark.parametrize("at", ["once", "call", "later"])
@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("no compiler\n\nTraceback\n  more", "no compiler"),
        ("backend='inductor' raised:\nInvalidCxxCompiler: none\nmore", "InvalidCxxCompiler: none"),
        ("", "RuntimeError"),
    ],
)
def test_where_compiling_fails_one_line_says_so(monkeypatch, caplog, capfd, message, reason, at):
    """And the text is the same; also if it fails after steps that succeeded."""
    model = model_of("llama")
    expected = tokens_of(TorchEngine(model), RAGGED)
    monkeypatch.setattr(torch, "compile", failing_compile(message, at))
    engine = TorchEngine(model, compile=True)
    for _ in range(2):
        assert tokens_of(engine, RAGGED) == expected
    line = f"torch.compile failed, so steps run uncompiled: {reason}"
    assert caplog.record_tuples == [("mygpt", logging.WARNING, line)]
    assert caplog.records[0].exc_info is None
    assert capfd.readouterr() == ("", "")


class Foreign(nn.Module):
    max_seq_len = 8

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 5))

    def forward(self, ids):
        return self.table[ids], None


def test_a_model_that_is_not_ours_runs_uncompiled_and_a_line_says_so(caplog, uncompiled):
    """Any module with a window: ids are not checked; in a batch, too."""
    model = Foreign()
    engine = TorchEngine(model, compile=True)
    assert tokens_of(engine, [ask()]) == tokens_of(TorchEngine(model), [ask()])
    batch = engine.open(2)
    slot = batch.join(ask())
    assert [batch.advance(50)[slot]] == tokens_of(engine, [ask()])
    assert isinstance(engine.start([ask()])._batches[0].decoder, UncachedDecoder)
    assert lines(caplog) == [
        "only mygpt's own GPT has a step to compile: this model runs uncompiled"
    ]
    assert uncompiled == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("device", "mode"), [("cpu", None), ("cuda", "reduce-overhead")])
def test_cuda_graphs_are_asked_for_on_cuda(monkeypatch, uncompiled, device, mode):
    """The mode that torch.compile gets; no GPU is needed to see that."""
    monkeypatch.setattr(torch, "full", lambda *args, device: torch.tensor([args[1]]))
    model = model_of("modern")
    ids = SimpleNamespace(device=torch.device(device), clone=lambda **_: torch.tensor([[1]]))
    with torch.no_grad():
        assert TorchCompiledStep(model).read(ids, empty_cache(model, 1)) is not None
    assert [options["mode"] for options in uncompiled] == [mode]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA knows")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compile", [False, True])
def test_on_cuda_the_tokens_are_the_numpy_engines(compile, caplog):
    model = build(MODERN, spread=0.5)
    expected = tokens_of(NumpyEngine(model.config, arrays_of(model)), RAGGED)
    engine = TorchEngine(model.to("cuda"), compile=compile)
    assert tokens_of(engine, RAGGED) == expected
    assert lines(caplog) == []


# --- drawing -------------------------------------------------------------------------------


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a device, or copies from it."""

    WAITING = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in self.WAITING:
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(0.0), ALL], ids=str)
def test_a_step_waits_for_its_device_once(sampling):
    """To check that the logits are finite; the draw is computed where the logits are."""
    logits, text = torch.randn(3, 5), some_ids(5, 3, 4)
    with Waits() as waits:
        next_ids(logits, sampling, text, [Stream(1, i) for i in range(3)], 0)
    assert waits.seen == ["tolist"]


@settings(max_examples=60)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-9, 0.3, 1.0]), min_size=1, max_size=12),
    errors=st.lists(st.integers(-3, 3), min_size=12, max_size=12),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_sums_made_in_parallel_draw_no_token_of_probability_zero(weights, errors, uniform):
    """A GPU groups each sum's terms in its own way: here they are off by up to 3 last bits."""
    probs = torch.tensor([[*weights, 0.5, 0.0]], dtype=torch.float64)
    exact = probs.cumsum(-1)
    noise = torch.tensor([[*errors, 0, 2][-exact.shape[1] :]]) * 2**-52 * exact
    sums = _only_where_probable(exact + noise, probs)
    assert bool((sums[:, 1:] >= sums[:, :-1]).all())
    improbable = probs[:, 1:] == 0
    assert torch.equal(sums[:, 1:][improbable], sums[:, :-1][improbable])
    token = int(torch.searchsorted(sums, uniform * sums[:, -1:], right=True))
    assert probs[0, token] > 0
    assert torch.equal(_only_where_probable(exact, probs)[probs > 0], exact[probs > 0])


def test_sums_are_wide_where_the_device_has_wide_numbers():
    """Float32 sums would not rise at the small ones: the first token would be drawn."""
    probs = torch.tensor([[1.0, 1e-9, 1e-9, 1e-9, 1e-9]])
    assert draw(probs, [(1 + 2.5e-9) / (1 + 4e-9)]).tolist() == [3]


def test_half_precision_logits_are_drawn_from_in_float32():
    """The penalty moves the largest logit to 1.003, which bfloat16 rounds to 1."""
    logits = torch.tensor([[1.0, 1.0078125]], dtype=torch.bfloat16)
    sampling = SamplingConfig(0.0, repetition_penalty=1.005)
    seen = torch.tensor([[1]])
    assert next_ids(logits, sampling, seen, [Stream(0)], 0).tolist() == [1]
    model = build(LLAMA).bfloat16()
    decoding = TorchEngine(model).start([ask(index=i) for i in range(3)])
    decoding.advance(9)
    assert decoding.logits(1).dtype == np.float32


# --- number formats ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [
        ("cuda", True, torch.bfloat16),
        ("cuda:1", True, torch.bfloat16),
        ("cuda", False, torch.float32),
        ("cpu", True, torch.float32),
        ("mps", True, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_cuda_computes_in_it(monkeypatch, device, native, expected):
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or native,
    )
    assert choose_dtype("auto", torch.device(device)) == expected
    for name in ("float32", "float16", "bfloat16"):
        assert choose_dtype(name, torch.device(device)) == getattr(torch, name)


def test_formats_that_torch_lacks_are_refused():
    with pytest.raises(
        InputError, match="int8 works only with the cpu engine: use --engine cpu, or float32"
    ):
        choose_dtype("int8", torch.device("cpu"))
    with pytest.raises(InputError, match=f"dtype='int3' is not known: choose {', '.join(DTYPES)}"):
        choose_dtype("int3", torch.device("cpu"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_checkpoint(path, build(GPTConfig(5, 8, 2, 1, max_seq_len=12)), CharTokenizer("abcd\n"))
    return path


@pytest.mark.parametrize("engine", ["numpy", CPU, "torch"])
def test_every_engine_takes_auto_and_on_the_cpu_it_is_float32(saved, engine):
    texts = {
        load(saved, device="cpu", engine=engine, **options).generate("ab", 20, seed=3)
        for options in ({}, {"dtype": "auto"}, {"dtype": "float32"})
    }
    assert len(texts) == 1
    assert load(saved, engine=engine, device="cpu").model.token_embedding.weight.dtype == (
        torch.float32
    )


# --- asked for by a writer and the command line ---------------------------------------------


def test_a_writer_keeps_what_it_compiled(saved, uncompiled):
    writer = load(saved, device="cpu", engine="torch", compile=True)
    texts = {writer.generate("ab", 20, seed=3, overflow="refill") for _ in range(3)}
    assert texts == {load(saved, engine="torch").generate("ab", 20, seed=3, overflow="refill")}
    assert len(uncompiled) == 1


def test_a_writer_of_a_torch_model_compiles_too(uncompiled):
    model = build(GPTConfig(257, 8, 2, 1, max_seq_len=12)).double()  # no other engine takes it
    Writer(model, ByteTokenizer(), compile=True).generate("ab", 5)
    Writer(model, ByteTokenizer()).generate("ab", 5)
    assert len(uncompiled) == 1


@pytest.mark.parametrize("engine", ["numpy", "cpu", "auto"])
def test_compile_is_refused_for_other_engines(saved, capsys, monkeypatch, engine):
    """In one line that names the remedy."""
    monkeypatch.setattr("mygpt.decode.choice.may_have_gpu", lambda: False)
    message = (
        r"compile is for the torch engine, and (numpy|cpu) is chosen \(.+\): "
        r"add (--engine torch|engine='torch')"
    )
    with pytest.raises(InputError, match=message):
        load(saved, engine=engine, compile=True)
    checkpoint = read_checkpoint(saved)
    with pytest.raises(InputError, match=message):
        Writer(checkpoint, checkpoint.tokenizer, engine=engine, compile=True)
    with pytest.raises(SystemExit) as left:
        main(f"generate -c {saved} -p a --seed 1 --compile --engine {engine}".split())
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("mygpt: compile is for the torch engine")


def test_compile_on_the_command_line_is_the_same_text(saved, capsys, uncompiled):
    args = ["generate", "-c", str(saved), "-p", "ab", "--seed", "1", "--engine", "torch"]
    shown = []
    for flags in ([], ["--compile"]):
        with pytest.raises(SystemExit) as left:
            main([*args, "--device", "cpu", *flags])
        assert left.value.code == 0
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1]
    assert shown[0].out.startswith("ab")
    assert len(uncompiled) == 1
