"""What several tests share: paths, builders of models and runs, and oracles."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The project's folder."""
DATA = ROOT.parent / "shared" / "data"
"""Real benchmark sets and models, where they are at hand."""
NOTHING_TO_JUDGE = {
    "pruning.allocation.kind": "logistic",
    "pruning.attention_unit": "group",
    "pruning.score": "obs",
    "pruning.compensation": "least_squares",
}
"""Keys of jobs whose tests are not about the choice of plans, so that none is measured."""
