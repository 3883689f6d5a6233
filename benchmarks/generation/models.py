"""The five models of the benchmark, with fixed weights, also in other programs' formats.

S is the tutorial's model, M a larger one of its kind, L is GPT-2 small (Radford et al., 2019), Q is
of the block that `mygpt train` trains, which is Qwen3's. R is L with position embeddings that make
it repeat one passage.
Letters: C embedding, V vocabulary.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mygpt import GPT, GPTConfig
from mygpt.checkpoint.unloaded_model import unloaded_model

CONFIGS = {
    "S": GPTConfig(65, 64, 4, 4, 64),
    "M": GPTConfig(65, 384, 6, 6, 256),
    "L": GPTConfig(50257, 768, 12, 12, 1024, mlp="gelu_tanh", attention_bias=True),
    "Q": GPTConfig(
        4096,
        768,
        12,
        12,
        1024,
        mlp_dim=2048,
        norm="rms",
        position="rotary",
        mlp="swiglu",
        mlp_bias=False,
        qk_norm=True,
    ),
}
CONFIGS["R"] = CONFIGS["L"]
_PASSAGE = 60  # tokens of the passage that R repeats


def build(size: str, *, gelu_tanh: bool = False) -> GPT:
    """The model called `size`, with the same weights in every process, in eval mode.

    Matrices are drawn with standard deviation 1 / sqrt(inputs), larger than GPT-2's 0.02: the best
    logits then differ by so much that greedy tokens can be compared between programs, and the
    text does not repeat its first token. Norms and biases are random too, so that a conversion
    that omits one gives other tokens.
    """
    config = CONFIGS[size]
    if gelu_tanh and config.mlp == "gelu":
        config = replace(config, mlp="gelu_tanh")
    model = unloaded_model(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
            elif parameter.ndim == 1:
                parameter.normal_(mean=1.0, std=0.1)
            elif "position" in name:
                parameter.normal_(std=0.5)
            elif "embedding" in name:
                parameter.normal_(std=0.1)
            else:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1]))
        if size == "R":
            # A position's embedding is that of the next token of the passage, larger than what
            # token and blocks add: the head, which has the same embeddings, then chooses it.
            following = torch.tensor(prompts(size, 1, config.max_seq_len + 1)[0, 1:])
            model.position_embedding.weight.copy_(200 * model.token_embedding.weight[following])
    return model.eval()


def prompts(size: str, batch: int, length: int) -> NDArray[np.int64]:
    """(batch, length) token ids, the same everywhere; of R its passage, repeated."""
    if size == "R":
        return np.tile(np.resize(prompts("L", 1, _PASSAGE), length), (batch, 1))
    draws = np.random.default_rng(batch * 10_000 + length)
    return draws.integers(0, CONFIGS[size].vocab_size, (batch, length), dtype=np.int64)


def matrix_parameters(config: GPTConfig) -> int:
    """Parameters that are read for every decoded token: all but the position embedding."""
    positions = config.max_seq_len if config.position == "learned" else 0
    return config.num_parameters() - positions * config.embed_dim


def as_transformers(model: GPT) -> Any:
    """The same model as a GPT2LMHeadModel of transformers; biases that it lacks here are zero."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    converted = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_seq_len,
            n_embd=config.embed_dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            activation_function="gelu" if config.mlp == "gelu" else "gelu_new",
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    state = {
        "wte.weight": model.token_embedding.weight,
        "wpe.weight": model.position_embedding.weight,
        "ln_f.weight": model.final_norm.weight,
        "ln_f.bias": model.final_norm.bias,
    }
    for i, block in enumerate(model.blocks):
        for name, norm in (("ln_1", block.attention_norm), ("ln_2", block.mlp_norm)):
            state |= {f"h.{i}.{name}.weight": norm.weight, f"h.{i}.{name}.bias": norm.bias}
        for name, linear in (
            ("attn.c_attn", block.attention.query_key_value),
            ("attn.c_proj", block.attention.output),
            ("mlp.c_fc", block.mlp.input),
            ("mlp.c_proj", block.mlp.output),
        ):
            bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
            state |= {f"h.{i}.{name}.weight": linear.weight.T, f"h.{i}.{name}.bias": bias}
    missing, unexpected = converted.transformer.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if "attn.bias" not in name]
    return converted


