"""Benchmarks: a suite a file, each a function that gives rows; ``measure`` is what they share."""
