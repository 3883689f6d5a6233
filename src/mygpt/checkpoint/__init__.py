"""Model files: durable writes, the container format, the model in it."""
