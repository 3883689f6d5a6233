"""JSON from anywhere: the limits of bytes, values and depth, and what is not an object."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mygpt.errors import InputError
from mygpt.json_objects import SETTINGS, Limits, parse_object, read_object

SMALL = Limits(1000, 50)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), VALUES, max_size=5))
@settings(max_examples=60, deadline=None)
def test_objects_within_the_limits_are_parsed_as_by_the_json_module(value):
    text = json.dumps(value)
    assert parse_object(text, SETTINGS) == value
    assert parse_object(text.encode(), SETTINGS) == value


@given(st.binary(max_size=200) | st.text('[]{}:,"0ae\\', max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_an_object_or_a_short_error(data):
    message = ""
    try:
        assert isinstance(parse_object(data, SMALL), dict)
    except ValueError as error:
        message = str(error)
    assert len(message) < 200
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"a": "' + "x" * 1000 + '"}', "longer than 1,000 bytes"),
        ('{"a": [' + "{}," * 60 + "{}]}", "more than 50 values"),
        ('{"a": ' * 40 + "{}" + "}" * 40, None),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "two values for the key 'c'"),
        ("[1]", "is not a JSON object"),
        ("{} {}", "Extra data"),
    ],
)
def test_content_beyond_a_limit_is_refused(text, match):
    if match is None:
        assert parse_object(text, SMALL)
        return
    with pytest.raises(ValueError, match=match):
        parse_object(text, SMALL)


@pytest.mark.parametrize("depth", [101, 5000, 200_000])
def test_values_nested_too_deep_are_refused(depth):
    with pytest.raises(ValueError, match="nested more than 100 levels deep"):
        parse_object('{"a":' * depth + "1" + "}" * depth, Limits(2**22, 2**20))


def test_many_small_values_take_no_memory():
    """60 MB of {} as a config.json took gigabytes."""
    text = '{"a": [' + "{}," * 2_000_000 + "{}]}"
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 65,536 values"):
        parse_object(text, Limits(2**26, 2**16))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_paths_that_are_not_files_are_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=str(name)):
            read_object(name, SETTINGS)
