"""What a pickle from elsewhere would build, found out before any of it is built.

A pickle of 300 bytes can hash for ever: a tuple that holds the one before it twice, thirty times,
is a billion values to whoever walks through it, and walking is what hashing, printing and
comparing do. Loading then cannot even be interrupted. So the instructions are followed here with
placeholders: how many values there are, how deep they lie, and how many a walk would meet.
"""

from __future__ import annotations

import pickletools
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

_MOST_STEPS = 2**23  # instructions: 40,000 tensors have a million
_MOST_CONTAINERS = 2**20  # a dict is 64 bytes of memory and one of the file
_DEEPEST = 100
_LARGEST_KEY = 200  # values that a walk through a dict's key meets
_LEAST_WALK = 2**20  # values that a walk through everything may meet, and more in a large file
_WALK_A_STEP = 10
_LONGEST_INT = 128  # bits; Python refuses to print much longer ones
_CHARACTERS_A_VALUE = 32  # printing text costs by its length

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
_SIZED = ("bytearray", "Storage", "Tensor")  # what these are called with may be a size


class _Value:
    """A placeholder.

    Attributes:
        own: what it costs a walk by itself.
        parts: what it holds, or is made of.
        name: of a function or class, where it is one; "int" for a number.
        walk: how many values a walk through it meets; 0 while that is not known.
        depth: how deep its parts lie.
    """

    __slots__ = ("depth", "name", "own", "parts", "walk")

    def __init__(self, own: int = 1, parts: list[_Value] | None = None, name: str = "") -> None:
        self.own, self.parts, self.name = own, parts, name
        self.walk, self.depth = (own, 0) if parts is None else (0, 0)


_ONE, _NUMBER, _MARK = _Value(), _Value(name="int"), _Value(name="mark")


def check_pickle(
    stream: BinaryIO,
    *,
    allowed: Collection[str] | None = None,
    most_containers: int = _MOST_CONTAINERS,
    most_steps: int = _MOST_STEPS,
) -> None:
    """Read one pickle, up to its end, and refuse it where loading it could take for ever.

    Args:
        stream: is at the pickle's beginning, and at its end afterwards.
        allowed: names of the instructions that may occur; None is all that are known here.
        most_containers: dicts, lists, tuples and objects that it may build.
        most_steps: instructions that it may have.

    Raises:
        ValueError: in one short line.
        NotAllowed: for an instruction that may not occur.
    """
    _Machine(allowed, most_containers, most_steps).run(stream)


class NotAllowed(ValueError):
    """A pickle with an instruction that may not occur.

    Attributes:
        instruction: its name.
    """

    def __init__(self, instruction: str) -> None:
        super().__init__(f"it has pickle's {instruction}")
        self.instruction = instruction


class _Machine:
    def __init__(
        self, allowed: Collection[str] | None, most_containers: int, most_steps: int
    ) -> None:
        self._allowed, self._most, self._most_steps = allowed, most_containers, most_steps
        self._stack: list[_Value] = []
        self._memo: dict[int, _Value] = {}
        self._built: list[_Value] = []  # all that have parts
        self._given: list[_Value] = []  # what functions are called with
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
            raise ValueError("its instructions do not fit together") from None
        self._measure()

    def _follow(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _NUMBERS:
            if int(argument).bit_length() > _LONGEST_INT:
                raise ValueError("it has a number of more than 128 bits")
            stack.append(_NUMBER)
        elif name in _PLAIN:
            length = len(argument) if isinstance(argument, (str, bytes, bytearray)) else 0
            stack.append(_Value(1 + length // _CHARACTERS_A_VALUE) if length > 100 else _ONE)
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
            if place > self._steps:  # memory would be taken up to there
                raise ValueError("a place beyond its end")
            self._memo[place] = stack[-1]
        elif name in _GET:
            stack.append(self._memo[int(argument)])
        elif name not in ("PROTO", "FRAME", "STOP"):
            self._change(name)

    def _change(self, name: str) -> None:
        """What takes values off the stack, and puts them into others."""
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
            stack.append(_ONE)  # torch's own reader knows no such instruction
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
            raise ValueError("it adds to what holds nothing")
        value.parts += parts

    def _set(self, value: _Value, items: list[_Value]) -> None:
        self._check_keys(items[::2])
        self._extend(value, items)

    def _check_keys(self, keys: list[_Value]) -> None:
        """Refuse keys that are large: they are hashed as soon as they are there."""
        for key in keys:
            count, waiting = 0, [key]
            while waiting:
                count += 1
                waiting += (waiting.pop().parts or ())[: _LARGEST_KEY + 1]
                if count > _LARGEST_KEY:
                    raise ValueError(f"it has a key of more than {_LARGEST_KEY} values")

    def _check_call(self, parts: list[_Value]) -> None:
        """Refuse memory of a size that the pickle names, without anything in it."""
        function, given = parts[-1], [p for part in parts[:-1] for p in part.parts or ()]
        if function.name.endswith(_SIZED) and _NUMBER in given:
            raise ValueError(f"it asks for a {function.name[:60]} of a size of its own")

    def _measure(self) -> None:
        """Refuse what a walk through all of it would take for ever."""
        most = _LEAST_WALK + _WALK_A_STEP * self._steps
        for value in self._built:
            value.walk = 0
        for value in self._built:
            _measure_one(value, most)
        if sum(value.walk for value in self._given) > most:
            raise ValueError("its values repeat each other without end")


def _measure_one(value: _Value, most: int) -> None:
    """Fill in `walk` and `depth` of a value and its parts, without recursion."""
    if value.walk:
        return
    waiting: list[tuple[_Value, Iterator[_Value]]] = [(value, iter(value.parts or ()))]
    value.walk = -1  # it is being measured: who meets it again has met a circle
    while waiting:
        here, parts = waiting[-1]
        below = next((part for part in parts if part.walk <= 0), None)
        if below is None:
            own = here.parts or []
            here.walk = here.own + sum(part.walk for part in own)
            here.depth = 1 + max((part.depth for part in own), default=0)
            if here.walk > most:
                raise ValueError("its values repeat each other without end")
            if here.depth > _DEEPEST:
                raise ValueError(f"its values are nested more than {_DEEPEST} deep")
            waiting.pop()
            continue
        if below.walk < 0:
            raise ValueError("one of its values holds itself")
        below.walk = -1
        waiting.append((below, iter(below.parts or ())))
        if len(waiting) > _DEEPEST + 1:
            raise ValueError(f"its values are nested more than {_DEEPEST} deep")
