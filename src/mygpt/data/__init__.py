"""Tokens of a corpus, and the batches cut from them in an order that is a function of the seed."""

from mygpt.data.batches import ShuffledWindows
from mygpt.data.sizes import first_part, predicted_size
from mygpt.data.token_cache import cached_bpe, cached_tokens
from mygpt.data.token_store import StoredTokens, TokenStore, is_store
from mygpt.data.tokens import drop_unknown, encode_documents, unknown_in

__all__ = [
    "ShuffledWindows",
    "StoredTokens",
    "TokenStore",
    "cached_bpe",
    "cached_tokens",
    "drop_unknown",
    "encode_documents",
    "first_part",
    "is_store",
    "predicted_size",
    "unknown_in",
]
