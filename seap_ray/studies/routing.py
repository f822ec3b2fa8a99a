"""Study ``routing``: what do the router's errors cost?"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median

from seap_ray.config import DENSE, GENERAL
from seap_ray.errors import ConfigError
from seap_ray.judges.quality import Quality
from seap_ray.pipeline.evaluate import EvalResult, EvalTask, Failure
from seap_ray.pipeline.results import quality_cells
from seap_ray.report.rows import Cell
from seap_ray.report.study_rows import Estimate, RoutingRow
from seap_ray.routing.expected_quality import KeptQuality, kept
from seap_ray.routing.router import Route, Router
from seap_ray.studies.requests import SEEDS, at_every_ratio, run_specs
from seap_ray.studies.result import StudyResult
from seap_ray.studies.runner import ModelRequest, StudyRunner

Choices = Mapping[str, Sequence[str]]
"""By task, the name of the model that answers each of its prompts."""
Results = Mapping[tuple[float | None, str], Mapping[str, EvalResult]]
"""By ratio and model, the results by task, with each prompt's part."""


def run(runner: StudyRunner) -> StudyResult:
    """Send every evaluation prompt by the run's router, in two ways, and by its true task, at random, and to one model.

    The router's ways are its fitted threshold (``classifier``) and what models are expected to keep of the dense one's
    quality (``expected quality``). Always the likeliest task's expert is ``argmax``.
    """
    config = runner.config

    # A user should learn of these before the models are judged, which takes longest.
    if not runner.calibrated.run.router.is_dir():
        raise ConfigError(
            "model.source: study=routing needs a router, and none can be fitted for this model's tokenizer"
        )
    eval_tasks = _with_prompts(runner)
    if not eval_tasks:
        raise ConfigError("tasks: study=routing needs a task with prompts; a text that is judged in windows has none")

    # What models keep is a share of the dense one's quality.
    models = runner.evaluate_models([ModelRequest(), *at_every_ratio(config, run_specs(config))])
    results = {(model.row.ratio, model.row.name): model.results for model in models}

    router = Router.load(runner.calibrated.run.router)
    routes, seconds = _route(router, eval_tasks)
    # The other ways are told the answer, so that choosing takes them no time.
    milliseconds = dict.fromkeys(("classifier", "expected quality", "argmax"), median(seconds) * 1e3)

    rows = []
    for ratio in config.pruning.ratio:
        # A choice says who answers; only random choices differ from seed to seed.
        ways: dict[str, list[Choices]] = {
            "classifier": [_choose(routes, lambda _, route: route.confidence >= router.threshold)],
            "expected quality": [_choose_by_expectation(routes, results, ratio, eval_tasks)],
            "argmax": [_choose(routes, lambda _, route: True)],
            "oracle": [{task.task.name: [task.task.name] * len(task.items) for task in eval_tasks}],
            "random": [_choose_at_random(runner.task_names, eval_tasks, seed) for seed in SEEDS],
            "general": [{task.task.name: [GENERAL] * len(task.items) for task in eval_tasks}],
        }
        for way, choices in ways.items():
            qualities = [_quality_by_task(results, ratio, eval_tasks, choice) for choice in choices]
            rows.append(_row(way, ratio, qualities, _share_of_general(choices), milliseconds.get(way, 0.0)))

    names = [task.task.name for task in eval_tasks]
    return StudyResult(models, RoutingRow.columns(runner.mean_head, names), rows)


def _with_prompts(runner: StudyRunner) -> list[EvalTask]:
    """Return the tasks that have prompts to route; windows of a text are none."""
    eval_tasks = []
    for task in runner.eval_tasks.values():
        if isinstance(task, EvalTask) and task.task.metric != "window_perplexity":
            eval_tasks.append(task)
    return eval_tasks


def _route(router: Router, eval_tasks: Sequence[EvalTask]) -> tuple[dict[str, list[Route]], list[float]]:
    """Return the route of every prompt, by task, however sure the router is, and the seconds that each takes."""
    routes: dict[str, list[Route]] = {task.task.name: [] for task in eval_tasks}
    seconds = []
    for eval_task in eval_tasks:
        for item in eval_task.items:
            # Only the choice itself is timed. A task of plain texts has no questions.
            started = time.perf_counter()
            route = router.route(item.question or item.text, threshold=0.0)
            seconds.append(time.perf_counter() - started)
            routes[eval_task.task.name].append(route)
    return routes, seconds


