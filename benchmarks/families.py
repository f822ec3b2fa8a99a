"""python -m benchmarks.families

Reads transformers' list of causal language models and prints, for each, whether it is supported, refused with a reason,
or unknown. The unknown ones are the next rows of ``FAMILIES`` or ``MULTIMODAL``, or of ``REASONS``.
"""

from collections.abc import Iterable, Mapping

from seap_ray.core.families import FAMILIES, MULTIMODAL
from seap_ray.core.refused_families import WHY_REFUSED


def kinds_of_model(model_types: Iterable[str]) -> dict[str, list[str]]:
    """Sort model types by what this package does with them.

    Args:
        model_types: Names as in ``model_type`` of a config.json.

    Returns:
        ``supported``, ``refused`` and ``unknown``, each with its model types in order.
    """
    kinds: dict[str, list[str]] = {"supported": [], "refused": [], "unknown": []}
    for model_type in sorted(model_types):
        if model_type in FAMILIES or model_type in MULTIMODAL:
            kinds["supported"].append(model_type)
        else:
            kinds["refused" if model_type in WHY_REFUSED else "unknown"].append(model_type)
    return kinds


def lines(classes: Mapping[str, str], version: str) -> Iterable[str]:
    """Yield a line for every model type, and one with their numbers.

    Args:
        classes: Class of each causal language model, by its model type.
        version: Version of transformers that has them.
    """
    kinds = kinds_of_model(classes)
    for kind, model_types in kinds.items():
        for model_type in model_types:
            reason = f": {WHY_REFUSED[model_type]}" if kind == "refused" else ""
            yield f"{kind:9}  {model_type} ({classes[model_type]}){reason}"

    counts = ", ".join(f"{len(model_types)} {kind}" for kind, model_types in kinds.items())
    yield f"transformers {version}: {len(classes)} causal language models, {counts}"


if __name__ == "__main__":
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    print(*lines(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.__version__), sep="\n")