def write_ctranslate2(size: str, folder: Path) -> None:
    """The model in CTranslate2's format, float32; it converts to int8 when loading."""
    from ctranslate2.converters.transformers import GPT2Loader

    spec = GPT2Loader().get_model_spec(as_transformers(build(size)))
    spec.register_vocabulary([f"t{i}" for i in range(CONFIGS[size].vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "t0"
    spec.validate()
    spec.optimize(quantization=None)
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))


_GGUF_BLOCK = {
    "attention_norm": "attn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.output": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.input": "ffn_up",
    "mlp.output": "ffn_down",
}


def write_gguf(size: str, path: Path, kind: str = "F32") -> None:
    """The model as a GGUF file: Q as `mygpt export` writes it, the others as gpt2.

    Of gpt2, without a vocabulary, the matrices are F32, Q8_0 or Q4_0; with Q4_0 the embedding,
    which is the head too, is Q8_0.

    llama.cpp has only tanh GELU and biases in GPT-2: it computes with tanh GELU and zero biases,
    which is the same amount of arithmetic.
    """
    if CONFIGS[size].position == "rotary":
        _export_gguf(size, path, kind)
        return
    import gguf

    config = CONFIGS[size]
    writer = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_feed_forward_length(config.mlp_hidden)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(config.eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, array in _gguf_arrays(build(size)).items():
        if kind != "F32" and array.ndim == 2 and not name.startswith("position"):
            own = "Q8_0" if name.startswith("token_embd") else kind
            form = gguf.GGMLQuantizationType[own]
            writer.add_tensor(name, gguf.quants.quantize(array, form), raw_dtype=form)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _export_gguf(size: str, path: Path, kind: str) -> None:
    """The file that a user of llama.cpp would make: exported, then quantized by llama.cpp."""
    from mygpt.formats.gguf import write_gguf as export

    if kind == "F32":
        export(_checkpoint(size, path), path)
        return
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {
        "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
        "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    }[kind]
    source = files(size, "F32", path.parent)
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(path).encode(), ctypes.byref(params)
    )
    assert not failed, f"llama.cpp could not quantize {source}"


def _checkpoint(size: str, path: Path) -> Any:
    """The model as a checkpoint, which `mygpt export` takes; with a tokenizer of three letters."""
    from mygpt.checkpoint.model_file import Checkpoint, model_arrays
    from mygpt.tokenization import CharTokenizer

    tokenizer = CharTokenizer("abc", end_of_text=True)
    return Checkpoint(path, CONFIGS[size], tokenizer, model_arrays(build(size)), {})


def _gguf_arrays(model: GPT) -> dict[str, NDArray[np.float32]]:
    found = {
        "token_embd.weight": model.token_embedding.weight,
        "position_embd.weight": model.position_embedding.weight,
        "output_norm.weight": model.final_norm.weight,
        "output_norm.bias": model.final_norm.bias,
    }
    for i, block in enumerate(model.blocks):
        for ours, theirs in _GGUF_BLOCK.items():
            module = block.get_submodule(ours)
            bias = module.bias
            if bias is None:
                bias = torch.zeros(module.weight.shape[0])
            found |= {f"blk.{i}.{theirs}.weight": module.weight, f"blk.{i}.{theirs}.bias": bias}
    return {name: tensor.detach().contiguous().numpy() for name, tensor in found.items()}


def files(size: str, kind: str, work: Path) -> Path:
    """The model's file or folder; written if missing.

    Args:
        size: the model.
        kind: "ct2" for CTranslate2, "hf" for transformers, "F32" or another of llama.cpp's kinds.
        work: the folder for all of them.
    """
    path = work / (f"{size}-{kind}" if kind in ("ct2", "hf") else f"{size}-{kind}.gguf")
    if not path.exists():
        if kind == "ct2":
            write_ctranslate2(size, path)
        elif kind == "hf":
            from mygpt.formats.hugging_face import write_hugging_face

            write_hugging_face(_checkpoint(size, path), path)
        else:
            write_gguf(size, path, kind)
    return path
