"""n-gram tables: counted, looked up, in the model, in its file, and the same in every engine.

The slow twin knows n-grams as tuples in dictionaries; the models' judge is a plain GPT, without a
cache, to whose token embedding a hook adds what the twin finds.
Letters: B rows, C embedding, N highest order, T time, V vocabulary.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from mygpt import (
    GPT,
    CharTokenizer,
    GPTConfig,
    Writer,
    generate,
    load_checkpoint,
    ngram_keys,
    save_checkpoint,
)
from mygpt.checkpoint import model_arrays, read_checkpoint
from mygpt.cli import main
from mygpt.container import write_arrays
from mygpt.core.config import SamplingConfig
from mygpt.core.kv_cache import KVCache
from mygpt.core.random import Stream
from mygpt.engines.choice import choose
from mygpt.engines.contract import Request
from mygpt.engines.cpu import CpuEngine
from mygpt.engines.numpy_engine import NumpyEngine
from mygpt.engines.torch_engine import TorchEngine
from mygpt.errors import CheckpointError, InputError
from mygpt.generation.packing import arrays_of, can_pack, cpu_engine_of
from mygpt.ngrams import NgramEmbedding, count_ngrams, ngram_rows_of
from shapes import GPT2, LLAMA, MODERN, TUTORIAL, build

# --- the twin ------------------------------------------------------------------------------


def known_ngrams(text, vocab_size, orders, min_count=1, max_rows=10**9) -> list[dict]:
    """For each order the n-grams that have a row, as tuples, and which."""
    tables: list[dict] = []
    for n in range(2, orders + 1):
        counts = Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
        known = {}
        for ngram, count in counts.items():
            context = tables[-1].get(ngram[:-1]) if tables else ngram[0]
            if context is not None and count >= min_count:
                known[ngram] = (-count, context * vocab_size + ngram[-1])
        kept = sorted(known, key=known.get)[: max_rows - 1]
        kept.sort(key=lambda ngram: known[ngram][1])
        tables.append({ngram: row for row, ngram in enumerate(kept, start=1)})
    return tables


def rows_in(window, tables) -> list[list[int]]:
    """The row of each position, for each order."""
    return [
        [known.get(tuple(window[max(0, t - n + 1) : t + 1]), 0) for t in range(len(window))]
        for n, known in enumerate(tables, start=2)
    ]


class Judge:
    """A model with tables, as a plain GPT that reads all of its window."""

    def __init__(self, model: GPT, tables: list[dict]) -> None:
        self.max_seq_len, self.tables = model.max_seq_len, tables
        state = model.state_dict()
        self.vectors = [state[f"ngram_embedding.tables.{n}"] for n in range(len(tables))]
        self.plain = GPT.from_config(replace(model.config, ngram_rows=())).eval()
        self.plain.load_state_dict({k: v for k, v in state.items() if "ngram" not in k})
        self.plain.token_embedding.register_forward_hook(self.add)
        self.told: list[torch.Tensor] = []  # logits of each call's last position

    def add(self, module, args, x):
        for b, window in enumerate(args[0].tolist()):
            for vectors, rows in zip(self.vectors, rows_in(window, self.tables), strict=True):
                x = x.index_add(0, torch.tensor([b]), vectors[rows][None])
        return x

    def __call__(self, ids):
        with torch.no_grad():
            logits, loss = self.plain(ids)
        self.told.append(logits[0, -1])
        return logits, loss


# --- models --------------------------------------------------------------------------------

TABLES = {  # shape and highest order
    "tutorial": (TUTORIAL, 4),
    "modern": (MODERN, 3),
    "gpt2": (GPT2, 2),
    "llama": (LLAMA, 5),
}
every_model = pytest.mark.parametrize("name", TABLES)


@cache
def text_of(vocab_size: int) -> np.ndarray:
    """Some tokens: most bigrams, fewer and fewer of the longer n-grams occur."""
    return np.random.default_rng(vocab_size).integers(vocab_size, size=60).astype(np.uint16)


@cache
def model_and_judge(name: str) -> tuple[GPT, Judge]:
    config, orders = TABLES[name]
    vocab = config.vocab_size
    keys = count_ngrams(text_of(vocab), vocab, orders)
    model = build(replace(config, ngram_rows=tuple(len(k) + 1 for k in keys)), spread=0.7)
    model.ngram_embedding.set_keys(keys)
    with torch.no_grad():
        for table in model.ngram_embedding.tables:
            table[0] = 0
    return model, Judge(model, known_ngrams(text_of(vocab).tolist(), vocab, orders))


def some_ids(vocab_size: int, batch: int, time: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, time), generator=generator)


def assert_close(found, expected) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-5, atol=2e-5
    )


# --- counting ------------------------------------------------------------------------------


@pytest.fixture(params=["dense", "sorted"])
def counting(request, monkeypatch):
    """Pieces of a few tokens; keys counted in a list of all, or sorted and merged."""
    monkeypatch.setattr(ngram_keys, "_PIECE", 7)
    monkeypatch.setattr(ngram_keys, "_MOST_PENDING", 5)
    if request.param == "sorted":
        monkeypatch.setattr(ngram_keys, "_DENSE", 0)


texts = st.integers(1, 5).flatmap(
    lambda vocab: st.tuples(st.just(vocab), st.lists(st.integers(0, vocab - 1), max_size=60))
)


@given(texts, st.integers(1, 5), st.integers(1, 4), st.sampled_from([1, 2, 3, 9, 99]), texts)
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_ngrams_are_the_twins(dtype, text, orders, min_count, max_rows, other):
    """Which are known, in which rows, in which places, of the text and of others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram_keys, "_PIECE", 7)
        patch.setattr(ngram_keys, "_MOST_PENDING", 5)
        for dense in (0, 2**22):
            patch.setattr(ngram_keys, "_DENSE", dense)
            vocab, ids = text
            keys = count_ngrams(
                np.array(ids, dtype), vocab, orders, min_count=min_count, max_rows=max_rows
            )
            tables = known_ngrams(ids, vocab, orders, min_count, max_rows)
            assert [len(k) for k in keys] == [len(table) for table in tables]
            assert len(keys) == orders - 1
            for window in (ids, [token % vocab for token in other[1]]):
                rows = ngram_rows_of(np.array(window, dtype), keys, vocab)
                assert all(row.dtype == np.int32 for row in rows)
                assert [row.tolist() for row in rows] == rows_in(window, tables)


