"""The activations of a forward pass: lens, contributions, attention and patches.

Letters: T time, N blocks, H heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from mygpt import GPT, CharTokenizer, Writer
from mygpt.checkpoint.model_file import read_checkpoint, save_checkpoint
from mygpt.core.kv_cache import KVCache
from mygpt.decode.numpy_network import Network
from mygpt.decode.packing import arrays_of
from mygpt.errors import InputError
from mygpt.evaluation.ablation import Part, ablated
from mygpt.evaluation.inside import read_activations
from shapes import CONFIGS, GPT2, LLAMA, MODERN, OwnForward, build, own_forward

configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def some_ids(config, seed: int = 0) -> list[int]:
    time = min(7, config.max_seq_len)
    return np.random.default_rng(seed).integers(0, config.vocab_size, time).tolist()


def forward(model: GPT, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0][0].numpy()


@configs
def test_the_pass_is_the_models_own(config):
    model, ids = build(config), some_ids(config)
    inside = read_activations(model, ids)
    np.testing.assert_allclose(inside.logits, forward(model, ids), atol=1e-5)
    n, t = config.num_layers, len(ids)
    assert inside.residual.shape == (2 * n + 1, t, config.embed_dim)
    assert inside.heads.shape == (n, config.num_heads, t, config.head_size)
    assert inside.keys.shape == inside.values.shape == (n, config.kv_heads, t, config.head_size)
    assert inside.mlps.shape == (n, t, config.embed_dim)
    assert {array.dtype for array in (inside.logits, inside.residual, inside.heads)} == {
        np.dtype(np.float32)
    }


def test_dropout_is_off_and_the_mode_of_the_model_stays():
    model = build(GPT2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = forward(model, [1, 2, 3])
    np.testing.assert_allclose(
        read_activations(model.train(), [1, 2, 3]).logits, expected, atol=1e-5
    )
    assert model.training


@configs
def test_the_attention_is_that_of_the_numpy_network(config):
    model, ids = build(config), some_ids(config)
    expected = Network(config, arrays_of(model)).read_all(ids).weights
    np.testing.assert_allclose(read_activations(model, ids).attention, expected, atol=1e-5)


@configs
def test_the_lens_at_the_last_block_is_the_models_prediction(config):
    model, ids = build(config), some_ids(config)
    inside = read_activations(model, ids)
    lens = inside.lens()
    assert lens.shape == (2 * config.num_layers + 1, len(ids), config.vocab_size)
    np.testing.assert_allclose(lens[-1], forward(model, ids), atol=1e-5)
    np.testing.assert_allclose(inside.lens(0), lens[:, 0], atol=1e-6)


def test_the_lens_after_a_block_is_the_prediction_of_a_model_without_later_blocks():
    model, ids = build(MODERN), some_ids(MODERN)
    lens = read_activations(model, ids).lens()
    del model.blocks[1:]
    np.testing.assert_allclose(lens[2], forward(model, ids), atol=1e-5)
    del model.blocks[:]
    np.testing.assert_allclose(lens[0], forward(model, ids), atol=1e-5)


@configs
def test_the_contributions_add_up_to_the_logit(config):
    model, ids = build(config), some_ids(config)
    expected, inside = forward(model, ids), read_activations(model, ids)
    for position in range(len(ids)):
        for token in range(config.vocab_size):
            found = inside.contributions(token, position)
            assert found.total == pytest.approx(expected[position, token], abs=1e-4)
            assert found.heads.shape == (config.num_layers, config.num_heads)
    last = inside.contributions()
    assert (last.position, last.token) == (len(ids) - 1, expected[-1].argmax())


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_contribution_is_what_the_logit_loses_at_the_same_scale_of_the_norm(config):
    """Of the last block's head 2, computed slowly from the vectors that it adds."""
    model, ids = build(config), some_ids(config)
    found = read_activations(model, ids)
    block, d = model.blocks[-1], config.head_size
    with torch.no_grad():
        values = torch.tensor(found.heads[-1, 1, 3])
        added = block.attention.output.weight[:, d : 2 * d] @ values  # (C,)
        x = torch.tensor(found.residual[-1, 3])
        if config.norm == "layer":
            added, x = added - added.mean(), x - x.mean()
        scale = 1 / torch.sqrt((x * x).mean() + config.eps)
        head = model.token_embedding if config.tied else model.head
        expected = float(head.weight[2] @ (model.final_norm.weight * added * scale))
    assert found.contributions(2, 3).heads[-1, 1] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("config", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_a_part_that_is_off_contributes_nothing(config):
    writer = Writer(build(config), CharTokenizer("abcdefg"[: config.vocab_size]))
    found = writer.ablated("1.2", "attention2", "mlp1").inside([0, 1, 2]).contributions()
    assert found.heads[0, 1] == found.mlps[0] == found.attention_biases[1] == 0
    assert not found.heads[1].any()
    assert found.heads[0, 0] != 0
    assert found.total == pytest.approx(found.logit, abs=1e-4)


@configs
def test_the_losses_are_those_of_the_next_tokens(config):
    model, ids = build(config), some_ids(config)
    inside = read_activations(model, ids)
    with torch.no_grad():
        expected = float(model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))[1])
    assert inside.loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert inside.losses.shape == (len(ids) - 1,)
    assert math.isnan(read_activations(model, ids[:1]).loss)


