"""The decorator of all kernels, and the operations that Numba's Python lacks, as LLVM code.

These are raw pointers, the bits of a float, atomic counters, and vectors of `LANES` numbers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from mygpt.cpu.common.layout import HAS_PAIRS, LANES

intrinsic: Any = numba_intrinsic

# Types of arguments: pointers to numbers, then single numbers.
FLOATS = types.CPointer(types.float32)
INTS = types.CPointer(types.int64)
BYTES = types.CPointer(types.int8)
WORDS = types.CPointer(types.uint32)
HALVES = types.CPointer(types.uint16)
INT64, INT32, UINT32 = types.int64, types.int32, types.uint32
FLOAT32, FLOAT64 = types.float32, types.float64

# LLVM's fast-math flags (LangRef, "Fast-Math Flags"), granted function by function. "reassoc" lets
# it keep several partial sums, one in each lane: the order is then fixed in the machine code, so
# it is the same for every row and every run. "nnan" lets it compare as if there were no NaN.
NOTHING: frozenset[str] = frozenset()
REASSOCIATE = frozenset({"reassoc"})
NO_NANS = frozenset({"nnan"})


def kernel(*arguments: Any, returns: Any = types.void, extra: frozenset[str] = NOTHING) -> Any:
    """Compile a function for arguments of these types.

    Nothing in a kernel allocates, raises or calls Python: it needs nothing of Numba's runtime,
    so its machine code can be stored and run without Numba. `extra` adds to the compiler's
    freedom: REASSOCIATE or NO_NANS.
    """
    # "contract": a * b + c may be one fused multiply-add, which rounds once. "nsz": -0.0 and 0.0
    # may be exchanged. error_model "numpy": a division by zero gives infinity, no exception.
    # Without wrappers and without _nrt (reference counting) only the bare function is left.
    return njit(
        returns(*arguments),
        fastmath={"contract", "nsz", *extra},
        error_model="numpy",
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
        _nrt=False,
    )


_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)
_WORD_VECTOR = ir.VectorType(_I32, LANES)


# Jobs and tables hold addresses as int64 (see `layout`); these turn one into a pointer. All
# intrinsics below become one LLVM instruction each: the inner function emits it.
def _caster(pointer_type: Any) -> Any:
    def cast(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(pointer_type))

        return pointer_type(types.int64), codegen

    return intrinsic(cast)


floats = _caster(FLOATS)  # the float32 numbers at an address; below the int64, int8, uint32
ints = _caster(INTS)
int8s = _caster(BYTES)
words = _caster(WORDS)


def _converter(pointer_type: Any) -> Any:
    def convert(typingctx: Any, pointer: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(pointer_type))

        return pointer_type(pointer), codegen

    return intrinsic(convert)


as_words = _converter(WORDS)  # the same memory as 32-bit words; below as 16-bit words
as_halves = _converter(HALVES)


@intrinsic
def skip(typingctx: Any, pointer: Any, count: Any) -> Any:
    """The pointer to `count` elements after this one (C: pointer + count)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), codegen


@intrinsic
def float_of_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 that has the bits of an int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.int32), codegen


@intrinsic
def bits_of_float(typingctx: Any, value: Any) -> Any:
    """The int32 that has the bits of a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), codegen


@intrinsic
def atomic_add(typingctx: Any, counter: Any, value: Any) -> Any:
    """Add to a shared counter; returns its value before."""

    # "seq_cst" includes release: what this thread wrote earlier is visible to every thread that
    # reads the new value by `atomic_load`.
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], args[1], "seq_cst")

    return types.int64(INTS, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, counter: Any) -> Any:
    """Read a shared counter; all that was written before it was added to is then visible."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(args[0], "acquire", 8, typ=_I64)

    return types.int64(INTS), codegen


def ask_for(builder: Any, pointer: Any, offset: int) -> None:
    """Have the cache line at pointer + offset bytes read, without waiting for it (a prefetch)."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    read = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    address = builder.gep(builder.bitcast(pointer, byte), [_I64(offset)])
    # For reading, into all caches, as data. An address that does not exist is ignored.
    builder.call(read, [address, _I32(0), _I32(3), _I32(1)])


def fma(builder: Any) -> Any:
    """The function a b + c of three vectors, rounded once."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")


