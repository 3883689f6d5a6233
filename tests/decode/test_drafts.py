"""Drafts: whatever is guessed, the text is bitwise the one that is decoded without drafts."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

import mygpt
from decoding import (
    SAMPLINGS,
    cases,
    constant,
    counting_model,
    engine,
    model_of,
    random_arrays,
    random_config,
    random_requests,
    request,
    written,
)
from mygpt.core.config import SamplingConfig
from mygpt.cpu.decode import layout as at
from mygpt.cpu.decode.engine import CpuEngine
from mygpt.cpu.decode.speculation import Counts, Drafts, Shown, Speculation, counts_of
from mygpt.decode import choice
from mygpt.decode.draft_table import ORDER, DraftTable, keys_before
from mygpt.errors import CheckpointError, DamagedError, InputError
from mygpt.evaluation.ngram import ngram_losses
from mygpt.tokenization import CharTokenizer
from shell import Shell

CASES = cases(150)
WEIGHTS = ("float32", "int8", "int4")


def repetitive(generator: np.random.Generator, vocab_size: int, length: int) -> np.ndarray:
    """A text that repeats its own passages, so that some drafts are right."""
    words = [generator.integers(vocab_size, size=generator.integers(1, 9)) for _ in range(6)]
    return np.concatenate([words[generator.integers(6)] for _ in range(length)])[:length]


def random_drafts(generator: np.random.Generator, vocab_size: int) -> Drafts:
    """With or without counts, a fixed number of drafts or a measured one."""
    always = [None, 1, 2, 3, 5, at.MOST_DRAFTS_A_PASS][generator.integers(6)]
    if generator.random() < 0.3:
        return Drafts(always=always)
    return DraftTable.count(repetitive(generator, vocab_size, 300), vocab_size).drafts(
        always=always
    )


def assert_same(plain, drafted, row: int) -> None:
    assert plain.logits(row).tobytes() == drafted.logits(row).tobytes()


@pytest.mark.kernels
def test_tokens_and_logits_are_bitwise_those_without_drafts():
    """Random models, requests, policies, filters, threads, weights, drafts, pieces and ends."""
    right = 0
    for case in range(CASES):
        generator = np.random.default_rng(case)
        config = random_config(generator)
        arrays = random_arrays(config, case, spread=generator.choice([0.05, 0.5]))
        options = {"threads": int(generator.integers(1, 3))}
        options["weights"] = WEIGHTS[generator.integers(3)]
        requests = random_requests(generator, config)
        if generator.random() < 0.5:
            requests = [
                replace(one, max_new_tokens=40, prompt=repetitive(generator, config.vocab_size, 30))
                for one in requests[:3]
                if one.overflow != "stop"
            ] or requests
        drafts = random_drafts(generator, config.vocab_size)
        plain = CpuEngine(config, arrays, **options).start(requests)
        drafted = CpuEngine(config, arrays, **options, drafts=drafts).start(requests)
        for _ in range(50):
            count = int(generator.integers(1, 20))
            expected, outcomes = outcome(plain, count), outcome(drafted, count)
            assert expected == outcomes, case
            if isinstance(expected, str) or not any(expected):
                break
            for row in range(len(requests)):
                if expected[row]:
                    assert_same(plain, drafted, row)
        counted = drafted._slots[:, at.ACCEPTED : at.ACCEPTED + at.MOST_DRAFTS_A_PASS]
        right += int(counted.sum())
    assert right > CASES  # the drafts were not all wrong


def outcome(decoding, count: int) -> list[list[int]] | str:
    try:
        return decoding.advance(count)
    except InputError as error:
        return str(error)


@pytest.mark.kernels
def test_requests_that_join_a_batch_get_the_tokens_without_drafts():
    """Rows that join and leave at any time, and texts longer than what a batch keeps of them."""
    model = model_of("modern")
    size, generator = model.config.vocab_size, np.random.default_rng(7)
    for always in (1, 3, 7):
        drafts = DraftTable.count(repetitive(generator, size, 400), size).drafts(always=always)
        batch, found, jobs = engine(model, drafts=drafts).open(3), {}, {}
        waiting = [
            request(
                repetitive(generator, size, 20), 230, SAMPLINGS[n % 4], seed=n, overflow="refill"
            )
            for n in range(7)
        ]
        expected = [written(engine(model), one)[0] for one in waiting]
        while waiting or jobs:
            while waiting and len(jobs) < 3:
                jobs[batch.join(waiting[-1])] = number = len(waiting) - 1
                found[number] = []
                waiting.pop()
            new = batch.advance(int(generator.integers(1, 60)))
            for slot, number in list(jobs.items()):
                found[number] += new[slot]
                if len(found[number]) == 230:
                    batch.end(slot)
                    del jobs[slot]
        assert [found[n] for n in range(7)] == expected


@pytest.mark.kernels
def test_drafts_of_a_text_that_repeats_itself_are_right():
    """A model that always continues a cycle: each pass gives as many tokens as it can."""
    model, prompt = counting_model(9), np.arange(30) % 9
    drafted = CpuEngine(*model, threads=1, drafts=Drafts(always=3)).start(
        [request(prompt, 80, SamplingConfig(temperature=0.0), overflow="refill")]
    )
    plain = written(
        CpuEngine(*model, threads=1),
        request(prompt, 80, SamplingConfig(temperature=0.0), overflow="refill"),
    )
    assert drafted.advance(80) == plain
    assert drafted.passes(0) <= 25  # 20 of 4 tokens, and some where the window moves
    # Every draft was right, so a pass gave one token more than it checked drafts.
    passes, right = counts_of(drafted._slots)
    assert passes @ np.arange(1, len(passes) + 1) == 80
    assert right.sum() == 80 - passes.sum()


@pytest.mark.kernels
def test_a_draft_that_breaks_its_row_changes_nothing():
    """A token whose embedding is infinite: alone it would never be read, as a draft it is."""
    config, arrays = counting_model(6)
    arrays["token_embedding.weight"][5, 0] = np.inf
    arrays["head.weight"][[0, 5]] = np.eye(6)[4], np.zeros(6)  # 0 1 2 3 4 0 ..., never 5
    table = DraftTable.count(np.full(50, 5), 6)  # guesses 5 always
    asked = request([0, 1], 30, SamplingConfig(temperature=0.0), overflow="refill")
    plain = CpuEngine(config, arrays, threads=1).start([asked])
    drafted = CpuEngine(config, arrays, threads=1, drafts=table.drafts(always=3)).start([asked])
    assert plain.advance(30) == drafted.advance(30)
    assert_same(plain, drafted, 0)
    assert drafted._slots[0, [at.DRAWN, at.TRUSTED]].tolist() == [30, 0]


# --- the table -----------------------------------------------------------------------------


def test_the_tables_model_is_the_n_gram_model_of_the_evaluation():
    """Its probabilities give the loss that `ngram_losses` computes, where no context is omitted."""
    generator = np.random.default_rng(1)
    text = repetitive(generator, 5, 400)
    train, test = text[:350], text[350:]
    table = DraftTable.count(train, 5)
    (expected,) = ngram_losses(train, test, 5, (ORDER,))
    found = [-np.log(table.probabilities(text[: 350 + n])[token]) for n, token in enumerate(test)]
    # Contexts that occurred once are omitted from the table: the losses are near, not equal.
    assert abs(np.mean(found) - expected) < 0.05
    assert abs(sum(table.probabilities(text[:200])) - 1) < 1e-5


@pytest.mark.kernels
def test_the_kernels_guess_is_drawn_from_the_tables_probabilities():
    """With the settings and the number that draw the model's own token of that step."""
    generator, size, wrong, right = np.random.default_rng(3), 7, 0, 0
    table = DraftTable.count(repetitive(generator, size, 500), size)
    config, arrays = counting_model(size)
    arrays["head.weight"] *= 0.1  # nearly uniform: all tokens are drawn
    for case in range(160):
        sampling = [s for s in SAMPLINGS if not s.repetition_penalty][case % 3]
        text = generator.integers(size, size=4)  # too short to copy from
        asked = request(text, 9, sampling, seed=case, overflow="refill")
        decoding = CpuEngine(config, arrays, threads=1, drafts=table.drafts(always=1)).start(
            [asked]
        )
        first, second = decoding.advance(1)[0][0], decoding.advance(2)[0][0]
        guessed = table.probabilities(np.append(text, first))
        # A model that predicts this everywhere draws its token number 1 as the guess was drawn.
        guess = written(constant(np.log(guessed)), replace(asked, max_new_tokens=2))[0][1]
        accepted = decoding._slots[0, at.ACCEPTED]
        wrong += accepted != (guess == second)
        right += accepted
    assert wrong <= 1  # where the random number is at the border of two tokens
    assert 20 < right < 140


