"""Doctor: every finding of the preflight as a line, without doing any work."""

import sys
from collections.abc import Sequence

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.pipeline.biases import with_bias
from seap_ray.pipeline.calibrate import n_workers
from seap_ray.pipeline.cluster import connect_driver
from seap_ray.pipeline.gguf_files import gguf_note
from seap_ray.pipeline.placement import choose_placement
from seap_ray.pipeline.preflight import (
    Finding,
    check_config,
    cluster_checks,
    family_findings,
    local_checks,
    needs_findings,
    with_absolute_source,
    with_recognised_tasks,
)
from seap_ray.pipeline.quantization import with_quantization
from seap_ray.pipeline.ray_errors import unwrap_ray_errors
from seap_ray.pipeline.run_target import checkpoint_target, with_ratio
from seap_ray.progress import say
from seap_ray.storage.run import Run


def diagnose(config: Config) -> None:
    """Print what the config needs, then what this machine and the cluster have.

    What a run needs is printed before any weights are fetched and before a cluster is joined.

    Raises SeapError for what keeps a job from starting.
    """
    run = Run.of(config)

    # Each line is shown as soon as it is known: what comes next may fail, or take minutes.
    _show(local_checks(config))
    _show(family_findings(config))
    _show(needs_findings(config, run))

    config = with_recognised_tasks(config)
    checkpoint = check_config(config, check_evaluation_rows=config.evaluation.samples != 0)
    if note := gguf_note(config, checkpoint.architecture):
        _show([Finding("ok", "gguf", note.removeprefix("gguf: "))])
    config = with_quantization(with_bias(config, checkpoint.architecture), checkpoint.architecture)
    if target := checkpoint_target(config, checkpoint):
        config = with_ratio(config, checkpoint.architecture, target)
    config = with_absolute_source(config)

    connect_driver()
    with unwrap_ray_errors():
        findings = cluster_checks(config, checkpoint, run)
        _show(findings)

        # This raises where the cluster holds no worker, so it comes after the lines that may say why.
        settings = config.calibration
        n = n_workers(config, sys.maxsize)
        each = f"{settings.num_cpus} CPUs and {settings.num_gpus:g} GPUs"
        placement = choose_placement(config, checkpoint)
        _show([Finding("ok", "workers", f"{n}, each of {each}; placement {placement}")])

    # Warnings keep no job from starting.
    n_errors = sum(finding.level == "error" for finding in findings)
    if n_errors:
        raise ConfigError(f"{n_errors} of these lines must be fixed before a job can run")


def _show(findings: Sequence[Finding]) -> None:
    for finding in findings:
        say(f"{finding.level:7}  {finding.subject:8}  {finding.message}")
