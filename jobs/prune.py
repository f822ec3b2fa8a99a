"""python jobs/prune.py [config=ray_config.yaml] [dotted.key=value ...]

Calibrates a model on task corpora over a Ray cluster, then writes one expert per task and a general model, and
evaluates them. On a cluster: ray job submit --working-dir . -- python jobs/prune.py

Everything is kept in <run.storage>/<run.name>. The same command resumes what was cut short; on a finished run
another pruning.ratio (or score, or allocation) only plans, writes and evaluates.

Exit codes: 0 done, 2 a key or the model is wrong, 3 a corpus is wrong, 4 cut short: the same command goes on.
"""

import sys

from seap_ray.config import Config, help_text
from seap_ray.errors import IncompleteError, SeapError


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(help_text(__doc__ or ""))
        return 0
    try:
        config = Config.load(arguments)
        from seap_ray.job import run_job

        run_job(config)
    except SeapError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return IncompleteError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
