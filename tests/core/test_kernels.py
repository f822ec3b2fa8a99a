"""The kernels, by Triton's interpreter: what a GPU would sum, on the CPU, against sums in two passes."""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

pytest.importorskip("triton")

COMPARED = """
import torch
from torch.nn.functional import cosine_similarity
from seap_ray.core import kernels
from benchmarks.gpu.statistics import two_pass

generator = torch.Generator().manual_seed(0)
tile = kernels.Tile(tokens=4, columns=8, steps=2, warps=4)
for n, width in ((0, 3), (1, 3), (7, 9), (8, 8), (300, 5)):
    for dtype in (torch.bfloat16, torch.float32):
        x_ND, y_ND = (torch.randn(n, width, generator=generator) * 3 + 50 for _ in range(2))
        x_ND[:1] *= 100  # an outsized first token
        x_ND, y_ND = x_ND.to(dtype), y_ND.to(dtype)
        mean_D, m2_D = kernels.moments(x_ND, tile=tile)
        expected_D, expected_m2_D = two_pass(x_ND)
        torch.testing.assert_close(mean_D, expected_D, rtol=1e-12, atol=0)
        torch.testing.assert_close(m2_D, expected_m2_D, rtol=1e-12, atol=0)
        cosine_N = kernels.cosines(x_ND, y_ND)
        torch.testing.assert_close(cosine_N, cosine_similarity(x_ND.double(), y_ND.double()), rtol=1e-12, atol=0)
        rows_N = torch.arange(0, n, 3)
        some, few = kernels.moments(x_ND, rows_N, tile), kernels.moments(x_ND[rows_N], tile=tile)
        assert all(torch.equal(one, other) for one, other in zip(some, few, strict=True))
        assert torch.equal(kernels.cosines(x_ND, y_ND, rows_N), cosine_N[rows_N])
poisoned = torch.ones(3, 2)
poisoned[1] = torch.nan
assert [sums.tolist() for sums in kernels.moments(poisoned, torch.tensor([0, 2]), tile)] == [[1, 1], [0, 0]]
assert kernels.moments(poisoned, tile=tile)[1].isnan().all()
assert kernels.cosines(torch.zeros(1, 4), torch.ones(1, 4)).tolist() == [0]
"""


def test_the_kernels_sum_what_two_passes_do():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # is read where the kernels are defined
    root = ROOT
    done = subprocess.run([sys.executable, "-c", COMPARED], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
