"""`generate` and `stream` on ids: the chapter's loop token for token, seeds, windows, refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reference
from decoding import NAMES, SAMPLINGS
from mygpt import GPT, CharTokenizer, Writer, generate, stream
from mygpt.core.generation import CachedDecoder, UncachedDecoder, torch_decoder
from mygpt.errors import InputError
from shapes import CONFIGS, MODERN, TUTORIAL, build, own_forward

model_of = cache(lambda name, seed=0: build(CONFIGS[name], seed, spread=0.7))
OVERFLOWS = ("crop", "refill", "stop")
PROMPT = torch.tensor([[1, 4, 0]])


def prompts(vocab_size: int, batch: int, time: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, time), generator=generator)


class Foreign(nn.Module):
    """A model that is not ours: logits depend on the window it is shown, last token and length."""

    def __init__(self, vocab_size: int = 6, max_seq_len: int = 5):
        super().__init__()
        self.max_seq_len = max_seq_len
        self.table = nn.Parameter(torch.randn(vocab_size, vocab_size))
        self.calls: list[list[list[int]]] = []

    def forward(self, ids):
        self.calls.append(ids.tolist())
        time = torch.arange(1, ids.shape[1] + 1)[:, None]
        means = self.table[ids].cumsum(dim=1) / time
        return means + self.table[ids], {"anything": "at all"}


# --- the chapter's loop --------------------------------------------------------------------


@settings(max_examples=300)
@given(
    name=st.sampled_from(NAMES),
    batch=st.integers(1, 4),
    prompt_length=st.integers(1, 20),
    new=st.integers(0, 14),
    temperature=st.sampled_from([0.05, 0.5, 0.8, 1.0, 1.3, 3.0, 100.0]),
    top_k=st.none() | st.integers(1, 10),
    seed=st.integers(0, 2**32),
)
def test_generate_is_the_chapters_loop(name, batch, prompt_length, new, temperature, top_k, seed):
    """Token for token, inside the window and past it; the global generator ends the same too.

    It draws once a step, for top_k=1 too, where the draw cannot change anything.
    """
    model = model_of(name)
    prompt = prompts(model.config.vocab_size, batch, prompt_length, seed)
    torch.manual_seed(seed)
    expected = reference.chapter_generate(model, prompt, new, temperature, top_k)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    found = generate(model, prompt, new, temperature, top_k)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("options", [{"seed": 4}, {"temperature": 0.0}, {"seed": 4, "top_k": 2}])
def test_seeded_and_greedy_writing_leaves_the_global_generator_alone(options):
    state = torch.get_rng_state()
    generate(model_of("tutorial"), PROMPT, 5, **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-35}])
def test_greedy_is_the_argmax_of_the_full_pass(name, greedy):
    """With the global generator and with a seed, past the window."""
    model = model_of(name)
    prompt = prompts(model.config.vocab_size, 2, 4)
    ids = prompt
    for _ in range(20):
        with torch.no_grad():
            logits, _ = model(ids[:, -model.max_seq_len :])
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, prompt, 20, **greedy), ids)
    assert torch.equal(generate(model, prompt, 20, **greedy, seed=3), ids)


# --- seeds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "greedy", "seen", "k", "p", "all"])
@pytest.mark.parametrize("name", ["tutorial", "modern", "llama"])
def test_seeded_rows_are_the_references(name, sampling, overflow):
    """Plain-Python filters, draws, random numbers and window, a full pass for each token."""
    model = model_of(name)
    window = model.max_seq_len
    for length in (1, window - 2, window) if overflow == "stop" else (1, window - 2, window + 3):
        prompt = prompts(model.config.vocab_size, 2, length)
        found = generate(model, prompt, 17, **vars(sampling), seed=2**40 + 7, overflow=overflow)
        for i in range(2):
            expected = reference.seeded_generate(
                model, prompt[i].tolist(), 17, sampling, 2**40 + 7, i, overflow
            )
            assert found[i].tolist() == expected


def test_seeded_rows_do_not_depend_on_batch_or_neighbours():
    """Row i is the text of (seed, i): alone with its number, in any batch, beside any prompt."""
    model = model_of("modern")
    rows = prompts(5, 4, 6)
    together = generate(model, rows, 20, seed=5)
    assert torch.equal(generate(model, rows[:2], 20, seed=5), together[:2])
    others = torch.cat([rows[:1], prompts(5, 3, 6, seed=8)])
    assert torch.equal(generate(model, others, 20, seed=5)[0], together[0])
    assert not torch.equal(generate(model, rows, 20, seed=6), together)
    same = generate(model, rows[:1].expand(3, -1), 20, seed=5)
    assert len({tuple(row) for row in same.tolist()}) == 3


@pytest.mark.parametrize("options", [{"seed": 5}, {"seed": 5, "overflow": "refill"}, {"top_k": 2}])
def test_stream_yields_what_generate_returns(options):
    model = model_of("tutorial")
    prompt = prompts(5, 3, 7)
    torch.manual_seed(1)
    expected = generate(model, prompt, 15, **options)
    torch.manual_seed(1)
    steps = list(stream(model, prompt, 15, **options))
    assert [tuple(step.shape) for step in steps] == [(3,)] * 15
    assert all(step.dtype == torch.int64 for step in steps)
    assert torch.equal(torch.cat([prompt, torch.stack(steps, dim=1)], dim=1), expected)


def test_stream_works_step_by_step():
    """A token is there when it is asked for, and no work is done ahead of it."""
    model = Foreign()
    steps = stream(model, PROMPT, 10, seed=0)
    assert model.calls == []
    for number in (1, 2, 3):
        next(steps)
        assert len(model.calls) == number


# --- past the window -----------------------------------------------------------------------


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
def test_what_a_foreign_model_is_shown(overflow, window):
    """Each step's input is the reference's part of the text; one call a step."""
    for length in range(1, window + 1 if overflow == "stop" else window + 4):
        model = Foreign(max_seq_len=window)
        prompt = prompts(6, 2, length)
        out = generate(model, prompt, 12, seed=1, overflow=overflow)
        parts = reference.visible_parts(length, 12, window, overflow)
        assert model.calls == [out[:, p.start : p.stop].tolist() for p in parts]
        assert out.shape == (2, length + len(parts))
        assert torch.equal(out[:, :length], prompt)


def test_the_references_windows():
    """The reference itself, by hand: window 4, prompt of 3 and of 6 tokens."""

    def shown(length, overflow):
        return [(p.start, p.stop) for p in reference.visible_parts(length, 6, 4, overflow)]

    assert shown(3, "crop") == [(0, 3), (0, 4), (1, 5), (2, 6), (3, 7), (4, 8)]
    assert shown(3, "refill") == [(0, 3), (0, 4), (3, 5), (3, 6), (3, 7), (6, 8)]
    assert shown(6, "refill") == [(2, 6), (5, 7), (5, 8), (5, 9), (8, 10), (8, 11)]
    assert shown(2, "stop") == [(0, 2), (0, 3)]


# --- which engine --------------------------------------------------------------------------


def test_our_model_is_decoded_with_a_cache_and_others_in_the_plain_loop():
    assert isinstance(torch_decoder(model_of("modern"), 1, "crop"), CachedDecoder)
    assert isinstance(torch_decoder(Foreign(), 1, "crop"), UncachedDecoder)
    assert isinstance(torch_decoder(own_forward(), 1, "crop"), UncachedDecoder)


class Viewing(Foreign):
    """Views its input, which a slice of a longer buffer would forbid, for batches alone."""

    def forward(self, ids):
        return self.table[ids.view(-1)].view(*ids.shape, -1), None


@pytest.mark.parametrize(
    "make",
    [Foreign, own_forward, lambda: Viewing(max_seq_len=30), lambda: build(TUTORIAL).double()],
)
@pytest.mark.parametrize("top_k", [None, 2])
def test_any_module_is_written_from_as_the_chapter_does(make, top_k):
    """Forward returns (logits, anything); a learner's own forward, or number format, is used."""
    torch.manual_seed(2)
    model, prompt = make(), prompts(5, 3, 4)
    torch.manual_seed(3)
    expected = reference.chapter_generate(model, prompt, 15, 0.9, top_k)
    torch.manual_seed(3)
    assert torch.equal(generate(model, prompt, 15, 0.9, top_k), expected)


