#!/usr/bin/env bash
# datasets 5.2.0: one message with content parts turns texts of other messages into objects, numbers and None.
#
# A field that is text in one row and a list in another gets the type Json. It stores text that is no JSON in quotes,
# but text that can be parsed as JSON as it stands, and reads it back as what it parses to. So what a message says
# depends on whether another row of the file has content parts (or a number in the field). The parser is not strict
# either: 02134 is no JSON, but comes back as 2134.
#
# Seen, for the answers {"city": "Rome"}, 02134, null and Rome, all of them text:
#   each content of the file is text      the four texts
#   one other message has content parts   a dictionary, the number 2134, None, and the text Rome
# to_json then writes the changed values.
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
ANSWERS = ['{"city": "Rome"}', "02134", "null", "Rome"]


def read(name: str, *questions) -> list:
    """Write a chat for each answer, its question first, and return the answers as datasets reads them."""
    pairs = zip(questions, ANSWERS, strict=True)
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    Path(f"{name}.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats) + "\n")
    table = load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="cache")
    answers = [chat[1]["content"] for chat in table["messages"]]
    print(f"{name:15} {table.features['messages'].feature['content']} {answers}")
    table.to_json("out.jsonl")
    written = [json.loads(line)["messages"][1]["content"] for line in Path("out.jsonl").read_text().splitlines()]
    assert written == answers
    return answers


assert read("text", "Where?", "Which code?", "And then?", "And now?") == ANSWERS
seen = read("one with parts", "Where?", "Which code?", "And then?", [{"type": "text", "text": "And now?"}])
assert seen == [{"city": "Rome"}, 2134, None, "Rome"], "text that reads as JSON stays text now"
PYTHON
