"""Tools: which of vLLM's parsers reads the calls that a model writes, by a key or by the model's own chat template."""

from pathlib import Path

from vllm.tool_parsers import ToolParserManager

from seap_ray.config import Config
from seap_ray.errors import ConfigError
from seap_ray.models.corpus import load_tokenizer

MARKS = (
    (("<function_calls>",), "olmo3"),
    (("<tool_call>", "<arg_key>"), "glm45"),
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|python_tag|>",), "llama3_json"),
)
"""What stands in a chat template that writes calls in some form, and the parser of that form; the first that fits."""


def tool_parser(config: Config, folder: Path) -> str | None:
    """Return the name of vLLM's parser of tool calls for the models of a run; None where they get none.

    Args:
        config: The service's settings; ``serve.tools`` is a name or ``auto``.
        folder: A model's folder, whose chat template ``auto`` reads: all models of a run have the same.

    Raises:
        ConfigError: vLLM has no parser of that name, or the template writes calls in no form that is known here.
    """
    name = config.serve.tools
    if name is None:
        return None

    known = sorted(ToolParserManager.list_registered())
    if name != "auto":
        if name not in known:
            raise ConfigError(f"serve.tools: vLLM has no parser {name!r}; it has {', '.join(known)}")
        return name

    template = load_tokenizer(folder).chat_template
    for marks, parser in MARKS:
        # Several templates by name are none that says how calls are written.
        if isinstance(template, str) and all(mark in template for mark in marks):
            return parser
    raise ConfigError(
        f"serve.tools: the chat template of {folder.name} writes tool calls in no form that auto knows; name vLLM's "
        f"parser ({', '.join(known)})"
    )
