"""Passages of a generated text that are verbatim copies from the corpus, with their places."""

from mygpt.novelty.report import COPIED_CHARS, Novelty, Passage, measure_novelty

__all__ = ["COPIED_CHARS", "Novelty", "Passage", "measure_novelty"]