def add_pairs(builder: Any, total: Any, x: Any, w: Any) -> Any:
    """total + x[k] w[k] + x[k + 1] w[k + 1] in each lane, for words of two bfloat16.

    By vdpbf16ps. Other processors, whose tests run this too, do it in float32: a bfloat16 is the
    upper half of a float32, so a shift or a mask makes one of it.
    """
    if HAS_PAIRS:
        # LLVM before 22 has the words as integers here, later ones accept that.
        kind = ir.FunctionType(_VECTOR, [_VECTOR, _WORD_VECTOR, _WORD_VECTOR])
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        pair_sum = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(pair_sum, [total, x, w])
    half = ir.Constant(_WORD_VECTOR, [16] * LANES)
    upper = ir.Constant(_WORD_VECTOR, [-(1 << 16)] * LANES)
    for a, b in (
        (builder.shl(x, half), builder.shl(w, half)),
        (builder.and_(x, upper), builder.and_(w, upper)),
    ):
        factors = builder.bitcast(a, _VECTOR), builder.bitcast(b, _VECTOR)
        total = builder.call(fma(builder), [*factors, total])
    return total


def load_vector(builder: Any, pointer: Any, offset: Any, kind: Any, align: int) -> Any:
    """A vector of consecutive elements, from any element on (`align` is that of one element)."""
    at = builder.bitcast(builder.gep(pointer, [offset]), kind.as_pointer())
    return builder.load(at, align=align, typ=kind)


def spread(builder: Any, value: Any) -> Any:
    """A vector with one number in all its lanes (a broadcast)."""
    # LLVM's idiom for it: put the number into lane 0, then shuffle lane 0 everywhere.
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    one = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(
        one, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    )


# A transposition of LANES x LANES words in registers, in log2(LANES) steps. Step s = 1, 2, 4, ...
# transposes blocks: of each pair of lines (i, i + s) it exchanges the upper right s x s blocks
# with the lower left ones. For 4 lines:
#
#     a0 a1 a2 a3   s = 1   a0 b0 a2 b2   s = 2   a0 b0 c0 d0
#     b0 b1 b2 b3   ---->   a1 b1 a3 b3   ---->   a1 b1 c1 d1
#     c0 c1 c2 c3           c0 d0 c2 d2           a2 b2 c2 d2
#     d0 d1 d2 d3           c1 d1 c3 d3           a3 b3 c3 d3
@intrinsic
def transpose_words(typingctx: Any, out: Any, out_stride: Any, x: Any, x_stride: Any) -> Any:
    """out = x transposed: LANES lines of LANES words, with strides from line to line."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, to_stride, source, stride = args
        lines = [
            load_vector(builder, source, builder.mul(stride, _I64(i)), _WORD_VECTOR, 4)
            for i in range(LANES)
        ]
        store_transposed(builder, to, to_stride, lines)
        return context.get_dummy_value()

    return types.void(WORDS, INT64, WORDS, INT64), codegen


def store_transposed(builder: Any, to: Any, to_stride: Any, lines: list[Any]) -> None:
    """Emit the transposition of LANES vectors of words, and their stores."""
    lines, step = list(lines), 1
    while step < LANES:
        # Lanes LANES and up are those of a shuffle's second vector.
        first = [j if not j & step else LANES + j - step for j in range(LANES)]
        second = [j + step if not j & step else LANES + j for j in range(LANES)]
        for i in (i for i in range(LANES) if not i & step):
            upper, lower = lines[i], lines[i + step]
            lines[i] = _shuffled(builder, upper, lower, first)
            lines[i + step] = _shuffled(builder, upper, lower, second)
        step *= 2
    for i, line in enumerate(lines):
        at = builder.gep(to, [builder.mul(to_stride, _I64(i))])
        builder.store(line, builder.bitcast(at, _WORD_VECTOR.as_pointer()), align=4)


def _shuffled(builder: Any, first: Any, second: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, LANES), lanes))
