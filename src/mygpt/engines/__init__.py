"""Decoding engines: given all text so far, the logits of the next token."""
