"""POST /api/inside: its numbers are those of `Writer.inside` and of `Writer.ablated`.

Letters: N blocks, H heads, T time.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mygpt import GPT, Writer
from mygpt.evaluation.head_scores import KINDS
from mygpt.evaluation.inside_values import contribution_list
from servers import CHARS, client, tiny_writer
from shapes import CONFIGS, build, own_forward

pytestmark = pytest.mark.kernels

IDS = [0, 1, 2, 0, 1, 0, 3, 0, 1]
WRITER = tiny_writer()


@pytest.fixture(scope="module")
def api():
    with client(WRITER) as made:
        yield made


def ask(api, ids: list[int] = IDS, **options) -> dict:
    answer = api.post("/api/inside", json={"ids": ids, **options})
    assert answer.status_code == 200, answer.text
    return answer.json()


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64))
    return powers / powers.sum(-1, keepdims=True)


def greedy(model: GPT, ids: list[int], count: int) -> list[int]:
    """The loop of section 15.1 with the most probable token."""
    text = list(ids)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([text[-model.max_seq_len :]]))[0][0, -1]
        text.append(int(logits.argmax()))
    return text[len(ids) :]


@pytest.mark.parametrize("position", [None, 3])
@pytest.mark.parametrize("ablate", [[], ["1.2", "mlp2"]])
def test_lens_and_contributions_are_those_of_the_writer(api, position, ablate):
    """Of the token that follows, or else of the one that the complete model finds likeliest."""
    found = ask(api, position=position, ablate=ablate)
    at = len(IDS) - 1 if position is None else position
    whole, expected = WRITER.inside(IDS), WRITER.ablated(*ablate).inside(IDS)
    token = IDS[at + 1] if position is not None else int(whole.logits[-1].argmax())
    assert found["token"] == {"id": token, "text": WRITER.tokenizer.token_text(token)}
    assert (found["start"], found["position"]) == (0, at)
    lens = expected.lens(at)[::2]
    assert [row["name"] for row in found["lens"]] == ["embedding", "block1", "block2"]
    for row, logits in zip(found["lens"], lens, strict=True):
        probs = softmax(logits)
        order = sorted(range(len(probs)), key=lambda i: -probs[i])
        assert [i for i, _, _ in row["top"]] == order
        assert [p for _, _, p in row["top"]] == pytest.approx([probs[i] for i in order], abs=1e-5)
        assert row["probability"] == pytest.approx(probs[token], abs=1e-5)
        assert row["rank"] == order.index(token) + 1
    parts, values = expected.contributions(token, at), dict(found["contributions"])
    assert found["logit"] == pytest.approx(parts.logit, abs=1e-5)
    assert sum(values.values()) == pytest.approx(found["logit"], abs=1e-4)
    assert found["total"] == pytest.approx(parts.total, abs=1e-5)
    assert values["embedding"] == pytest.approx(parts.embedding, abs=1e-5)
    assert values["1.2"] == pytest.approx(parts.heads[0, 1], abs=1e-5)
    assert values["mlp2"] == pytest.approx(parts.mlps[1], abs=1e-5)
    if ablate:
        assert (values["1.2"], values["mlp2"]) == (0, 0)
    np.testing.assert_allclose(found["attention"], expected.attention, atol=0.00501)


def test_another_token_can_be_chosen(api):
    found = ask(api, position=2, token=3)
    parts = WRITER.inside(IDS).contributions(3, 2)
    assert found["token"]["id"] == 3
    assert dict(found["contributions"])["2.1"] == pytest.approx(parts.heads[1, 0], abs=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixed", "rotary_layer_norm"])
def test_the_named_contributions_add_up_for_every_kind_of_block(name):
    """No part of the sum is without a name."""
    config = CONFIGS[name]
    ids = [n % config.vocab_size for n in range(7)]
    tokenizer = tiny_writer().tokenizer
    inside = Writer(build(config), Sized(tokenizer, config.vocab_size)).inside(ids)
    found = inside.contributions()
    values = [value for _, value in contribution_list(found, config)]
    assert sum(values) == pytest.approx(found.total, abs=1e-9)


class Sized:
    """A tokenizer's attributes with another size of the vocabulary."""

    def __init__(self, tokenizer, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)


