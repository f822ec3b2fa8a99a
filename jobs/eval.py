"""python jobs/eval.py [study=table] [config=ray_config.yaml] [dotted.key=value ...]

Compare pruning methods in a study; ``seap-ray eval`` does the same.
``--help`` tells what goes in and what comes out, and lists every key.
"""

import sys
from collections.abc import Sequence

from seap_ray.cli import run_verb


def main(arguments: Sequence[str]) -> int:
    """Run the job and return its exit code."""
    return run_verb("eval", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
