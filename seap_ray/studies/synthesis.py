"""Study ``synthesis``: do texts that the dense model itself writes stand for more rows of a task?"""

from collections.abc import Mapping, Sequence
from itertools import product

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.pipeline.model_specs import ModelSpec
from seap_ray.pipeline.shards import Shard
from seap_ray.report.study_rows import Estimate, SynthesisRow
from seap_ray.studies.requests import on_own_task
from seap_ray.studies.result import StudyResult
from seap_ray.studies.runner import EvaluatedModel, ModelRequest, StudyRunner

CORPORA = ("rows", "rows + their questions", "rows + other questions", "questions", "twice the rows")
"""What experts are calibrated on: half of a task's drawn rows; these with what the model writes behind their own
questions, or behind those of the other half; what it writes behind all questions, alone; and all rows."""


def check(config: Config) -> None:
    """Raise ConfigError where the model is to write too few texts."""
    samples = config.corpus.synthesis.samples
    if samples < config.corpus.samples:
        raise ConfigError(
            f"corpus.synthesis.samples: study=synthesis compares as many texts as rows; set it to corpus.samples, "
            f"{config.corpus.samples}, or leave it out"
        )


def run(runner: StudyRunner) -> StudyResult:
    """Compare experts that are calibrated on rows, on texts of the model's own, and on both."""
    config = runner.config
    parts: dict[str, Sequence[Shard]] = {}
    for task in runner.task_names:
        for corpus, shards in _corpora(runner.manifest(task).shards).items():
            parts[f"{task}.{corpus}"] = shards
    planner = runner.planner_with_parts(parts)

    keys = list(product(config.pruning.ratio, CORPORA, runner.task_names))
    requests = [ModelRequest(_expert(config, task, corpus), ratio) for ratio, corpus, task in keys]
    models = runner.evaluate_models(on_own_task(requests), planner)

    by_key = dict(zip(keys, models, strict=True))
    rows = [_row(runner, ratio, corpus, by_key, parts) for ratio, corpus in product(config.pruning.ratio, CORPORA)]
    return StudyResult(models, SynthesisRow.columns(runner.mean_head, runner.task_names), rows)


def _corpora(shards: Sequence[Shard]) -> dict[str, Sequence[Shard]]:
    """Return the shards of every corpus of a task."""
    real = [shard for shard in shards if not shard.is_synthetic]
    # Texts were written shard by shard; those of a second round over the same questions are not needed.
    written = [shard for shard in shards if shard.is_synthetic][: len(real)]
    half = (len(real) + 1) // 2
    corpora = (
        real[:half],
        [*written[:half], *real[:half]],
        [*written[half:], *real[:half]],
        written,
        real,
    )
    return dict(zip(CORPORA, corpora, strict=True))


def _expert(config: Config, task: str, corpus: str) -> ModelSpec:
    settings = config.plan_settings(config.pruning.experts)
    # Names become names of folders.
    name = f"{task}.{CORPORA.index(corpus)}"
    return ModelSpec(name, "baseline", corpus, {f"{task}.{corpus}": 1.0}, settings, task=task)


def _row(
    runner: StudyRunner,
    ratio: float,
    corpus: str,
    models: Mapping[tuple[float, str, str], EvaluatedModel],
    parts: Mapping[str, Sequence[Shard]],
) -> SynthesisRow:
    """Return the row of one corpus: each expert on its own task."""
    qualities: dict[str, Estimate] = {}
    n_tokens = 0
    cells = []
    for task in runner.task_names:
        cell = models[ratio, corpus, task].row.quality[task]
        cells.append(cell)
        qualities[task] = Estimate.mean([cell])
        n_tokens += sum(shard.n_tokens for shard in parts[f"{task}.{corpus}"])
    overall = Estimate.mean(cells)
    return SynthesisRow(ratio, corpus, n_tokens, overall.value, overall.stderr, qualities)