def test_the_loss_the_next_token_and_the_continuation_are_with_and_without(api):
    found = ask(api, ablate=["mlp1", "1.1", "mlp1"])
    change, without = found["ablation"], WRITER.ablated("1.1", "mlp1")
    assert change["parts"] == ["1.1", "mlp1"]
    assert found["loss"] == pytest.approx(WRITER.inside(IDS).loss, abs=1e-5)
    assert change["loss"] == pytest.approx(without.inside(IDS).loss, abs=1e-5)
    assert change["loss"] != pytest.approx(found["loss"], abs=0.01)
    before, after = (softmax(w.inside(IDS).logits[-1]) for w in (WRITER, without))
    for i, text, p, q in change["next"]:
        assert text == CHARS.token_text(i)
        assert (p, q) == pytest.approx((before[i], after[i]), abs=1e-5)
    assert [i for i, *_ in change["next"]] == sorted(range(4), key=lambda i: -before[i])
    assert change["others"] == pytest.approx([0, 0, 0], abs=1e-9)
    for part, writer in ((found, WRITER), (change, without)):
        ids = [token["id"] for token in part["continuation"]]
        assert ids == greedy(writer.model, IDS, 16), "also past the window of 16"


def test_without_a_change_there_is_no_comparison(api):
    for found in (ask(api), ask(api, ablate=None), ask(api, other="ab")):
        assert not {"ablation", "patch"} & set(found)


@pytest.mark.parametrize("parts", [["1.2"], ["mlp1", "attention2"], ["block1"]])
@pytest.mark.parametrize("position", [None, 5])
def test_patches_are_those_of_the_writer(api, parts, position):
    text = "cabbaabca"
    source = WRITER.inside(text)
    expected = WRITER.inside(IDS, [source.patch(part, position) for part in parts])
    found = ask(api, patch=parts, other=text, patch_position=position)
    change = found["patch"]
    assert change["parts"] == sorted(parts)
    assert change["loss"] == pytest.approx(expected.loss, abs=1e-5)
    assert found["loss"] == pytest.approx(WRITER.inside(IDS).loss, abs=1e-5)
    after = softmax(expected.logits[-1])
    for i, _, _, probability in change["next"]:
        assert probability == pytest.approx(after[i], abs=1e-5)
    assert "continuation" not in change
    if parts == ["block1"]:
        assert (found["contributions"], found["total"]) == (None, None)
    else:
        assert found["total"] == pytest.approx(found["logit"], abs=1e-4)


def test_a_patch_of_a_text_longer_than_the_window_is_of_its_last_positions(api):
    ids, text = [0, 1, 2, 3] * 5, "abca" * 5
    source = WRITER.inside(WRITER.prompt_ids(text)[4:])
    expected = WRITER.inside(ids[4:], [source.patch("1.1", 15 - 2)])
    found = ask(api, ids, patch=["1.1"], other=text, patch_position=17)
    assert found["patch"]["loss"] == pytest.approx(expected.loss, abs=1e-5)


def test_heads_have_the_kind_with_the_largest_relative_score(api):
    relative = WRITER.head_scores().relative
    for block, heads in enumerate(ask(api)["names"]):
        for head, (kind, score) in enumerate(heads):
            scores = {KINDS[name]: float(relative[name][block, head]) for name in KINDS}
            assert kind == max(scores, key=scores.__getitem__)
            assert score == pytest.approx(scores[kind], abs=1e-4)


def test_only_the_last_positions_are_read(api):
    """At most the window, whose last positions `start` counts from."""
    ids = [0, 1, 2, 3] * 5
    found = ask(api, ids)
    assert (found["start"], found["position"]) == (4, 19)
    assert found["loss"] == pytest.approx(WRITER.inside(ids[4:]).loss, abs=1e-5)
    wide = tiny_writer(max_seq_len=300)
    with client(wide) as other:
        assert ask(other, ids * 10)["start"] == 200 - 128
        assert np.array(ask(other, ids * 10)["attention"]).shape == (2, 2, 32, 32)


def test_one_token_has_no_loss(api):
    found = ask(api, [0], ablate=["1.1"])
    assert found["loss"] is None
    assert found["ablation"]["loss"] is None


def test_a_window_of_one_token_has_no_names_of_heads():
    with client(tiny_writer(max_seq_len=1)) as api:
        assert ask(api, [0, 1])["names"] is None


def test_what_did_not_change_is_not_computed_again(monkeypatch):
    """A change of the position or the token runs no model, another ablation one pass."""
    from mygpt.evaluation import head_scores, inside

    calls = []
    for module, name in ((inside, "read_activations"), (head_scores, "measure_heads")):
        monkeypatch.setattr(module, name, counted(calls, getattr(module, name)))
    with client(tiny_writer()) as api:
        ask(api)
        assert sorted(calls) == ["measure_heads", "read_activations"]
        ask(api, position=2, token=1)
        assert len(calls) == 2
        ask(api, ablate=["1.1"])
        ask(api, ablate=["1.1"], position=0)
        assert calls[2:] == ["read_activations"]
        ask(api, [0, 1], ablate=["1.1"])
        assert calls[3:] == ["read_activations"] * 2


