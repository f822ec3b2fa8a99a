"""Benchmarks that need a GPU and no Ray: ``python -m benchmarks.gpu``."""