def test_each_ngram_has_one_row_and_its_context_has_one(counting):
    """Prefix-closed: the key names the row of the first tokens, which is never 0.

    Nothing is lost or counted twice where the pieces of a text meet.
    """
    text = np.random.default_rng(0).integers(7, size=500).astype(np.uint16)
    keys = count_ngrams(text, 7, 4, max_rows=40)
    assert [len(k) for k in keys] == [39, 39, 39]
    for before, known in pairwise(keys):
        assert (np.diff(known) > 0).all()
        assert known.min() >= 7
        assert (known // 7).max() <= len(before)
    found = ngram_rows_of(text, count_ngrams(text, 7, 4, min_count=2), 7)
    assert [row.tolist() for row in found] == rows_in(
        text.tolist(), known_ngrams(text.tolist(), 7, 4, 2)
    )


def test_a_text_with_other_ids_is_refused():
    with pytest.raises(InputError, match=r"holds id 9: .* from 0 to 8"):
        count_ngrams(np.array([1, 9, 8]), 9, 2)


def test_texts_too_short_for_any_ngram_have_none(counting):
    for length in (0, 1):
        keys = count_ngrams(np.zeros(length, np.uint16), 3, 4)
        assert [len(k) for k in keys] == [0, 0, 0]
        assert [len(rows) for rows in ngram_rows_of(np.zeros(length, int), keys, 3)] == [length] * 3


# --- the embedding -------------------------------------------------------------------------


@every_model
def test_rows_of_windows_are_the_twins(name):
    """Whatever part of a window is read first: n-grams end where the window begins."""
    model, judge = model_and_judge(name)
    most = len(judge.tables)
    ids = some_ids(model.config.vocab_size, 2, 12)
    expected = [rows_in(row, judge.tables) for row in ids.tolist()]  # (B, N - 1, T)
    expected = torch.tensor(expected).transpose(0, 1)
    assert (expected[0] > 0).any()
    embedding = model.ngram_embedding
    assert torch.equal(embedding.rows(ids), expected)
    for t in range(13):
        before = ids[:, max(0, t - most) : t]
        padded = torch.cat([torch.full((2, most - before.shape[1]), -1), before], dim=1)
        for given_ in (before, padded):
            for end in range(t + 1, 13):
                found = embedding.rows(ids[:, t:end], given_)
                assert torch.equal(found, expected[:, :, t:end]), (t, end)


@every_model
def test_the_model_is_the_judges(name):
    """All positions, and losses; without tables' numbers it is the plain model."""
    model, judge = model_and_judge(name)
    ids = some_ids(model.config.vocab_size, 3, model.max_seq_len)
    with torch.no_grad():
        assert_close(model(ids)[0], judge(ids)[0])
        plain = GPT.from_config(replace(model.config, ngram_rows=())).eval()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "ngram" not in k})
        assert (plain(ids)[0] - judge(ids)[0]).abs().max() > 0.1


