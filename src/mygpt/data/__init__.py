"""Tokens of a corpus, and the batches cut from them in an order that is a function of the seed."""

from mygpt.data.batches import ShuffledWindows
from mygpt.data.tokens import encode_documents

__all__ = ["ShuffledWindows", "encode_documents"]
