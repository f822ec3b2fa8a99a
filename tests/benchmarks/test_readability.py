"""Readability: what is counted in a source text whose counts are known."""

import pytest

from benchmarks.readability import (
    COLUMNS,
    Source,
    annotated_share,
    docstring_shares,
    function_lengths,
    line_shares,
    main,
    nested_comprehensions,
    paired_assignments,
    python_files,
    row,
    vague_docstrings,
    vague_names,
)

TEXT = '''\
"""A module."""


class Thing:
    """A thing."""

    def of(self, other: int) -> int:
        """Of the thing."""
        told = other  # the name says nothing

        # A comment.
        return told

    def _hidden(self, plain):
        a, b = 1, plain
        return a + b
'''


def parse(text):
    return Source.parse(text)


def test_a_comprehension_that_holds_another_one_is_counted_once():
    assert nested_comprehensions(parse("x = [[i for i in row] for row in rows]")) == 1
    assert nested_comprehensions(parse("x = {k: (sum(i for i in v), [j for j in v]) for k, v in rows}")) == 1
    assert nested_comprehensions(parse("x = [i for i in row]\ny = {j for j in x}")) == 0
    assert nested_comprehensions(parse("x = [[[i for i in a] for a in b] for b in c]")) == 2, "two of three hold one"


def test_a_vague_name_counts_as_an_argument_and_as_a_variable():
    assert vague_names(parse("def work(of, name):\n    return name")) == 1
    assert vague_names(parse("found = 1\nfor said in found:\n    print(said)")) == 2
    assert vague_names(parse("if (asked := 1):\n    pass\nwith open(x) as told:\n    pass")) == 2
    assert vague_names(parse("call = lambda told: told")) == 1
    assert vague_names(parse("result = work(of=1).found")) == 0, "what others named does not count"


@pytest.mark.parametrize("start", ["Of a task.", "Those that stay.", "As before.", "The same of a layer."])
def test_a_docstring_without_a_subject_is_counted(start):
    assert vague_docstrings(parse(f'def work():\n    """{start}"""')) == 1
    assert vague_docstrings(parse(f'class Work:\n    """{start}"""')) == 1


@pytest.mark.parametrize("start", ["Offer a task.", "Return those.", "Assign it.", "The samest.", ""])
def test_a_docstring_with_a_subject_or_a_verb_is_not_counted(start):
    assert vague_docstrings(parse(f'def work():\n    """{start}"""')) == 0


def test_values_that_are_paired_in_one_assignment_are_counted():
    assert paired_assignments(parse("a, b = 1, 2")) == 1
    assert paired_assignments(parse("a, b = pair()\nc = 1, 2\nd = e = 3")) == 0


def test_blank_lines_are_a_share_of_functions_and_comments_of_all_lines():
    blank, commented, long = line_shares([parse(TEXT)])
    assert (blank, commented, long) == (1 / 9, 1 / 16, 0), "nine lines of functions, sixteen of the file"
    assert line_shares([parse(f"x = '{'-' * 100}'\ny = 1")])[2] == 1 / 2
    inner = "def outer():\n    def inner():\n        x = 1\n\n        return x\n    return inner"
    assert line_shares([parse(inner)])[0] == 1 / 6, "a line of both functions counts once"


def test_docstrings_types_and_lengths():
    source = parse(TEXT)
    assert docstring_shares([source]) == (2 / 3, 1), "the hidden one has none"
    assert annotated_share([source]) == 1 / 2, "self does not count"
    assert sorted(function_lengths(source)) == [3, 6]


def test_a_file_without_functions_lacks_nothing():
    empty = parse("")
    assert docstring_shares([empty]) == (1, 1) and annotated_share([empty]) == 1
    assert len(row("empty", [empty]).split("|")) == len(COLUMNS) + 2


def test_a_row_is_printed_for_every_folder_or_file(tmp_path, capsys):
    (tmp_path / "inner").mkdir()
    (tmp_path / "thing.py").write_text(TEXT)
    (tmp_path / "inner" / "other.py").write_text("x = 1\n")
    assert len(python_files(str(tmp_path))) == 2 and len(python_files(str(tmp_path / "thing.py"))) == 1
    main([str(tmp_path), str(tmp_path / "thing.py")])
    head, line, folder, file = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.strip("| ").split(" | ")] == list(COLUMNS) and line.startswith("|---|--:|")
    cells = dict(zip(COLUMNS, (cell.strip() for cell in file.strip("|").split("|")), strict=True))
    assert cells["lines"] == "16" and cells["nested ones"] == "0" and cells["`a, b = x, y` / 1,000"] == "62.5"
    assert cells["vague names / docstrings"] == "1 / 1" and cells["on public names"] == "100%"
    assert folder.split("|")[2].strip() == "17"
