"""Training with several processes; a single process imports none of its torch code."""
