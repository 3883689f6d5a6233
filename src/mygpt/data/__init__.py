"""Tokens of a corpus: encoded, cached, and in stores on disk."""

from mygpt.data.token_cache import cached_bpe, cached_tokens
from mygpt.data.token_store import StoredTokens, TokenStore, is_store
from mygpt.data.tokens import (
    drop_unknown,
    encode_documents,
    first_part,
    predicted_size,
    unknown_in,
)

__all__ = [
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
