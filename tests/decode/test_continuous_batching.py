"""Batches that requests join and leave: each row has the tokens it has alone; no memory leaks.

A schedule is a list of joins, ends and advances; the checker is each request's own `Decoding`.
"""

from __future__ import annotations

import gc
import math
import time
import tracemalloc
import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import CPU, INT8, arrays_of, cases, constant, engine_for, every_kind, request
from decoding import SAMPLINGS as USUAL
from mygpt import CharTokenizer, GPTConfig, Writer
from mygpt.core.config import SamplingConfig
from mygpt.core.window import OVERFLOW_POLICIES
from mygpt.cpu.decode import engine as cpu_batch
from mygpt.cpu.decode import layout as at
from mygpt.cpu.decode.engine import CpuBatch, CpuEngine
from mygpt.cpu.decode.memory import Memory
from mygpt.decode.numpy_engine import NumpyEngine
from mygpt.engine import Request, SeparateBatch
from mygpt.errors import InputError
from shapes import LLAMA, MODERN, TUTORIAL, build

WIDE = {  # windows in which prompts are long enough to share
    "modern": replace(MODERN, max_seq_len=40),
    "learned": replace(TUTORIAL, max_seq_len=40),
    "broken": replace(LLAMA, max_seq_len=40, num_layers=2),
}
WILD = SamplingConfig(repetition_penalty=1e-39)
SAMPLINGS = [*USUAL, WILD]


@cache
def model_of(name: str):
    """ "broken" has NaN in the embedding of token 5: a row with it in its text fails."""
    config = TUTORIAL if name == "tutorial" else WIDE[name]
    model = build(config, spread=0.7)
    if name == "broken":
        with torch.no_grad():
            model.token_embedding.weight[5] = math.nan
    return model


@cache
def engine_of(name: str, kind: str = "cpu", threads: int = 1):
    return engine_for(model_of(name), kind, threads)


def config_of(name: str) -> GPTConfig:
    return model_of(name).config


@cache
def base_texts(vocab_size: int) -> list[list[int]]:
    """Three long texts whose beginnings are prompts; the last has the beginning of the second."""
    generator = np.random.default_rng(vocab_size)
    one, two, rest = (generator.integers(min(vocab_size, 5), size=60).tolist() for _ in range(3))
    return [one, two, two[:18] + rest]


# --- comparison with separate rows ---------------------------------------------------------


@dataclass
class Alone:
    """The results of a request decoded alone: tokens, logits of each, and its error."""

    ids: list[int] = field(default_factory=list)
    logits: list[bytes] = field(default_factory=list)
    error: str | None = None


def alone(engine, one: Request) -> Alone:
    result, decoding = Alone(), engine.start([one])
    try:
        while new := decoding.advance(1)[0]:
            result.ids += new
            result.logits.append(decoding.logits(0).tobytes())
    except InputError as error:
        result.error = str(error)
    return result


@dataclass
class Expected:
    """A joined row: its results when decoded alone, and how many of them have been compared."""

    alone: Alone
    seen: int = 0
    failed: bool = False

    @property
    def draws(self) -> bool:
        more = self.seen < len(self.alone.ids)
        return more or (self.alone.error is not None and not self.failed)


