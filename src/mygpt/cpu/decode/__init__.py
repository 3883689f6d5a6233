"""The decoding loop as machine code."""
