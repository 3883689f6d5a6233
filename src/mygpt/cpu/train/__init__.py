"""The training step as machine code by Numba: losses and gradients of a batch on a CPU.

Nothing here uses `torch.compile`. Products, panels and the cache of machine code are those of
decoding: src/mygpt/cpu/README.md describes them and says which file to read first.
`layout` names all fields and buffers. Numba compiles `products`, `arithmetic`,
`attention`, `block`, `network` and `orthogonal`; `step` describes a model to them and runs them.
"""