class Checker:
    """Executes a schedule's steps with a batch, and compares all results."""

    def __init__(self, engine, size: int) -> None:
        self.engine, self.batch = engine, engine.open(size)
        self.rows: dict[int, Expected] = {}
        self.counts: Counter[str] = Counter()

    def join(self, one: Request) -> None:
        if len(self.rows) < self.batch.size:
            expected = Expected(alone(self.engine, one))
            slot = self.batch.join(one)
            assert slot in range(self.batch.size)
            assert slot not in self.rows
            self.rows[slot] = expected

    def end(self, which: int) -> None:
        if self.rows:
            slot = sorted(self.rows)[which % len(self.rows)]
            self.batch.end(slot)
            del self.rows[slot]

    def advance(self, most: int) -> None:
        new, failures = self.batch.advance(most), self.batch.failures()
        assert set(new) <= set(self.rows)
        for slot, row in self.rows.items():
            if slot not in new:  # its prompt is being read
                assert row.draws
                assert row.seen == 0
                self.counts["waits"] += 1
                continue
            ids = new[slot]
            assert ids == row.alone.ids[row.seen : row.seen + most]
            row.seen += len(ids)
            fails = row.alone.error is not None and not row.failed and len(ids) < most
            assert str(failures.pop(slot, None)) == str(row.alone.error if fails else None)
            row.failed |= fails
            if row.seen and not row.failed:
                assert self.batch.logits(slot).tobytes() == row.alone.logits[row.seen - 1]
            self.counts.update(["ids"] * len(ids) + ["failures"] * fails)
        assert not failures
        assert self.batch.active == sum(row.draws for row in self.rows.values())

    def do(self, schedule) -> None:
        for step, argument in schedule:
            getattr(self, step)(argument)
        while any(row.draws for row in self.rows.values()):
            self.advance(50)


def random_request(generator: np.random.Generator, config: GPTConfig, most_new: int) -> Request:
    """A prompt with or without a shared beginning, of any length; any settings."""
    texts = base_texts(config.vocab_size)
    text = texts[generator.integers(3)][: generator.integers(config.max_seq_len + 7)]
    text = text + generator.integers(config.vocab_size, size=generator.integers(3)).tolist()
    overflow = OVERFLOW_POLICIES[generator.integers(3)]
    if overflow == "stop":
        text = text[-config.max_seq_len :]
    return request(
        text or [0],
        int(generator.choice([0, 1, 3, 10, most_new])),
        SAMPLINGS[generator.integers(len(SAMPLINGS))],
        seed=int(generator.integers(3)),
        index=int(generator.integers(4)),
        overflow=overflow,
        end=None if generator.random() < 0.7 else int(generator.integers(2)),
    )


def random_schedule(seed: int, config: GPTConfig, most_new: int) -> list[tuple]:
    """20 to 60 steps for `Checker`: more joins than slots, and `advance` by any count."""
    generator = np.random.default_rng(seed)
    schedule: list[tuple] = []
    for _ in range(generator.integers(20, 61)):
        step = ("join", "join", "advance", "advance", "end")[generator.integers(5)]
        if step == "join":
            schedule.append((step, random_request(generator, config, most_new)))
        elif step == "advance":
            schedule.append((step, int(generator.choice([0, 1, 1, 1, 2, 7, 40]))))
        else:
            schedule.append((step, int(generator.integers(9))))
    return schedule


@pytest.fixture
def shared(monkeypatch) -> list[int]:
    """How many tokens each row copied from another's cache instead of reading them."""
    counts, share_cache = [], Memory.share_cache

    def watched(self, first, others, count):
        counts.append(count)
        share_cache(self, first, others, count)
        # With another START the loop would assume a moved window and read all of it again.
        assert (self.slots[others, at.START] >= 0).all()

    monkeypatch.setattr(Memory, "share_cache", watched)
    return counts


def compared(engine, config, examples: int, least_slots: int, most_new: int) -> Counter[str]:
    """Check random schedules; the events of all of them."""
    counts: Counter[str] = Counter()

    @settings(max_examples=examples)
    @given(st.integers(least_slots, 5), st.integers(0, 2**32))
    def check(size, seed):
        checker = Checker(engine, size)
        checker.do(random_schedule(seed, config, most_new))
        counts.update(checker.counts)

    check()
    return counts


