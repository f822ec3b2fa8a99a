"""Templates: Jinja over the columns of a row, in which null, and what a row lacks, are empty texts.

``row`` is the whole row, for columns whose names are no identifiers: ``row['a b']``. What null is asked for is empty as
well (``answer.text`` where the answer is null), ``default(...)`` holds for null as for a missing column, and so does
the test ``is none``. A text that is no number stays empty under ``int`` and ``float``, which give 0 elsewhere.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from types import GeneratorType
from typing import Any, ClassVar

from jinja2 import ChainableUndefined, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.filters import do_float, do_int, make_attrgetter
from jinja2.nodes import EvalContext

from seap_ray.models.row_sources import Row
from seap_ray.models.template_limits import LimitedEnvironment, join_within_limits


class WholeValueError(ValueError):
    """A template prints a list or a mapping, whose text would be that of Python."""


class Missing(ChainableUndefined):
    """A value that a row does not have: it prints nothing, and remembers that it was used."""

    __slots__ = ()
    used: ClassVar[dict[str, None]] = {}
    """What was used though it is undefined, in words and in order; null is defined and never among it."""

    def note(self) -> "Missing":
        """Remember the use of the value, and return it."""
        # A hint stands for what is in the row and no value: null, or a text that is no number.
        if self._undefined_hint is None:
            self.used[self._undefined_message] = None
        return self

    def __str__(self) -> str:
        self.note()
        return ""

    def __bool__(self) -> bool:
        self.note()
        return False

    def __len__(self) -> int:
        self.note()
        return 0

    def __iter__(self) -> Any:
        self.note()
        return iter(())

    def __eq__(self, other: object) -> bool:
        self.note()
        return other is None or isinstance(other, Missing)

    def __hash__(self) -> int:
        return hash(None)


class RowEnvironment(LimitedEnvironment):
    """Jinja as tasks use it; each environment remembers what its templates used and rows lacked."""

    def __init__(self) -> None:
        # A class of its own, since Jinja makes undefined values by a class.
        missing: type[Missing] = type("Missing", (Missing,), {"used": {}, "__slots__": ()})
        super().__init__(undefined=missing, finalize=_printable, keep_trailing_newline=True)

        self.used = missing.used
        self.tests["none"] = lambda value: value is None or isinstance(value, Missing)
        self.filters["tojson"] = _to_json
        self.filters["join"] = _join
        self.filters["int"] = self._number_filter(do_int)
        self.filters["float"] = self._number_filter(do_float)

    def make_globals(self, d: Any) -> Any:
        """Return the names that templates have besides a row's columns."""
        # A chain of mappings, as Jinja has it, takes most of the time of a short template.
        return {**self.globals, **(d or {})}

    def context(self, row: Row) -> dict[str, Any]:
        """Return the variables that a template has for a row."""
        columns = {name: self._or_missing(value, name) for name, value in row.items()}
        return {"row": row, **columns}

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute, in which null is a missing value."""
        return self._or_missing(super().getattr(obj, attribute), attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an element, in which null is a missing value, as is the element at a missing index."""
        if isinstance(argument, Missing):
            return argument.note()
        return self._or_missing(super().getitem(obj, argument), argument)

    # Jinja names the parameters so, which keeps their names free for those of the called.
    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call what a template calls; null is a missing value."""
        value = super().call(__context, __obj, *args, **kwargs)
        return __self._or_missing(value, getattr(__obj, "__name__", "call"))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Raise SecurityError, where Jinja would return a value that prints nothing here."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe")

    def _or_missing(self, value: Any, name: Any) -> Any:
        return self.undefined(hint=f"{name!r} is null") if value is None else value

    def _number_filter(self, convert: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter to a number that gives a missing value, not 0, for what is none."""
        no_number = object()

        def to_number(value: Any, default: Any = no_number, *args: Any) -> Any:
            if isinstance(value, Missing):
                return value.note() if default is no_number else default

            number = convert(value, default, *args)
            return self.undefined(hint=f"{value!r} is no number") if number is no_number else number

        return to_number


def _printable(value: Any) -> Any:
    """Return what a template prints for a value. Raises WholeValueError for one that has no text of its own."""
    if isinstance(value, list | tuple | set | Mapping | GeneratorType):
        raise WholeValueError(f"prints a whole {'mapping' if isinstance(value, Mapping) else 'list'}")
    return "" if value is None else value


@pass_eval_context
def _join(context: EvalContext, values: Iterable[Any], separator: str = "", attribute: str | int | None = None) -> str:
    """Join the texts of a list, in which null is an empty one."""
    values = values if attribute is None else map(make_attrgetter(context.environment, attribute), values)
    return join_within_limits(separator, ["" if value is None else str(value) for value in values])


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON as transformers' chat templates write it, without Jinja's escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        # A date has no JSON of its own.
        default=lambda other: None if isinstance(other, Missing) else str(other),
    )


def without_missing(value: Any) -> Any:
    """Return a value of an expression with null in place of what is missing, at any depth."""
    if isinstance(value, Missing):
        return None
    if isinstance(value, list | tuple):
        return [without_missing(element) for element in value]
    if isinstance(value, Mapping):
        return {name: without_missing(element) for name, element in value.items()}
    return value
