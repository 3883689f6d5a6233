"""The training step as machine code: losses and gradients of a batch on a CPU.

`layout` says where everything lies. Numba compiles `products`, `arithmetic`, `attention` and
`network`; `step` lays out a model's job and runs it.
"""