# --- the model's state ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [Foreign, lambda: build(TUTORIAL), own_forward])
def test_every_module_is_afterwards_in_the_mode_it_was_in(make):
    """A sample written in the middle of training must not switch dropout off from there on."""
    model = make().train()
    next(reversed(list(model.modules()))).eval()  # frozen by its owner
    modes = [module.training for module in model.modules()]
    generate(model, PROMPT, 2)
    assert [module.training for module in model.modules()] == modes
    for _ in stream(model, PROMPT, 2):  # nor between the steps
        assert [module.training for module in model.modules()] == modes
    if isinstance(model, GPT):
        Writer(model, CharTokenizer("abcde"), engine="torch").generate("a", 2)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("make", [Foreign, lambda: build(TUTORIAL), own_forward])
def test_no_rows_give_no_rows(make):
    empty = torch.zeros(0, 3, dtype=torch.int64)
    for options in ({}, {"seed": 1}, {"top_k": 1}):
        out = generate(make(), empty, 4, **options)
        assert out.shape == (0, 7)
        assert out.dtype == torch.int64
        assert [ids.shape for ids in stream(make(), empty, 4, **options)] == [(0,)] * 4


def test_dropout_does_not_act_while_writing():
    model = build(replace(TUTORIAL, dropout=0.5)).train()
    expected = generate(build(TUTORIAL), PROMPT, 15, seed=1)
    assert torch.equal(generate(model, PROMPT, 15, seed=1), expected)


def test_no_gradients_are_tracked_and_those_of_the_caller_still_are():
    """Between the steps of a stream the caller's own gradients still work."""
    model = build(MODERN)
    for ids in stream(model, PROMPT, 3):
        assert torch.is_grad_enabled()
        assert not ids.requires_grad
    assert not generate(model, PROMPT, 3).requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    probe = Foreign()
    seen = []
    probe.register_forward_hook(lambda *args: seen.append(args[2][0].requires_grad))
    generate(probe, PROMPT, 2)
    assert seen == [False, False]


