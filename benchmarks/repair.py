"""Repair: what covariances cost after calibration, by this build and by another checkout, in turns on the same files.

    python -m benchmarks.repair --old FOLDER [--shapes 7b,8b] [--divide 1] [--rounds 3] [--parts read,merge,weight,obs]

Sites of one layer of a Llama with random covariances and a weight in bfloat16: reading, merging two records with the
choice of a ridge, the weight by least squares with half of the columns kept, and scores ``obs``. Every build runs in a
process of its own, on one thread as Ray tasks do, and the seconds are those of the processor, whatever else it has to
do. ``--divide`` makes all widths smaller. ``--save FOLDER`` writes ``repair.json``, of which ``python jobs/bench.py
docs`` makes a table.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from benchmarks.judging import Build
    from benchmarks.measure import Row

ROOT = Path(__file__).parents[1]
HEAD_DIM = 128
RIDGE = 0.01
TOKENS = 4096
"""Tokens of a record; a site has as many and half of them again, or fewer than it has columns."""
TARGET = "ratio <= 0.25"
"""What all parts of a layer together are to take of the other checkout's time."""
PARTS = ("read", "merge", "weight", "obs")


@dataclass(frozen=True)
class SiteShape:
    """An output module of a Llama."""

    name: str
    outputs: int
    columns: int
    block: int
    """Columns of a unit: a head's, or one."""


SHAPES = {
    "7b": (
        SiteShape("o_proj of Llama-2-7B", 4096, 4096, HEAD_DIM),
        SiteShape("down_proj of Llama-2-7B", 4096, 11008, 1),
    ),
    "8b": (
        SiteShape("o_proj of Llama-3-8B", 4096, 4096, HEAD_DIM),
        SiteShape("down_proj of Llama-3-8B", 4096, 14336, 1),
    ),
}


# --- a process that repairs: it imports the seap_ray of its PYTHONPATH -----------------------------------------------


class _Worker:
    """One site's files, and what is done with them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        import torch

        # Imported before anything is timed.
        import seap_ray.core.reconstruction
        import seap_ray.models.records  # noqa: F401
        from seap_ray.storage.paths import LocalPath

        torch.set_num_threads(1)
        self.folder = LocalPath(settings["folder"])
        self.block = settings["block"]
        self.weight_OD = torch.load(self.folder / "weight.pt")
        self.results = Path(settings["results"])
        self.results.mkdir(exist_ok=True)

    def measure(self, part: str) -> float:
        """Return the processor's seconds of a part, and save what it makes."""
        import torch

        started = time.process_time()
        result = getattr(self, part)()
        seconds = time.process_time() - started
        if result is not None:
            torch.save(result, self.results / f"{part}.pt")
        return seconds

    def _load(self, record: int) -> Any:
        from seap_ray.models.records import load_covariance

        return load_covariance(self.folder / f"{record}.safetensors", (0, "mlp"))

    def read(self) -> None:
        """Read a record's covariance."""
        self._load(0)

    def merge(self) -> float:
        """Read two records, choose a ridge, add them and write the sum."""
        from seap_ray.core.reconstruction import choose_ridge
        from seap_ray.models.records import save_covariances

        fitted = self._load(0)
        held_out = self._load(1)
        ridge = choose_ridge(fitted, held_out, self.weight_OD)
        fitted += held_out
        save_covariances(self.folder / f"{self.results.name}.safetensors", 0, {"mlp": fitted}, ridges={"mlp": ridge})
        return ridge

    def weight(self) -> "torch.Tensor":
        """Read a covariance, and make the weight of every other column."""
        import torch

        from seap_ray.core.reconstruction import least_squares

        kept_S = torch.arange(0, self.weight_OD.shape[1], 2)
        weight_OS, _ = least_squares(self._load(0), self.weight_OD, kept_S, ridge=RIDGE)
        return weight_OS.to(self.weight_OD.dtype)

    def obs(self) -> "torch.Tensor":
        """Read a covariance, and score all units."""
        from seap_ray.core.reconstruction import obs

        return obs(self._load(0), self.weight_OD, block=self.block, ridge=RIDGE)


def _serve() -> None:
    """Answer one JSON line for each on stdin: the settings first, then names of parts."""
    # Libraries print to stdout, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    worker = _Worker(json.loads(sys.stdin.readline()))
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(worker, method)(*arguments)), file=answers, flush=True)


# --- the contest -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print and, with ``--save``, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="another checkout of the repository")
    parser.add_argument("--shapes", default="7b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--divide", type=int, default=1, help="by what all widths are divided")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--save", type=Path, help="folder that repair.json is written to")
    arguments = parser.parse_args()
    if not (arguments.old / "seap_ray" / "core" / "reconstruction.py").is_file():
        parser.error(f"--old {arguments.old}: no checkout of the repository")

    rows: list[Row] = []
    for shape in arguments.shapes.split(","):
        contests = [
            _Contest(_smaller(site, arguments.divide), arguments.parts.split(","), arguments.old, arguments.rounds)
            for site in SHAPES[shape]
        ]
        for contest in contests:
            contest.run()
        rows += _rows(contests, f"python -m benchmarks.repair --old FOLDER {' '.join(_shown(sys.argv[1:]))}")
    _report(rows, arguments.save)


