"""python jobs/prune.py [config=ray_config.yaml] [dotted.key=value ...]

Calibrates a model on task corpora over a Ray cluster, then writes one expert per task and a general model, and
evaluates them. On a cluster: ray job submit --working-dir . -- python jobs/prune.py

Everything is kept in <run.storage>/<run.name>. The same command resumes what was cut short; on a finished run
another pruning.ratio (or score, or allocation) only plans, writes and evaluates.

Exit codes: 0 done, 2 a key or the model is wrong, 3 a corpus is wrong, 4 cut short: the same command goes on.
"""

import sys
from collections.abc import Sequence

from seap_ray.cli import command
from seap_ray.config import Config
from seap_ray.errors import IncompleteError


def prune(config: Config) -> None:
    from seap_ray.pipeline.job import run_job

    run_job(config)


def main(arguments: Sequence[str]) -> int:
    stopped = ("stopped; the same command goes on from here", IncompleteError.exit_code)
    return command(__doc__ or "", arguments, prune, stopped=stopped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
