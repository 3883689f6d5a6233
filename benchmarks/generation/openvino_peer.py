"""OpenVINO with a model of transformers, converted as optimum-intel converts one.

optimum-intel itself needs older releases than the other programs of `benchmarks/peers.txt`. What it
does is: trace the model with its cache as inputs and outputs, make the cache a state of the
compiled model, and compress the weights with NNCF.
Letters: T new tokens, S tokens in the cache and new ones, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.generation.models import CONFIGS, as_transformers, build, files
from benchmarks.generation.torch_peers import Run
from numpy.typing import NDArray


def openvino(
    size: str, prompt: NDArray[np.int64], *, work: Path, threads: int, kind: str = "F32"
) -> Run:
    """Greedy decoding of one row with a compiled model, called for every token."""
    from openvino import Core

    path = work / f"{size}-openvino-{kind}" / "model.xml"
    if not path.exists():
        _write(size, kind, path)
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if kind == "F32":  # its defaults are bfloat16, where the processor can, and a cache of 8 bits
        options |= {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    request = Core().compile_model(path, "CPU", options).create_infer_request()
    first = np.zeros(1, np.int32)

    def run(n: int) -> list[list[int]]:
        request.reset_state()
        ids, positions = prompt, np.arange(prompt.shape[1])[None]
        found: list[int] = []
        for _ in range(n):
            request.infer(
                {"ids": ids, "positions": positions, "beam_idx": first}, share_inputs=True
            )
            logits = request.get_output_tensor(0).data  # (1, 1, V)
            found.append(int(logits.argmax()))
            ids, positions = np.array([[found[-1]]]), positions[:, -1:] + 1
        return [found]

    return run


def _write(size: str, kind: str, path: Path) -> None:
    """Convert the model; of INT8 and INT4 the weights are compressed as optimum-intel does."""
    from openvino import save_model

    model = _converted(size, path.parent.parent)
    if kind != "F32":
        import nncf

        mode = nncf.CompressWeightsMode[f"{kind}_ASYM"]
        # Of int4, embedding and head are int8.
        groups = {"group_size": 64, "ratio": 1.0} if kind == "INT4" else {}
        model = nncf.compress_weights(model, mode=mode, **groups)
    path.parent.mkdir()
    save_model(model, path, compress_to_fp16=False)


def _converted(size: str, work: Path) -> Any:
    """The `openvino.Model`, with the cache as its state."""
    import torch
    from openvino import PartialShape, Type, convert_model, opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = CONFIGS[size]
    layers, heads = config.num_layers, config.num_heads
    cache = (1, heads, -1, config.embed_dim // heads)  # (1, H, S, D)
    past = [torch.zeros(1, heads, 3, cache[3]) for _ in range(2 * layers)]
    example = (torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[3, 4]]), *past)
    shapes = [PartialShape([1, -1])] * 2 + [PartialShape(list(cache))] * len(past)
    with torch.inference_mode():
        module = _with_cache(_of_transformers(size, work))
        model = convert_model(module, example_input=example, input=shapes)
    names = [f"{part}.{layer}" for layer in range(layers) for part in ("key", "value")]
    _name(model.inputs, ["ids", "positions", *(f"past.{name}" for name in names)])
    _name(model.outputs, ["logits", *(f"present.{name}" for name in names)])
    # The plugin joins cache and attention only where rows of the cache can be reordered.
    order = opset13.parameter([1], Type.i32, name="beam_idx")
    _name(order.outputs(), ["beam_idx"])
    model.add_parameters([order])
    for name in names:
        port = model.input(f"past.{name}")
        readers = port.get_target_inputs()
        rows = opset13.gather(port, order, opset13.constant(0))
        for reader in readers:
            reader.replace_source_output(rows.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {f"past.{n}": f"present.{n}" for n in names})
    empty = np.zeros((1, heads, 0, cache[3]), np.float32)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([opset13.constant(empty)])
    model.validate_nodes_and_infer_types()
    return model


def _name(ports: list[Any], names: list[str]) -> None:
    for port, name in zip(ports, names, strict=True):
        port.get_tensor().set_names({name})


def _of_transformers(size: str, work: Path) -> Any:
    """The model in transformers: Q as `mygpt export --to hf` writes it, the others as GPT-2."""
    if CONFIGS[size].position == "learned":
        return as_transformers(build(size))
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(files(size, "hf", work)).eval()


def _with_cache(model: Any) -> Any:
    """A function of ids (1, T), positions (1, T) and all layers' keys, values (1, H, S - T, D)."""
    import torch
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class WithCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, positions: Any, *past: Any) -> tuple[Any, ...]:
            cache = DynamicCache()
            for keys, values in zip(past[::2], past[1::2], strict=True):
                layer = DynamicLayer()
                layer.lazy_initialization(keys, values)
                # `cache.update` would join them to an empty tensor, which OpenVINO cannot.
                layer.keys, layer.values = keys, values
                cache.layers.append(layer)
            columns = torch.arange(past[0].shape[2] + ids.shape[1])
            allowed = columns[None, None, None] <= positions[:, None, :, None]  # (1, 1, T, S)
            logits = self.model(
                input_ids=ids, position_ids=positions, attention_mask=allowed,
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            ).logits  # fmt: skip
            return (logits, *(t for layer in cache.layers for t in (layer.keys, layer.values)))

    return WithCache().eval()
