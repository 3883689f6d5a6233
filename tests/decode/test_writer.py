"""`Writer`: stop strings, streaming, ends, log-probabilities and samples, in text."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import reference
from mygpt import GPT, ByteTokenizer, CharTokenizer, GPTConfig, Writer, generate
from mygpt.errors import InputError, UnknownTokenError
from shapes import build

CHARS = CharTokenizer("abc\n")
WITH_END = CharTokenizer("abc", end_of_text=True)
SHAPE = {"embed_dim": 8, "num_heads": 2, "num_layers": 1, "max_seq_len": 16}


class PieceTokenizer(CharTokenizer):
    """Tokens of several characters, as a BPE has them: stop strings begin and end inside them."""

    def __init__(self):
        super().__init__("abcdefg")
        self.tokens = [b"a", b"b", b"c", b"ab", b"bca", b"cab", b"aab"]


@cache
def writer(kind: str = "char", seed: int = 0) -> Writer:
    tokenizer = {
        "char": CHARS,
        "end": WITH_END,
        "pieces": PieceTokenizer(),
        "byte": ByteTokenizer(),
    }[kind]
    return Writer(build(GPTConfig(tokenizer.vocab_size, **SHAPE), seed, 0.3), tokenizer)


class Scripted(GPT):
    """Predicts the bytes of a script one after the other, and end-of-text (or `!`) after them."""

    def forward(self, ids, targets=None):
        place = ids.shape[1] - 1
        wanted = self.script[place] if place < len(self.script) else ord("!")
        logits = torch.zeros(*ids.shape, 257)
        logits[..., wanted] = 100.0
        return logits, None


def scripted(script: bytes | list[int]) -> Writer:
    model = Scripted(257, 8, 1, 1, max_seq_len=200)
    model.script = list(script)
    return Writer(model, ByteTokenizer())


def cut_at_stop(pieces: list[str], stop: list[str]) -> tuple[str, bool]:
    """The naive definition: token after token; up to the first stop string there is."""
    text = ""
    for piece in pieces:
        text += piece
        found = [text.find(s) for s in stop if s in text]
        if found:
            return text[: min(found)], True
    return text, False


# --- stop strings and streaming ------------------------------------------------------------

stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@settings(max_examples=150)
@given(st.sampled_from(["char", "pieces"]), st.integers(0, 2**20), stops, st.integers(0, 25))
def test_text_ends_before_the_first_stop_string(kind, seed, stop, new):
    """Across the borders of tokens too; tokens are drawn no further than the stop."""
    w = writer(kind)
    options = {"seed": seed, "temperature": 2.0}
    whole = w.complete("ab", new, **options)[0]
    pieces = [w.tokenizer.token_text(i) for i in whole.token_ids]
    assert len(pieces) == new
    expected, stopped = cut_at_stop(pieces, stop)
    found = w.complete("ab", new, stop=stop, **options)[0]
    assert found.text == expected
    assert found.finish_reason == ("stop" if stopped else "length")
    assert found.token_ids == whole.token_ids[: len(found.token_ids)]
    assert not any(s in found.text for s in stop)
    if stopped:  # one token fewer has no stop string yet
        assert not cut_at_stop(pieces[: len(found.token_ids) - 1], stop)[1]


@pytest.mark.slow
@settings(max_examples=100)
@given(st.sampled_from(["char", "pieces", "byte"]), st.integers(0, 2**20), stops)
def test_streamed_pieces_are_the_text_and_are_final(kind, seed, stop):
    """Joined they are the completion's text, so nothing of a stop string was ever shown."""
    options = {"seed": seed, "temperature": 2.0, "stop": stop}
    w = writer(kind)
    pieces = list(w.stream("ab", 25, **options))
    assert all(pieces)
    assert "".join(pieces) == w.complete("ab", 25, **options)[0].text
    assert w.generate("ab", 25, **options) == "ab" + "".join(pieces)


