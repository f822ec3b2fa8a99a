"""Speculative decoding in vLLM: a cut model of other widths in every layer drafts for the one that it was cut from."""

import pytest
from transformers import AutoTokenizer

from seap_ray.demo import skills
from seap_ray.models.checkpoint import Checkpoint
from tests.support.served import chat
from tests.vllm_plugin.test_vllm_model import Engine, by_transformers, compact, load_float32

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    # What vLLM's and torch's own code warns of while vLLM is imported and runs.
    pytest.mark.filterwarnings(
        r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning:vllm\.", r"ignore::DeprecationWarning:torch\."
    ),
]


def test_drafts_are_taken_and_change_no_greedy_token_of_the_dense_model(tmp_path):
    dense = Checkpoint.open("demo").folder
    draft = compact(dense, tmp_path / "draft")
    tokenizer = AutoTokenizer.from_pretrained(dense)
    prompts = []
    for row in skills.rows("reverse", 6, split="test", seed=1):
        prompts.append(tokenizer.apply_chat_template(chat(row["question"]), return_dict=False))

    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    with Engine(dense, speculative_config=speculative, disable_log_stats=False) as engine:
        tokens = engine.greedy(prompts, 24)
        counted = {metric.name: getattr(metric, "value", 0) for metric in engine.llm.get_metrics()}
    assert tokens == by_transformers(load_float32(dense), prompts, 24)
    assert counted["vllm:spec_decode_num_draft_tokens"] > 0
    assert 0 < counted["vllm:spec_decode_num_accepted_tokens"] < counted["vllm:spec_decode_num_draft_tokens"]