def test_keys_of_a_context_are_those_that_python_computes_slowly():
    tokens, mask = np.array([3, 1, 4, 1, 5]), 0xFFFFFFFF
    key = 0
    for token in (5, 1, 4):
        key = (key * 0x9E3779B1 + token + 1) & mask
        key = ((key ^ (key >> 16)) * 0x85EBCA6B) & mask
        key = ((key ^ (key >> 13)) * 0xC2B2AE35) & mask
        key ^= key >> 16
    assert keys_before(tokens, np.array([5]), 3).tolist() == [key]


def test_a_table_is_stored_and_read(tmp_path):
    table = DraftTable.count(repetitive(np.random.default_rng(0), 3, 300), 3)
    path = tmp_path / "drafts.safetensors"
    table.save(path, CharTokenizer("abc"))
    again = DraftTable.load(path, CharTokenizer("abc"))
    for name in ("keys", "starts", "followers", "discounts"):
        assert getattr(again, name).tobytes() == getattr(table, name).tobytes()
    assert again.vocab_size == 3
    with pytest.raises(CheckpointError, match="another tokenizer"):
        DraftTable.load(path, CharTokenizer("abd"))
    DraftTable(
        2**20, *(getattr(table, name) for name in ("keys", "starts", "followers", "discounts"))
    ).save(path, CharTokenizer("abc"))
    with pytest.raises(CheckpointError, match="another tokenizer"):  # kernels would write past V
        DraftTable.load(path, CharTokenizer("abc"))


