"""What a generated text copied from the corpus word for word, and where from."""

from mygpt.novelty.report import COPIED_CHARS, Novelty, Passage, measure_novelty

__all__ = ["COPIED_CHARS", "Novelty", "Passage", "measure_novelty"]
