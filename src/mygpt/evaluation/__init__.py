"""Losses on whole texts, baselines on the same text, copied passages."""
