"""python jobs/bench.py [SUITE ...] [config=ray_config.yaml] [dotted.key=value ...]
python jobs/bench.py docs

Measures what is fast and what is slow, ours and a baseline in turns, and what the machine allows: calibrate, merge,
plan, compact, startup; left out: all of these, some minutes on two cores. With vLLM: serve, a dense model beside cut
ones, and route, what the endpoint adds. Prints a table and writes <benchmarks.folder>/<suite>.json. `docs` puts tables
of all of them into <benchmarks.folder>.md.

Exit codes: 0 done, whether targets are met or not, 2 a suite or a key is wrong, 4 cut short.
"""

import sys
from collections.abc import Sequence
from functools import partial

from seap_ray.cli import command
from seap_ray.config import Config
from seap_ray.errors import IncompleteError


def bench(config: Config, words: Sequence[str], keys: Sequence[str]) -> None:
    from benchmarks.suites import run_suites, write_page

    if words == ["docs"]:
        print(write_page(config))
    else:
        run_suites(config, words, keys)


def main(arguments: Sequence[str]) -> int:
    words = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    keys = [argument for argument in arguments if argument not in words]
    stopped = ("stopped; what was measured is written", IncompleteError.exit_code)
    return command(__doc__ or "", keys, partial(bench, words=words, keys=keys), stopped=stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