@pytest.mark.parametrize(
    "change",
    [
        {"starts": np.array([0, 2**31], np.uint32)},
        {"starts": np.array([0], np.uint32)},
        {"keys": np.array([[1]], np.uint32)},
        {"keys": np.array([1], np.int64)},
        {"followers": np.array([7 << 8 | 1], np.uint32)},
        {"followers": np.array([1 << 8], np.uint32)},
        {"discounts": np.full((1, 4), np.nan, np.float32)},
        {"discounts": np.zeros((1, 3), np.float32)},
    ],
    ids=str,
)
def test_a_table_that_kernels_could_not_read_safely_is_refused(tmp_path, change):
    """Counts and places of any file are checked: kernels check nothing."""
    sound = {
        "keys": np.array([5], np.uint32),
        "starts": np.array([0, 1], np.uint32),
        "followers": np.array([2 << 8 | 1], np.uint32),
        "discounts": np.zeros((1, 4), np.float32),
    }
    path = tmp_path / "drafts.safetensors"
    DraftTable(3, *sound.values()).save(path, CharTokenizer("abc"))
    DraftTable.load(path, CharTokenizer("abc"))
    DraftTable(3, *(sound | change).values()).save(path, CharTokenizer("abc"))
    with pytest.raises(DamagedError):
        DraftTable.load(path, CharTokenizer("abc"))


def test_a_long_texts_table_stays_small():
    generator = np.random.default_rng(5)
    table = DraftTable.count(generator.integers(60, size=300_000), 60)
    assert table.nbytes < 5 * 2**20


# --- how many drafts ------------------------------------------------------------------------


def chosen(
    seconds, right_of, runs: int = 60, most: int = 100, checked=lambda number, n: n
) -> tuple[list[int], float]:
    """What is chosen where a pass with n drafts takes seconds(n), and the time of a token.

    right_of: the probability that a draft is right where those before it are.
    most: passes of a run.
    checked: how many drafts pass `number` checks of the n that it may.
    """
    speculation, generator = Speculation({}, Shown()), np.random.default_rng(0)
    numbers, took, made, tokens = [], 0.0, 0, 0
    for _ in range(runs):
        passes = min(speculation.choose(False, 1), most)
        drafts = [checked(made + i, speculation.drafts) for i in range(passes)]
        accepted = np.zeros(at.MOST_DRAFTS_A_PASS, np.int64)
        for n in drafts:
            for draft in range(n):
                if generator.random() > right_of:
                    break
                accepted[draft] += 1
        counts = Counts(np.bincount(drafts, minlength=at.MOST_DRAFTS_A_PASS + 1), accepted)
        lasted = sum(seconds(n) for n in drafts)
        speculation.record(False, 1, counts, lasted / 1000)
        numbers.append(speculation.drafts)
        took, made = took + lasted, made + passes
        tokens += passes + int(accepted.sum())
    return numbers, took / tokens


