"""python jobs/report.py RUN [config=ray_config.yaml] [dotted.key=value ...]
python jobs/report.py compare RUN_A RUN_B

Prints the tables of a run and writes its report.html, with all pictures and nothing to fetch, and these as files in
pictures/; or says what differs between two runs. A run is a folder, or a name below run.storage; left out: run.name.

Exit codes: 0 done, 2 there is no such run, or a key is wrong.
"""

import sys
from collections.abc import Sequence
from functools import partial

from seap_ray.cli import command
from seap_ray.config import Config
from seap_ray.errors import ConfigError


def report(config: Config, words: Sequence[str]) -> None:
    from seap_ray.report.page import save_pictures, write_report
    from seap_ray.report.summary import compare, find, summary

    if words[:1] == ["compare"]:
        if len(words) != 3:
            raise ConfigError("compare: name two runs: python jobs/report.py compare RUN_A RUN_B")
        print(compare(*(find(config, name) for name in words[1:])))
        return
    for name in words or [config.run.name]:
        run = find(config, name)
        print(summary(run))
        save_pictures(run, run.pictures)
        print(f"\n{write_report(run)}")


def main(arguments: Sequence[str]) -> int:
    words = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    keys = [argument for argument in arguments if argument not in words]
    return command(__doc__ or "", keys, partial(report, words=words), stopped=("stopped", 0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
