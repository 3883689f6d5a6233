"""The cache of tokens and tokenizers: results are reused, verified, and never cause errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from mygpt.data import cached_bpe, cached_tokens, encode_documents, token_cache
from mygpt.errors import InputError
from mygpt.text import Document, split_documents
from mygpt.tokenization import BPETokenizer, ByteTokenizer, CharTokenizer

TEXT = "the quick brown fox, the quicker the better; the fox again and again.\n" * 40
DOCUMENTS = [Document("a", TEXT), Document("b", TEXT[::-1])]
BPE = BPETokenizer.train([TEXT], 300)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of a separate cache for the test, which also caches short texts."""
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    monkeypatch.delenv("MYGPT_TOKEN_CACHE", raising=False)
    monkeypatch.setattr(token_cache, "SHORTEST", 100)
    return tmp_path / "tokens"


@pytest.fixture
def work(monkeypatch):
    """A list that records each encoding and training, which the cache should avoid."""
    done = []
    train, encode = BPETokenizer.train, encode_documents

    def trained(pieces, vocab_size):
        done.append("trained")
        return train(pieces, vocab_size)

    def encoded(*arguments, **options):
        done.append("encoded")
        return encode(*arguments, **options)

    monkeypatch.setattr(BPETokenizer, "train", trained)
    monkeypatch.setattr(token_cache, "encode_documents", encoded)
    return done


def files(folder):
    return sorted(path for path in folder.iterdir()) if folder.exists() else []


# --- reuse ---------------------------------------------------------------------------------


def test_tokens_are_encoded_once(work, folder):
    expected = encode_documents(DOCUMENTS, BPE)
    for _ in range(3):
        tokens = cached_tokens(DOCUMENTS, BPE)
        assert tokens.dtype == expected.dtype == np.uint16
        assert tokens.tolist() == expected.tolist()
        assert not tokens.flags.writeable  # from the cache or not
    assert work == ["encoded"]
    assert len(files(folder)) == 1


def test_tokenizers_are_trained_once(work):
    states = [cached_bpe(DOCUMENTS, 290).to_state() for _ in range(3)]
    assert states[0] == states[1] == states[2]
    assert work == ["trained"]
    assert cached_bpe(DOCUMENTS, 280).vocab_size == 280
    assert cached_bpe(DOCUMENTS[:1], 290).to_state() != states[0]
    assert work == ["trained"] * 3


def test_everything_that_changes_the_tokens_changes_the_file_name(work):
    """The text, its split, its division into documents, and the tokenizer."""
    whole = [Document("a", TEXT * 2)]
    parts = [split_documents(whole, fraction) for fraction in (0.1, 0.2)]
    cases = [(whole, BPE, False), (DOCUMENTS, BPE, False), ([DOCUMENTS[0]] * 2, BPE, False)]
    cases += [(documents, BPE, True) for documents in (whole, *parts[0], *parts[1])]
    cases += [(whole, BPETokenizer.train([TEXT], 270), False)]
    for _ in range(2):
        for documents, tokenizer, continued in cases:
            found = cached_tokens(documents, tokenizer, continued=continued)
            expected = encode_documents(documents, tokenizer, continued=continued)
            assert found.tolist() == expected.tolist()
    assert work.count("encoded") == len(cases)


def test_large_vocabularies_are_cached_with_32_bits(monkeypatch):
    monkeypatch.setattr(BPETokenizer, "vocab_size", 2**16 + 1)
    for _ in range(2):
        tokens = cached_tokens(DOCUMENTS, BPE)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == encode_documents(DOCUMENTS, BPE).tolist()


def test_only_results_that_take_time_are_cached(folder, monkeypatch):
    """Not characters, bytes or short texts; and nothing if the cache is disabled."""
    for tokenizer in (ByteTokenizer(), CharTokenizer.from_text(TEXT)):
        cached_tokens(DOCUMENTS, tokenizer)
    with monkeypatch.context() as patch:
        patch.setenv("MYGPT_TOKEN_CACHE", "off")
        cached_bpe(DOCUMENTS, 290)
        cached_tokens(DOCUMENTS, BPE)
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "SHORTEST", 10**6)
        cached_bpe(DOCUMENTS, 290)
        cached_tokens(DOCUMENTS, BPE)
    assert files(folder) == []


