#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 26.0.1: a text column's dates are rewritten in every block of a JSON file but the first.
#
# load_dataset("json") reads a file in blocks of 10 MiB, and pyarrow guesses the types of each block anew. In a block
# where each text of a column is a date, the column becomes timestamps; datasets then casts it to the type of the first
# block. Where that is text, the timestamps are printed in another form than the file's. Neither a warning nor an error,
# and a smaller file, or a sample of the same rows, shows nothing.
#
# Seen, for a file whose first row has "open" and every other row the same two dates:
#   5 MiB    each row as in the file
#   20 MiB   the rows from the second block on: "2026-03-05" has become "2026-03-05 00:00:00",
#            "2026-03-05T10:00:00Z" has become "2026-03-05 10:00:00" (its time zone is lost)
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile "datasets==5.2.0" "pyarrow==26.0.1"
cd "$folder"
HF_HOME="$folder/cache" "$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import datasets
from datasets import load_dataset

datasets.disable_progress_bars()
NOTE = "x" * 1000
DATES = {"day": "2026-03-05", "moment": "2026-03-05T10:00:00Z"}


def last_row(rows: int) -> dict:
    """Write a file whose first row has words and every other one dates; return its last row as datasets reads it."""
    file = Path(f"{rows}.jsonl")
    lines = [json.dumps({**DATES, "note": NOTE}) for _ in range(rows - 1)]
    file.write_text("\n".join([json.dumps({"day": "open", "moment": "open", "note": NOTE}), *lines]) + "\n")
    table = load_dataset("json", data_files=str(file), split="train", cache_dir="cache")
    assert {table.features[name].dtype for name in DATES} == {"string"} and len(table) == rows
    changed = sum(day != DATES["day"] for day in table["day"][1:])
    last = {name: table[-1][name] for name in DATES}
    print(f"{file.stat().st_size / 2**20:5.1f} MiB: {changed} rows changed, the last one reads {last}")
    return last


assert last_row(5000) == DATES
REWRITTEN = {"day": "2026-03-05 00:00:00", "moment": "2026-03-05 10:00:00"}
assert last_row(20000) == REWRITTEN, "later blocks keep their text now"
PYTHON
