"""Benchmarks that need a GPU and no Ray: ``python -m seap_ray.benchmarks.gpu``."""
