"""Ablation: a part switched off adds nothing, whatever runs the model, and the rest is shared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mygpt import GPT, CharTokenizer, Writer, load, save_checkpoint
from mygpt.checkpoint.model_file import read_checkpoint
from mygpt.errors import InputError
from mygpt.evaluation.ablation import Part, ablated
from shapes import CONFIGS, GPT2, MODERN, TUTORIAL, build

IDS = [0, 2, 1, 0, 2]


def zeroed_in_a_hook(model: GPT, part: str) -> np.ndarray:
    """Logits (T, V) of a forward pass in which hooks replace the part's values by zeros."""
    kind, d = Part.parse(part, model.config), model.config.head_size
    block = model.blocks[kind.block]

    def without_head(module, inputs):
        changed = inputs[0].clone()
        changed[..., kind.head * d : (kind.head + 1) * d] = 0
        return (changed,)

    def nothing(module, inputs, output):
        return torch.zeros_like(output)

    if kind.kind == "head":
        hooks = [block.attention.output.register_forward_pre_hook(without_head)]
    else:
        modules = {"attention": [block.attention], "mlp": [block.mlp]}
        both = [block.attention, block.mlp]
        hooks = [m.register_forward_hook(nothing) for m in modules.get(kind.kind, both)]
    with torch.no_grad():
        logits = model(torch.tensor([IDS]))[0][0].numpy()
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("config", [TUTORIAL, MODERN, GPT2], ids=["tutorial", "modern", "gpt2"])
@pytest.mark.parametrize("part", ["1.1", "2.2", "attention1", "mlp2", "block1"])
def test_a_part_that_is_off_adds_zero(config, part):
    model = build(config)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = ablated(model, [Part.parse(part, config)])
    with torch.no_grad():
        logits = found(torch.tensor([IDS]))[0][0].numpy()
        whole = model(torch.tensor([IDS]))[0][0].numpy()
    assert np.abs(logits - whole).max() > 0.01
    np.testing.assert_allclose(logits, zeroed_in_a_hook(model, part), atol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_several_parts_are_off_together_and_other_weights_are_shared():
    model = build(MODERN)
    names = ["1.1", "1.2", "1.3", "1.4", "mlp2"]
    found = ablated(model, [Part.parse(name, MODERN) for name in names])
    assert not found.blocks[0].attention.output.weight.any()
    assert not found.blocks[1].mlp.output.weight.any()
    assert found.blocks[0].mlp.output.weight is model.blocks[0].mlp.output.weight
    assert found.token_embedding.weight is model.token_embedding.weight


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_a_writer_of_a_checkpoint_and_of_a_module_write_the_same_without_a_part(
    tmp_path: Path, engine: str
):
    """Both kinds of ablation, of arrays and of a module."""
    tokenizer = CharTokenizer("abcde")
    model = build(MODERN)
    save_checkpoint(tmp_path / "model.safetensors", model, tokenizer)
    parts = ("1.2", "mlp1", "attention2")
    loaded = load(tmp_path / "model.safetensors", engine=engine, device="cpu").ablated(*parts)
    direct = Writer(model, tokenizer).ablated(*parts)
    wanted = [Part.parse(part, MODERN) for part in parts]
    assert loaded.generate("abc", 8, seed=1) == direct.generate("abc", 8, seed=1)
    assert loaded.generate("abc", 8, seed=1) != Writer(model, tokenizer).generate("abc", 8, seed=1)
    arrays = ablated(read_checkpoint(tmp_path / "model.safetensors"), wanted).arrays
    for name, p in ablated(model, wanted).named_parameters():
        np.testing.assert_array_equal(arrays[name], p.detach().numpy())


@pytest.mark.parametrize(
    "name",
    ["0.1", "1.0", "3.1", "1.5", "mlp0", "block3", "mlp", "head1", "1.1.1", "", "²1.1", "-1.1"],
)
def test_a_part_that_the_model_lacks_is_refused_with_those_it_has(name):
    with pytest.raises(InputError, match=r"choose a head from 1\.1 to 2\.4.*count from 1"):
        Part.parse(name, MODERN)


def test_a_part_that_is_a_number_is_refused():
    with pytest.raises(InputError, match=r"part=1\.1 must be text"):
        Writer(build(MODERN), CharTokenizer("abcde")).ablated(1.10)


@pytest.mark.parametrize("name", ["1.1", "2.4", "attention1", "mlp2", "block2"])
def test_the_name_of_a_part_is_what_it_was_parsed_from(name):
    assert str(Part.parse(name, MODERN)) == name


def test_every_configuration_can_be_ablated():
    for config in CONFIGS.values():
        found = ablated(build(config), [Part("block", 0)])
        assert not found.blocks[0].mlp.output.weight.any()
