"""python -m benchmarks.readability [FOLDER ...]

Measures how a tree of Python files reads, a row for every folder or file; left out: the library, the service and the
jobs. The figures are those of the field's own projects in CONTRIBUTING.md: they are examples to learn from, no limits.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LONG = 100
"""Characters of a line above which it counts as long."""
VAGUE_NAMES = {"of", "told", "said", "asked", "found"}
"""Identifiers that say nothing of what they hold."""
VAGUE_STARTS = ("Of", "Those", "As", "The same")
"""Beginnings of docstrings that cannot be understood without the name above them."""
COLUMNS = (
    "tree",
    "lines",
    "function median / p90",
    "comprehensions / 100 lines",
    "nested ones",
    "`a, b = x, y` / 1,000",
    "lines over 100",
    "blank lines in bodies",
    "comment lines",
    "docstrings",
    "on public names",
    "arguments annotated",
    "vague names / docstrings",
)
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@dataclass(frozen=True)
class Source:
    """One Python file, parsed."""

    lines: list[str]
    tree: ast.Module

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Parse the text of a file."""
        return cls(text.splitlines(), ast.parse(text))

    def functions(self) -> Iterator[Function]:
        """Yield all functions and methods."""
        for node in ast.walk(self.tree):
            if isinstance(node, FUNCTIONS):
                yield node

    def definitions(self) -> Iterator[Definition]:
        """Yield all functions, methods and classes."""
        for node in ast.walk(self.tree):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                yield node

    def comprehensions(self) -> Iterator[ast.AST]:
        """Yield all comprehensions and generator expressions."""
        for node in ast.walk(self.tree):
            if isinstance(node, COMPREHENSIONS):
                yield node


def main(folders: list[str]) -> None:
    """Print a table in Markdown."""
    print(f"| {' | '.join(COLUMNS)} |")
    print(f"|---|{'--:|' * (len(COLUMNS) - 1)}")
    if not folders:
        print(row("seap_ray", python_files("seap_ray", "serve", "jobs")))
    for folder in folders:
        print(row(folder, python_files(folder)))


def python_files(*folders: str) -> list[Source]:
    """Read every Python file of some folders; a file may be named as well."""
    paths: list[Path] = []
    for folder in map(Path, folders):
        paths += [folder] if folder.is_file() else sorted(folder.rglob("*.py"))
    return [Source.parse(path.read_text()) for path in paths]


def row(name: str, sources: list[Source]) -> str:
    """Return one line of the table, in the order of ``COLUMNS``."""
    n_lines = max(sum(len(source.lines) for source in sources), 1)
    lengths: list[int] = []
    for source in sources:
        lengths += function_lengths(source)

    n_comprehensions = sum(len([*source.comprehensions()]) for source in sources)
    n_nested = sum(map(nested_comprehensions, sources))
    n_paired = sum(map(paired_assignments, sources))
    documented, public = docstring_shares(sources)
    blank, commented, long = line_shares(sources)
    cells = (
        name,
        f"{n_lines:,}",
        f"{median(lengths):g} / {quantiles(lengths, n=10)[-1]:.0f}" if len(lengths) > 1 else "",
        f"{100 * n_comprehensions / n_lines:.1f}",
        f"{n_nested}",
        f"{1000 * n_paired / n_lines:.1f}",
        f"{long:.1%}",
        f"{blank:.1%}",
        f"{commented:.1%}",
        f"{documented:.0%}",
        f"{public:.0%}",
        f"{annotated_share(sources):.0%}",
        f"{sum(map(vague_names, sources))} / {sum(map(vague_docstrings, sources))}",
    )
    return f"| {' | '.join(cells)} |"


# --- functions and statements ----------------------------------------------------------------------------------------


def function_lengths(source: Source) -> list[int]:
    """Return the lines of every function, from its signature to its end."""
    return [len(_lines(node)) for node in source.functions()]


def _lines(function: Function) -> range:
    """Return the numbers of a function's lines; decorators stand before them."""
    return range(function.lineno, (function.end_lineno or function.lineno) + 1)


def nested_comprehensions(source: Source) -> int:
    """Return the number of comprehensions that hold another one, however many these are."""
    return sum(map(_holds_comprehension, source.comprehensions()))


def _holds_comprehension(node: ast.AST) -> bool:
    return any(child is not node and isinstance(child, COMPREHENSIONS) for child in ast.walk(node))


def paired_assignments(source: Source) -> int:
    """Return the number of assignments of several values to several names at once."""
    return sum(map(_is_paired, ast.walk(source.tree)))


def _is_paired(node: ast.AST) -> bool:
    # Unpacking what a call returns is one thought; a tuple on both sides is several.
    if not isinstance(node, ast.Assign):
        return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


# --- shares ----------------------------------------------------------------------------------------------------------


def share(part: int, whole: int) -> float:
    """Return ``part / whole``; nothing lacks of nothing, so 1 where there is nothing."""
    return part / whole if whole else 1.0


def _share_true(values: Iterable[bool]) -> float:
    known = list(values)
    return share(sum(known), len(known))


def line_shares(sources: list[Source]) -> tuple[float, float, float]:
    """Return the shares of blank lines among those of functions, and of comment and long lines among all."""
    n_lines = n_blank = n_comments = n_long = n_inside = 0
    for source in sources:
        n_lines += len(source.lines)
        n_comments += sum(line.strip().startswith("#") for line in source.lines)
        n_long += sum(len(line) > LONG for line in source.lines)

        # A line of a function in a function counts once.
        inside: set[int] = set()
        for function in source.functions():
            inside.update(_lines(function))
        n_inside += len(inside)
        n_blank += sum(not source.lines[number - 1].strip() for number in inside)

    return share(n_blank, n_inside), share(n_comments, n_lines), share(n_long, n_lines)


def docstring_shares(sources: list[Source]) -> tuple[float, float]:
    """Return the shares of functions and classes with a docstring: of all, and of those whose names are public."""
    documented: list[bool] = []
    public: list[bool] = []
    for source in sources:
        for node in source.definitions():
            has_docstring = ast.get_docstring(node) is not None
            documented.append(has_docstring)
            if not node.name.startswith("_"):
                public.append(has_docstring)

    return _share_true(documented), _share_true(public)


def annotated_share(sources: list[Source]) -> float:
    """Return the share of arguments, without ``self`` and ``cls``, that have a type."""
    annotated: list[bool] = []
    for source in sources:
        for function in source.functions():
            arguments = function.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                if argument.arg not in ("self", "cls"):
                    annotated.append(argument.annotation is not None)
    return _share_true(annotated)


# --- words -----------------------------------------------------------------------------------------------------------


def vague_names(source: Source) -> int:
    """Return how often a variable or an argument gets a name that says nothing."""
    return sum(_bound_name(node) in VAGUE_NAMES for node in ast.walk(source.tree))


def _bound_name(node: ast.AST) -> str | None:
    """Return the name that a node binds, None where it binds none."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    return node.arg if isinstance(node, ast.arg) else None


def vague_docstrings(source: Source) -> int:
    """Return the number of docstrings without a subject."""
    return sum(map(_is_vague, source.definitions()))


def _is_vague(node: Definition) -> bool:
    docstring = ast.get_docstring(node) or ""
    return any(docstring == start or docstring.startswith(f"{start} ") for start in VAGUE_STARTS)


if __name__ == "__main__":
    main(sys.argv[1:])