@every_model
def test_a_cache_in_chunks_is_the_full_pass(name):
    """Every way to cut the first five tokens, a cache that begins again, and part of one."""
    model, judge = model_and_judge(name)
    cache_ = KVCache.empty(model.config, 2, device=torch.device("cpu"), dtype=torch.float32)
    for seed, cuts in enumerate(product([False, True], repeat=4)):
        ids = some_ids(model.config.vocab_size, 2, 7, seed)
        ends = [end for end, cut in enumerate(cuts, start=1) if cut] + [5, 6, 7]
        cache_.length = 0
        with torch.no_grad():
            parts = [model(ids[:, a:b], cache=cache_)[0] for a, b in pairwise([0, *ends])]
            assert_close(torch.cat(parts, dim=1), judge(ids)[0])
            cache_.length = 3
            assert_close(model(ids[:, 3:], cache=cache_)[0], judge(ids)[0][:, 3:])


def test_tables_begin_as_zeros_and_draw_no_random_numbers():
    """So a model with tables begins as the one without."""
    for config in (TUTORIAL, MODERN):
        with_tables = build(replace(config, ngram_rows=(9, 17)), spread=None)
        after = torch.rand(1)
        plain = build(config, spread=None)
        assert torch.rand(1) == after
        state = with_tables.state_dict()
        for name, tensor in plain.state_dict().items():
            assert torch.equal(state.pop(name), tensor)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        c = config.embed_dim
        assert shapes == {
            "ngram_embedding.tables.0": (9, c),
            "ngram_embedding.tables.1": (17, c),
            "ngram_embedding.keys.0": (8,),
            "ngram_embedding.keys.1": (16,),
        }
        assert not any(state[f"ngram_embedding.tables.{n}"].any() for n in range(2))
        ids = some_ids(5, 2, 12)
        assert torch.equal(with_tables(ids)[0], plain(ids)[0])


@every_model
def test_every_known_row_gets_a_gradient_and_row_0_none(name):
    model, _ = model_and_judge(name)
    text = torch.from_numpy(text_of(model.config.vocab_size).astype(np.int64))
    window = text[: model.max_seq_len][None]
    model(window, window.roll(-1, 1))[1].backward()
    rows = model.ngram_embedding.rows(window)
    for number, table in enumerate(model.ngram_embedding.tables):
        moved = table.grad.abs().sum(dim=1) > 0
        assert set(moved.nonzero().flatten().tolist()) == set(rows[number].unique().tolist()) - {0}
    model.zero_grad(set_to_none=True)


def test_keys_that_do_not_fit_are_refused():
    embedding = NgramEmbedding(5, 4, (3, 2))
    embedding.set_keys([np.array([3, 24]), np.array([14])])
    for keys, message in (
        ([[3, 24]], r"room for \[2, 1\] keys and \[2\] are given"),
        ([[3], [14]], r"\[1, 1\] are given"),
        ([[4, 3], [14]], "2-grams do not rise"),
        ([[3, 3], [14]], "2-grams do not rise"),
        ([[3, 25], [14]], "2-grams run from 3 to 25, .* from 0 to 24"),
        ([[-1, 3], [14]], "2-grams run from -1"),
        ([[3, 24], [4]], "3-grams run from 4 to 4, .* from 5 to 14"),
        ([[3, 24], [15]], "3-grams run from 15 to 15"),
    ):
        with pytest.raises(InputError, match=message):
            embedding.set_keys([np.array(k, np.int64) for k in keys])
    assert [k.tolist() for k in embedding.keys] == [[3, 24], [14]]


