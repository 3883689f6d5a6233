"""Training: from a text to a model, with everything saved that resuming needs."""

from mygpt.training.api import plan, replay, resume, train

__all__ = ["plan", "replay", "resume", "train"]
