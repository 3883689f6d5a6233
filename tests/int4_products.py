"""The products of weights of 4 bits as a program, for processors that have fewer instructions.

`python tests/int4_products.py IN OUT` compiles them as if the processor had neither vdpbf16ps nor
vpshufb, and writes the products of the arrays `x` and `panels` of IN, a .npz file.
"""

from __future__ import annotations

import sys

import numpy as np

from mygpt.cpu.common import layout

layout.HAS_PAIRS = layout.HAS_SHUFFLE = False

from mygpt.cpu.common import build  # noqa: E402
from mygpt.cpu.common.int4 import multiply_int4, pack_inputs  # noqa: E402
from mygpt.cpu.common.int4_format import GROUP, INPUT_WORDS  # noqa: E402
from mygpt.cpu.common.simd import INT64, floats, ints, kernel, words  # noqa: E402


@kernel(INT64, INT64, returns=INT64)
def multiply(job_address, thread):
    """The job: addresses of x, its packed form, panels and y, then R, C, N, G and two strides."""
    job = ints(job_address)
    packed, rows, depth, stride = words(job[1]), job[4], job[5], job[8]
    pack_inputs(packed, stride, floats(job[0]), depth, rows, depth)
    multiply_int4(
        floats(job[3]), job[9], packed, stride, rows, words(job[2]), job[6], job[7], thread
    )
    return 0


def main() -> None:
    """Read the arrays, multiply, write."""
    given = np.load(sys.argv[1])
    x, panels, outputs = given["x"], given["panels"], int(given["outputs"])
    (rows, depth), groups = x.shape, -(-x.shape[1] // GROUP)
    packed = np.zeros((rows, groups * INPUT_WORDS), np.uint32)
    y = np.zeros((rows, layout.padded(outputs)), np.float32)
    addresses = [array.ctypes.data for array in (x, packed, panels, y)]
    job = np.array([*addresses, rows, depth, outputs, groups, packed.shape[1], y.shape[1]])
    library = build.KernelLibrary("int4_products", "", 1, (), (("__main__", "multiply"),))
    code = build._compile_here(library)
    build._link(code, library)["multiply"](job.ctypes.data, 0)
    np.save(sys.argv[2], y[:, :outputs])


if __name__ == "__main__":
    main()