CPU_CASES = [
    ("tutorial", "cpu", 1), ("tutorial", "int8", 1), ("modern", "cpu", 1), ("modern", "cpu", 2),
    ("modern", "int8", 1), ("learned", "cpu", 1), ("learned", "int8", 2), ("broken", "cpu", 1),
]  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "kind", "threads"), CPU_CASES)
def test_a_row_is_bitwise_the_same_as_alone(name, kind, threads, shared):
    """While other rows join, leave, fail or share its prompt, in a new or a reused slot.

    With 150 tokens, texts of the tutorial's small window drop their beginnings several times.
    """
    engine = engine_of(name, kind, threads)
    most_new = 150 if name == "tutorial" else 50
    examples = cases(100 if name == "broken" else 60)  # rows that fail are short
    counts = compared(engine, config_of(name), examples, 1, most_new)
    assert counts["ids"] > 1000, "the schedules show too little"
    assert counts["failures"] > 15
    assert name == "tutorial" or len(shared) > 15


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_rows_of_other_engines_are_the_same_as_alone(kind):
    """With the same comparison: all engines have the same interface."""
    counts = compared(engine_of("tutorial", kind), config_of("tutorial"), 40, 1, 30)
    assert counts["ids"] > 300
    assert counts["failures"] > 3


# --- failures ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param(CpuEngine, marks=pytest.mark.kernels), NumpyEngine])
@pytest.mark.parametrize("most", [1, 5])
def test_tokens_drawn_before_a_failure_are_returned(most, kind):
    """Token 1 is drawn first; then it counts as seen, and its penalty overflows."""
    checker = Checker(constant([0.0, 40.0, 1.0], 4, kind), 3)
    checker.join(request([0], 4, seed=1))
    checker.join(request([0], 4, WILD))
    checker.join(request([0], 4, seed=2))
    for _ in range(5):
        checker.advance(most)
    assert checker.counts == {"ids": 9, "failures": 1}
    assert "repetition_penalty=1e-39" in checker.rows[1].alone.error


@every_kind
def test_a_row_whose_logits_are_not_finite_fails_alone(kind):
    """A server's other clients lose no token when one row's logits are NaN."""
    batch = engine_of("broken", kind).open(3)
    slots = [batch.join(request(text, 6, seed=1)) for text in ([1, 2], [1, 5, 2], [3])]
    found = {slot: [] for slot in slots}
    for step in range(6):
        for slot, ids in batch.advance(1).items():
            found[slot] += ids
        failures = batch.failures()
        assert (slots[1] in failures) == (step == 0)
        if step == 0:
            assert "weights are broken" in str(failures[slots[1]])
    assert found[slots[1]] == []
    for slot, text in ((slots[0], [1, 2]), (slots[2], [3])):
        assert found[slot] == alone(engine_of("broken", kind), request(text, 6, seed=1)).ids


# --- long prompts --------------------------------------------------------------------------


@pytest.fixture
def pieces(monkeypatch) -> None:
    """Pieces of a few tokens, as for models so large that these take long to read."""
    monkeypatch.setattr(cpu_batch, "_PIECE_PRODUCTS", 0)
    monkeypatch.setattr(cpu_batch, "_LEAST_PIECE", 7)


@pytest.mark.kernels
def test_a_long_prompt_does_not_keep_others_waiting(pieces):
    """They get tokens at each call; short prompts are read first, those with its beginning wait."""
    text, other, _ = base_texts(5)
    checker = Checker(engine_of("modern"), 6)
    checker.join(request([1], 20))
    checker.advance(1)
    for prompt, new in ((text[:30], 9), (text[:30], 9), (other[:20], 9), ([1, 2], 9)):
        checker.join(request(prompt, new))
    waits = []
    for _ in range(9):
        before = checker.counts["waits"]
        checker.advance(1)
        waits.append(checker.counts["waits"] - before)
    assert waits == [3, 3, 3, 3, 2, 1, 0, 0, 0]


@pytest.mark.kernels
def test_a_long_prompt_is_read_at_once_if_no_row_waits(pieces):
    """Reading stops as soon as the first row can draw."""
    text, other, _ = base_texts(5)
    checker = Checker(engine_of("modern"), 3)
    checker.join(request(text[:30], 9))
    checker.advance(1)
    assert not checker.counts["waits"]
    checker.end(0)
    checker.join(request(other[:30], 9))
    checker.join(request([3, *text[:30]], 9))
    checker.advance(1)
    assert checker.counts["waits"] == 1


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["modern", "learned", "broken"])
def test_reading_in_pieces_changes_no_row(name, pieces, shared):
    """The schedules above, in which rows now wait often."""
    counts = compared(engine_of(name), config_of(name), 80, 2, 50)
    assert counts["ids"] > 700
    assert counts["waits"] > 70
    assert len(shared) > 15


