"""Training: from text to a model, with everything kept that going on needs."""

from mygpt.training.going_on import resume
from mygpt.training.replaying import replay
from mygpt.training.session import plan, train

__all__ = ["plan", "replay", "resume", "train"]
