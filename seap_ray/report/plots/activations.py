"""Activations: whether the shards of different tasks activate different channels.

Letters: P shards, D channels, R principal components.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from seap_ray.core.moments import Site
from seap_ray.models.records import open_tensors, read_moments
from seap_ray.report.charts import Chart, Figure, Series, series_style
from seap_ray.report.run_data import RunData, percent
from seap_ray.report.section import Section
from seap_ray.storage.paths import StoragePath


def clusters_section(data: RunData) -> Section | None:
    """Return the mean activations of every shard in the first, a middle and the last layer."""
    records, tasks = _records(data)
    # One task has no other to differ from, and two points always lie on a line.
    if data.architecture is None or len(set(tasks)) < 2 or len(tasks) < 3:
        return None

    # Standardised over all shards, as channels differ in scale by orders of magnitude.
    with_mlp = [layer for layer in range(data.architecture.n_layers) if data.architecture.sites(layer, "mlp")]
    panels = []
    shares = []
    # Of a shallow model they may be the same.
    for layer in dict.fromkeys((with_mlp[0], with_mlp[len(with_mlp) // 2], with_mlp[-1])):
        keys = [(layer, site) for site in data.architecture.sites(layer, "mlp")]
        x_PD = standardised(np.array([_mean_activations(path, keys) for path in records]))
        panels.append(_scatter_chart(layer, x_PD, tasks))
        share = nearest_of_same_label(x_PD, tasks)
        if share is not None:
            shares.append(f"{percent(share)} in layer {layer}")

    finding = ""
    if shares:
        finding = (
            f"Share of the shards whose nearest neighbour, over all channels, is of the same task: {', '.join(shares)}."
        )

    return Section(
        "clusters",
        "Do tasks activate different channels?",
        "A point is a shard of a task's calibration data: the mean activations of the MLP channels, standardised and "
        "projected on the first two principal components (in brackets: their shares of the variance). Tasks that "
        "activate different channels lie apart.",
        finding,
        Figure("Mean activations of the MLP channels over every shard, by task.", tuple(panels)),
    )


def _records(data: RunData) -> tuple[list[StoragePath], list[str]]:
    """Return the record of every shard, and the task of each; tasks without records are left out."""
    records: list[StoragePath] = []
    tasks: list[str] = []
    for task in data.main.tasks:
        for path in data.run.records(task).sorted_glob("*.safetensors"):
            records.append(path)
            tasks.append(task)

    return records, tasks


def _mean_activations(path: StoragePath, keys: Sequence[tuple[int, Site]]) -> np.ndarray:
    with open_tensors(path) as file:
        return np.concatenate([read_moments(file, key).mean_D.numpy() for key in keys])


def standardised(x_PD: np.ndarray) -> np.ndarray:
    """Return every column with mean 0 and variance 1; a constant one is all zeros."""
    centred_PD = x_PD - x_PD.mean(0)
    spread_D = centred_PD.std(0)
    return centred_PD / np.where(spread_D > 0, spread_D, 1)


def principal_components(x_PD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first two principal components of centred points [P, 2], and the share of the variance of each [2].

    A component's sign is free; its largest coordinate is made positive, so that a figure comes out the same.
    """
    # There are far fewer points than channels, so the singular vectors cost less than a covariance.
    u_PR, s_R, _ = np.linalg.svd(x_PD, full_matrices=False)
    at_P2 = (u_PR * s_R)[:, :2]
    at_P2 *= np.sign(at_P2[np.abs(at_P2).argmax(0), [0, 1]])
    # Equal points have no variance, and 0 / 0 would be no number.
    return at_P2, s_R[:2] ** 2 / max(float((s_R**2).sum()), 1e-300)


def nearest_of_same_label(x_PD: np.ndarray, labels: Sequence[str]) -> float | None:
    """Return the share of the points whose nearest neighbour has their label.

    Points whose label no other point has do not count; None where no points count.
    """
    distance_PP = np.linalg.norm(x_PD[:, None] - x_PD, axis=-1)
    np.fill_diagonal(distance_PP, np.inf)  # no point is its own neighbour
    nearest_P = distance_PP.argmin(1)

    is_same = []
    for point, label in enumerate(labels):
        if labels.count(label) > 1:
            is_same.append(labels[nearest_P[point]] == label)

    return sum(is_same) / len(is_same) if is_same else None


def _scatter_chart(layer: int, x_PD: np.ndarray, tasks: Sequence[str]) -> Chart:
    """Return a point for every shard, in its task's style."""
    at_P2, (first, second) = principal_components(x_PD)

    # Points of one task are one series without a line.
    series = []
    for i, task in enumerate(dict.fromkeys(tasks)):
        is_of_task = [other == task for other in tasks]
        x, y = at_P2[is_of_task].T.tolist()
        series.append(Series(task, x, y, replace(series_style(i), line="none")))

    x_label = f"1st component ({percent(first)})"
    y_label = f"2nd component ({percent(second)})"
    return Chart(f"layer {layer}", x_label, y_label, tuple(series))
