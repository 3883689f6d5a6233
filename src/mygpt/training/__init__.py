"""Training: from text to a model, with everything kept that going on needs."""

from mygpt.training.session import plan, replay, resume, train

__all__ = ["plan", "replay", "resume", "train"]