# --- configuration -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (7, "ngram_rows=7 must be a list"),
        ("25", "ngram_rows='25' must be a list"),
        ((2, 2, 2, 2, 2), "at most 4"),
        ((0,), "ngram_rows=0 must be a whole number of at least 1"),
        ((2, 1.5), "ngram_rows=1.5 "),
        ((True,), "ngram_rows=True "),
        ((27,), "5 contexts and 5 tokens make at most 26 rows, not 27"),
        ((3, 12), "2 contexts and 5 tokens make at most 11 rows, not 12"),
        ((1, 2), "0 contexts"),
    ],
)
def test_impossible_tables_are_refused(rows, message):
    with pytest.raises(InputError, match=message):
        replace(TUTORIAL, ngram_rows=rows)


def test_configuration_survives_json_as_a_tuple():
    config = replace(TUTORIAL, ngram_rows=[np.int64(26), 11])
    again = GPTConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.ngram_rows == (26, 11)
    assert hash(again) == hash(config)
    assert config.to_dict()["ngram_rows"] == [26, 11]
    assert "ngram_rows" not in TUTORIAL.to_dict(), "older versions read models without tables"


@every_model
def test_parameters_are_counted_and_tables_multiply_nothing(name):
    config = model_and_judge(name)[0].config
    assert config.num_parameters() == sum(p.numel() for p in GPT.from_config(config).parameters())
    shapes = {n: tuple(p.shape) for n, p in GPT.from_config(config).named_parameters()}
    assert config.parameter_shapes() == shapes
    assert config.num_multiplied() == replace(config, ngram_rows=()).num_parameters()
    assert config.num_multiplied() < config.num_parameters()
    assert config.is_tutorial_block == (name == "tutorial")


def test_large_tables_do_not_make_a_job_long(monkeypatch):
    """Looking up costs next to nothing: no engine is worth more for it, nor a GPU."""
    from mygpt.engines.cpu import build as kernels

    config = replace(TUTORIAL, vocab_size=2**15)
    tables = replace(config, ngram_rows=(2**27,))
    monkeypatch.setattr(kernels, "is_compiled", lambda: False)
    monkeypatch.setattr("mygpt.engines.choice.may_have_gpu", lambda: True)
    for job in ({"tokens": 50}, {"tokens": 50, "device": "cpu"}):
        assert choose(tables, **job) == choose(config, **job)


def test_large_tables_do_not_call_for_threads(monkeypatch):
    """A step of a small model was shared by all cores: its tables counted as work."""
    monkeypatch.setattr("mygpt.engines.cpu.decoding.usable_cores", lambda: 4)
    config = replace(TUTORIAL, vocab_size=1000)
    for rows in ((), (900_000,)):
        model = build(replace(config, ngram_rows=rows), spread=None)
        decoding = cpu_engine_of(model).start(
            [Request(np.array([1]), 3, SamplingConfig(), Stream(0))]
        )
        decoding.advance(3)
        assert decoding._loop._threads == 1


# --- engines -------------------------------------------------------------------------------

SAMPLINGS = [
    SamplingConfig(temperature=0.0),
    SamplingConfig(),
    SamplingConfig(1.1, 4, 0.95, 0.05, 1.2),
]


def requests_of(config: GPTConfig) -> list[Request]:
    """Mixed prompts, up to past the window, in all policies and ways of drawing."""
    window = config.max_seq_len
    lengths = [1, 2, 3, window - 1, 2 * window]
    policies = ["crop", "refill", "stop"]
    generator = np.random.default_rng(3)
    requests = []
    for index, (length, overflow) in enumerate(product(lengths, policies)):
        if overflow == "stop":
            length = min(length, window)
        prompt = generator.integers(config.vocab_size, size=length)
        sampling = SAMPLINGS[index % 3]
        requests.append(Request(prompt, window + 5, sampling, Stream(5, index), overflow))
    return [*requests, replace(requests[6], stream=Stream(5, 99))]  # a prompt in common


