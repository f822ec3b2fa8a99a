"""What several tests share: paths, builders of models and runs, and oracles."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The project's folder."""
DATA = ROOT.parent / "shared" / "data"
"""Real benchmark sets and models, where they are at hand."""