def _smaller(site: SiteShape, divisor: int) -> SiteShape:
    """Return a site with all widths divided."""
    if divisor == 1:
        return site
    name = f"1/{divisor} of {site.name}"
    return SiteShape(name, site.outputs // divisor, site.columns // divisor, max(1, site.block // divisor))


def _shown(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that mean something on another machine."""
    shown: list[str] = []
    # Names and values take turns.
    for name, value in zip(arguments[::2], arguments[1::2], strict=True):
        if name not in ("--old", "--save"):
            shown += [name, value]
    return shown


@dataclass
class _Contest:
    """All turns of a site: seconds of both builds in every round, and what they made last."""

    site: SiteShape
    parts: Sequence[str]
    old: Path
    rounds: int
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """By build and part."""
    differences: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Write the files, let both builds take turns, and compare what they made."""
        from benchmarks.judging import Build

        with TemporaryDirectory() as folder:
            _write_site(Path(folder), self.site)
            builds: dict[str, Build] = {}
            try:
                for name, checkout in (("new", ROOT), ("old", self.old.resolve())):
                    settings = {"folder": folder, "block": self.site.block, "results": f"{folder}/{name}"}
                    builds[name] = Build.of(name, checkout, {**settings, "dtype": "bfloat16"}, script=__file__)
                    builds[name].tokens()
                self._take_turns(builds)
            finally:
                for build in builds.values():
                    build.close()
            self.differences = dict(_differences(Path(folder), self.parts))

    def _take_turns(self, builds: Mapping[str, "Build"]) -> None:
        from benchmarks.measure import alternate

        def turn(name: str) -> None:
            """Let a build do all parts."""
            for part in self.parts:
                self.seconds.setdefault((name, part), []).append(builds[name].ask("measure", part))
                print(f"{self.site.name}, {part}, {name}: {self.seconds[name, part][-1]:.2f} s", file=sys.stderr)

        contestants: dict[str, Callable[[], object]] = {name: partial(turn, name) for name in builds}
        alternate(contestants, self.rounds, warm_up=False)


def _write_site(folder: Path, site: SiteShape) -> None:
    """Write two records of correlated columns of several scales, and a weight."""
    import torch

    from seap_ray.core.moments import Covariance
    from seap_ray.models.records import save_covariances, save_moments
    from seap_ray.storage.paths import LocalPath

    generator = torch.Generator().manual_seed(0)
    n_hidden = site.columns // 8
    mix = torch.randn(n_hidden, site.columns, generator=generator) / n_hidden**0.5
    scale_D = torch.logspace(-1.5, 1.5, site.columns)[torch.randperm(site.columns, generator=generator)]
    for record in range(2):
        hidden = torch.randn(TOKENS, n_hidden, generator=generator) @ mix
        own = 0.3 * torch.randn(TOKENS, site.columns, generator=generator)
        covariance = Covariance.of((torch.nn.functional.silu(hidden) + own) * scale_D)
        path = LocalPath(folder) / f"{record}.safetensors"
        save_moments(path, {(0, "mlp"): covariance})
        save_covariances(path, 0, {"mlp": covariance})

    weight_OD = torch.randn(site.outputs, site.columns, generator=generator) / site.columns**0.5
    torch.save(weight_OD.bfloat16(), folder / "weight.pt")


def _differences(folder: Path, parts: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield by how much the results of both builds differ."""
    import torch

    def both(part: str) -> list[Any]:
        """Return what each build made."""
        return [torch.load(folder / name / f"{part}.pt") for name in ("new", "old")]

    if "merge" in parts:
        new, old = both("merge")
        yield "ridges chosen otherwise", float(new != old)
    if "weight" in parts:
        new, old = both("weight")
        yield "share of the weights that are rounded otherwise", float((new != old).float().mean())
        gap = (new.double() - old.double()).abs().max() / old.double().square().mean().sqrt()
        yield "largest difference of a weight, of their root mean square", float(gap)
    if "obs" in parts:
        new, old = both("obs")
        n_kept = len(new) // 2
        kept = [set(scores.argsort()[-n_kept:].tolist()) for scores in (new, old)]
        yield "units kept otherwise, of half of them", float(len(kept[0] - kept[1]))
        yield "largest relative difference of a score", float((new / old - 1).abs().max())


# --- what is told ----------------------------------------------------------------------------------------------------


def _rows(contests: Sequence[_Contest], command: str) -> Iterator["Row"]:
    """Yield a row for every part of every site, one for all together, and how far results differ."""
    from benchmarks.measure import Row

    row_of = partial(Row.of, "repair", command=command)
    for contest in contests:
        for part in contest.parts:
            yield _seconds_row(row_of, f"{contest.site.name}: {part}", [contest], [part])
    parts = contests[0].parts
    yield _seconds_row(row_of, "all of them", contests, parts, target=TARGET)

    for contest in contests:
        for name, difference in contest.differences.items():
            yield row_of(f"{contest.site.name}: {name}", ours=difference, unit="")


def _seconds_row(
    row_of: Callable[..., "Row"], name: str, contests: Sequence[_Contest], parts: Sequence[str], **target: str
) -> "Row":
    """Return a row of the seconds of some parts together, round by round."""
    seconds: dict[str, list[float]] = {}
    for build in ("new", "old"):
        lists = [contest.seconds[build, part] for contest in contests for part in parts]
        seconds[build] = [sum(values) for values in zip(*lists, strict=True)]
    ratios = [new / old for new, old in zip(seconds["new"], seconds["old"], strict=True)]
    return row_of(name, ours=median(seconds["new"]), baseline=median(seconds["old"]), unit="s", ratios=ratios, **target)


def _report(rows: Sequence["Row"], folder: Path | None) -> None:
    """Print the table, and write it to ``folder``."""
    from benchmarks.measure import save_rows
    from benchmarks.suites import COLUMNS, _cells
    from seap_ray.report.table import text_table

    print(text_table(COLUMNS, [_cells(row) for row in rows]))
    if folder:
        print(save_rows(folder, "repair", rows))


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        _serve()
    else:
        main()