@cache
def judged(name: str) -> list[list[tuple[int, torch.Tensor]]]:
    """What the plain loop writes, and the logits behind each token."""
    model, judge = model_and_judge(name)
    rows = []
    for one in requests_of(model.config):
        steps, seed, index = one.room(model.max_seq_len), one.stream.seed, one.stream.index
        prompt, judge.told = one.prompt.tolist(), []
        text = reference.seeded_generate(
            judge, prompt, steps, one.sampling, seed, index, one.overflow
        )
        rows.append(list(zip(text[len(prompt) :], judge.told, strict=True)))
    return rows


def written(engine, requests, blocks=(100,)) -> list[list[int]]:
    """All tokens of each row, asked for in blocks."""
    decoding, rows, turn = engine.start(requests), [[] for _ in requests], 0
    while any(new := decoding.advance(blocks[turn % len(blocks)])):
        turn += 1
        for row, ids in zip(rows, new, strict=True):
            row.extend(ids)
    return rows


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile hands its function back."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def engines_of(name: str) -> dict:
    model, _ = model_and_judge(name)
    arrays = arrays_of(model)
    return {
        "numpy": NumpyEngine(model.config, arrays),
        "cpu": CpuEngine(model.config, arrays, threads=1),
        "cpu of two threads": CpuEngine(model.config, arrays, threads=2),
        "torch": TorchEngine(model),
        "torch, fixed shapes": TorchEngine(model, compile=True),
    }


@every_model
def test_every_engine_predicts_and_writes_as_the_judge(name, uncompiled, caplog):
    """Inside the window and past it, by every policy, step by step: logits and tokens."""
    requests, expected = requests_of(TABLES[name][0]), judged(name)
    assert len({tuple(token for token, _ in row) for row in expected}) > 10
    for kind, engine in engines_of(name).items():
        decoding = engine.start(requests)
        for step in range(max(map(len, expected))):
            for row, ids in enumerate(decoding.advance(1)):
                assert ids == [token for token, _ in expected[row][step : step + 1]], (kind, row)
                if ids:
                    assert_close(decoding.logits(row), expected[row][step][1])
        assert not any(decoding.advance(1))
    assert caplog.records == [], "a step of fixed shapes that fails is replaced, with a warning"


@every_model
def test_company_order_and_block_do_not_matter(name):
    """For the engines whose rows are computed one by one, and the one that batches them."""
    requests = requests_of(TABLES[name][0])[::-1]
    expected = [[token for token, _ in row] for row in judged(name)][::-1]
    for kind, engine in engines_of(name).items():
        if "torch" not in kind:
            assert written(engine, requests, blocks=(1, 5)) == expected, kind
            assert [written(engine, [one])[0] for one in requests[:6]] == expected[:6], kind


def test_a_long_prompt_is_read_in_several_passes():
    """More rows than one pass of the compiled loop has room for, by threads that share them."""
    config = replace(TUTORIAL, vocab_size=30, max_seq_len=700)
    text = np.random.default_rng(1).integers(30, size=4000).astype(np.uint16)
    keys = count_ngrams(text, 30, 4)
    model = build(replace(config, ngram_rows=tuple(len(k) + 1 for k in keys)), spread=0.3)
    model.ngram_embedding.set_keys(keys)
    ids = torch.from_numpy(text[1000:1650].astype(np.int64))
    with torch.no_grad():
        expected = model(ids[None])[0][0, -1]
    for threads in (1, 2):
        engine = CpuEngine(model.config, arrays_of(model), threads=threads)
        decoding = engine.start([Request(ids.numpy(), 1, SamplingConfig(), Stream(0))])
        decoding.advance(1)
        assert_close(decoding.logits(0), expected)


@every_model
def test_int8_weights_leave_the_tables_as_they_are(name):
    """Against float32 engines of the rounded matrices: see test_cpu_engine.py."""
    from test_cpu_engine import dequantized

    model, _ = model_and_judge(name)
    arrays = arrays_of(model)
    rounded = dequantized(arrays) | {n: a for n, a in arrays.items() if "ngram" in n}
    small = CpuEngine(model.config, arrays, weights="int8", threads=1)
    plain = CpuEngine(model.config, rounded, threads=1)
    requests = requests_of(model.config)
    ours, theirs = small.start(requests), plain.start(requests)
    ours.advance(1), theirs.advance(1)
    for row in range(len(requests)):
        if requests[row].room(model.max_seq_len):
            np.testing.assert_allclose(ours.logits(row), theirs.logits(row), atol=2e-4, rtol=1e-4)