def test_wrong_text_is_refused_as_without_a_cache():
    for text, message in (("ab\ud800" * 100, "position 2"), (b"ab" * 100, "needs text")):
        for use in (lambda d: cached_tokens(d, BPE), lambda d: cached_bpe(d, 300)):
            with pytest.raises(InputError, match=message):
                use([Document("a", text)])


# --- verification --------------------------------------------------------------------------


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "header cut": lambda data: data[:20],
    "longer": lambda data: data + b"\0\0",
    "digest": lambda data: flipped(data, 0),
    "content": lambda data: flipped(data, 200),
    "end": lambda data: flipped(data, len(data) - 1),
    "foreign": lambda data: b"hello" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_replaced(work, folder, damage):
    expected = cached_tokens(DOCUMENTS, BPE).tolist()
    (path,) = files(folder)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    assert cached_tokens(DOCUMENTS, BPE).tolist() == expected
    assert work == ["encoded"] * 2
    assert path.read_bytes() == whole


def test_a_valid_file_of_another_text_is_ignored(folder):
    """Its digest is also that of its name."""
    expected = cached_tokens(DOCUMENTS, BPE).tolist()
    (path,) = files(folder)
    cached_tokens(DOCUMENTS[:1], BPE)
    (other,) = {*files(folder)} - {path}
    path.write_bytes(other.read_bytes())
    assert cached_tokens(DOCUMENTS, BPE).tolist() == expected


@pytest.mark.parametrize("forged", [b"\xff\xff", b"\0", b"", b"[]", b'{"kind": "bpe"}'])
def test_invalid_content_with_a_valid_digest_is_ignored(folder, forged):
    """Ids outside the vocabulary, or JSON that is not a tokenizer."""
    for use in (lambda: cached_tokens(DOCUMENTS, BPE).tolist(),
                lambda: cached_bpe(DOCUMENTS, 290).to_state()):  # fmt: skip
        expected = use()
        for path in files(folder):
            content = memoryview(forged)
            path.write_bytes(token_cache._digest(path, content) + forged)
        assert use() == expected


def test_files_of_other_users_pipes_and_folders_are_not_read(folder, monkeypatch):
    expected = cached_tokens(DOCUMENTS, BPE).tolist()
    (path,) = files(folder)
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "is_private", lambda status: False)
        assert token_cache._read(path) is None
    path.unlink()
    os.mkfifo(path)  # opening it must not wait for a writer
    assert token_cache._read(path) is None
    path.unlink()
    path.mkdir()
    assert cached_tokens(DOCUMENTS, BPE).tolist() == expected


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no modes of files")
def test_the_cache_is_private_whatever_the_umask(folder, work):
    """Under umask 000 another user could change the tokens and their digest."""
    before = os.umask(0)
    try:
        cached_tokens(DOCUMENTS, BPE)
    finally:
        os.umask(before)
    (path,) = files(folder)
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    for place, mode in ((path, 0o620), (folder, 0o777)):
        kept = place.stat().st_mode
        place.chmod(mode)
        assert token_cache._read(path) is None
        place.chmod(kept)
    assert token_cache._read(path) is not None
    other = folder.parent / "other"
    path.rename(other)
    path.symlink_to(other)
    assert token_cache._read(path) is None


