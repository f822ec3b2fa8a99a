"""Rows: strategies of any JSON, and what comes out of a source's parts."""

import json
from collections.abc import Iterable
from typing import Any

from hypothesis import strategies as st

from seap_ray.models.row_files import RowPart

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=12)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=5)
"""Rows of any values that JSON has."""


def same_json(left: Any, right: Any) -> bool:
    """Return whether two values of JSON are equal, where NaN equals itself."""
    return json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)


def rows_of(parts: Iterable[RowPart]) -> list[dict[str, Any]]:
    """Return the rows of all parts, in their order."""
    rows = []
    for part in parts:
        rows += part.rows()
    return rows