def test_generate_draws_as_the_chapters_loop():
    """torch's own draws between the compiled steps."""
    model, judge = model_and_judge("tutorial")
    assert can_pack(model)
    prompt = torch.tensor([[1, 4, 0], [2, 2, 2]])
    torch.manual_seed(3)
    expected = reference.chapter_generate(judge.plain, prompt, 30, 0.9, 3)
    torch.manual_seed(3)
    assert torch.equal(generate(model, prompt, 30, 0.9, 3), expected)


# --- packed weights ------------------------------------------------------------------------


def logits_of(model) -> tuple[np.ndarray, np.ndarray]:
    """The last position's, of the compiled engine and of torch."""
    ids = np.array([1, 4, 0, 2])
    decoding = cpu_engine_of(model).start([Request(ids, 1, SamplingConfig(), Stream(0))])
    decoding.advance(1)
    with torch.no_grad():
        return decoding.logits(0), model(torch.tensor(ids[None]))[0][0, -1].numpy()


def full_model() -> GPT:
    """Every bigram and trigram of five tokens has a row."""
    return build(replace(TUTORIAL, ngram_rows=(26, 126)), spread=0.7)


def test_changed_tables_and_keys_are_packed_anew():
    model = full_model()
    first, (before, _) = cpu_engine_of(model), logits_of(model)
    row = int(model.ngram_embedding.rows(torch.tensor([[0, 2]]))[0, 0, 1])
    model.ngram_embedding.tables[0].data[row, 0] += 3  # all of it would be no change to a norm
    second, (after, expected) = cpu_engine_of(model), logits_of(model)
    assert second is not first
    assert_close(after, expected)
    assert np.abs(after - before).max() > 0.01
    model = build(replace(TUTORIAL, ngram_rows=(25,)), spread=0.7)
    model.ngram_embedding.set_keys([np.arange(24)])
    third = cpu_engine_of(model)
    assert cpu_engine_of(model) is third
    model.ngram_embedding.set_keys([np.delete(np.arange(25), 23)])  # the last key alone is another
    assert cpu_engine_of(model) is not third
    assert_close(*logits_of(model))


def test_changed_modules_are_not_packed():
    class Doubled(NgramEmbedding):
        def forward(self, ids, before=None):
            return 2 * super().forward(ids, before)

    def hooked(model):
        model.ngram_embedding.register_forward_hook(lambda module, args, out: 2 * out)

    def doubled(model):
        model.ngram_embedding = Doubled(5, 8, (26, 126))

    def renumbered(model):
        model.ngram_embedding.vocab_size = 6

    def narrow(model):
        keys = model.ngram_embedding.keys
        keys.register_buffer("0", keys.get_buffer("0").int())

    def without(model):
        del model.ngram_embedding.keys._buffers["1"]

    assert can_pack(full_model())
    assert not can_pack(full_model().bfloat16())
    for change in (hooked, doubled, renumbered, narrow, without):
        model = full_model()
        change(model)
        assert not can_pack(model), change


# --- files ---------------------------------------------------------------------------------

CHARS = CharTokenizer("abcde", end_of_text=False)


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model_and_judge("modern")[0], CHARS)
    return path


def test_round_trip_is_bitwise(saved):
    model, _ = model_and_judge("modern")
    loaded, _ = load_checkpoint(saved)
    assert loaded.config == model.config
    state, again = model.state_dict(), loaded.state_dict()
    assert list(state) == list(again)
    for name, tensor in state.items():
        assert torch.equal(tensor, again[name])
        assert (
            tensor.dtype
            == again[name].dtype
            == (torch.int64 if ".keys." in name else torch.float32)
        )


def test_half_precision_keeps_the_keys(tmp_path):
    """float32 in the file, and keys past what such numbers can tell apart."""
    config = replace(TUTORIAL, vocab_size=60_000, ngram_rows=(3,))
    model = build(config, spread=None).bfloat16()
    model.ngram_embedding.set_keys([np.array([3_599_999_998, 3_599_999_999])])
    arrays = model_arrays(model)
    assert arrays["ngram_embedding.keys.0"].tolist() == [3_599_999_998, 3_599_999_999]
    assert arrays["ngram_embedding.keys.0"].dtype == np.int64
    assert arrays["ngram_embedding.tables.0"].dtype == np.float32
    ids = torch.tensor([[59_999, 59_999, 59_998]])
    assert model.ngram_embedding.rows(ids).tolist() == [[[0, 2, 1]]]


