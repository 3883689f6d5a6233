"""The training step as machine code by Numba: losses and gradients of a batch on a CPU.

README.md in the folder above says which file to read first. Nothing here uses `torch.compile`.
"""
