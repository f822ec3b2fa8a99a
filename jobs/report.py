"""python jobs/report.py [RUN ...] [config=ray_config.yaml] [dotted.key=value ...]
python jobs/report.py compare RUN_A RUN_B

Print the tables of a run and draw its page, or compare two runs; ``seap-ray report`` does the same.
``--help`` tells what goes in and what comes out, and lists every key.
"""

import sys
from collections.abc import Sequence

from seap_ray.cli import run_verb


def main(arguments: Sequence[str]) -> int:
    """Run the job and return its exit code."""
    return run_verb("report", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
