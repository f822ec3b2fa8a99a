"""Companions of a GGUF file: a Modelfile by which Ollama imports it, and a preset by which llama-server offers many."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LONGEST_CONTEXT = 8192
"""Tokens that Ollama keeps a cache for at most, where the model could have more; a user may raise it."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""Keys of a generation config that Ollama has, too."""


def modelfile(file: str, folder: Path, longest: int) -> str:
    """Return the Modelfile of a GGUF file beside it.

    Args:
        file: Name of the GGUF file.
        folder: Folder of the model, whose generation config is heeded.
        longest: The model's longest sequence, in tokens.
    """
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {min(longest, LONGEST_CONTEXT)}"]
    for key, value in _sampling(folder / "generation_config.json").items():
        lines.append(f"PARAMETER {key} {value}")
    return "\n".join(lines) + "\n"


def _sampling(file: Path) -> dict[str, Any]:
    """Return how a model's makers sample; without a word of theirs the likeliest token."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    if not content.get("do_sample"):
        return {"temperature": 0}
    return {key: content[key] for key in SAMPLING if content.get(key) is not None}


def preset(files: Mapping[str, str]) -> str:
    """Return the preset of several GGUF files for llama-server's router mode.

    Args:
        files: Paths of the files from the preset's folder, by the names that requests give in ``model``.
    """
    sections = ["; llama-server --models-preset llama-server.ini, in this folder\nversion = 1\n"]
    for name, file in files.items():
        sections.append(f"[{name}]\nmodel = {file}\n")
    return "\n".join(sections)
