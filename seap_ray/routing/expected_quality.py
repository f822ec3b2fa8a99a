"""Expected quality: how well each model does on each task, and a prompt's probabilities, in; who should answer, out.

An expert is better than the general model on its own task and worse on others, so that how sure the router has to be
follows from what was measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from seap_ray.config import GENERAL
from seap_ray.tasks import is_perplexity


@dataclass(frozen=True, slots=True)
class KeptQuality:
    """What models keep of the dense one's quality, as ``kept`` returns it, by model and task."""

    by_model: Mapping[str, Mapping[str, float]]

    def prefers_expert(self, task: str, probabilities: Mapping[str, float]) -> bool:
        """Return whether a task's expert is expected to answer a prompt at least as well as the general model.

        True where nothing is known of a model: then the router's word alone counts.
        """
        if task not in self.by_model or GENERAL not in self.by_model:
            return True
        return self.expected(task, probabilities) >= self.expected(GENERAL, probabilities)

    def expected(self, model: str, probabilities: Mapping[str, float]) -> float:
        """Return the mean of what a model keeps over the tasks, by a prompt's probability of each.

        Tasks that models are not judged on are left out.
        """
        shares = self.by_model[model]
        return sum(probability * shares[task] for task, probability in probabilities.items() if task in shares)


def kept(metric: str, value: float, dense: float) -> float:
    """Return the share of the dense model's quality that a model keeps: 1 is as good as dense.

    It is the ratio of accuracies, and of perplexities the inverse one. A task that the dense model cannot do at all has
    nothing to keep, and counts 1.
    """
    if is_perplexity(metric):
        return dense / value
    return value / dense if dense else 1.0