# --- no errors ----------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path, monkeypatch, work):
    """A file in place of the folder, an impossible path, a user without a home directory."""
    (tmp_path / "file").write_bytes(b"")
    for chosen in (str(tmp_path / "file"), "/proc/none", "/dev/null/x"):
        monkeypatch.setenv("MYGPT_CACHE", chosen)
        assert len(cached_tokens(DOCUMENTS, BPE)) == len(encode_documents(DOCUMENTS, BPE))
        assert cached_bpe(DOCUMENTS, 290).vocab_size == 290
    assert len(work) == 6
    for name in ("MYGPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(token_cache.Path, "home", homeless)
    assert cached_bpe(DOCUMENTS, 290).vocab_size == 290


def test_a_full_disk_is_not_an_error_and_is_not_filled(folder, monkeypatch):
    """The last gigabyte stays free; a write that fails leaves no file."""
    real = token_cache.shutil.disk_usage
    with monkeypatch.context() as patch:
        patch.setattr(
            token_cache.shutil, "disk_usage", lambda path: real(path)._replace(free=2**30)
        )
        cached_tokens(DOCUMENTS, BPE)
        assert files(folder) == []

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mygpt.checkpoint.durable.os.write", full)
    cached_tokens(DOCUMENTS, BPE)
    assert files(folder) == []


def test_the_least_recently_used_files_are_removed_first(folder, monkeypatch):
    """Reading counts as use. Other files in the folder stay, whatever their age."""
    texts = [[Document("a", f"{n} {TEXT}")] for n in range(4)]
    own = []
    for number, documents in enumerate(texts[:3]):
        cached_tokens(documents, BPE)
        (new,) = {*files(folder)} - {*own}
        own.append(new)
        os.utime(new, (number + 1, number + 1))
    size = own[0].stat().st_size
    mine, stray = folder / "notes.txt", folder / ".mygpt-01234567-abc.tmp"
    fresh = folder / ".mygpt-01234567-abd.tmp"
    for path in (mine, stray, fresh):
        path.write_bytes(b"x" * 10)
    os.utime(mine, (0, 0))
    os.utime(stray, (time.time() - 7200,) * 2)
    cached_tokens(texts[0], BPE)  # used now
    monkeypatch.setattr(token_cache, "MOST_BYTES", 3 * size + 50)
    cached_tokens(texts[3], BPE)
    assert own[0].exists()
    assert not own[1].exists()
    assert own[2].exists()
    assert mine.exists()
    assert fresh.exists()  # its writer may still be running
    assert not stray.exists()
    monkeypatch.setattr(token_cache, "MOST_BYTES", size // 2)
    before = files(folder)
    cached_tokens([Document("a", f"5 {TEXT}")], BPE)  # larger than the whole cache may be
    assert files(folder) == before


def test_tokens_in_use_remain_valid_after_their_file_is_removed(folder):
    """Another process may remove it to free space."""
    cached_tokens(DOCUMENTS, BPE)
    tokens = cached_tokens(DOCUMENTS, BPE)
    for path in files(folder):
        path.unlink()
    assert tokens.tolist() == encode_documents(DOCUMENTS, BPE).tolist()


@pytest.mark.processes
def test_several_processes_can_use_the_cache_at_once(tmp_path, folder):
    """All start with an empty cache; each gets the right tokens, and each result has one file."""
    script = (
        "import sys, json\n"
        "from mygpt.data import cached_bpe, cached_tokens, token_cache\n"
        "from mygpt.text import Document\n"
        "token_cache.SHORTEST = 100\n"
        "documents = [Document('a', sys.stdin.read())]\n"
        "for _ in range(20):\n"
        "    tokenizer = cached_bpe(documents, 300)\n"
        "    tokens = cached_tokens(documents, tokenizer)\n"
        "    assert tokenizer.decode(tokens[1:]) == documents[0].whole\n"
        "print(json.dumps(tokens.tolist()))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "MYGPT_CACHE": str(tmp_path)},
            text=True,
        )
        for _ in range(3)
    ]
    for process in running:
        process.stdin.write(TEXT)
        process.stdin.close()
    said = []
    for process in running:
        with process:
            said.append(process.stdout.read())
    assert [process.returncode for process in running] == [0, 0, 0]
    assert said[0] == said[1] == said[2]
    assert len(json.loads(said[0])) > 100
    assert len(files(folder)) == 2
