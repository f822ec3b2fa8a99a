"""Transfer: what every expert still does on the other tasks."""

from dataclasses import dataclass

from seap_ray.report.charts import Figure, HeatMap
from seap_ray.report.plots.studies import study_tables
from seap_ray.report.rows import Cell, ModelRow, QualityCell, Results
from seap_ray.report.run_data import RunData, percent
from seap_ray.report.section import Section
from seap_ray.tasks import is_perplexity


@dataclass(frozen=True)
class Transfer:
    """Quality of the experts and the general model of one ratio on every task, relative to the dense model."""

    models: list[ModelRow]
    tasks: list[str]
    values: list[list[float | None]]
    """Relative quality by model and task; None where a cell is missing or has failed."""

    @classmethod
    def of(cls, results: Results, ratio: float) -> "Transfer":
        """Compare the models of one ratio with the dense model; the experts come first, the general model last."""
        dense = results.dense.quality if results.dense else {}
        models = [model for model in results.models if model.ratio == ratio and model.kind == "expert"]
        models += [model for model in results.models if model.ratio == ratio and model.kind == "general"]

        # A missing dense model leaves every cell empty.
        values = []
        for model in models:
            values.append([_relative(model.quality.get(task), dense.get(task)) for task in results.tasks])

        return cls(models, list(results.tasks), values)

    @property
    def names(self) -> list[str]:
        """Names of the models."""
        return [model.name for model in self.models]

    @property
    def own_cells(self) -> frozenset[tuple[int, int]]:
        """Cells (model, task) of the experts on their own tasks."""
        return frozenset((i, self.tasks.index(name)) for i, name in enumerate(self.names) if name in self.tasks)

    @property
    def has_values(self) -> bool:
        """Whether any model could be compared on any task."""
        return any(value is not None for row in self.values for value in row)

    def mean(self, *, own: bool) -> float | None:
        """Return the mean over the experts on their own tasks, or on all others; None where there is no value."""
        values = []
        for i, row in enumerate(self.values):
            for j, value in enumerate(row):
                is_wanted = self.models[i].kind == "expert" and ((i, j) in self.own_cells) == own
                if value is not None and is_wanted:
                    values.append(value)

        return sum(values) / len(values) if values else None


def _relative(cell: Cell | None, dense: Cell | None) -> float | None:
    """Return quality relative to the dense model's: 1 is as good, less is worse, for perplexities too."""
    if not isinstance(cell, QualityCell) or not isinstance(dense, QualityCell) or not dense.value:
        return None
    return dense.value / cell.value if is_perplexity(cell.metric) else cell.value / dense.value


def transfer_section(data: RunData) -> Section | None:
    """Return the relative quality of every expert on every task."""
    results = data.studies.get("transfer", data.main)
    ratios = {model.ratio for model in results.models if model.kind == "expert" and model.ratio is not None}
    transfers = {ratio: Transfer.of(results, ratio) for ratio in sorted(ratios)}
    # Nothing to show where no model could be compared.
    transfers = {ratio: transfer for ratio, transfer in transfers.items() if transfer.has_values}
    if not transfers:
        return None

    maps = [_transfer_map(transfer, ratio) for ratio, transfer in transfers.items()]
    return Section(
        "transfer",
        "How good is an expert on the other tasks?",
        "A cell is a model's quality on a task divided by the dense model's, for a perplexity the other way round: 1 "
        "means as good as the dense model. A frame marks an expert's own task.",
        " ".join(_finding(transfer, ratio) for ratio, transfer in transfers.items()),
        Figure("Quality of every expert on every task, relative to the dense model.", tuple(maps)),
        study_tables(data, "transfer"),
    )


def _transfer_map(transfer: Transfer, ratio: float) -> HeatMap:
    title = f"{percent(ratio)} removed"
    return HeatMap(title, "task", "model", transfer.tasks, transfer.names, transfer.values, framed=transfer.own_cells)


def _finding(transfer: Transfer, ratio: float) -> str:
    """Say how much of the dense model's quality an expert keeps on its own task and on the others."""
    own = transfer.mean(own=True)
    others = transfer.mean(own=False)
    if own is None:
        return ""

    rest = f" and {percent(others)} on the others" if others is not None else ""
    return (
        f"With {percent(ratio)} removed, an expert keeps {percent(own)} of the dense model's quality on its own "
        f"task{rest}."
    )