# --- common prefixes -----------------------------------------------------------------------


@pytest.mark.kernels
def test_a_prompt_is_read_once(shared):
    """Once for rows that join at the same time, for later ones, and after all have left."""
    text = base_texts(5)[0][:30]
    checker = Checker(engine_of("modern"), 4)
    for index in range(3):
        checker.join(request(text, 5, index=index))
    checker.advance(1)
    assert shared == [29, 29]
    checker.join(request(text, 5, index=3))
    checker.advance(1)
    assert shared == [29, 29, 29]
    for _ in range(4):
        checker.end(0)
    checker.join(request([*text, 1], 5))
    checker.advance(2)
    assert shared == [29, 29, 29, 30]


@pytest.mark.kernels
def test_only_the_common_beginning_is_copied(shared):
    """Up to the first different token; nothing if it is short, or the window has moved past it."""
    text = base_texts(5)[0]
    checker = Checker(engine_of("learned"), 8)
    checker.join(request(text[:30], 20, seed=3))
    checker.advance(1)
    checker.join(request([*text[:20], (text[20] + 1) % 5, *text[21:30]], 5))
    checker.advance(1)
    assert shared == [20]
    checker.join(request([*text[:10], (text[10] + 1) % 5, *text[11:30]], 5))
    checker.join(request(text[:9], 5))
    checker.advance(1)
    checker.advance(30)
    checker.end(0)
    assert shared == [20]


@pytest.mark.kernels
def test_the_beginning_of_a_moved_window_is_copied(shared):
    """Of a prompt longer than the window the part that the model sees is compared."""
    text = base_texts(5)[0]
    checker = Checker(engine_of("modern"), 2)
    checker.join(request(text[:50], 3))
    checker.advance(1)
    checker.join(request(text[10:45], 3))
    checker.advance(3)
    assert shared == [34]


@pytest.mark.kernels
def test_cached_values_that_are_not_finite_are_not_copied(shared):
    """Tokens in one tile with a broken token became NaN too, and were copied to other rows."""
    text = base_texts(6)[0][:17]
    assert 5 not in text
    checker = Checker(engine_of("broken"), 3)
    checker.join(request([*text, 5, 0], 3))
    checker.join(request([*text, 1, 0], 3))
    checker.advance(3)
    assert checker.counts == {"ids": 3, "failures": 1}


@pytest.mark.kernels
def test_a_penalty_counts_tokens_before_the_window():
    """Only the last tokens of a prompt are kept, but all of them count as seen."""
    greedy = SamplingConfig(0.0, repetition_penalty=2.0)
    checker = Checker(constant([1.0, 3.9, 4.0], 4), 1)
    checker.join(request([2, 0, 0, 0, 0, 0], 1, greedy))
    checker.advance(1)
    assert checker.rows[0].alone.ids == [1]


# --- no memory leaks ----------------------------------------------------------------


@pytest.mark.kernels
@pytest.mark.parametrize("overflow", ["crop", "refill"])
def test_a_text_may_grow_without_limit(overflow):
    """Its buffers keep their size; once each token took more memory."""
    engine = engine_of("tutorial")
    batch = engine.open(2)
    width = batch._memory.text.shape[1]
    one = request([1, 2, 3], 1500, SamplingConfig(1.2), seed=4, overflow=overflow)
    batch.join(one)
    assert batch.advance(1500)[0] == engine.start([one]).advance(1500)[0]
    assert batch._memory.text.shape[1] == width


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CPU, "numpy"])
def test_two_thousand_rows_leak_no_memory(kind):
    """Whether rows had ended, failed, or were freed before their end."""
    engine = engine_of("tutorial", kind)
    batch = engine.open(4)

    def come_and_go(count: int) -> None:
        for n in range(count):
            sampling = SAMPLINGS[n % len(SAMPLINGS)]
            slot = batch.join(request([n % 5] * (1 + n % 30), 1 + n % 3, sampling, seed=n))
            if n % 5:
                batch.advance(1 + n % 2)
            batch.end(slot)

    come_and_go(100)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        text = batch._memory.text.shape if kind == "cpu" else None
        come_and_go(2000)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 30_000
        assert text is None or batch._memory.text.shape == text
    finally:
        tracemalloc.stop()
    assert batch.active == 0