def _choose(routes: Mapping[str, Sequence[Route]], prefers_expert: Callable[[int, Route], bool]) -> Choices:
    """Return the likeliest task's expert where ``prefers_expert`` says so, by the prompt's number and route.

    The general model answers elsewhere, and all prompts that are unlike every task.
    """
    chosen: dict[str, list[str]] = {}
    for task, of_task in routes.items():
        chosen[task] = []
        for number, route in enumerate(of_task):
            goes = route.task is not None and prefers_expert(number, route)
            chosen[task].append(route.task if route.task and goes else GENERAL)
    return chosen


def _choose_by_expectation(
    routes: Mapping[str, Sequence[Route]], results: Results, ratio: float | None, eval_tasks: Sequence[EvalTask]
) -> Choices:
    """Return the choices by what models are expected to keep, measured on the half of the prompts that this is not."""
    halves = [_kept_quality(results, ratio, eval_tasks, half) for half in (0, 1)]

    def prefers_expert(number: int, route: Route) -> bool:
        """Return what the prompts say whose numbers are even where this one is odd, and the other way round."""
        known = halves[1 - number % 2]
        return known is None or route.task is None or known.prefers_expert(route.task, route.probabilities)

    return _choose(routes, prefers_expert)


def _kept_quality(
    results: Results, ratio: float | None, eval_tasks: Sequence[EvalTask], half: int
) -> KeptQuality | None:
    """Return what models keep of the dense one's quality on every second prompt; None where one was not judged."""
    by_model: dict[str, dict[str, float]] = {}
    for (of_ratio, model), by_task in results.items():
        if of_ratio != ratio:
            continue
        by_model[model] = {}
        for task in eval_tasks:
            name = task.task.name
            result = by_task.get(name)
            whole = results[None, DENSE].get(name)
            if not isinstance(result, Quality) or not isinstance(whole, Quality):
                return None
            values = [_of_half(quality, half).value for quality in (result, whole)]
            by_model[model][name] = kept(result.metric, *values)
    return KeptQuality(by_model)


def _of_half(quality: Quality, half: int) -> Quality:
    """Return the quality on every second prompt, from the first (0) or the second one (1) on."""
    return Quality.of(quality.metric, quality.values[half::2], quality.weights[half::2])


def _choose_at_random(tasks: Sequence[str], eval_tasks: Sequence[EvalTask], seed: int) -> dict[str, list[str]]:
    """Return an expert drawn for every prompt."""
    # One generator for all tasks, or the same prompt numbers would draw the same experts in each.
    rng = random.Random(seed)
    chosen = {}
    for eval_task in eval_tasks:
        chosen[eval_task.task.name] = [rng.choice(tasks) for _ in eval_task.items]
    return chosen


def _row(
    way: str, ratio: float, by_choice: Sequence[Mapping[str, Cell]], to_general: float, milliseconds: float
) -> RoutingRow:
    """Return one way of routing as a row: the mean over several choices where it draws at random.

    ``by_choice`` has the quality by task for each choice.
    """
    by_task = {}
    for task in by_choice[0]:
        by_task[task] = Estimate.mean([quality[task] for quality in by_choice])

    overall = _mean_over_choices([Estimate.mean(quality.values()) for quality in by_choice])
    return RoutingRow(way, ratio, overall.value, overall.stderr, to_general, by_task, milliseconds)


def _quality_by_task(
    results: Results, ratio: float, eval_tasks: Sequence[EvalTask], choice: Choices
) -> dict[str, Cell]:
    """Return the quality on every task when each prompt is answered by the model of ``choice``."""
    routed = {}
    for task in eval_tasks:
        name = task.task.name
        routed[name] = _routed_quality(results, ratio, task, choice[name])
    return quality_cells(routed)


def _mean_over_choices(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over those choices that could be measured."""
    values = [choice.value for choice in estimates if choice.value is not None]
    errors = [choice.stderr for choice in estimates if choice.stderr is not None]
    return Estimate(mean(values), mean(errors)) if values else Estimate()


def _share_of_general(choices: Sequence[Choices]) -> float:
    """Return the share of all prompts that the general model answers."""
    names: list[str] = []
    for choice in choices:
        for chosen in choice.values():
            names += chosen
    return mean(name == GENERAL for name in names)


def _routed_quality(results: Results, ratio: float, eval_task: EvalTask, names: Sequence[str]) -> EvalResult:
    """Return a task's quality when each item is answered by the model of ``names``, or why there is none."""
    by_model = {name: results[ratio, name][eval_task.task.name] for name in set(names)}

    # A model that fails matters only where prompts are sent to it.
    qualities: dict[str, Quality] = {}
    for name, result in by_model.items():
        if isinstance(result, Failure):
            return result
        qualities[name] = result

    # Every model was judged on the same items in the same order.
    values = [qualities[name].values[item] for item, name in enumerate(names)]
    weights = [qualities[name].weights[item] for item, name in enumerate(names)]
    return Quality.of(eval_task.task.metric, values, weights)
