"""Row values: numbers print as in the file, Arrow's values are plain ones of Python, what is no row is named."""

import datetime
import json
import pickle
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seap_ray.models.row_values import SLICE_BYTES, Binary, FileNumber, arrow_rows, parse_object, slice_rows
from tests.support.rows import OBJECTS, same_json


@given(OBJECTS, st.booleans())
def test_any_object_is_what_json_reads(row, ascii_only):
    text = json.dumps(row, ensure_ascii=ascii_only)
    assert same_json(parse_object(text), json.loads(text))


@given(st.from_regex(r"-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", fullmatch=True))
def test_a_number_prints_as_it_is_written(text):
    value = parse_object('{"n": ' + text + "}")["n"]
    assert value == json.loads(text)
    assert str(value) == f"{value}" == repr(value) == text


def test_a_number_that_prints_as_written_is_a_number_otherwise():
    price = FileNumber("2.50")
    assert isinstance(price, float) and price == 2.5 and price + 1 == 3.5 and f"{price:.3f}" == "2.500"
    copy = pickle.loads(pickle.dumps(price))
    assert copy == 2.5 and str(copy) == "2.50"


def test_neighbours_change_no_value():
    rows = [parse_object(line) for line in ('{"a": 5}', '{"a": 2.5}', '{"a": "five"}', '{"a": "2024-01-05"}')]
    assert [(type(row["a"]), str(row["a"])) for row in rows] == [
        (int, "5"),
        (FileNumber, "2.5"),
        (str, "five"),
        (str, "2024-01-05"),
    ]


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"q": "5 + 1 =", "a"', "not JSON \\(Expecting ':' delimiter at column 21\\)"),
        ("{'a': 1}", "not JSON"),
        ("[1, 2]", "not a JSON object but an array"),
        ('"text"', "not a JSON object but a text"),
        ("null", "not a JSON object but null"),
        ("true", "not a JSON object but a truth value"),
        ("5", "not a JSON object but a number"),
        ('{"n": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        (r'{"a": "cut \ud83d"}', r"half of a surrogate pair, \\ud83d"),
    ],
)
def test_what_is_no_row_is_refused_with_its_reason(text, reason):
    with pytest.raises(ValueError, match=reason) as refusal:
        parse_object(text)
    assert "\n" not in str(refusal.value)


def test_a_pair_of_surrogates_is_a_character():
    assert parse_object(r'{"a": "\ud83d\ude00"}') == {"a": "😀"}


# --- Arrow -----------------------------------------------------------------------------------------------------------


def row_of(array: pa.Array):
    """Return the first value of a column as a row has it."""
    return next(iter(arrow_rows(pa.record_batch({"a": array}))))["a"]


@pytest.mark.parametrize(
    "array, value, text",
    [
        (pa.array([0.1], pa.float32()), float(np.float32(0.1)), "0.1"),
        (pa.array([1e10], pa.float32()), 1e10, "10000000000.0"),
        (pa.array([np.float16(0.1)], pa.float16()), float(np.float16(0.1)), "0.1"),
        (pa.array([0.1], pa.float64()), 0.1, "0.1"),
        (pa.array([2**63 - 1], pa.int64()), 2**63 - 1, "9223372036854775807"),
        (pa.array([True]), True, "True"),
        (pa.array([None], pa.float32()), None, "None"),
        (pa.array(["02108"]), "02108", "02108"),
        (pa.array(["a"], pa.string_view()), "a", "a"),
        (pa.array(["a"]).dictionary_encode(), "a", "a"),
        (pa.array([np.float32(0.1)]).dictionary_encode(), float(np.float32(0.1)), "0.1"),
        (pa.array([b"caf\xc3\xa9"]), "café", "café"),
        (pa.array([b"ab"], pa.binary(2)), "ab", "ab"),
        (pa.array([b"ab"], pa.large_binary()), "ab", "ab"),
        (pa.array([Decimal("2.50")]), Decimal("2.50"), "2.50"),
        (pa.array([datetime.date(2024, 1, 5)]), datetime.date(2024, 1, 5), "2024-01-05"),
        (pa.array([datetime.time(9, 30)]), datetime.time(9, 30), "09:30:00"),
        (
            pa.array([datetime.datetime(2024, 1, 5, 9, 30)], pa.timestamp("ns")),
            datetime.datetime(2024, 1, 5, 9, 30),
            "2024-01-05 09:30:00",
        ),
        (pa.array(['{"a": 2.50, "b": ["x"]}'], pa.json_()), {"a": 2.5, "b": ["x"]}, "{'a': 2.50, 'b': ['x']}"),
        (pa.nulls(1), None, "None"),
    ],
)
def test_a_stored_value_is_python_s_and_prints_in_its_own_digits(array, value, text):
    read = row_of(array)
    assert read == value and str(read) == text


def test_nested_columns_are_lists_and_mappings():
    kind = pa.struct([("name", pa.binary()), ("scores", pa.list_(pa.float32())), ("tags", pa.map_("string", "float"))])
    row = {"name": b"x", "scores": [0.1, None], "tags": [("t", 0.2)]}
    read = row_of(pa.array([row], kind))
    assert read == {"name": "x", "scores": [np.float32(0.1), None], "tags": {"t": np.float32(0.2)}}
    assert str(read) == "{'name': 'x', 'scores': [0.1, None], 'tags': {'t': 0.2}}"
    assert row_of(pa.array([None], kind)) is None


@pytest.mark.parametrize(
    "make", [pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda kind: pa.list_(kind, 2)]
)
def test_every_kind_of_list_is_a_list(make):
    assert str(row_of(pa.array([[0.1, 0.2]], make(pa.float32())))) == "[0.1, 0.2]"


def test_bytes_that_are_no_text_are_read_and_refuse_to_be_printed():
    image = row_of(pa.array([b"\xff\xd8"]))
    assert isinstance(image, Binary) and image == b"\xff\xd8" and repr(image) == "<2 bytes>"
    with pytest.raises(ValueError, match="binary data, which is not UTF-8 text"):
        str(image)


def digits(text: str) -> str:
    """Return the digits of a number that say more than its order of magnitude."""
    return re.sub(r"[^0-9]", "", text.partition("e")[0]).strip("0")


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_a_number_of_32_bits_prints_the_fewest_digits_that_are_it(numbers):
    rows = arrow_rows(pa.record_batch({"a": pa.array(numbers, pa.float32())}))
    for row, number in zip(rows, numbers, strict=True):
        assert row["a"] == number and np.float32(str(row["a"])) == np.float32(number)
        assert len(digits(str(row["a"]))) <= len(digits(repr(number)))


def test_a_long_batch_is_taken_in_slices_of_some_megabytes():
    assert slice_rows(SLICE_BYTES * 100, 50) == 1
    assert slice_rows(SLICE_BYTES, 8) == 8
    assert 1 <= slice_rows(10, 100_000) < 100_000
    batch = pa.record_batch({"a": range(2500)})
    assert [row["a"] for row in arrow_rows(batch)] == list(range(2500))
