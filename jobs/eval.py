"""python jobs/eval.py [study=table] [config=ray_config.yaml] [dotted.key=value ...]

Compares methods and answers questions, one study a command, from one set of statistics, which it makes where they are
missing. Studies: table, ratio, corpus, allocation, reconstruction, ood, transfer, routing, pooling, paper
(docs/evaluation.md).

Writes <run>/results/<study>.json and .csv and <run>/report.html. What was judged once is not judged again; the same
command resumes what was cut short.

Exit codes: 0 done, 2 a key or the model is wrong, 3 a corpus is wrong, 4 cut short or a cell has failed: go on with
the same command.
"""

import sys
from collections.abc import Sequence

from seap_ray.cli import command
from seap_ray.config import Config
from seap_ray.errors import IncompleteError


def evaluate(config: Config) -> None:
    from seap_ray.studies.studies import run_study

    run_study(config)


def main(arguments: Sequence[str]) -> int:
    stopped = ("stopped; the same command goes on from here", IncompleteError.exit_code)
    return command(__doc__ or "", arguments, evaluate, stopped=stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
