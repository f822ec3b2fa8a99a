"""Prompts of a text completion: their forms, and ids that lack the token which the model was trained with."""

import pytest
from transformers import PreTrainedTokenizerFast

from seap_ray.models.corpus import load_tokenizer
from tests.support import ROOT

pytestmark = [
    pytest.mark.vllm,
    # What vLLM, torch and Ray warn of while they are imported.
    pytest.mark.filterwarnings(r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning"),
]

DEMO = ROOT / "seap_ray" / "demo" / "model"


def without_beginning(template: str | None = None) -> PreTrainedTokenizerFast:
    """The demo's tokenizer, which then adds nothing by itself."""
    tokenizer = load_tokenizer(DEMO)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.chat_template = template
    return tokenizer


def beginning_of(tokenizer):
    from serve.prompts import PromptBeginning

    return PromptBeginning.of(tokenizer)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (None, [""]),
        ([], []),
    ],
)
def test_prompts_of_any_form_are_a_list(prompt, prompts):
    from serve.prompts import prompts_of

    assert prompts_of(prompt) == prompts


def test_ids_as_the_tokenizer_writes_a_text_or_a_chat_lack_nothing():
    tokenizer = load_tokenizer(DEMO)
    beginning = beginning_of(tokenizer)
    text = tokenizer("20 - 14 =")["input_ids"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "20 - 14 ="}], return_dict=False)

    assert beginning.ids == (tokenizer.bos_token_id,)
    assert (
        beginning.warning([text]) is beginning.warning([text, chat]) is beginning.warning(["20 - 14 =", text]) is None
    )
    assert beginning.warning([]) is None


def test_ids_without_the_beginning_token_are_warned_of_with_its_number():
    tokenizer = load_tokenizer(DEMO)
    beginning = beginning_of(tokenizer)
    text = tokenizer("20 - 14 =")["input_ids"]
    bare = tokenizer("20 - 14 =", add_special_tokens=False)["input_ids"]

    token = f"the beginning token ({tokenizer.bos_token_id}) is missing in"
    assert beginning.warning([bare]).startswith(f"{token} 1 of 1 prompts")
    assert beginning.warning([text, bare, bare]).startswith(f"{token} 2 of 3 prompts")
    assert "add_bos_token=True" in beginning.warning([bare]) and beginning.warning([bare]).isascii()
    assert beginning.warning([[]]), "nor has an empty prompt the token"


def test_a_model_whose_tokenizer_adds_no_token_is_never_warned_of():
    for template in (None, "<s>{{ messages[-1]['content'] }}"):
        beginning = beginning_of(without_beginning(template))
        assert beginning.ids == () and beginning.warning([[5, 6], [7], []]) is None


def test_a_chat_may_begin_as_the_template_writes_it_where_texts_have_a_token():
    tokenizer = load_tokenizer(DEMO)
    tokenizer.chat_template = "sort {{ messages[-1]['content'] }}"
    beginning = beginning_of(tokenizer)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "cab:"}], return_dict=False)

    assert chat[0] != tokenizer.bos_token_id
    assert beginning.warning([chat]) is None
    assert beginning.warning([tokenizer("reverse cab:", add_special_tokens=False)["input_ids"]])