def test_the_leftmost_of_two_stop_strings_counts():
    w = writer("pieces")
    vocab_size = w.tokenizer.vocab_size
    w = Writer(Scripted(vocab_size, 8, 1, 1, max_seq_len=50), w.tokenizer)
    w.model.script = [0, 4]  # "a", then "bca"
    found = w.complete("a", 5, temperature=0, stop=["ca", "bc"])[0]
    assert (found.text, found.token_ids, found.finish_reason) == ("a", [0, 4], "stop")


def test_streaming_works_step_by_step():
    """The first piece is there before the second token was drawn."""
    w = scripted(b"abcdef")
    seen = []
    w.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    pieces = w.stream("?", 6, temperature=0)
    assert seen == []
    assert next(pieces) == "a"
    assert seen == [1]


def test_nothing_is_computed_after_the_end():
    """Neither past a stop string nor past end-of-text, when all samples have ended."""
    for script, stop in (([*b"abc"], ["b"]), ([97, 256, 99], [])):
        w = scripted(script)
        calls = []
        w.model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        w.complete("?", 50, 3, temperature=0, stop=stop)
        assert len(calls) == 2


@pytest.mark.slow
@given(st.text(max_size=12))
@example("aé€😀ü!")
def test_streaming_shows_whole_characters_alone(text):
    """Bytes of one to four to a character; a piece never ends inside one."""
    w = scripted(text.encode())
    assert list(w.stream("?", len(text.encode()), temperature=0)) == list(text)


# --- ends ----------------------------------------------------------------------------------


END = ByteTokenizer.end_of_text
SCRIPTS = [
    # Text that can no longer be part of a stop string is streamed at once.
    (b"xabyabcz", 8, ["abc"], ["x", "aby"], "stop"),
    # At the end, what was held back is text after all.
    (b"xyaab", 5, ["abc", "aac"], ["x", "y", "a", "ab"], "length"),
    ([*b"xab", END], 9, ["abc"], ["x", "ab"], "end"),
    ([120, 0xE2, 0x82, END], 9, [], ["x", "\ufffd"], "end"),
    # End-of-text is not shown.
    ([*b"ab", END, *b"cd"], 9, [], ["a", "b"], "end"),
    # Several bytes to a character; one that is cut off is a replacement character.
    ("año €€ fin".encode(), 50, ["€€"], [*"año "], "stop"),
    ("a€".encode(), 1, [], ["a"], "length"),
    ("a€".encode(), 2, [], ["a", "\ufffd"], "length"),
    ("a€".encode(), 3, [], ["a", "\ufffd"], "length"),
    ("a€".encode(), 4, [], ["a", "€"], "length"),
]


@pytest.mark.parametrize(("script", "new", "stop", "pieces", "reason"), SCRIPTS)
def test_pieces_texts_and_reasons_of_scripts(script, new, stop, pieces, reason):
    w, options = scripted(script), {"temperature": 0, "stop": stop}
    assert list(w.stream("?", new, **options)) == pieces
    found = w.complete("?", new, **options)[0]
    assert (found.text, found.finish_reason) == ("".join(pieces), reason)
    read = script.index(END) + 1 if END in [*script] else min(new, len(script))
    assert found.token_ids == [*script][: len(found.token_ids)]
    assert reason == "stop" or len(found.token_ids) == read


def test_finish_reasons():
    """A full window ends under "stop" alone; as many tokens as asked for is "length"."""
    w = writer("char")
    cases = [
        ({"max_new_tokens": 0}, "length", 0),
        ({"max_new_tokens": 40}, "length", 40),
        ({"max_new_tokens": 40, "overflow": "refill"}, "length", 40),
        ({"max_new_tokens": 40, "overflow": "stop"}, "window", 14),
        ({"max_new_tokens": 14, "overflow": "stop"}, "length", 14),
    ]
    for options, reason, length in cases:
        found = w.complete("ab", seed=1, **options)[0]
        assert (found.finish_reason, len(found.token_ids)) == (reason, length), options


