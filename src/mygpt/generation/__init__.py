"""Writing: `tokens` holds `generate` and `stream` on ids, `writer` the `Writer` of text.

They are imported from where they are, so that the text side needs no torch.
"""
