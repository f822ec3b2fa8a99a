"""Judges: a model and a task in, a quality or a speed out."""