def test_rows_that_ended_do_not_hold_up_the_others_nor_change():
    """Each sample is what it is alone, whenever the others end."""
    w = writer("end")
    options = {"seed": 3, "temperature": 1.5, "stop": ["ab"], "logprobs": 2}
    samples = w.complete("a", 30, 8, **options)
    assert len({s.finish_reason for s in samples}) > 1, "a case that shows nothing"
    assert len({len(s.token_ids) for s in samples}) > 2
    for n in range(1, 8):
        assert_same(w.complete("a", 30, n, **options), samples[:n])


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        for name in ("text", "token_ids", "finish_reason", "seed", "index", "prompt"):
            assert getattr(one, name) == getattr(other, name)
        logprobs = [entry.logprob for entry in one.logprobs]
        assert logprobs == pytest.approx([entry.logprob for entry in other.logprobs], abs=1e-5)


def test_sample_i_is_the_text_of_seed_and_i():
    """The same tokens as `generate` with that seed in row i."""
    w = writer("char")
    samples = w.complete("ab", 20, 4, seed=9, temperature=0.8, top_k=3)
    assert [s.index for s in samples] == [0, 1, 2, 3]
    assert {s.seed for s in samples} == {9}
    prompt = torch.tensor([[0, 1]] * 4)
    rows = generate(w.model, prompt, 20, 0.8, 3, seed=9)[:, 2:]
    assert [s.token_ids for s in samples] == rows.tolist()
    assert [s.text for s in samples] == [CHARS.decode(row) for row in rows]


def test_a_fresh_seed_is_returned_and_reproduces_the_text():
    w = writer("char")
    first = w.complete("ab", 20)[0]
    assert w.complete("ab", 20, seed=first.seed)[0] == first
    assert w.complete("ab", 20)[0].seed != first.seed


@pytest.mark.parametrize("overflow", ["crop", "refill", "stop"])
def test_options_reach_the_sampler(overflow):
    """Each of them, by the tokens they give."""
    w = writer("char")
    options = {
        "temperature": 1.3,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "seed": 5,
        "overflow": overflow,
    }
    expected = generate(w.model, torch.tensor([[0, 1]]), 30, **options)[0, 2:]
    assert w.complete("ab", 30, **options)[0].token_ids == expected.tolist()


# --- log-probabilities ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 3])
def test_logprobs_are_those_of_the_model_before_any_filter(number):
    """Log-softmax of the raw logits of a full pass, in nats, the most probable first."""
    w = writer("char")
    found = w.complete("ab", 12, seed=2, temperature=0.4, top_k=2, logprobs=number)[0]
    ids = torch.tensor([[0, 1, *found.token_ids]])
    with torch.no_grad():
        logits, _ = w.model(ids)
    assert len(found.logprobs) == 12
    for step, entry in enumerate(found.logprobs):
        expected = torch.tensor(reference.softmax(logits[0, 1 + step].tolist())).log()
        assert entry.id == found.token_ids[step]
        assert entry.text == CHARS.chars[entry.id]
        assert entry.logprob == pytest.approx(float(expected[entry.id]), abs=1e-4)
        best = reference.most_probable_first(expected.tolist())[:number]
        assert [text for text, _ in entry.top] == [CHARS.chars[i] for i in best]
        assert [value for _, value in entry.top] == pytest.approx(expected[best].tolist(), abs=1e-4)


def test_logprobs_are_returned_only_if_requested_and_change_nothing():
    w = writer("char")
    plain = w.complete("ab", 12, seed=2)[0]
    assert plain.logprobs is None
    assert w.complete("ab", 12, seed=2, logprobs=4)[0].text == plain.text


