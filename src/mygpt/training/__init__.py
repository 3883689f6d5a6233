"""Training: from text to a model, with everything kept that going on needs."""

from mygpt.training.new_run import plan, train
from mygpt.training.replaying import replay
from mygpt.training.resuming import resume

__all__ = ["plan", "replay", "resume", "train"]
