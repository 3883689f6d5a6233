"""Machine code for the CPU: `common` pieces, the decoding loop, the training step (README.md)."""
