"""Methods: pruning methods of other authors as settings of ours, and the studies with what each needs of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

StudyName = Literal[
    "table",
    "ratio",
    "corpus",
    "allocation",
    "curve",
    "reconstruction",
    "ood",
    "transfer",
    "routing",
    "pooling",
    "synthesis",
    "paper",
]

CHANNELS = {"mlp_unit": "channel"}
"""What methods that know no whole experts remove of the MLP."""
METHODS: Mapping[str, Mapping[str, Any]] = {
    # The settings are the authors' own: Wanda (arXiv 2306.11695) in FLAP's structured form, FLAP (2312.11983).
    "wanda_sp": {**CHANNELS, "score": "wanda_sp", "allocation": "uniform", "compensation": "none"},
    "flap": {**CHANNELS, "score": "wifv", "allocation": "standardised", "compensation": "mean", "bias": True},
    "magnitude": {**CHANNELS, "score": "magnitude", "allocation": "uniform", "compensation": "none"},
    "random": {**CHANNELS, "score": "random", "allocation": "uniform", "compensation": "none"},
    # ShortGPT (arXiv 2403.03853).
    "depth": {**CHANNELS, "allocation": "depth", "compensation": "none"},
    # SEAP as its paper has it (arXiv 2503.07605): an expert per task, no bias.
    "seap": {**CHANNELS, "score": "wifv", "allocation": "logistic", "compensation": "none", "per_task": True},
    # SEAP's released code: its WIFN, and a schedule that removes less than it says.
    "seap_official": {
        **CHANNELS,
        "score": "official_wifn",
        "allocation": "logistic",
        "compensation": "none",
        "budget": "official",
        "per_task": True,
    },
}
"""Baselines by name, as the mappings of ``config.Baseline``; ``pruning.baselines: {flap: {}}`` takes one as it is."""


@dataclass(frozen=True)
class Study:
    """A question about pruning, and the config keys that its study sets where the command line does not."""

    title: str
    question: str
    preset: Mapping[str, Any] = field(default_factory=dict)

    @property
    def own_run(self) -> bool:
        """Whether the study needs another corpus or other tasks, and so a run of its own, ``<run.name>-<study>``."""
        return any(key.startswith(("corpus.", "tasks")) for key in self.preset)


STUDIES: Mapping[StudyName, Study] = {
    "table": Study("All methods", "Which method keeps the most quality at equal size?"),
    "ratio": Study(
        "Ratio sweep",
        "How does quality fall with the pruning ratio?",
        # Baselines are the built-in methods, and those that the command line names.
        {"pruning.ratio": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], "pruning.baselines": {}},
    ),
    "corpus": Study(
        "Corpus size",
        "How many samples does a calibration need?",
        # Three disjoint draws of 1,000 samples, in shards as large as the smallest draw.
        {"corpus.samples": 3000, "corpus.shard_sequences": 50, "pruning.baselines": {}},
    ),
    "allocation": Study("Allocation", "Which allocation over the layers, and over attention and MLP, is best?"),
    "curve": Study("Logistic curve", "Which curve of the logistic allocation is best?"),
    "reconstruction": Study(
        "Compensation",
        "Which compensation is best for what is removed?",
        {
            "pruning.ratio": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
            "calibration.statistics": "covariance",
            "pruning.baselines": {},
        },
    ),
    "ood": Study("Out of distribution", "How good are models on a task that their calibration did not see?"),
    "transfer": Study("Cross-task transfer", "How good is an expert on the other tasks?"),
    "routing": Study("Routing", "What do the router's errors cost?"),
    "pooling": Study("Expert against general", "Does an expert gain by its task's data, or only by more data?"),
    "synthesis": Study(
        "Texts of the model's own",
        "Do texts that the dense model writes stand for more rows?",
        {
            "corpus.samples": 400,
            "corpus.shard_sequences": 50,
            "corpus.synthesis.samples": 400,
            "pruning.baselines": {},
        },
    ),
    "paper": Study(
        "The paper's tables",
        "Can the paper's numbers be reproduced?",
        {
            "tasks": [
                *("winogrande", "openbookqa", "hellaswag", "piqa", "arc_challenge", "arc_easy", "boolq"),
                *("gsm8k", "wikitext2"),
            ],
            "model.dtype": "auto",
            "corpus.samples": 200,
            "calibration.statistics": "moments",
            "pruning.score": "wifv",
            "pruning.compensation": "mean",
            "pruning.ratio": [0.2, 0.5],
            "pruning.baselines": {},
            # All rows of every task.
            "evaluation.samples": None,
            "evaluation.window": 512,
            "evaluation.speed.prompt_tokens": 32,
            "evaluation.speed.new_tokens": 200,
        },
    ),
}
