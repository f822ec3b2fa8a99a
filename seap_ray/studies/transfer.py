"""Study ``transfer``: how good is an expert on the other tasks?"""

from seap_ray.report.study_rows import Estimate, TransferRow
from seap_ray.studies.requests import at_every_ratio, run_specs
from seap_ray.studies.result import StudyResult
from seap_ray.studies.runner import ModelRequest, StudyRunner


def run(runner: StudyRunner) -> StudyResult:
    """Judge the dense model, the general model and every expert on every task."""
    tasks = runner.task_names
    # The run's experts are judged on all tasks.
    requests = at_every_ratio(runner.config, run_specs(runner.config))
    models = runner.evaluate_models([ModelRequest(), *requests])

    rows = []
    for model in models:
        # A mean over one task is the task's quality; for a perplexity it has the rounding of all other means.
        by_task = {task: Estimate.mean([model.row.quality[task]]) for task in tasks}
        rows.append(TransferRow(model.row.name, model.row.ratio, by_task))
    return StudyResult(models, TransferRow.columns(tasks=tasks), rows)