def test_the_prompt_is_not_written_to_and_the_result_not_shared():
    prompt = PROMPT.clone()
    for new in (0, 4):
        out = generate(model_of("tutorial"), prompt, new)
        assert out.shape == (1, 3 + new)
        out.zero_()
        assert torch.equal(prompt, PROMPT)


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [generate, stream])
@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[1, 4, 0], [1, 4]], {}, r"prompt_ids\[1\] has 2 ids and prompt_ids\[0\] 3: rows have"),
        ([1, "4"], {}, r"prompt_ids has '4': ids are whole numbers"),
        ([1, True], {}, r"prompt_ids has True: ids are whole numbers"),
        ([2**70], {}, r"prompt_ids has 1180591620717411303424: ids are"),
        ([1.0], {}, r"prompt_ids has 1.0: ids are whole numbers"),
        ([], {}, "no tokens: start from at least one"),
        ([5], {}, "id 5: this model's ids are 0 to 4"),
        ("abc", {}, r"must be a \(B, T\) int64 tensor, not str: torch.tensor"),
        (None, {}, "int64 tensor, not NoneType"),
        (PROMPT.numpy() / 2, {}, "prompt_ids has numbers of type float"),
        (PROMPT.numpy()[None], {}, r"must be \(B, T\) int64, not \(1, 1, 3\)"),
        (PROMPT[None], {}, r"must be \(B, T\) int64, not \(1, 1, 3\)"),
        (PROMPT.int(), {}, "int64, not .* torch.int32"),
        (PROMPT.float(), {}, "int64, not .* torch.float32"),
        (PROMPT[:, :0], {}, "no tokens: start from at least one"),
        (torch.tensor([[0, 5]]), {}, "id 5: this model's ids are 0 to 4"),
        (torch.tensor([[0, 1], [-1, 2]]), {}, "id -1: this model's ids are 0 to 4"),
        (PROMPT, {"max_new_tokens": -1}, "max_new_tokens=-1 must be a whole number of at least 0"),
        (PROMPT, {"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
        (PROMPT, {"temperature": None}, "temperature=None must be a number"),
        (PROMPT, {"top_p": 0.0}, "top_p=0.0"),
        (PROMPT, {"seed": -1}, "seed=-1"),
        (PROMPT, {"overflow": "wrap"}, "overflow='wrap' .*crop, refill, stop"),
        (torch.zeros(1, 13, dtype=torch.int64), {"overflow": "stop"}, "13 tokens .*window 12"),
    ],
)
def test_wrong_arguments_are_refused_at_once(write, prompt, options, message):
    """By name, value and range; also by `stream`, before its first step is asked for."""
    model = build(TUTORIAL).train()
    with pytest.raises(InputError, match=message) as caught:
        write(model, prompt, **{"max_new_tokens": 3, **options})
    assert isinstance(caught.value, ValueError)
    assert model.training, "a refused call changes nothing"


@pytest.mark.parametrize(
    "prompt",
    [[1, 4, 0], (1, 4, 0), PROMPT[0], PROMPT[0].numpy(), np.array([1, 4, 0], np.uint8),
     [np.int32(1), 4, 0]],
    ids=["list", "tuple", "tensor", "array", "array of bytes", "NumPy's numbers"],
)  # fmt: skip
def test_a_prompt_without_rows_gives_a_text_without_rows(prompt):
    """The ids of its row, whatever they are in."""
    model = build(TUTORIAL).train()
    expected = generate(model, PROMPT, 5, seed=3)
    assert torch.equal(generate(model, prompt, 5, seed=3), expected[0])
    steps = list(stream(model, prompt, 5, seed=3))
    assert [int(step) for step in steps] == expected[0, 3:].tolist()
    assert steps[0].shape == ()
    assert model.training


def test_rows_may_be_lists_and_arrays():
    model, rows = model_of("tutorial"), [[1, 4, 0], [2, 2, 1]]
    expected = generate(model, torch.tensor(rows), 5, seed=3)
    for prompt in (rows, np.array(rows), tuple(map(tuple, rows))):
        assert torch.equal(generate(model, prompt, 5, seed=3), expected)


def test_what_is_no_model_is_refused():
    for model in (None, "runs/poems", nn.Linear(2, 2)):
        with pytest.raises(InputError, match=r"model is a .*: give a GPT, or a torch module"):
            generate(model, PROMPT, 2)


def test_numbers_of_numpy_are_numbers():
    options = {"temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.uint64(7)}
    plain = {"temperature": 0.5, "top_k": 3, "seed": 7}
    model = model_of("tutorial")
    out = generate(model, PROMPT, np.int32(5), **options)
    assert torch.equal(out, generate(model, PROMPT, 5, **plain))


def test_a_broken_model_is_named():
    model = build(TUTORIAL)
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    for options in ({}, {"seed": 0}, {"temperature": 0.0}, {"top_k": 1}):
        with pytest.raises(InputError, match="NaN or infinity"):
            generate(model, PROMPT, 2, **options)
