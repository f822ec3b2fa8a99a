"""Repairs of models that are run together: each way to cut a layer is computed once."""

from types import SimpleNamespace

from seap_ray.pipeline.repairs import _repair_layer


def export(repaired, *, kept, layers=(0, 1), compensation="least_squares", statistics=None, whole=False):
    """Return a model that notes what is repaired of it."""

    def repair(layer, module):
        repaired.append((kept[layer], module))
        return {"weight": (kept[layer], module, compensation)}

    return SimpleNamespace(
        plan=SimpleNamespace(layers=layers, kept=kept, compensation=SimpleNamespace(name=compensation)),
        statistics=statistics,
        compensates=lambda layer: not whole,
        base=SimpleNamespace(architecture=SimpleNamespace(modules=lambda layer: {"attn": "o", "mlp": "down"})),
        repaired=repair,
    )


def test_models_that_keep_the_same_of_a_layer_by_the_same_statistics_are_repaired_once():
    done = []
    shared = object()
    exports = [
        export(done, kept=("a", "b"), statistics=shared),
        export(done, kept=("c", "b"), statistics=shared),
        export(done, kept=("b",), layers=(1,), statistics=shared),
        export(done, kept=("a", "b"), statistics=object()),
        export(done, kept=("a", "b"), statistics=shared, compensation="mean"),
        export(done, kept=("a",), layers=(0,), statistics=shared),
        export(done, kept=("a", "b"), statistics=shared, whole=True),
    ]
    by_model = _repair_layer(exports, 1)
    assert done == [("b", "o"), ("b", "down")] * 3
    assert by_model[0] is by_model[1] is by_model[2]
    assert by_model[0] == {module: {"weight": ("b", module, "least_squares")} for module in ("o", "down")}
    assert by_model[4] == {module: {"weight": ("b", module, "mean")} for module in ("o", "down")}
    assert by_model[5] == by_model[6] == {}
