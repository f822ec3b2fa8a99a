"""The list of transformers' causal language models, sorted by what this package does with them."""

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families import kinds_of_model, lines
from seap_ray.core.families import FAMILIES
from seap_ray.core.refused_families import REASONS, WHY_REFUSED


def test_every_model_type_is_sorted_once_and_a_made_up_one_is_unknown():
    kinds = kinds_of_model(["llama", "mamba", "made_up"])
    assert kinds == {"supported": ["llama"], "refused": ["mamba"], "unknown": ["made_up"]}
    printed = [*lines({"llama": "L", "mamba": "M", "made_up": "X"}, "5.19")]
    assert printed[1] == f"refused    mamba (M): {WHY_REFUSED['mamba']}"
    assert printed[-1] == "transformers 5.19: 3 causal language models, 1 supported, 1 refused, 1 unknown"


LATER = set(
    "apertus1p5_text bailing_hybrid beam dory dots3_note dots3_note_text exaone flint inkling2_loop_text inkling2_text "
    "internlm3 iquestcoder kolibri1 lara_mini lfm3 moss_transcribe_diarize sarvam_mla sarvam_moe "
    "hy_v4 kimi_linear".split()
)
"""Models that transformers 5.19 does not have yet, and two that 5.16 does not."""


def test_names_are_transformers_own_and_no_refused_one_stands_twice():
    assert WHY_REFUSED.keys() - LATER <= CONFIG_MAPPING_NAMES.keys()
    assert FAMILIES.keys() <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert sum(map(len, REASONS.values())) == len(WHY_REFUSED)