def test_a_fresh_model_can_be_saved_and_loaded(tmp_path):
    for rows in ((1,), (1, 1), (26, 126), (26, 1, 1, 1)):
        model = build(replace(TUTORIAL, ngram_rows=rows), spread=None)
        save_checkpoint(tmp_path / "m", model, CHARS)
        loaded, _ = load_checkpoint(tmp_path / "m")
        ids = some_ids(5, 1, 9)
        assert torch.equal(loaded(ids)[0], model.eval()(ids)[0])
        assert_close(*logits_of(loaded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys.0": lambda k: k[::-1]}, "2-grams do not rise"),
        ({"keys.0": lambda k: k + 25}, "2-grams run from"),
        ({"keys.1": lambda k: k - k[0]}, "3-grams run from 0"),
        ({"keys.1": lambda k: k * 1000}, "3-grams run from"),
        ({"keys.1": lambda k: k.astype(np.int32)}, "keys.1 is int32, not int64"),
        ({"keys.0": lambda k: k.astype(np.float64)}, "keys.0 is float64, not int64"),
        ({"keys.0": lambda k: k[1:]}, r"keys.0 has shape \(\d+,\), and its configuration wants"),
        ({"keys.1": None}, "keys.1 has shape none"),
        ({"tables.1": None}, "tables.1 has shape none"),
        ({"keys.2": lambda _: np.zeros(3, np.int64)}, "keys.2 has shape .* wants none"),
        ({"tables.0": lambda t: t + 1}, "row 0 of tensor ngram_embedding.tables.0 holds"),
        ({"tables.1": lambda t: t * np.nan}, "row 0 of tensor ngram_embedding.tables.1 holds"),
    ],
)
def test_files_whose_tables_would_be_read_wrongly_are_refused(saved, change, message):
    checkpoint = read_checkpoint(saved)
    arrays = dict(checkpoint.arrays)
    for name, function in change.items():
        name = f"ngram_embedding.{name}"
        if function is None:
            del arrays[name]
        else:
            arrays[name] = np.ascontiguousarray(function(arrays.get(name)))
    parts = {"config": checkpoint.config.to_dict(), "tokenizer": CHARS.to_state()}
    write_arrays(saved, arrays, parts)
    for load in (lambda: load_checkpoint(saved), lambda: read_checkpoint(saved).check_shapes()):
        with pytest.raises(CheckpointError, match=message) as caught:
            load()
        assert str(saved) in str(caught.value)


@pytest.mark.parametrize("overflow", ["crop", "refill", "stop"])
def test_writers_of_a_file_write_the_same_with_every_engine(saved, overflow):
    texts = {
        engine: Writer(read_checkpoint(saved), CHARS, engine=engine).generate(
            "abca", 30, seed=4, overflow=overflow
        )
        for engine in ("numpy", "cpu", "torch")
    }
    assert len(set(texts.values())) == 1, texts
    model, judge = model_and_judge("modern")
    steps = 30 if overflow != "stop" else model.max_seq_len - 4
    ids = reference.seeded_generate(judge, [0, 1, 2, 0], steps, SamplingConfig(), 4, 0, overflow)
    assert texts["numpy"] == CHARS.decode(ids)


def test_writers_of_a_torch_model_write_the_same_with_every_engine():
    model, _ = model_and_judge("modern")
    told = {
        (engine, dtype): Writer(model, CHARS, engine=engine, dtype=dtype).generate("ab", 20, seed=1)
        for engine, dtype in (("numpy", "auto"), ("cpu", "auto"), ("torch", "auto"))
    }
    assert len(set(told.values())) == 1, told
    assert Writer(model, CHARS, engine="cpu", dtype="int8").generate("ab", 20, seed=1)


def test_info_tells_of_the_tables(saved, capsys):
    with pytest.raises(SystemExit):
        main(["info", str(saved)])
    bigrams, trigrams = model_and_judge("modern")[0].config.ngram_rows
    expected = f"n-grams:     tables of order 2 to 3 with {bigrams} and {trigrams} rows; "
    assert expected + "such a model runs in mygpt alone\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["info", str(saved), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["ngram_rows"] == [bigrams, trigrams]
