"""Encoding: one beginning token, no end token in what is continued, and chats as transformers' template writes them."""

import json
from dataclasses import replace
from itertools import product

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from seap_ray.config import Config
from seap_ray.core.families import family_of
from seap_ray.errors import ConfigError, DataError
from seap_ray.models.corpus import Item
from seap_ray.models.encoding import Encoding, bos_warning, prompt_frame, uses_chat, writes_conversations
from seap_ray.models.sequences import CountedSequence
from seap_ray.routing.router import PromptFrame, Router
from seap_ray.tasks import Task

BOS = "<s>"
EOS = "</s>"
TURN = "<|end|>"
CORPUS = [
    "The capital of France is Paris.",
    "What is 2 + 2? It is 4.",
    "user assistant system\n",
    "Snow is white.\n",
] * 4

# --- tokenizers of each kind -----------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|end|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant\n{% endif %}"
)
TEMPLATES = {
    # As Gemma's: the template writes the beginning token, and refuses what does not alternate.
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ m['role'] }}\n{{ m['content'] | trim }}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}",
    "chatml": CHATML,
    # As Mistral's: a space before the answer, which the prompt does not have.
    "inst": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}",
    # As Qwen3's: an empty thought before the last answer.
    "thought": "{% for m in messages %}<|end|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant\n{% endif %}",
    # As DeepSeek-R1's: the prompt begins a thought that the whole does not have.
    "reasoning": "{% for m in messages %}<|end|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant\n<think>\n{% endif %}",
    "last message alone": "{{ bos_token }}{{ messages[-1]['content'] }}",
    # As models that see pictures have it: contents are lists of parts, and a text gives nothing.
    "parts": "{% for m in messages %}<|end|>{{ m['role'] }}\n{% for part in m['content'] if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endfor %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|end|>assistant\n{% endif %}",
}
CHATS = ("gemma", "chatml", "inst", "thought")
"""Templates whose prompt begins the whole."""


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<pad>", BOS, EOS, TURN], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece(*, legacy: bool) -> Tokenizer:
    """As Llama 2's: a space before the text, by a normalizer or, as newer files have it, a pre-tokenizer."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<pad>", BOS, EOS, TURN, "<unk>", *bytes_], show_progress=False
    )
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Trained models forget how they fall back.
    stated = json.loads(tokenizer.to_str())
    stated["model"] |= {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer.from_str(json.dumps(stated))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def words() -> Tokenizer:
    vocab = {
        word: i for i, word in enumerate(["<pad>", BOS, EOS, TURN, "<unk>", "The", "capital", "of", "is", "Paris"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "dummy prefix": lambda: sentencepiece(legacy=False),
    "legacy dummy prefix": lambda: sentencepiece(legacy=True),
    "words": words,
}
ADDED = {"none": "$A", "bos": f"{BOS} $A", "eos": f"$A {EOS}", "both": f"{BOS} $A {EOS}"}


class Characters(PreTrainedTokenizer):
    """A tokenizer in Python, without offsets."""

    vocab_files_names: dict = {}

    def __init__(self, before=(), after=(), **named):
        self.before, self.after = [*before], [*after]
        super().__init__(**named)

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict:
        return {chr(i): i for i in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text, **_named):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) % 256

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, ids, other=None):
        before = [self.convert_tokens_to_ids(token) for token in self.before]
        return [*before, *ids, *(self.convert_tokens_to_ids(token) for token in self.after)]


def make(kind: str, added: str = "none", template: str | None = None):
    """Return a tokenizer of a kind, with the special tokens that it adds by itself."""
    named = {"bos_token": BOS, "eos_token": EOS, "chat_template": TEMPLATES[template] if template else None}
    if kind == "slow":
        parts = ADDED[added].split()
        middle = parts.index("$A")
        tokenizer = Characters(parts[:middle], parts[middle + 1 :], **named)
        tokenizer.add_tokens([AddedToken(TURN, special=True)], special_tokens=True)
        return tokenizer

    backend = KINDS[kind]()
    backend.add_special_tokens([BOS, EOS, TURN])
    special = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    if added != "none":
        backend.post_processor = processors.TemplateProcessing(
            single=ADDED[added], pair=f"{ADDED[added]} $B", special_tokens=special
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", **named)


ALL = [*KINDS, "slow"]
QUESTION = "What is the capital of France?"


def asked(question: str = QUESTION, answer: str = "Paris", history=(), **fields) -> Item:
    messages = [*history, {"role": "user", "content": question}]
    return Item(f"{question} {answer}", question, answer, [], messages=messages, **fields)


# --- plain text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "added"), [*product(ALL, ADDED)])
def test_a_text_has_one_beginning_token_where_the_tokenizer_adds_it_and_no_end_token(kind, added):
    tokenizer = make(kind, added)
    encoding = Encoding(tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    for text in ("The capital of France", "", " x", "a\n", "Ünïcode 😀"):
        ids = encoding.ids(text)
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == ([bos] if added in ("bos", "both") else []) + bare
        assert eos not in ids


@pytest.mark.parametrize(("kind", "added"), [*product(ALL, ADDED)])
def test_a_text_that_begins_with_the_beginning_token_does_not_get_another(kind, added):
    tokenizer = make(kind, added)
    encoding = Encoding(tokenizer)
    # In whatever order they come: a first text of this kind changes nothing for later ones.
    for text in (f"{BOS}The capital", "The capital", f"{BOS}The capital"):
        ids = encoding.ids(text)
        expected = int(added in ("bos", "both") or text.startswith(BOS))
        assert ids.count(tokenizer.bos_token_id) == expected
        assert ids[:expected] == [tokenizer.bos_token_id] * expected


@pytest.mark.parametrize(("kind", "added"), [*product(ALL, ADDED)])
def test_a_whole_text_of_the_calibration_is_what_the_tokenizer_makes_of_it(kind, added):
    tokenizer = make(kind, added)
    item = asked()
    assert Encoding(tokenizer).sequence(item) == tokenizer(item.text)["input_ids"]

    marked = Item(f"{BOS}The capital{EOS}", "", "", [])
    ids = Encoding(tokenizer).sequence(marked)
    assert (ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)) == (1, 1)


@pytest.mark.parametrize(("kind", "added"), [*product(ALL, ADDED)])
def test_an_answer_is_judged_token_by_token_after_its_question(kind, added):
    tokenizer = make(kind, added)
    encoding = Encoding(tokenizer)
    ids, start = encoding.continuation(asked(), "Paris")
    assert start > 0 and ids[:start] == encoding.prompt(asked())
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[start:]).strip() == "Paris"


@pytest.mark.parametrize(("kind", "added"), [*product(ALL, ADDED)])
def test_a_perplexity_is_of_all_tokens_after_the_first_special_one(kind, added):
    tokenizer = make(kind, added)
    bos = tokenizer.bos_token_id
    for text in ("The capital", f"{BOS}The capital"):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = bare if bare[0] == bos else [bos, *bare]
        assert Encoding(tokenizer).whole(Item(text, "", text, [])) == (expected, 1)


def test_a_vocabulary_without_the_probes_has_its_special_tokens_known():
    backend = Tokenizer(models.BPE({BOS: 0, EOS: 1, "x": 2, "y": 3, "xy": 4}, [("x", "y")]))
    backend.post_processor = processors.TemplateProcessing(f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
    assert Encoding(tokenizer).ids("xy") == [0, 4]


# --- chats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "added", "template"), [*product(ALL, ADDED, TEMPLATES)])
def test_a_prompt_is_the_ids_of_transformers_chat_template(kind, added, template):
    tokenizer = make(kind, added, template)
    item = asked()
    messages = item.messages
    if template == "parts":
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert Encoding(tokenizer, is_chat=True).prompt(item) == expected
    assert expected.count(tokenizer.bos_token_id) == int("bos_token" in TEMPLATES[template])


@pytest.mark.parametrize(("kind", "template"), [*product(ALL, CHATS)])
def test_a_whole_chat_is_the_ids_of_transformers_chat_template_and_begins_with_the_prompt(kind, template):
    tokenizer = make(kind, "both", template)
    encoding = Encoding(tokenizer, is_chat=True)
    item = asked()
    whole = [*item.messages, {"role": "assistant", "content": "Paris"}]
    ids = encoding.sequence(item)
    prompt = encoding.prompt(item)

    assert ids[: len(prompt)] == prompt
    assert ids == tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)


# A tokenizer of whole words joins what a template writes without a space between.
@pytest.mark.parametrize(("kind", "template"), [*product(ALL, CHATS), *product([*KINDS][:-1], TEMPLATES)])
def test_an_answer_is_judged_behind_the_prompt_without_what_ends_the_turn(kind, template):
    tokenizer = make(kind, "both", template)
    encoding = Encoding(tokenizer, is_chat=True)
    item = asked()
    prompt = encoding.prompt(item)
    ids, start = encoding.continuation(item, "Paris")

    assert 0 < len(prompt) <= start and ids[: len(prompt)] == prompt
    assert tokenizer.decode(ids[start:]).strip() == "Paris"
    # The template's own thought is given.
    given = tokenizer.decode(ids[len(prompt) : start])
    assert kind == "words" or given.split() == (["<think>", "</think>"] if template == "thought" else [])
    assert encoding.whole(item) == (ids, start)


@pytest.mark.parametrize("kind", ["byte-level", "dummy prefix", "legacy dummy prefix", "slow"])
@pytest.mark.parametrize("answer", ["end", "assistant", "think", "INST", "a b", "\n\nx", "  x", "user\n"])
def test_words_of_the_template_may_be_answers(kind, answer):
    for template in CHATS:
        tokenizer = make(kind, "bos", template)
        encoding = Encoding(tokenizer, is_chat=True)
        ids, start = encoding.continuation(asked(), answer)
        written = answer.strip() if template == "gemma" else answer
        assert tokenizer.decode(ids[start:]).lstrip(" ") == written.lstrip(" ")


@pytest.mark.parametrize("kind", ["byte-level", "dummy prefix", "legacy dummy prefix", "slow"])
@pytest.mark.parametrize("template", ["reasoning", "last message alone"])
def test_where_the_whole_does_not_begin_with_the_prompt_the_answer_follows_it(kind, template):
    tokenizer = make(kind, "bos", template)
    encoding = Encoding(tokenizer, is_chat=True)
    item = asked()
    assert encoding.text(item) == encoding.prompt_text(item) + "Paris"
    prompt = encoding.prompt(item)
    ids = encoding.sequence(item)
    assert ids[: len(prompt)] == prompt and tokenizer.decode(ids[len(prompt) :]).strip() == "Paris"


def test_a_token_across_the_end_of_the_prompt_does_not_change_the_prompt():
    """The prompt's last line break and the answer's first are one token in the whole."""
    backend = Tokenizer(models.BPE({"\n": 0, "\n\n": 1, "a": 2, "b": 3}, [("\n", "\n")]))
    template = "{% for m in messages %}{{ m['content'] }}{% if loop.first %}{{ '\n' }}{% endif %}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
    encoding = Encoding(tokenizer, is_chat=True)
    item = asked("a", "\nb")
    assert tokenizer(encoding.text(item))["input_ids"] == [2, 1, 3]
    assert encoding.prompt(item) == [2, 0]
    assert encoding.sequence(item) == [2, 0, 0, 3]
    assert encoding.continuation(item, "\nb") == ([2, 0, 0, 3], 2)


def test_what_a_template_refuses_is_one_line_with_the_conversation():
    encoding = Encoding(make("byte-level", "bos", "gemma"), is_chat=True)
    system = asked(history=[{"role": "system", "content": "Be brief."}])
    with pytest.raises(DataError, match=r"does not take 'system: Be brief. .*System role not supported"):
        encoding.sequence(system)
    with pytest.raises(DataError, match="Conversation roles must alternate"):
        encoding.prompt(asked(history=[{"role": "user", "content": "Hello"}]))


def test_a_mere_text_is_nobodys_message():
    tokenizer = make("byte-level", "bos", "gemma")
    text = Item("The capital", "", "The capital", [])
    assert Encoding(tokenizer, is_chat=True).sequence(text) == Encoding(tokenizer).sequence(text)
    assert Encoding(tokenizer, is_chat=True).whole(text) == Encoding(tokenizer).whole(text)


# --- whether the template is used ------------------------------------------------------------------------------------


def config(**corpus) -> Config:
    return Config.model_validate({"corpus": corpus})


def task(**fields) -> Task:
    return Task(**{"name": "mine", "path": "unused", "question": "{{ q }}", "answer": "{{ a }}", **fields})


def test_auto_uses_a_template_that_writes_conversations_for_tasks_that_ask():
    chat, last, none = (make("byte-level", "bos", name) for name in ("gemma", "last message alone", None))
    assert [writes_conversations(tokenizer) for tokenizer in (chat, last, none)] == [True, False, False]

    assert uses_chat(config(), task(), chat)
    assert uses_chat(config(), task(question="", answer="", messages="{{ messages }}"), chat)
    assert not uses_chat(config(), task(question=""), chat)
    assert not uses_chat(config(prompt_format="official"), task(), chat)
    assert not uses_chat(config(), task(chat="never"), chat)
    assert not uses_chat(config(chat="never"), task(), chat)
    assert uses_chat(config(chat="never"), task(chat="always"), last)
    assert uses_chat(config(chat="always"), task(), last)
    assert not uses_chat(config(chat="always"), task(question=""), chat)
    assert not uses_chat(config(), task(), last)
    assert not uses_chat(config(), task(), none)


def test_a_template_of_content_parts_writes_what_one_of_texts_does():
    parts, chatml = (Encoding(make("byte-level", "bos", name), is_chat=True) for name in ("parts", "chatml"))
    assert writes_conversations(parts.tokenizer)

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    item = Item("", "What is 2 + 2?", "4", [], messages)
    assert parts.prompt_text(item) == chatml.prompt_text(item)
    assert parts.sequence(item) == chatml.sequence(item)
    assert prompt_frame(parts.tokenizer) == prompt_frame(chatml.tokenizer)


def test_always_without_a_template_is_refused_by_its_key():
    tokenizer = make("byte-level")
    with pytest.raises(ConfigError, match="^corpus.chat: always, but"):
        uses_chat(config(chat="always"), task(), tokenizer)
    with pytest.raises(ConfigError, match="^tasks.mine.chat: always, but"):
        uses_chat(config(), task(chat="always"), tokenizer)


def test_of_several_templates_the_default_is_used():
    tokenizer = make("byte-level", "bos", "gemma")
    tokenizer.chat_template = {"default": TEMPLATES["gemma"], "tool_use": "x"}
    assert writes_conversations(tokenizer)
    tokenizer.chat_template = {"rag": "x", "tool_use": "x"}
    assert not writes_conversations(tokenizer)


# --- one question everywhere -----------------------------------------------------------------------------------------


def router_of(tokenizer, *, is_chat: bool) -> Router:
    frame = prompt_frame(tokenizer) if is_chat else None
    return Router(tokenizer.backend_tokenizer, (), {}, (), frame=PromptFrame(*frame) if frame else None)


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize(("kind", "added", "template"), [*product(KINDS, ADDED, [*CHATS, "reasoning"])])
def test_a_question_has_the_same_ids_in_calibration_judge_router_and_transformers(kind, added, template, is_chat):
    """How lm-eval and the endpoint see it is tested beside them."""
    tokenizer = make(kind, added, template)
    encoding = Encoding(tokenizer, is_chat)
    for question in (QUESTION, "a\nb ", f"x {TURN} y", "Ünï 😀"):
        item = asked(question.strip())
        prompt = encoding.prompt(item)
        if is_chat:
            expected = tokenizer.apply_chat_template(
                item.messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        else:
            expected = [i for i in tokenizer(item.question)["input_ids"] if i != tokenizer.eos_token_id]
        judged, start = encoding.continuation(item, "Paris")
        router = router_of(tokenizer, is_chat=is_chat)

        assert prompt == expected
        assert [*encoding.sequence(item)][: len(prompt)] == prompt
        assert start >= len(prompt) and judged[: len(prompt)] == prompt
        assert router.prompt_ids(question) == prompt
        # The router's evidence is a part of these ids.
        ids = router.ids(question).tolist()
        assert any(prompt[i : i + len(ids)] == ids for i in range(len(prompt)))


# --- which tokens count ----------------------------------------------------------------------------------------------


def counted_text(tokenizer, sequence) -> str:
    assert isinstance(sequence, CountedSequence)
    return tokenizer.decode([i for i, counts in zip(sequence.ids, sequence.counted, strict=True) if counts])


@pytest.mark.parametrize(("kind", "template"), [*product(["byte-level", "dummy prefix", "slow"], ["gemma", "chatml"])])
def test_of_a_chat_the_tokens_of_all_the_assistants_messages_count(kind, template):
    tokenizer = make(kind, "bos", template)
    history = [
        {"role": "user", "content": "Snow is?"},
        {"role": "assistant", "content": "Snow is white."},
    ]
    item = asked(history=history)
    encoding = Encoding(tokenizer, is_chat=True)
    sequence = encoding.sequence(item, "assistant")
    assert [*sequence] == encoding.sequence(item)
    assert counted_text(tokenizer, sequence).replace("\n", "").replace(" ", "") == f"Snowiswhite.{TURN}Paris{TURN}"


@pytest.mark.parametrize("kind", ["byte-level", "dummy prefix", "slow"])
@pytest.mark.parametrize("answer", ["\n\nParis", "  Paris", "Paris\n"])
def test_an_answer_counts_where_its_white_space_would_be_one_token_with_the_end_of_the_prompt(kind, answer):
    tokenizer = make(kind, "bos", "chatml")
    # A tokenizer with such tokens, as those of trained models.
    tokenizer.add_tokens(["\n\n\n", "\n  "])
    item = replace(asked(), answer=answer)
    encoding = Encoding(tokenizer, is_chat=True)
    sequence = encoding.sequence(item, "assistant")
    assert [*sequence] == encoding.sequence(item)
    assert counted_text(tokenizer, sequence).lstrip(" ") == f"{answer}{TURN}".lstrip(" ")


def test_words_of_earlier_answers_are_found_where_the_template_writes_these_otherwise():
    tokenizer = make("byte-level", "none", "thought")
    history = [{"role": "user", "content": "white?"}, {"role": "assistant", "content": "Snow is white."}]
    sequence = Encoding(tokenizer, is_chat=True).sequence(asked(history=history), "assistant")
    assert counted_text(tokenizer, sequence) == f"Snow is white.<think>\n\n</think>\n\nParis{TURN}"


@pytest.mark.parametrize(("kind", "added"), [*product(["byte-level", "dummy prefix", "slow"], ADDED)])
def test_of_a_plain_text_the_answer_counts_and_where_nothing_is_asked_all(kind, added):
    tokenizer = make(kind, added)
    encoding = Encoding(tokenizer)
    sequence = encoding.sequence(asked(), "assistant")
    end = EOS if added in ("eos", "both") else ""
    assert counted_text(tokenizer, sequence).strip().replace(" ", "") == f"Paris{end}"
    # They are those that are judged.
    judged, first = encoding.continuation(asked(), "Paris")
    assert [*sequence.counted][: len(judged)] == [place >= first for place in range(len(judged))]
    assert [*sequence] == encoding.sequence(asked())

    text = Item("The capital", "", "The capital", [])
    assert encoding.sequence(text, "assistant") == encoding.sequence(text)
    # The texts of the paper's authors are lower-cased.
    official = replace(asked(), text="what is the capital of france? paris")
    assert encoding.sequence(official, "assistant") == encoding.sequence(official)


# --- a family that needs its beginning token -------------------------------------------------------------------------


def test_a_warning_where_a_family_needs_a_beginning_token_and_texts_or_chats_get_none():
    gemma, llama = family_of("gemma3_text"), family_of("llama")

    def warning(added, template=None, family=gemma, *, is_chat=False) -> str:
        return bos_warning(Encoding(make("byte-level", added, template), is_chat), family) or ""

    assert "its tokenizer gives texts none" in warning("none")
    assert "its tokenizer gives texts none" in warning("eos", "gemma")
    assert "its chat template gives chats none" in warning("bos", "chatml", is_chat=True)
    assert not warning("none", "gemma", is_chat=True)
    assert not warning("both", "chatml")
    assert not warning("none", family=llama)
