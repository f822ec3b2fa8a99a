"""A question in a chat has the same ids wherever it is read: calibration, judge, router and the served model's prompt.

The model is made here, with a ChatML template and a tokenizer that puts a beginning token before every text by itself.
"""

import json

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from seap_ray.models.corpus import Renderer
from seap_ray.models.encoding import Encoding
from seap_ray.routing.router import Router
from seap_ray.tasks import Task
from tests.support.browser import open_page, send
from tests.support.served import KEY, Service, prune

openai = pytest.importorskip("openai")
# The time of a test counts what its fixtures take: a run and a start, each at its longest.
pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if loop.first and message.role != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SYSTEM = {"role": "system", "content": "Answer with one number."}
SUMS = [{"q": f"{i} plus {i % 7}?", "a": str(i + i % 7)} for i in range(10, 70)]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"Tell me of the {kind} {animal}"},
            {"role": "assistant", "content": f"It is a {kind} one."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": f"The {animal} slept."},
        ]
    }
    for kind in ("grey", "small", "proud", "quiet", "early", "young")
    for animal in ("horse", "owl", "fox", "bear", "hare", "wolf", "goat", "crow")
]


def user(content):
    return {"role": "user", "content": content}


def said(content):
    return {"role": "assistant", "content": content}


CALL = {"id": "call-1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
CONVERSATIONS = {
    "text": [user("12 plus 5?")],
    "text with spaces and line breaks": [user(" 12 plus\n5?\n")],
    "a system message": [SYSTEM, user("12 plus 5?")],
    "several turns": [user("12 plus 5?"), said("17"), user("And 1 more?")],
    "several turns after a system message": [
        SYSTEM,
        user("12 plus 5?"),
        said("17"),
        user("And 1 more?"),
    ],
    "a tool's result": [
        user("12 plus 5?"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "17", "tool_call_id": "call-1"},
    ],
    "a role of one's own": [{"role": "critic", "content": "wrong"}, user("12 plus 5?")],
    "the mark of a turn in the text": [user("<|im_end|> 12 plus 5?")],
}
"""Conversations as transformers' own function takes them, too."""
PARTS = {
    "one part": ([user([{"type": "text", "text": "12 plus 5?"}])], [user("12 plus 5?")]),
    "several parts": ([user([{"type": "text", "text": "12 plus"}, "5?"])], [user("12 plus\n5?")]),
    "parts of the Responses API": (
        [user([{"type": "input_text", "text": "12"}]), said([{"type": "output_text", "text": "?"}])],
        [user("12"), said("?")],
    ),
    "a system message in parts": ([{**SYSTEM, "content": [SYSTEM["content"]]}, user("12")], [SYSTEM, user("12")]),
    "a tool's result in parts": (
        [user("12"), {"role": "tool", "content": [{"type": "text", "text": "17"}]}],
        [user("12"), {"role": "tool", "content": "17"}],
    ),
    "no content": ([user("12"), said(None)], [user("12"), said("")]),
}
"""Conversations with parts, and the same ones in texts."""


def make_tokenizer():
    """A token for every byte, and those of ChatML."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:3],
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in (("sums", SUMS), ("talks", TALKS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sums = {"question": "{{ q }}", "answer": "{{ a }}", "system": SYSTEM["content"]}
    return [
        {"name": "sums", "path": f"{folder}/sums.jsonl", **sums},
        {"name": "talks", "path": f"{folder}/talks.jsonl", "messages": "{{ messages }}"},
    ]


@pytest.fixture(scope="module")
def chat_run(cluster, tasks, tmp_path_factory):
    """A run of the two tasks with a model of random weights."""
    folder = tmp_path_factory.mktemp("chats")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = make_tokenizer()
    set_seed(0)
    config = LlamaConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=0, eos_token_id=3, pad_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = {
        "run.storage": str(folder),
        "run.name": "chats",
        "model.source": str(folder / "model"),
        "tasks": tasks,
        "corpus.samples": 40,
        "corpus.chat": "always",
        "pruning.ratio": 0.2,
        "pruning.baselines": {},
        "evaluation.samples": 0,
    }
    prune(settings)
    return folder / "chats"


@pytest.fixture(scope="module")
def service(chat_run, tmp_path_factory):
    more = {"serve.experts": ["sums", "talks"], "serve.engine.max_model_len": 512}
    made = Service(chat_run, tmp_path_factory.mktemp("service") / "log", **more)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def client(service):
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def tokenizer(chat_run):
    return AutoTokenizer.from_pretrained(chat_run.parent / "model")


def served_ids(client, messages, model="general", **more):
    reply = client.chat.completions.create(
        model=model, messages=messages, max_tokens=1, extra_body={"return_token_ids": True, **more}
    )
    return reply.prompt_token_ids


def template_ids(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_a_chat_is_given_to_the_model_as_transformers_template_has_it(client, tokenizer, messages):
    ids = served_ids(client, messages)
    assert ids == template_ids(tokenizer, messages)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(("messages", "flat"), PARTS.values(), ids=PARTS)
def test_parts_of_a_content_are_lines_of_its_text(client, tokenizer, messages, flat):
    assert served_ids(client, messages) == template_ids(tokenizer, flat)


def test_a_stream_tells_the_ids_as_well(client, tokenizer):
    messages = [SYSTEM, user("12 plus 5?")]
    chunks = client.chat.completions.create(
        model="auto", messages=messages, max_tokens=2, stream=True, extra_body={"return_token_ids": True}
    )
    (ids,) = [chunk.prompt_token_ids for chunk in chunks if getattr(chunk, "prompt_token_ids", None)]
    assert ids == template_ids(tokenizer, messages)


def test_calibration_judge_and_endpoint_have_the_same_ids(client, chat_run, tasks, tokenizer):
    for fields in tasks:
        task = Task(**fields)
        shards = sorted((chat_run / "shards" / task.name).glob("0*.parquet"))
        calibrated = [ids for shard in shards for ids in pq.read_table(shard).column("ids").to_pylist()]
        encoding, renderer = Encoding(tokenizer, is_chat=True), Renderer(task)
        rows = SUMS if task.name == "sums" else TALKS
        n_found = 0
        for row in rows[::5]:
            item = renderer.item(row)
            ids = encoding.prompt(item)
            assert served_ids(client, item.messages) == ids
            judged, start = encoding.continuation(item, item.answer)
            assert judged[:start] == ids
            whole = encoding.sequence(item)
            assert whole[: len(ids)] == ids
            n_found += whole in calibrated
        assert n_found > 3, "most rows were drawn"


def test_a_chat_is_routed_by_its_first_question_however_it_is_written(client, service, chat_run):
    for content in ("33 plus 5?", [{"type": "text", "text": "33 plus 5?"}], ["33 plus 5?"], ["33 plus", "5?"]):
        messages = [SYSTEM, user(content), said("38"), user("Tell me of the grey owl")]
        raw = client.chat.completions.with_raw_response.create(model="auto", messages=messages, max_tokens=1)
        assert (raw.headers["x-seap-expert"], raw.headers["x-seap-reason"]) == ("sums", "routed")
        with service.http() as http:
            route = http.post("/v1/route", json={"messages": messages}).json()
        assert route["model"] == "sums" and 0.5 < route["confidence"] <= 1
    raw = client.chat.completions.with_raw_response.create(
        model="auto", messages=[user("Tell me of the small bear")], max_tokens=1
    )
    assert raw.headers["x-seap-expert"] == "talks"
    router = Router.load(chat_run / "router")
    assert router.route("33 plus 5?").task == "sums" and router.route("Tell me of the small bear").task == "talks"


def test_the_router_reads_a_question_where_it_stands_in_the_ids_that_the_model_is_given(client, chat_run):
    router = Router.load(chat_run / "router")
    for text in ("33 plus 5?", "Tell me of the small bear"):
        served = served_ids(client, [user(text)])
        assert router.prompt_ids(text) == served
        ids = router.ids(text).tolist()
        assert ids and any(served[i : i + len(ids)] == ids for i in range(len(served)))


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}], "content[1]"),
        ([{"type": "text", "text": None}], "content[0].text"),
        ({"type": "text", "text": "a"}, "content"),
    ],
)
def test_a_part_that_is_no_text_is_400_with_its_place(client, content, place):
    with pytest.raises(openai.BadRequestError, match="should be a string|the model reads text alone") as refused:
        served_ids(client, [user(content)])
    assert refused.value.param == f"messages[0].{place}"


def test_a_form_that_tokens_can_spell_is_kept(client):
    reply = client.chat.completions.create(
        model="general",
        messages=[user("12 plus 5?")],
        max_tokens=9,
        extra_body={"structured_outputs": {"choice": ["Stop", "Go"]}},
    )
    assert reply.choices[0].message.content in ("Stop", "Go")


def test_the_playground_chats_and_shows_which_expert_answers(service):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with open_page(service.url, http_credentials={"username": "x", "password": KEY}) as page:
        page.get_by_label("Max tokens").fill("8")
        page.get_by_label("System message").fill(SYSTEM["content"])
        paths = []
        page.on("request", lambda request: paths.append(request.url.rpartition("/v1/")[2]))
        send(page, "33 plus 5?")
        pane = page.get_by_role("region", name="Pane A")
        sync_api.expect(pane.locator(".state")).to_have_text("stopped at the limit of 8 tokens", timeout=60_000)
        sync_api.expect(pane.get_by_role("heading")).to_have_text("sums")
        assert "chat/completions" in paths
