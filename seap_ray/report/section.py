"""Section: what a page of the report is made of. A section asks a question and answers it by a figure and tables."""

from collections.abc import Sequence
from dataclasses import dataclass

from seap_ray.report.charts import Figure


@dataclass(frozen=True, slots=True)
class Table:
    """Rows in groups."""

    caption: str
    columns: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str]]]]
    """Headings, each with its rows; an empty heading is not shown. A row's first cell names it."""
    notes: Sequence[str] = ()
    """Footnotes that cells refer to by number, from 1 on."""


@dataclass(frozen=True, slots=True)
class Section:
    """A question with its answer."""

    key: str
    """Anchor on the page, and name of the figure's file."""
    question: str
    how_to_read: str
    """How the figure is to be read."""
    finding: str = ""
    """What the figure shows, in words with numbers."""
    figure: Figure | None = None
    tables: tuple[Table, ...] = ()


def as_sentences(clauses: Sequence[str]) -> str:
    """Return every clause as a sentence of its own."""
    return " ".join(f"{clause[0].upper()}{clause[1:]}." for clause in clauses)
