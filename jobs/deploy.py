"""python jobs/deploy.py [config=ray_config.yaml] [dotted.key=value ...]

Serves a finished run: every expert, the general model and the router behind one OpenAI-compatible endpoint, on the
cluster of RAY_ADDRESS, where it stays, or on this machine until Ctrl-C.

A request needs one of the API keys in the environment variable SEAP_API_KEYS or the file serve.api_keys_file.

Exit codes: 0 done, 2 a key, the run or the cluster is wrong, 4 the engines did not start.
"""

import logging
import sys
from collections.abc import Sequence

from seap_ray.cli import command
from seap_ray.config import Config


def deploy(config: Config) -> None:
    from seap_ray.vllm_plugin.plugin import check_registered

    logging.disable(logging.WARNING)  # vLLM and Ray speak of the machine while they are imported
    check_registered()
    from serve import deployment

    logging.disable(logging.NOTSET)
    deployment.deploy(config)


def main(arguments: Sequence[str]) -> int:
    return command(__doc__ or "", arguments, deploy, stopped=("stopped", 0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
