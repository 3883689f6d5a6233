"""Training: from a text to a model, with everything saved that resuming needs."""

from mygpt.training.new_run import plan, train
from mygpt.training.replaying import replay
from mygpt.training.resuming import resume

__all__ = ["plan", "replay", "resume", "train"]
