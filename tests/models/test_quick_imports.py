"""Quick imports: a model is loaded without scikit-learn, scipy and pandas, and what was put off works all the same."""

import gc
import json
import subprocess
import sys

import pytest

from seap_ray.models.quick_imports import quick_imports
from tests.support import ROOT

LOADS = """
import json, sys
from pathlib import Path
import torch
from seap_ray.config import Config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.loading import load_model
base = Checkpoint.open("demo")
load_model(Config(), base, base.folder)
present = [name for name in ("sklearn", "scipy", "pandas", "matplotlib", "datasets", "ray") if name in sys.modules]
from transformers.generation.candidate_generator import roc_curve
from transformers.loss.loss_for_object_detection import linear_sum_assignment
false_positives, true_positives, thresholds = roc_curve([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
rows, columns = linear_sum_assignment([[4, 1], [2, 3]])
print(json.dumps([present, true_positives.tolist(), columns.tolist()]))
"""


def test_a_process_that_loads_a_model_has_none_of_the_packages_it_can_do_without():
    done = subprocess.run([sys.executable, "-c", LOADS], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    present, true_positives, columns = json.loads(done.stdout)
    assert present == []
    assert true_positives == [0, 0.5, 0.5, 1, 1] and columns == [1, 0]


@pytest.fixture
def put_off(monkeypatch):
    """A small module is the one that is put off, and not loaded yet."""
    monkeypatch.setattr("seap_ray.models.quick_imports.DEFERRED", {"colorsys": "rgb_to_yiq"})
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    return "colorsys"


def test_a_function_that_is_put_off_brings_its_module_when_it_is_called(put_off):
    with quick_imports():
        assert not gc.isenabled()
        from colorsys import rgb_to_yiq

        stand_in = sys.modules[put_off]
        assert rgb_to_yiq.__module__ != put_off
    assert gc.isenabled() and put_off not in sys.modules

    assert rgb_to_yiq(0, 0, 0) == (0, 0, 0)
    assert sys.modules[put_off] is not stand_in


def test_who_asks_the_module_for_more_gets_the_true_one(put_off):
    with quick_imports():
        stand_in = sys.modules[put_off]
        from colorsys import hls_to_rgb

        assert sys.modules[put_off] is not stand_in and hls_to_rgb(0, 0, 0) == (0, 0, 0)
    assert sys.modules[put_off].hls_to_rgb is hls_to_rgb


def test_an_import_that_fails_leaves_everything_as_it_was(put_off):
    with pytest.raises(ZeroDivisionError), quick_imports():
        _ = 1 / 0
    assert gc.isenabled() and put_off not in sys.modules


def test_what_is_loaded_already_stays(put_off):
    import colorsys

    with quick_imports():
        assert sys.modules[put_off] is colorsys
