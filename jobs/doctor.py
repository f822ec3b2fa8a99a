"""python jobs/doctor.py [config=ray_config.yaml] [dotted.key=value ...]

What the machines have against what a job with this config needs, a line each: ok, warning, or wrong with its remedy. It
looks at versions, the model, corpora, tokens, and at every node of the cluster of RAY_ADDRESS: GPUs, memory, disk, and
whether it sees the run's folder, the model and the corpora. Every job looks at the cluster itself before it starts.

Exit codes: 0 a job can run, 2 something is wrong, 3 a corpus is wrong, 4 storage or GPUs cannot be had now.
"""

import sys
from collections.abc import Sequence

from seap_ray.cli import command
from seap_ray.config import Config


def diagnose(config: Config) -> None:
    from seap_ray.pipeline.job import diagnose

    diagnose(config)


def main(arguments: Sequence[str]) -> int:
    return command(__doc__ or "", arguments, diagnose, stopped=("stopped", 0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
