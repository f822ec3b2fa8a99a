#!/usr/bin/env bash
# torch 2.13.0: an int64 tensor that is compared with a Python float is compared in float32.
#
# A Python float counts as a number without a type of its own, so the common type of both is the default one, float32, which
# holds whole numbers up to 2**24. Counts of a model's weights are beyond that: the comparisons of a budget ("does this
# plan save at least 0.2 of the weights?") are off by up to 512 weights at ten billion. The same float as a float64 tensor,
# and a whole number as a Python int, are compared exactly.
#
# Seen: 10,000,000,001 >= 10,000,000,002.0 is True, and False where the right side is an int or a float64 tensor.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "torch==2.13.0"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch

print("torch", torch.__version__)
saved = torch.tensor([10_000_000_001])
target = 10_000_000_002
seen = {
    "Python float": bool(saved >= float(target)),
    "Python int": bool(saved >= target),
    "float64 tensor of one dimension": bool(saved >= torch.tensor([target], dtype=torch.float64)),
}
for right_side, is_enough in seen.items():
    print(f"10,000,000,001 >= 10,000,000,002 as a {right_side}: {is_enough}")
assert torch.result_type(saved, 1.5) == torch.float32
assert list(seen.values()) == [True, False, False], "the behaviour has changed"
PYTHON