def test_a_row_that_leaves_frees_its_decoding():
    """Its keys and values are freed when it leaves, not when its slot is used again."""
    batch = engine_of("tutorial", "numpy").open(2)
    slot = batch.join(request([1, 2], 5))
    kept = weakref.ref(batch._rows[slot].decoding)
    batch.advance(1)
    batch.end(slot)
    gc.collect()
    assert kept() is None


# --- the interface --------------------------------------------------------------------------

ENGINES = pytest.mark.parametrize("kind", [CPU, INT8, "numpy", "torch"])


@ENGINES
def test_bad_prompts_are_refused_and_take_no_slot(kind):
    """An id below 0 would read memory before the embedding."""
    batch = engine_of("tutorial", kind).open(1)
    for prompt, overflow, message in (
        ([], "crop", "no tokens"),
        ([1, 5], "crop", r"holds id 5.*are 0 to 4"),
        ([-1], "refill", r"holds id -1"),
        ([1] * 13, "stop", r"13 tokens and the window 12"),
        ([9] + [1] * 20, "crop", r"holds id 9"),
    ):
        with pytest.raises(InputError, match=message):
            batch.join(request(prompt, overflow=overflow))
        assert batch.active == 0
    one = request([1, 2], 4, seed=2)
    assert batch.advance(1) == {}
    slot = batch.join(one)
    assert batch.advance(9)[slot] == alone(engine_of("tutorial", kind), one).ids


@ENGINES
def test_slots_are_counted(kind):
    """A free slot is used once; joining without a free slot is the caller's mistake."""
    batch = engine_of("tutorial", kind).open(3)
    assert (batch.size, batch.active) == (3, 0)
    slots = [batch.join(request([1], 2, index=i)) for i in range(2)]
    slots.append(batch.join(request([1], 0)))
    assert sorted(slots) == [0, 1, 2]
    assert batch.active == 2
    with pytest.raises(AssertionError, match="no slot is free"):
        batch.join(request([1], 2))
    assert {slot: len(ids) for slot, ids in batch.advance(1).items()} == dict(
        zip(slots, [1, 1, 0], strict=True)
    )
    batch.end(slots[0])
    assert batch.active == 1
    assert batch.join(request([1], 2)) == slots[0]
    assert set(batch.advance(5)) == set(slots)
    assert batch.active == 0
    assert batch.advance(5) == {slot: [] for slot in slots}


@pytest.mark.kernels
def test_a_row_that_leaves_before_its_first_step_reads_nothing(shared):
    """Its slot can be used again at once, by a prompt with the same beginning."""
    text = base_texts(5)[0][:30]
    checker = Checker(engine_of("modern"), 2)
    checker.join(request(text, 5))
    checker.end(0)
    checker.join(request(text, 5, index=1))
    checker.join(request(text, 5, index=2))
    checker.advance(5)
    assert shared == [29]


@pytest.mark.kernels
def test_logits_are_a_copy():
    """The caller can change and keep them; those of a row without tokens are not another row's."""
    batch = engine_of("tutorial").open(2)
    first = batch.join(request([1, 2], 5))
    batch.advance(1)
    kept = batch.logits(first)
    copy = kept.copy()
    second = batch.join(request([3], 5))
    assert not batch.logits(second).any()
    batch.logits(first)[:] = math.nan
    batch.advance(1)
    assert np.array_equal(kept, copy)
    assert np.isfinite(batch.logits(first)).all()


