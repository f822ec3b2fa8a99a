"""python jobs/prune.py [config=ray_config.yaml] [dotted.key=value ...]

Prune a model into task experts and evaluate them; ``seap-ray prune`` does the same.
``--help`` tells what goes in and what comes out, and lists every key.
"""

import sys
from collections.abc import Sequence

from seap_ray.cli import run_verb


def main(arguments: Sequence[str]) -> int:
    """Run the job and return its exit code."""
    return run_verb("prune", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
