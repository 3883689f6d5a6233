"""Where a continuation meets its prompt: together they are what decoding all ids gives."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mygpt import GPT, GPTConfig, Writer
from mygpt.checkpoint.model_file import save_checkpoint
from mygpt.cli import main
from mygpt.decode.completion import Completion, Row
from mygpt.tokenization import BPETokenizer, ByteTokenizer, ForeignTokenizer
from servers import client
from shapes import build

NAMES = [
    "a", "b</w>", "the</w>", "▁the", "▁", "Ġthe", "Ġ", "Ã", "©", "##ing", "ing", ".", "|", "<pad>",
    "<0xC3>", "<0xA9>", "<0xF0>", " ", "n't", "'s", "</w>", "é", "!", "cat▁", "  x ",
]  # fmt: skip
DECODERS: dict[str, Any] = {
    "none": None,
    "ByteLevel": decoders.ByteLevel(),
    "Metaspace": decoders.Metaspace(),
    "Metaspace without a prefix": decoders.Metaspace(prepend_scheme="never"),
    "WordPiece": decoders.WordPiece(),
    "WordPiece without cleanup": decoders.WordPiece(cleanup=False),
    "BPEDecoder": decoders.BPEDecoder(),
    "CTC": decoders.CTC(),
    "Llama's": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    ),
    "Replace": decoders.Replace("a", "xyz"),
    "Fuse": decoders.Fuse(),
    "BPEDecoder, then more": decoders.Sequence(
        [decoders.BPEDecoder(), decoders.Fuse(), decoders.Replace("e b", "EB")]
    ),
}  # fmt: skip


def tokenizer_of(decoder: Any) -> tuple[ForeignTokenizer, tokenizers.Tokenizer]:
    library = tokenizers.Tokenizer(
        models.WordLevel({name: n for n, name in enumerate(NAMES)}, unk_token="<pad>")
    )
    if decoder is not None:
        library.decoder = decoder
    return ForeignTokenizer(json.loads(library.to_str()), vocab_size=len(NAMES) + 2), library


CASES = {name: tokenizer_of(decoder) for name, decoder in DECODERS.items()}
ids = st.lists(st.integers(0, len(NAMES) + 1), max_size=8)


def written(tokenizer: Any, prompt: str, before: list[int], new: list[int]) -> str:
    row = Row(tokenizer, Completion(prompt), (), None, np.array(before, np.int64))
    text = "".join(row.push(token) for token in new)
    return text + row.finish(len(new))


@pytest.mark.parametrize("name", CASES)
@given(before=ids, new=ids)
def test_the_joint_is_what_decoding_all_ids_gives(
    name: str, before: list[int], new: list[int]
) -> None:
    """Of a prompt of ids, except one whose text depends on the tokens that follow."""
    tokenizer, library = CASES[name]
    judge = [library.decode([i for i in row if i < len(NAMES)], skip_special_tokens=False)
             for row in (before, before + new)]  # fmt: skip
    assert tokenizer.decode(before + new) == judge[1]
    prompt = judge[0].removesuffix(tokenizer.decoder(after=before).finish())
    if prompt and judge[1].startswith(prompt):
        assert prompt + written(tokenizer, prompt, before, new) == judge[1]


@given(st.binary(max_size=6), st.binary(max_size=6))
def test_a_character_that_a_prompt_of_ids_leaves_unfinished(one: bytes, other: bytes) -> None:
    for tokenizer in (ByteTokenizer(), BPETokenizer.train(["aé€ aé€"], 260), CASES["ByteLevel"][0]):
        if isinstance(tokenizer, ForeignTokenizer):
            before, new = ([n % len(NAMES) for n in part] for part in (one, other))
        else:
            before, new = list(one), list(other)
        prompt = tokenizer.decode(before).removesuffix(tokenizer.decoder(after=before).finish())
        if prompt:
            assert prompt + written(tokenizer, prompt, before, new) == tokenizer.decode(
                before + new
            )


def clip_like() -> tuple[ForeignTokenizer, tokenizers.Tokenizer]:
    """Merges over characters whose last one has "</w>", as OpenAI's first GPT and CLIP have it."""
    letters = "abcdefghijklmnopqrstuvwxyzFC"
    vocab = [*letters, *(f"{c}</w>" for c in letters), "ac</w>", "First</w>", "Citizen</w>"]
    merges = [("a", "c</w>")]
    for word in ("First", "Citizen"):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocab += pieces[:1]
    names = {name: n for n, name in enumerate(dict.fromkeys(vocab))}
    library = tokenizers.Tokenizer(models.BPE(names, merges, end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.decoder = decoders.BPEDecoder()
    return ForeignTokenizer(json.loads(library.to_str())), library


def model_of(tokenizer: ForeignTokenizer) -> GPT:
    shape = {"embed_dim": 16, "num_heads": 2, "num_layers": 1, "max_seq_len": 32}
    return build(GPTConfig(tokenizer.vocab_size, **shape), 0, 0.02)


@pytest.mark.kernels
@pytest.mark.parametrize("prompt", ["First Citizen", "First Citizen ", "F", " a ", ""])
def test_a_space_comes_between_a_prompts_last_word_and_the_next(prompt: str, tmp_path: Any) -> None:
    """In `Writer`, its streams, the command and the server, and once alone where it is given."""
    tokenizer, library = clip_like()
    writer = Writer(model_of(tokenizer), tokenizer)
    sample = writer.complete(prompt, 12, seed=3, temperature=5.0)[0]
    read = tokenizer.encode_array(prompt).tolist()
    wanted = library.decode(read + sample.token_ids)
    given = prompt.lstrip()  # which its ids do not have
    assert wanted.startswith(given)
    assert given + sample.text == wanted
    how: dict[str, Any] = {"seed": 3, "temperature": 5.0}
    assert "".join(writer.stream(prompt, 12, **how)) == sample.text
    assert writer.generate(prompt, 12, **how) == prompt + sample.text
    with client(writer) as api:
        body = {"model": "mygpt", "prompt": prompt, "max_tokens": 12, **how}
        for more in ({}, {"echo": True}, {"echo": True, "logprobs": 1}, {"prompt": read}):
            if more.get("prompt") == []:
                continue
            answer = api.post("/v1/completions", json={**body, **more}).json()
            shown = prompt if "echo" in more else ""
            text = sample.text
            if "prompt" in more and prompt.endswith(" "):
                text = f" {text}"  # the ids do not say that there was one
            assert answer["choices"][0]["text"] == shown + text


def test_the_command_writes_the_space_too(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer, library = clip_like()
    model = model_of(tokenizer)
    save_checkpoint(tmp_path / "m.safetensors", model, tokenizer)
    with pytest.raises(SystemExit):
        main(["generate", "-c", str(tmp_path / "m.safetensors"), "-p", "First Citizen", "-n", "8",
              "--temperature", "5", "--seed", "3"])  # fmt: skip
    found = Writer(model, tokenizer).complete("First Citizen", 8, seed=3, temperature=5.0)[0]
    read = tokenizer.encode_array("First Citizen").tolist()
    assert capfd.readouterr().out == library.decode(read + found.token_ids) + "\n"
    assert " " in found.text[:1]


def test_bert_like_words_after_a_given_space() -> None:
    library = tokenizers.Tokenizer(
        models.WordPiece({"[UNK]": 0, "the": 1, "cat": 2, "##s": 3, "sat": 4}, unk_token="[UNK]")
    )
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    tokenizer = ForeignTokenizer(json.loads(library.to_str()))
    for prompt in ("the cat", "the cat ", "the cat\n"):
        text = written(tokenizer, prompt, [1, 2], [4, 3])
        assert text == (" sats" if prompt[-1] in "t\n" else "sats")
    assert written(tokenizer, "the cat", [1, 2], [3, 4]) == "s sat"