@configs
def test_keys_and_values_are_those_of_a_cache(config):
    model, ids = build(config), some_ids(config)
    cache = KVCache.empty(config, 1, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        model(torch.tensor([ids]), cache=cache)
    inside = read_activations(model, ids)
    for found, expected in ((inside.keys, cache.keys), (inside.values, cache.values)):
        for layer, array in enumerate(expected):
            np.testing.assert_allclose(found[layer], array[0, :, : len(ids)], atol=1e-6)


@configs
def test_a_pass_that_begins_with_known_blocks_is_the_complete_one(config):
    """Ablated and patched from the first changed block on."""
    model, ids = build(config), some_ids(config)
    whole, other = read_activations(model, ids), read_activations(model, some_ids(config, 1))
    last = config.num_layers
    for name in ("1.1", "mlp1", f"{last}.1", f"attention{last}", f"block{last}"):
        part = Part.parse(name, config)
        without = ablated(model, [part])
        for changed, patches in ((without, []), (model, [other.patch(part)])):
            expected = read_activations(changed, ids, patches)
            found = read_activations(changed, ids, patches, (whole, part.block))
            for field in dataclasses.fields(expected):
                if isinstance(array := getattr(expected, field.name), np.ndarray):
                    np.testing.assert_allclose(getattr(found, field.name), array, atol=1e-5)


# --- patches -------------------------------------------------------------------------------------


@configs
def test_patching_a_block_everywhere_gives_the_other_texts_predictions(config):
    model = build(config)
    first, second = (read_activations(model, some_ids(config, seed)) for seed in (0, 1))
    for block in range(config.num_layers):
        patched = read_activations(model, first.ids.tolist(), [second.patch(f"block{block + 1}")])
        np.testing.assert_allclose(patched.logits, second.logits, atol=1e-5)


@pytest.mark.parametrize("part", ["1.2", "2.2", "attention1", "attention2", "mlp2", "block1"])
def test_a_patch_acts_at_its_position_as_a_hook_does(part):
    """Against hooks on the model that write the other text's values."""
    model, position = build(MODERN), 2
    d, first, second = MODERN.head_size, [0, 1, 2, 3, 4], [4, 3, 1, 1, 0]
    block = model.blocks[Part.parse(part, MODERN).block]
    module = {"mlp2": block.mlp, "block1": block}.get(part, block.attention.output)
    columns = slice(d, 2 * d) if "." in part else slice(None)
    kept: list[torch.Tensor] = []

    def keep(module, inputs, output=None):
        kept.append((inputs[0] if output is None else output).clone())

    def put(module, inputs, output=None):
        x = (inputs[0] if output is None else output).clone()
        x[0, position, columns] = kept[0][0, position, columns]
        return (x,) if output is None else x

    before = module is block.attention.output  # the heads' values are its input
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    with register(keep):
        forward(model, second)
    with register(put):
        expected = forward(model, first)
    patch = read_activations(model, second).patch(part, position)
    found = read_activations(model, first, [patch])
    np.testing.assert_allclose(found.logits, expected, atol=1e-5)
    whole = forward(model, first)
    assert np.abs(found.logits[position:] - whole[position:]).max() > 0.01
    np.testing.assert_allclose(found.logits[:position], whole[:position], atol=1e-5)


def test_contributions_add_up_after_a_patch_of_heads_but_not_of_a_block():
    model = build(GPT2)
    other = read_activations(model, [1, 2, 3])
    for part in ("1.2", "attention2", "mlp1"):
        found = read_activations(model, [3, 0, 1], [other.patch(part)]).contributions(0, -1)
        assert found.total == pytest.approx(found.logit, abs=1e-4)
    with pytest.raises(InputError, match="patch of a block"):
        read_activations(model, [3, 0, 1], [other.patch("block1", 0)]).contributions()


# --- what is refused, and the writer -------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "0 tokens cannot be read at once: give 1 to 10"),
        ([0] * 11, "11 tokens cannot be read at once"),
        ([0, 7], "token ids must be 0 to 6"),
        ([-1], "token ids must be 0 to 6"),
    ],
)
def test_ids_that_do_not_fit_are_refused(ids, message):
    with pytest.raises(InputError, match=message):
        read_activations(build(GPT2), ids)


def test_patches_positions_and_tokens_that_do_not_fit_are_refused():
    model = build(GPT2)
    inside = read_activations(model, [1, 2, 3])
    with pytest.raises(InputError, match="a patch of 3 tokens does not fit a text of 2"):
        read_activations(model, [1, 2], [inside.patch("mlp1")])
    with pytest.raises(InputError, match="position=3 must be 0 to 2"):
        inside.patch("mlp1", 3)
    with pytest.raises(InputError, match="position=-4 must be 0 to 2"):
        inside.lens(-4)
    with pytest.raises(InputError, match="token=7 must be 0 to 6"):
        inside.contributions(7)
    with pytest.raises(InputError, match="is not a part of this model"):
        inside.patch("9.9")


def test_a_model_with_its_own_forward_is_refused():
    with pytest.raises(InputError, match=f"{OwnForward.__name__} has its own forward"):
        read_activations(own_forward(), [0])


def test_a_writer_reads_a_text_and_its_engine_stays(tmp_path):
    """A writer of a checkpoint keeps running its arrays: building torch's model changed that."""
    tokenizer = CharTokenizer("abcdefg")
    save_checkpoint(tmp_path / "model.safetensors", build(GPT2), tokenizer)
    writer = Writer(read_checkpoint(tmp_path / "model.safetensors"), tokenizer, engine="numpy")
    inside = writer.inside("abca")
    assert inside.ids.tolist() == [0, 1, 2, 0]
    np.testing.assert_allclose(inside.logits, writer.read([0, 1, 2, 0]).logits, atol=1e-4)
    assert writer.backend.source is not writer.backend.read_only_model
    assert writer.model is writer.backend.read_only_model is writer.backend.source
