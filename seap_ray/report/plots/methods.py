"""Methods: what charts that compare methods have in common."""

from collections.abc import Iterable

from seap_ray.report.rows import Results
from seap_ray.report.run_data import RunData

REMOVED_LABEL = "decoder weights removed, %"
MAX_METHODS = 9
"""Lines that one chart can hold, which is as many as there are markers."""
_FIRST = {"experts": 0, "general": 1}


def experts_first(methods: Iterable[str]) -> list[str]:
    """Return each method once: the experts, the general model, then the others in their order."""
    # The sort is stable, so all others stay as they were.
    return sorted(dict.fromkeys(methods), key=lambda name: _FIRST.get(name, len(_FIRST)))


def widest_comparisons(data: RunData) -> list[Results]:
    """Return the results that compare many methods, those with the most ratios first."""
    # Either study has the main job's models and those of other methods; ``ratio`` has them at more ratios.
    results = [data.studies[name] for name in ("ratio", "table") if name in data.studies]
    return [*results, data.main]