def test_only_blocks_after_a_change_are_run(monkeypatch):
    """An ablation or a patch of the last block ran all blocks."""
    from mygpt.evaluation import activations

    blocks: list[str] = []
    monkeypatch.setattr(activations, "_attend", counted(blocks, activations._attend))
    with client(tiny_writer()) as api:
        ask(api)
        blocks.clear()
        ask(api, ablate=["2.1"])
        assert len(blocks) == 1
        for position in (None, 1):
            ask(api, patch=["mlp2"], other="abcaabcab", position=position)
        assert len(blocks) == 1 + 2 + 1, "the second text, then the last block of the first, once"


@pytest.mark.parametrize("window", [16, 32])
def test_the_continuation_of_a_large_model_reads_only_new_tokens(monkeypatch, window):
    """Within the window: past it, each token changes all positions."""
    read = []
    forward = GPT.forward

    def counted_forward(self, ids, *args, **options):
        read.append(ids.shape[1])
        return forward(self, ids, *args, **options)

    writer = tiny_writer(max_seq_len=window)
    expected = {part: greedy(writer.ablated(part).model, IDS, 16) for part in ("1.2", "mlp2")}
    for limit in ("_WORTH_KEYS", "_WORTH_SHARING"):
        monkeypatch.setattr(f"mygpt.server.inside.{limit}", 0)
    monkeypatch.setattr(GPT, "forward", counted_forward)
    with client(writer) as api:
        for part, ids in expected.items():
            found = ask(api, ablate=[part])["ablation"]["continuation"]
            assert [token["id"] for token in found] == ids
    assert read == ([1] * 15 if window == 32 else [1] * 7 + [16] * 8) * 3


def counted(calls: list[str], function):
    def call(*args, **options):
        calls.append(function.__name__)
        return function(*args, **options)

    return call


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "the field ids is missing"),
        ({"ids": []}, "expected list of length >= 1"),
        ({"ids": [4]}, "4"),
        ({"ids": IDS, "position": 9}, "position=9 must be 0 to 8: other tokens are not read"),
        ({"ids": IDS, "position": -1}, "expected integer >= 0"),
        ({"ids": [0] * 20, "position": 3}, "position=3 must be 4 to 19"),
        ({"ids": IDS, "token": 4}, "token=4 must be 0 to 3"),
        ({"ids": IDS, "ablate": ["3.1"]}, "'3.1' is not a part of this model: choose a head from"),
        ({"ids": IDS, "ablate": ["<b>"]}, "'<b>' is not a part of this model"),
        ({"ids": IDS, "ablate": "1.1"}, "expected list"),
        ({"ids": IDS, "ablate": [1.1]}, "expected string"),
        ({"ids": IDS, "ablate": ["1.1"] * 513}, "expected list of length <= 512"),
        ({"ids": IDS, "patch": ["1.9"]}, "'1.9' is not a part of this model"),
        ({"ids": IDS, "patch": ["1.1"], "other": "ab"}, "has 2 tokens and the first 9: a patch"),
        ({"ids": [0], "patch": ["1.1"], "other": "é"}, "'é'"),
        ({"ids": [0], "patch": ["1.1"], "ablate": ["1.2"]}, "cannot be combined: send one"),
        ({"ids": IDS, "patch_position": 9}, "patch_position=9 must be 0 to 8"),
        ({"ids": IDS, "path": []}, "unknown field"),
    ],
)
def test_wrong_requests_get_one_clear_line(api, body, message):
    answer = api.post("/api/inside", json=body)
    assert answer.status_code == 400
    found = answer.json()["error"]["message"]
    assert message in found
    assert "\n" not in found


def test_models_that_cannot_be_shown_get_one_clear_line():
    """A model with its own forward, and one with weights that are not finite."""
    model = own_forward()
    with client(Writer(model, Sized(CHARS, model.config.vocab_size))) as api:
        answer = api.post("/api/inside", json={"ids": [0, 1]})
    assert (answer.status_code, "its own forward" in answer.text) == (400, True)
    broken = tiny_writer()
    with torch.no_grad():
        broken.model.token_embedding.weight[1] = math.nan
    with client(broken) as api:
        answer = api.post("/api/inside", json={"ids": [0, 1]})
    assert (answer.status_code, "not finite" in answer.text) == (400, True)


def test_the_response_has_the_documents_fields(api):
    schemas = api.get("/openapi.json").json()["components"]["schemas"]
    required = schemas["Inside"]["required"]
    assert set(ask(api)) == set(required)
    changes = {"ablation": {"ablate": ["block1"]}, "patch": {"patch": ["1.1"], "other": "a" * 9}}
    for name, options in changes.items():
        found = ask(api, **options)
        assert set(found) == {*required, name}
        assert set(schemas["Change"]["required"]) <= set(found[name])
    assert {*required, *changes} == set(schemas["Inside"]["properties"])
