"""Tokens of a corpus, and the batches cut from them in an order that is a function of the seed."""

from mygpt.data.batches import ShuffledWindows
from mygpt.data.cache import cached_bpe, cached_tokens
from mygpt.data.tokens import encode_documents

__all__ = ["ShuffledWindows", "cached_bpe", "cached_tokens", "encode_documents"]
