"""Benchmarks of a GPU, without Ray: ``python -m benchmarks.gpu OUT.json [part ...]``. Parts are listed in ``__main__``.

``device`` is the GPU or, without one, a CPU over tiny shapes, which checks that the code runs.
"""
