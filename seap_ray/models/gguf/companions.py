"""Companions of a GGUF file: a Modelfile by which Ollama imports it, and a preset by which llama-server offers many."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from seap_ray.models.template_limits import limit_chat_templates

LONGEST_CONTEXT = 8192
"""Tokens that Ollama keeps a cache for at most, where the model could have more; a user may raise it."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
"""Keys of a generation config that Ollama has, too."""
ROLES = {"system": "System-Text", "user": "User-Text", "assistant": "Assistant-Text"}
"""Texts by whose places in a conversation a chat template is known; no change of case leaves them as they are."""


# --- Ollama ----------------------------------------------------------------------------------------------------------


def modelfile(file: str, folder: Path, longest: int) -> str:
    """Return the Modelfile of a GGUF file beside it.

    Args:
        file: Name of the GGUF file.
        folder: Folder of the model, whose generation config and chat template are heeded.
        longest: The model's longest sequence, in tokens.
    """
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {min(longest, LONGEST_CONTEXT)}"]
    for key, value in _sampling(folder / "generation_config.json").items():
        lines.append(f"PARAMETER {key} {value}")

    template = ollama_template(_tokenizer(folder))
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join(lines) + "\n"


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    limit_chat_templates()
    try:
        return AutoTokenizer.from_pretrained(folder)
    # No tokenizer, or one that needs a package or code: refused elsewhere where it matters.
    except (ImportError, OSError, ValueError):
        return None


def _sampling(file: Path) -> dict[str, Any]:
    """Return how a model's makers sample; without a word of theirs the likeliest token."""
    content = json.loads(file.read_text()) if file.is_file() else {}
    if not content.get("do_sample"):
        return {"temperature": 0}
    return {key: content[key] for key in SAMPLING if content.get(key) is not None}


def ollama_template(tokenizer: Any) -> str | None:
    """Return a tokenizer's chat template in Ollama's language; None where there is none, or it does something else.

    Ollama reads templates of Go and knows some of the usual Jinja ones by heart. What a template puts around the texts
    of a conversation is seen where it writes one; a template that changes or leaves out texts has no such places.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        (first, answer) = _around(tokenizer, "user")
        (_, again, between, last) = _around(tokenizer, "user", "assistant", "user")
        (_, _, after) = _around(tokenizer, "user", "assistant", generates=False)
    except (TemplateError, ValueError, RecursionError):
        return None

    # What comes after an answer belongs to it, the rest before a question.
    before = between.removeprefix(after)
    if answer != last or not between.startswith(after) or not first.endswith(before):
        return None
    # A blank before an answer may be the model's own to write.
    own = again.removeprefix(answer)
    if not again.startswith(answer):
        return None

    opening = first.removesuffix(before)
    system = _system_part(tokenizer, before)
    parts = [opening, before, answer, own, after, *(system or ())]
    if any("{{" in part or '"""' in part for part in parts):
        return None

    if system is not None:
        opening = f"{{{{ if .System }}}}{system[0]}{{{{ .System }}}}{system[1]}{{{{ else }}}}{opening}{{{{ end }}}}"
    question = f'{{{{ if eq .Role "user" }}}}{before}{{{{ .Content }}}}{answer}'
    reply = f'{{{{ else if eq .Role "assistant" }}}}{own}{{{{ .Content }}}}{after}{{{{ end }}}}'
    return f"{opening}{{{{ range .Messages }}}}{question}{reply}{{{{ end }}}}"


def _system_part(tokenizer: Any, before: str) -> tuple[str, str] | None:
    """Return what is put around a system message, before the first question; None where there can be none."""
    try:
        (opening, closing, _) = _around(tokenizer, "system", "user")
    except (TemplateError, ValueError):
        return None
    return (opening, closing.removesuffix(before)) if closing.endswith(before) else None


def _around(tokenizer: Any, *roles: str, generates: bool = True) -> list[str]:
    """Return what a chat template writes before, between and behind the texts of a conversation.

    Raises ValueError where it does not write each text once, in order.
    """
    texts = [f"{ROLES[role]}-{i}" for i, role in enumerate(roles)]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    rest = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generates)
    # A beginning token that the tokenizer adds to any text is put there by llama.cpp.
    if tokenizer("1")["input_ids"][0] == tokenizer.bos_token_id:
        rest = rest.removeprefix(tokenizer.bos_token)

    around: list[str] = []
    for text in texts:
        if rest.count(text) != 1:
            raise ValueError(text)
        written, _, rest = rest.partition(text)
        around.append(written)
    return [*around, rest]


# --- llama-server ----------------------------------------------------------------------------------------------------


def preset(files: Mapping[str, str]) -> str:
    """Return the preset of several GGUF files for llama-server's router mode.

    Args:
        files: Paths of the files from the preset's folder, by the names that requests give in ``model``.
    """
    sections = ["; llama-server --models-preset llama-server.ini, in this folder\nversion = 1\n"]
    for name, file in files.items():
        sections.append(f"[{name}]\nmodel = {file}\n")
    return "\n".join(sections)