@pytest.fixture
def two_cores(monkeypatch):
    """The `modern` model's batch on a machine with two cores, and settings of its threads."""

    def opened(size: int, products: int, shortest_s: float) -> CpuBatch:
        monkeypatch.setattr(cpu_batch, "usable_cores", lambda: 2)
        for name, value in (
            ("usable_cores", lambda: 2),
            ("_PRODUCTS_A_THREAD", products),
            ("_SHORTEST_S", shortest_s),
            ("_ONE_THREAD_S", (0.05, 0.05)),
        ):
            monkeypatch.setattr(f"mygpt.cpu.decode.decoding.{name}", value)
        model = model_of("modern")
        return CpuEngine(model.config, arrays_of(model)).open(size)

    return opened


@pytest.mark.kernels
def test_the_number_of_threads_follows_the_work(two_cores):
    """As rows join and leave; the rows' tokens do not change by it."""
    products = 3 * config_of("modern").num_parameters()
    batch, used = two_cores(5, products, 60.0), []  # however busy this machine is
    slots = [batch.join(request([1], 9, seed=1))]
    for rows in (1, 2, 3, 5):
        slots += [batch.join(request([1], 9, index=i)) for i in range(len(slots), rows)]
        batch.advance(1)
        used.append(batch._loop._threads)
    assert used == [1, 1, 2, 2]
    expected = alone(engine_of("modern"), request([1], 9, seed=1)).ids
    assert batch.advance(9)[slots[0]] == expected[4:]


@pytest.mark.kernels
def test_one_thread_decodes_if_other_processes_use_the_cores(monkeypatch, two_cores):
    """Threads without a core made all others wait at every barrier, for seconds in a block."""
    batch = two_cores(1, 1, 0.0)
    slot, found, used = batch.join(request([1], 30, seed=1)), [], []
    for fraction in (1.0, 0.1, 0.1, 1.0, 1.0):
        clock = lambda fraction=fraction: fraction * time.perf_counter()  # noqa: E731
        monkeypatch.setattr("mygpt.cpu.decode.decoding.time.thread_time", clock)
        if len(found) == 3:
            time.sleep(0.06)
        found += batch.advance(1)[slot]
        used.append(batch._loop._threads)
    assert used == [2, 2, 1, 2, 2]
    expected = alone(engine_of("modern"), request([1], 30, seed=1)).ids
    assert found + batch.advance(25)[slot] == expected


# --- the Writer ----------------------------------------------------------------------------

CHARS = CharTokenizer("abcde")


@pytest.mark.parametrize("engine", [CPU, "numpy", "torch"])
def test_a_writers_batch_has_its_samples(engine):
    """Sample i of a seeded request is row i of `complete`, at whatever time it joins."""
    writer = Writer(model_of("tutorial"), CHARS, engine=engine)
    batch = writer.open_batch(2)
    assert isinstance(batch, CpuBatch if engine == "cpu" else SeparateBatch)
    ids = writer.prompt_ids("abc")
    slots = [batch.join(request(ids, 20, seed=5))]
    found = [batch.advance(3)[slots[0]], []]
    slots.append(batch.join(request(ids, 20, seed=5, index=1)))
    new = batch.advance(20)
    found = [a + new[slot] for a, slot in zip(found, slots, strict=True)]
    assert found == [sample.token_ids for sample in writer.complete("abc", 20, 2, seed=5)]


@pytest.mark.kernels
def test_a_writer_opens_a_batch_of_the_engine_for_long_jobs(monkeypatch):
    """Even if the machine code is not compiled yet; and a batch needs at least one slot."""
    monkeypatch.setattr("mygpt.cpu.common.build.has_machine_code", lambda: False)
    writer = Writer(model_of("tutorial"), CHARS)
    assert isinstance(writer.open_batch(1), CpuBatch)
    for size in (0, -1, 1.5, True):
        with pytest.raises(InputError, match=r"size=.* at least 1"):
            writer.open_batch(size)