def test_the_number_of_drafts_is_the_one_that_gives_most_tokens_a_second():
    """Free drafts: as many as possible. Dear ones: some, or none."""
    assert chosen(lambda n: 1.0, 0.7)[0][-1] == at.MOST_DRAFTS_A_PASS
    assert chosen(lambda n: 1.0 + 0.1 * n, 0.7)[0][-1] in (3, 5)
    assert chosen(lambda n: 1.0 + 0.9 * n, 0.7)[0][-1] == 0
    assert chosen(lambda n: 1.0 + 0.05 * n, 0.0)[0][-1] == 0


@pytest.mark.parametrize("most", [1, 100])
def test_a_pass_with_fewer_drafts_tells_nothing_about_more(most):
    """Every third pass has none, as before the end of a text; in runs of one pass and of many."""
    how = {"runs": 6000 // most, "most": most, "checked": lambda i, n: n if i % 3 else 0}
    assert chosen(lambda n: 1.0 + 0.9 * n, 0.7, **how)[0][-1] == 0
    assert chosen(lambda n: 1.0 + 0.1 * n, 0.7, **how)[0][-1] in (3, 5)
    assert chosen(lambda n: 1.0, 0.7, **how)[0][-1] == at.MOST_DRAFTS_A_PASS


def test_drafts_that_are_never_right_cost_little():
    _, took = chosen(lambda n: 1.0 + 0.1 * n, 0.0)
    assert took < 1.03


def test_one_slow_measurement_does_not_end_drafts():
    """A process that took the core for a moment: the number is tried again."""
    slow = itertools.chain([False] * 16, [True] * 16, itertools.repeat(False))
    numbers, _ = chosen(lambda n: 100.0 if n and next(slow) else 1.0 + 0.05 * n, 0.8, runs=200)
    assert numbers[-1] >= 3


# --- in use --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has read a text a few times, with the table of its n-grams."""
    folder = tmp_path_factory.mktemp("drafts")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the cat\n" * 40)
    shape = {"embed_dim": 16, "num_heads": 2, "num_layers": 1, "max_seq_len": 64}
    mygpt.train(
        folder / "text.txt", output=folder / "run", steps=30, listener=lambda _: None, **shape
    )
    return folder / "run"


@pytest.mark.kernels
def test_a_run_keeps_its_table_and_texts_are_the_same_without(run, tmp_path, caplog):
    """Also with another text's counts, and with a table that is damaged."""
    how = {"seed": 3, "overflow": "refill", "num_samples": 2}
    (expected, other) = mygpt.load(run, engine="cpu", speculate=False).complete("the", 300, **how)
    assert [one.passes for one in (expected, other)] == [
        len(one.token_ids) for one in (expected, other)
    ]
    table = DraftTable.load(run / "drafts.safetensors", mygpt.load(run).tokenizer)
    assert table.vocab_size == mygpt.load(run).config.vocab_size
    (tmp_path / "other.txt").write_text("the hat on the rat 123\n" * 20)
    for options in ({}, {"drafts_from": tmp_path / "other.txt"}):
        found = mygpt.load(run, engine="cpu", **options).complete("the", 300, **how)
        assert [one.text for one in found] == [expected.text, other.text]
        assert all(0 < one.passes <= len(one.token_ids) for one in found)
    assert not caplog.records
    kept = (run / "drafts.safetensors").read_bytes()
    try:
        (run / "drafts.safetensors").write_bytes(kept[:-3] + b"abc")
        (found, _) = mygpt.load(run, engine="cpu").complete("the", 300, **how)
    finally:
        (run / "drafts.safetensors").write_bytes(kept)
    assert found.text == expected.text
    assert "is damaged" in caplog.text
    assert "generating without it" in caplog.text


@pytest.mark.kernels
def test_samples_and_streams_are_those_without_drafts(run, monkeypatch):
    """Random prompts, numbers of samples, filters, stop strings, log-probabilities and weights."""
    by_table = DraftTable.drafts  # without `always` the number is measured, and may be 0
    monkeypatch.setattr(DraftTable, "drafts", lambda table: by_table(table, always=3))
    monkeypatch.setattr(choice, "_WORTH_DRAFTS", 1)  # by default short texts have none
    text = (run.parent / "text.txt").read_text()
    plain, drafted = (
        [mygpt.load(run, engine="cpu", dtype=weights, speculate=speculate) for weights in WEIGHTS]
        for speculate in (False, True)
    )
    passes = tokens = 0
    reasons = set()
    for case in range(max(20, CASES // 5)):
        generator = np.random.default_rng(case)
        first, length = generator.integers(len(text) - 90), generator.integers(90)
        asked = {
            "prompt": text[first : first + length],
            "max_new_tokens": int(generator.integers(150)),
            "overflow": ["crop", "refill"][generator.integers(2)],
            "stop": [["at on"], ["\n", "dog"], ["xyz", " s"], [], []][generator.integers(5)],
            "seed": int(generator.integers(1000)),
            **SAMPLINGS[generator.integers(len(SAMPLINGS))].__dict__,
        }
        weights = generator.integers(len(WEIGHTS))
        more = {
            "num_samples": int(generator.integers(1, 4)),
            "logprobs": [None, None, None, 0, 3][generator.integers(5)],
        }
        expected = plain[weights].complete(**asked, **more)
        found = drafted[weights].complete(**asked, **more)
        assert found == expected, case
        assert "".join(drafted[weights].stream(**asked)) == expected[0].text, case
        reasons |= {one.finish_reason for one in found}
        passes, tokens = passes + found[0].passes, tokens + len(found[0].token_ids)
    assert {"length", "stop"} <= reasons
    assert passes < tokens  # the drafts were not all wrong


@pytest.mark.kernels
def test_commands_have_the_options_of_drafts(run, capsys, tmp_path):
    shell = Shell(capsys, "generate", "-c", run, "-p", "the", "--seed", 1, "-n", 150)
    text = shell.printed("--engine", "cpu")
    assert shell.printed("--engine", "cpu", "--no-speculate") == text
    assert shell.printed("--engine", "cpu", "--draft-from", run.parent / "text.txt") == text
    sample = json.loads(shell.printed("--engine", "cpu", "--json", "--no-speculate"))
    assert sample["passes"] == len(sample["token_ids"])
    both = shell.refused("--draft-from", run.parent / "text.txt", "--no-speculate")
    assert "--draft-from and --no-speculate exclude each other" in both
    (tmp_path / "empty.txt").write_text("")
    assert "has no text for drafts" in shell.refused("--draft-from", tmp_path / "empty.txt")
    assert "none.txt" in shell.refused("--draft-from", tmp_path / "none.txt")
    info = Shell(capsys, "info")
    assert "n-grams of the training text" in info.printed(run)
    drafts = json.loads(info.printed(run, "--json"))["drafts"]
    assert drafts["bytes"] == (run / "drafts.safetensors").stat().st_size
    assert drafts["tokens_a_pass"] is None or drafts["tokens_a_pass"] >= 1


@pytest.mark.kernels
def test_a_call_may_draw_less_than_it_could_and_nothing_is_lost():
    """As streams ask: at least one token, and more where a pass gives more; to the very end."""
    model, prompt = counting_model(9), np.arange(30) % 9
    for always in (0, 3, 7):
        asked = request(prompt, 61, SamplingConfig(temperature=0.0), overflow="refill")
        engine_ = CpuEngine(*model, threads=1, drafts=Drafts(always=always))
        (expected,) = engine_.start([asked]).advance(61)
        decoding, pieces = engine_.start([asked, replace(asked, max_new_tokens=50)]), []
        while any(new := decoding.advance(8, least=1)):
            pieces.append(new)
        for row, length in enumerate((61, 50)):
            assert [token for new in pieces for token in new[row]] == expected[:length]
        assert max(len(new[0]) for new in pieces) == 1 + always
