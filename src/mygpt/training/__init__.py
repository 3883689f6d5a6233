"""Training: from text to a model, with everything kept that going on needs."""

from mygpt.training.session import replay, resume, train

__all__ = ["replay", "resume", "train"]
