"""python -m benchmarks.readability [FOLDER ...]

Measures how a tree of Python files reads, a row for every folder; left out: the library, the service and the jobs.
The figures are those of the field's own projects in CONTRIBUTING.md: they are examples to learn from, no limits.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
VAGUE_NAMES = {"of", "told", "said", "asked", "found"}
"""Identifiers that say nothing of what they hold."""
VAGUE_STARTS = ("Of", "Those", "As", "The same")
"""Beginnings of docstrings that cannot be understood without the name above them."""
HEAD = (
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


@dataclass(frozen=True)
class Source:
    """One Python file, parsed."""

    lines: list[str]
    tree: ast.Module

    @classmethod
    def read(cls, path: Path) -> "Source":
        text = path.read_text()
        return cls(text.splitlines(), ast.parse(text))

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


def main(folders: list[str]) -> None:
    print(f"| {' | '.join(HEAD)} |")
    print(f"|---|{'--:|' * (len(HEAD) - 1)}")
    if not folders:
        print(row("seap_ray", python_files("seap_ray", "serve", "jobs")))
    for folder in folders:
        print(row(folder, python_files(folder)))


def python_files(*folders: str) -> list[Source]:
    """Every Python file of some folders; a file may be named as well."""
    paths: list[Path] = []
    for folder in map(Path, folders):
        paths += [folder] if folder.is_file() else sorted(folder.rglob("*.py"))
    return [Source.read(path) for path in paths]


def row(name: str, sources: list[Source]) -> str:
    """One line of the table, in the order of ``HEAD``."""
    n_lines = max(sum(len(source.lines) for source in sources), 1)
    lengths = [length for source in sources for length in function_lengths(source)]
    n_comprehensions = sum(len([*source.nodes(*COMPREHENSIONS)]) for source in sources)
    documented, public = docstring_shares(sources)
    blank, commented, long = line_shares(sources)
    cells = (
        name,
        f"{n_lines:,}",
        f"{median(lengths):g} / {quantiles(lengths, n=10)[-1]:.0f}" if len(lengths) > 1 else "",
        f"{100 * n_comprehensions / n_lines:.1f}",
        f"{sum(nested_comprehensions(source) for source in sources)}",
        f"{1000 * sum(paired_assignments(source) for source in sources) / n_lines:.1f}",
        f"{long:.1%}",
        f"{blank:.1%}",
        f"{commented:.1%}",
        f"{documented:.0%}",
        f"{public:.0%}",
        f"{annotated_share(sources):.0%}",
        f"{sum(vague_names(source) for source in sources)} / {sum(vague_docstrings(source) for source in sources)}",
    )
    return f"| {' | '.join(cells)} |"


def share(part: int, whole: int) -> float:
    """``part / whole``; nothing lacks of nothing, so 1 where there is nothing."""
    return part / whole if whole else 1.0


def function_lengths(source: Source) -> list[int]:
    """Lines of every function, from its signature to its end."""
    return [node.end_lineno - node.lineno + 1 for node in source.nodes(*FUNCTIONS)]  # type: ignore[attr-defined]


def nested_comprehensions(source: Source) -> int:
    """Comprehensions that hold another one."""
    count = 0
    for node in source.nodes(*COMPREHENSIONS):
        inner = [child for child in ast.walk(node) if child is not node and isinstance(child, COMPREHENSIONS)]
        count += bool(inner)
    return count


def paired_assignments(source: Source) -> int:
    """Assignments of several values to several names at once."""
    count = 0
    for node in source.nodes(ast.Assign):
        assert isinstance(node, ast.Assign)
        count += isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    return count


def line_shares(sources: list[Source]) -> tuple[float, float, float]:
    """Share of blank lines among those of functions; of comment lines and of lines over 100 characters, among all."""
    n_lines = n_blank = n_comments = n_long = n_inside = 0
    for source in sources:
        n_lines += len(source.lines)
        n_comments += sum(line.strip().startswith("#") for line in source.lines)
        n_long += sum(len(line) > 100 for line in source.lines)
        inside: set[int] = set()
        for node in source.nodes(*FUNCTIONS):
            inside.update(range(node.lineno, node.end_lineno + 1))  # type: ignore[attr-defined]
        n_inside += len(inside)
        n_blank += sum(not source.lines[number - 1].strip() for number in inside)
    return share(n_blank, n_inside), share(n_comments, n_lines), share(n_long, n_lines)


def docstring_shares(sources: list[Source]) -> tuple[float, float]:
    """Shares of functions and classes with a docstring: of all, and of those whose names are public."""
    documented: list[bool] = []
    public: list[bool] = []
    for source in sources:
        for node in source.nodes(*FUNCTIONS, ast.ClassDef):
            has = ast.get_docstring(node) is not None  # type: ignore[arg-type]
            documented.append(has)
            if not node.name.startswith("_"):  # type: ignore[attr-defined]
                public.append(has)
    return share(sum(documented), len(documented)), share(sum(public), len(public))


def annotated_share(sources: list[Source]) -> float:
    """Share of arguments, without ``self`` and ``cls``, that have a type."""
    annotated: list[bool] = []
    for source in sources:
        for node in source.nodes(*FUNCTIONS):
            arguments = node.args  # type: ignore[attr-defined]
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                if argument.arg not in ("self", "cls"):
                    annotated.append(argument.annotation is not None)
    return share(sum(annotated), len(annotated))


def vague_names(source: Source) -> int:
    """Variables, arguments and functions whose names say nothing."""
    bound = [node.id for node in source.nodes(ast.Name) if isinstance(node.ctx, ast.Store)]  # type: ignore[attr-defined]
    bound += [node.arg for node in source.nodes(ast.arg)]  # type: ignore[attr-defined]
    return sum(name in VAGUE_NAMES for name in bound)


def vague_docstrings(source: Source) -> int:
    """Docstrings without a subject."""
    count = 0
    for node in source.nodes(*FUNCTIONS, ast.ClassDef):
        docstring = ast.get_docstring(node) or ""  # type: ignore[arg-type]
        count += docstring.split(" ")[0] in VAGUE_STARTS or docstring.startswith(VAGUE_STARTS[-1])
    return count


if __name__ == "__main__":
    main(sys.argv[1:])
