"""Measures speed and memory. No part of the installed package: run everything from a clone of the repository.

Suites, which ``seap-ray bench [SUITE ...]`` (or ``python jobs/bench.py``) runs and turns into tables of
docs/benchmarks.md. Each is a function ``rows`` that yields results, listed in ``suites.SUITES``:

    calibrate   statistics beside the bare forward pass, padding, the SEAP authors' code (``official``)
    merge       records of a large model's size, merged
    plan        plans of a large model
    compact     checkpoints of a large model, written by the job
    startup     ``--help`` of every job, the demo's whole job
    serve       vLLM with a dense model and with pruned ones, in one process; needs vLLM
    route       what the endpoint and its router add to a request; needs vLLM
    widths      the time of a layer at every width, for ``pruning.target.latency``; needs vLLM

One-off measurements, run as ``python -m benchmarks.NAME`` (as a script, ``benchmarks/serve.py`` would hide the package
``serve``):

    covariance         one layer's covariances: recording, files, least squares, the optimal brain surgeon
    judging            multiple choice by this build, by another checkout and by lm-eval's own loop
    repair             what is made of covariances after calibration, by this build and by another checkout
    layerwise          calibration layer by layer at the shape of a large model
    rows               the draw from one large file, beside counting its lines, and the memory of every process
    scaling            calibration over one to eight nodes
    profiles           where the time of calibration and of writing goes, by operation
    cost               formulas for every stage's seconds, beside measurements, and for a 70B on GPUs
    quantization       experts in fewer bits, beside llm-compressor's: quality on their tasks, bytes, seconds
    latency            checkpoints that a latency target made: tokens per second asked for, planned and measured
    runtimes           what a cut gains in vLLM and in llama.cpp, on a CPU
    speculative        what the pruned models of a run are worth as drafts of the dense one; needs vLLM
    first_start        what vLLM's compiling adds to an engine's start, of equal layers and of different ones
    faults             the main job under faults of processes, nodes and storage
    shared_engine      experts that share an engine, beside an engine each
    endpoint_overhead  a running service: what routing adds, how many of an engine's tokens pass through HTTP
    readability        how a tree of Python files reads

On a GPU, without Ray: ``python -m benchmarks.gpu OUT.json [part ...]``.

Shared parts: ``measure`` (rounds, rows, files), ``shapes`` (large models without weights), ``load`` (requests to vLLM).
"""