# --- prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "start"),
    [(ByteTokenizer(), 256), (WITH_END, 3), (CHARS, 3), (CharTokenizer("xyz"), 0)],
    ids=["end-of-text of bytes", "end-of-text of characters", "newline", "neither"],
)
def test_an_empty_prompt_starts_where_a_text_starts(tokenizer, start):
    """End-of-text, else a newline, else the first token; none of it is in the text."""
    model = build(GPTConfig(tokenizer.vocab_size, **SHAPE))
    w = Writer(model, tokenizer)
    assert w.prompt_ids("") == [start]
    found = w.complete("", 10, seed=0)[0]
    expected = generate(model, torch.tensor([[start]]), 10, seed=0)[0, 1:]
    assert found.token_ids == expected.tolist()[: len(found.token_ids)]
    assert w.generate("", 10, seed=0) == found.text


def test_a_prompt_longer_than_the_window_is_cropped():
    w = writer("char")
    long, short = "abcab" * 10, ("abcab" * 10)[-16:]
    assert w.complete(long, 9, seed=1)[0].text == w.complete(short, 9, seed=1)[0].text
    with pytest.raises(InputError, match=r"prompt has 50 tokens and the window 16"):
        w.complete(long, 9, overflow="stop")


def test_unknown_characters_of_a_prompt_are_listed():
    with pytest.raises(UnknownTokenError) as caught:
        writer("char").generate("abXcY")
    assert isinstance(caught.value, KeyError)
    assert "'X' 'Y'" in str(caught.value)
    assert "first at position 2" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples=0 must be a whole number of at least 1"),
        ({"num_samples": 1.5}, "num_samples=1.5"),
        ({"stop": "ab"}, "stop must be a list of strings"),
        ({"stop": ["ab", ""]}, "at least one character"),
        ({"stop": [3]}, "stop must be a list of strings"),
        ({"logprobs": -1}, "logprobs=-1 must be a whole number of at least 0"),
        ({"logprobs": "2"}, "logprobs='2' must be a whole number"),
        ({"topk": 3}, r"unknown option topk: did you mean top_k\?"),
        ({"logprobs": 5}, "logprobs=5 must be at most the vocabulary's size, 4"),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"overflow": "wrap"}, "overflow='wrap'"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    """By `stream` too, before its first piece is asked for."""
    w = writer("char")
    with pytest.raises(InputError, match=message):
        w.complete("ab", **options)
    if "num_samples" not in options:
        with pytest.raises(InputError, match=message):
            w.stream("ab", **options)


@pytest.mark.parametrize("prompt", [None, 3, b"ab", ["a", 3]])
def test_a_prompt_that_is_no_text_is_refused(prompt):
    with pytest.raises(InputError, match=r"prompt=.* must be text"):
        writer("char").generate(prompt)


def test_a_list_of_prompts_gives_a_list_of_what_each_gives_alone():
    """Of any lengths, with several samples each, streams and log-probabilities included."""
    w, prompts = writer("pieces"), ["ab", "", "abcabcabcabcabcabcabcabc", "ab"]
    options = {"seed": 4, "temperature": 1.5, "stop": ["ca"], "logprobs": 2}
    found = w.complete(prompts, 12, 3, **options)
    for samples, prompt in zip(found, prompts, strict=True):
        assert_same(samples, w.complete(prompt, 12, 3, **options))
    texts = w.generate(tuple(prompts), 12, seed=4)
    assert texts == [w.generate(prompt, 12, seed=4) for prompt in prompts]
    assert w.generate([]) == []
    seeds = {samples[0].seed for samples in w.complete(["ab", "ab"], 12)}
    assert len(seeds) == 2
    with pytest.raises(InputError, match="a stream continues one prompt"):
        w.stream(prompts)


def test_repr_says_what_it_is():
    count = writer("char").model.config.num_parameters()
    assert repr(writer("char")) == (
        f"Writer({count:,} parameters, window 16, char tokens, vocabulary 4)"
    )


def test_a_tokenizer_of_another_model_is_refused():
    with pytest.raises(InputError, match="the tokenizer has 257 ids and the model 9"):
        Writer(GPT(9, 8, 1, 1), ByteTokenizer())
