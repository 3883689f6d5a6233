"""A check of what a pickle would build, before anything of it is built.

A pickle of 300 bytes can take for ever to load: a tuple that holds the previous tuple twice,
nested thirty times, has a billion values for any traversal, and hashing, printing and comparing
traverse. Loading it cannot even be interrupted. So the instructions are executed here on
placeholders, which count the values, their depth, and the values that a traversal would visit.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from typing import Any, BinaryIO

_MOST_STEPS = 2**23  # instructions; 40,000 tensors need a million
_MOST_CONTAINERS = 2**20  # an empty dict takes 64 bytes of memory and one byte of the file
_DEEPEST = 100  # levels of nesting
_LARGEST_KEY = 200  # values that a traversal of a dict's key visits
# A traversal of everything may visit this many values, plus some for each instruction.
_LEAST_WALK = 2**20
_WALK_PER_STEP = 10
_LONGEST_INT = 128  # bits; Python refuses to print much longer ones
_CHARACTERS_PER_VALUE = 32  # a long text counts as one value for each so many characters

_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_PLAIN = {
    "NONE", "NEWTRUE", "NEWFALSE", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8", "PERSID",
}  # fmt: skip
_EMPTY = {"EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET"}
_COLLECTED = {"LIST", "TUPLE", "DICT", "FROZENSET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
_SIZED = ("bytearray", "Storage", "Tensor")  # types whose constructors allocate a given size


class _Value:
    """A placeholder for a value.

    Attributes:
        own: what it alone adds to a traversal.
        parts: the values that it contains or is built from; None for a plain value.
        name: the name of a function or class; "int" for a number; else empty.
        walk: the number of values that a traversal of it visits.
        depth: the depth of its nesting.
    """

    __slots__ = ("depth", "name", "own", "parts", "walk")

    def __init__(self, own: int = 1, parts: list[_Value] | None = None, name: str = "") -> None:
        self.own, self.parts, self.name = own, parts, name
        self.walk, self.depth = own, 0


_ONE, _NUMBER, _MARK = _Value(), _Value(name="int"), _Value(name="mark")


def check_pickle(
    stream: BinaryIO,
    *,
    allowed: Collection[str] | None = None,
    most_containers: int = _MOST_CONTAINERS,
    most_steps: int = _MOST_STEPS,
) -> None:
    """Check one pickle, without loading it: an error if loading it could take too long.

    Args:
        stream: at the beginning of the pickle; afterwards it is at its end.
        allowed: the names of the allowed instructions; None allows all that are known here.
        most_containers: how many dicts, lists, tuples and objects it may build.
        most_steps: how many instructions it may have.

    Raises:
        ValueError: with one short line.
        NotAllowed: for an instruction that is not allowed.
    """
    _Machine(allowed, most_containers, most_steps).run(stream)


class NotAllowed(ValueError):
    """A pickle has an instruction that is not allowed.

    Attributes:
        instruction: its name.
    """

    def __init__(self, instruction: str) -> None:
        super().__init__(f"it has the pickle instruction {instruction}")
        self.instruction = instruction


class _Machine:
    def __init__(
        self, allowed: Collection[str] | None, most_containers: int, most_steps: int
    ) -> None:
        self._allowed, self._most, self._most_steps = allowed, most_containers, most_steps
        self._stack: list[_Value] = []
        self._memo: dict[int, _Value] = {}
        self._built: list[_Value] = []  # all values that have parts
        self._given: list[_Value] = []  # arguments of calls
        self._steps = 0

    def run(self, stream: BinaryIO) -> None:
        try:
            for code, argument, _ in pickletools.genops(stream):
                self._steps += 1
                if self._allowed is not None and code.name not in self._allowed:
                    raise NotAllowed(code.name)
                if self._steps > self._most_steps:
                    raise ValueError(f"it has more than {self._most_steps:,} instructions")
                self._follow(code.name, argument)
        except (IndexError, KeyError):
            raise ValueError("its instructions are not valid") from None
        self._measure()

    def _follow(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _NUMBERS:
            if int(argument).bit_length() > _LONGEST_INT:
                raise ValueError(f"it has an integer of more than {_LONGEST_INT} bits")
            stack.append(_NUMBER)
        elif name in _PLAIN:
            length = len(argument) if isinstance(argument, (str, bytes, bytearray)) else 0
            stack.append(_Value(1 + length // _CHARACTERS_PER_VALUE) if length > 100 else _ONE)
        elif name == "GLOBAL":
            stack.append(_Value(name=str(argument).replace(" ", ".")))
        elif name in _EMPTY:
            self._build([])
        elif name in _TUPLES:
            self._build([stack.pop() for _ in range(_TUPLES[name])])
        elif name in _COLLECTED:
            self._collect(name)
        elif name in _PUT or name == "MEMOIZE":
            place = len(self._memo) if name == "MEMOIZE" else int(argument)
            if place > self._steps:  # the unpickler would allocate a memo of that length
                raise ValueError("it has a memo index that is out of range")
            self._memo[place] = stack[-1]
        elif name in _GET:
            stack.append(self._memo[int(argument)])
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._change(name)

    def _change(self, name: str) -> None:
        """Execute an instruction that removes values from the stack or adds them to others."""
        stack = self._stack
        if name == "MARK":
            stack.append(_MARK)
        elif name in ("APPEND", "BUILD"):
            value = stack.pop()
            self._extend(stack[-1], [value])
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set(stack[-1], [key, value])
        elif name in ("APPENDS", "ADDITEMS"):
            items = self._to_mark()
            if name == "ADDITEMS":
                self._check_keys(items)
            self._extend(stack[-1], items)
        elif name == "SETITEMS":
            items = self._to_mark()
            self._set(stack[-1], items)
        elif name == "STACK_GLOBAL":
            stack.pop()
            stack.pop()
            stack.append(_ONE)  # torch's weights_only reader does not support this instruction
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            parts = [stack.pop() for _ in range(3 if name == "NEWOBJ_EX" else 2)]
            self._check_call(parts)
            self._build(parts)
            self._given += parts[:-1]
        elif name == "BINPERSID":
            self._build([stack.pop()])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            raise NotAllowed(name)

    def _build(self, parts: list[_Value]) -> None:
        value = _Value(1, parts)
        self._built.append(value)
        if len(self._built) > self._most:
            raise ValueError(f"it builds more than {self._most:,} objects")
        self._stack.append(value)

    def _collect(self, name: str) -> None:
        parts = self._to_mark()
        if name in ("DICT", "FROZENSET"):
            self._check_keys(parts[::2] if name == "DICT" else parts)
        self._build(parts)

    def _to_mark(self) -> list[_Value]:
        items: list[_Value] = []
        while (value := self._stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def _extend(self, value: _Value, parts: list[_Value]) -> None:
        if value.parts is None:
            raise ValueError("it adds items to a value that is not a container")
        value.parts += parts

    def _set(self, value: _Value, items: list[_Value]) -> None:
        self._check_keys(items[::2])
        self._extend(value, items)

    def _check_keys(self, keys: list[_Value]) -> None:
        """Raise for large keys: they are hashed when they are inserted."""
        for key in keys:
            count, waiting = 0, [key]
            while waiting:
                count += 1
                waiting += (waiting.pop().parts or ())[: _LARGEST_KEY + 1]
                if count > _LARGEST_KEY:
                    raise ValueError(f"it has a key of more than {_LARGEST_KEY} values")

    def _check_call(self, parts: list[_Value]) -> None:
        """Raise for a call that allocates memory of a size that the pickle gives as a number."""
        function, given = parts[-1], [p for part in parts[:-1] for p in part.parts or ()]
        if function.name.endswith(_SIZED) and _NUMBER in given:
            raise ValueError(f"it allocates a {function.name[:60]} by size, without content")

    def _measure(self) -> None:
        """Raise if a traversal of the arguments of calls would visit too many values."""
        most = _LEAST_WALK + _WALK_PER_STEP * self._steps
        parts_first = TopologicalSorter({value: value.parts or () for value in self._built})
        try:
            for value in parts_first.static_order():
                value.walk = value.own + sum(part.walk for part in value.parts or ())
                value.depth = max((part.depth + 1 for part in value.parts or ()), default=0)
                if value.walk > most:
                    raise ValueError("its values contain each other too many times")
                if value.depth > _DEEPEST:
                    raise ValueError(f"its values are nested more than {_DEEPEST} levels deep")
        except CycleError:
            raise ValueError("one of its values contains itself") from None
        if sum(value.walk for value in self._given) > most:
            raise ValueError("its values contain each other too many times")
