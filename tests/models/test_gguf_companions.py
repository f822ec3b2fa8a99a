"""What lies beside a GGUF file: Ollama's Modelfile, with the template in its language, and llama-server's preset."""

import json
from configparser import ConfigParser

import pytest
from jinja2 import Environment
from tokenizers import processors

from seap_ray.models.gguf.companions import modelfile, ollama_template, preset
from tests.support.builders import make_tokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)
CONVERSATIONS = (
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go on"},
    ],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}],
)


def rendered(template: str, messages: list[dict[str, str]]) -> str:
    """Render a template of the few words of Go that are used here."""
    words = {
        "{{ if .System }}": "{% if system %}",
        "{{ .System }}": "{{ system }}",
        "{{ else }}": "{% else %}",
        "{{ range .Messages }}": "{% for m in messages %}",
        '{{ if eq .Role "user" }}': "{% if m.role == 'user' %}",
        '{{ else if eq .Role "assistant" }}': "{% elif m.role == 'assistant' %}",
        "{{ .Content }}": "{{ m.content }}",
    }
    for go, jinja in words.items():
        template = template.replace(go, jinja)
    # Ends come from the inside out: of an ``if`` wherever one is open.
    pieces = template.split("{{ end }}")
    closed = pieces[0]
    for piece in pieces[1:]:
        opened = [word for word in ("if", "for") if closed.count(f"{{% {word} ") > closed.count(f"{{% end{word} %}}")]
        closed += f"{{% end{opened[0]} %}}{piece}"
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    return Environment(keep_trailing_newline=True).from_string(closed).render(messages=messages, system=system)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, LLAMA_3, MISTRAL], ids=["ChatML", "Llama 3", "Mistral"])
def test_ollamas_template_writes_a_conversation_as_the_tokenizer_does(template, adds_bos):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    if adds_bos:
        around = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
        tokenizer.backend_tokenizer.post_processor = around
    found = ollama_template(tokenizer)
    for messages in CONVERSATIONS:
        if template == MISTRAL and messages[0]["role"] == "system":
            continue
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # llama.cpp puts the beginning token there, where the tokenizer does.
        assert rendered(found, messages) == (expected.removeprefix("<bos>") if adds_bos else expected)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}",
        "{{ '{{' }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_a_template_that_does_something_else_is_left_to_the_file(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert ollama_template(tokenizer) is None


def test_a_modelfile_names_the_file_how_it_is_sampled_and_the_template(tmp_path):
    assert modelfile("model-Q8_0.gguf", tmp_path, 256) == (
        "FROM ./model-Q8_0.gguf\nPARAMETER num_ctx 256\nPARAMETER temperature 0\n"
    )

    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "max_length": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(sampling))
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    text = modelfile("m.gguf", tmp_path, 131072)
    assert text.splitlines()[1:4] == ["PARAMETER num_ctx 8192", "PARAMETER temperature 0.7", "PARAMETER top_p 0.8"]
    assert text.endswith(f'TEMPLATE """{ollama_template(tokenizer)}"""\n')


def test_a_preset_names_every_file():
    read = ConfigParser()
    read.read_string("[top]\n" + preset({"0.20/logic": "0.20/logic/model-Q8_0.gguf", "0.50/logic": "x.gguf"}))
    assert read["0.20/logic"]["model"] == "0.20/logic/model-Q8_0.gguf"
    assert read.sections() == ["top", "0.20/logic", "0.50/logic"]
