"""Encoding: items of a task in; token ids out, with the special tokens that the model was trained with.

Corpus, judges, router and report turn text into ids here and nowhere else, so that a question has the same ids wherever
it is read:

- A plain text has the beginning token that the tokenizer adds, once, even where the text begins with it. An end token
  that the tokenizer adds stands behind a whole text of the calibration, as the model was trained; nothing that is
  prompted or judged has it, since what follows it is another text.
- A conversation is what the model's chat template writes, tokenised without further special tokens, as transformers and
  vLLM do it. The prompt's ids come first in those of the whole; where the template writes the prompt otherwise once it
  is answered, the whole is the prompt and the bare answer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from seap_ray.errors import ConfigError, DataError
from seap_ray.models.corpus import Item, Message
from seap_ray.models.sequences import CountedSequence
from seap_ray.models.template_limits import TemplateLimitError
from seap_ray.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from seap_ray.config import Config
    from seap_ray.core.families import Family

Count = Literal["all", "assistant"]
"""Which tokens count in the statistics: ``corpus.count``."""
PROBES = ("a", "the", "0", "A", "一")
"""Texts that show what a tokenizer adds before and behind them; one of them has a token in every vocabulary but odd
ones."""
PROBE_CHAT: tuple[Message, ...] = (
    {"role": "user", "content": "seapquestion"},
    {"role": "assistant", "content": "seapanswer"},
)
"""A conversation that shows what a chat template does; its words stand in no template."""
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What chat templates raise about conversations that they do not take."""
SHOWN_CHARACTERS = 120
"""Characters of a conversation that an error shows."""


# --- whether the chat template is used -------------------------------------------------------------------------------


def uses_chat(config: "Config", task: Task, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a task's texts are in the model's chat template (``corpus.chat``, ``Task.chat``).

    A task that asks nothing has plain texts whatever is set: they are nobody's messages. ``auto`` wants a template that
    writes whole conversations; some write the last message alone, for models that know no conversations.

    Raises ConfigError where the template is to be used and there is none.
    """
    setting = task.chat or config.corpus.chat
    if setting == "always" and not has_template(tokenizer):
        key = f"tasks.{task.name}.chat" if task.chat else "corpus.chat"
        raise ConfigError(f"{key}: always, but the tokenizer of model.source has no chat template")

    # A task without templates is completed from its rows' columns, which are questions or conversations.
    asks = bool(task.question or task.messages or not task.has_templates)
    if setting == "auto":
        return asks and config.corpus.prompt_format != "official" and writes_conversations(tokenizer)
    return asks and setting == "always"


def has_template(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a tokenizer has a chat template that is used where none is named."""
    try:
        return bool(tokenizer.get_chat_template())
    # None at all, or several of which none is the default.
    except ValueError:
        return False


def writes_conversations(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a tokenizer has a chat template that writes a question and, after it, its answer."""
    if not has_template(tokenizer):
        return False

    try:
        text = Encoding(tokenizer, is_chat=True).render(PROBE_CHAT)
    except DataError:
        return False

    question, answer = (text.find(message["content"]) for message in PROBE_CHAT)
    return 0 <= question < answer


def prompt_frame(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str] | None:
    """Return what the chat template writes before and behind a user's only message, up to where the answer begins.

    None where there is no template, or it does not write a message as it is, once.
    """
    if not has_template(tokenizer):
        return None

    question = PROBE_CHAT[0]
    try:
        text = Encoding(tokenizer, is_chat=True).render([question], is_prompt=True)
    except DataError:
        return None

    parts = text.split(question["content"])
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _with_parts(message: Message) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


# --- the encoding ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RenderedText:
    """A whole text that the model is calibrated on."""

    prompt: str
    """What stands before the answer; empty where nothing is asked."""
    rest: str
    """The answer, with what the template writes around it."""
    is_chat: bool
    """Whether the chat template wrote it."""
    spans: tuple[tuple[int, int], ...] | None = None
    """Characters of the text, from and to, whose tokens count; None for all."""

    @property
    def text(self) -> str:
        """The text as a whole."""
        return self.prompt + self.rest


@dataclass(frozen=True)
class Encoding:
    """How the texts of a task become token ids of a model."""

    tokenizer: "PreTrainedTokenizerBase"
    is_chat: bool = False
    """Whether questions and conversations are in the chat template."""

    @classmethod
    def of(cls, config: "Config", task: Task, tokenizer: "PreTrainedTokenizerBase") -> "Encoding":
        """Return a task's encoding. Raises ConfigError where a chat template is to be used and there is none."""
        return cls(tokenizer, uses_chat(config, task, tokenizer))

    # --- plain text --------------------------------------------------------------------------------------------------

    @cached_property
    def added(self) -> tuple[list[int], list[int]]:
        """Ids of the special tokens that the tokenizer adds by itself before and behind a text."""
        whole: list[int] = []
        for probe in PROBES:
            bare = self._bare(probe)
            whole = self.tokenizer(probe)["input_ids"]
            # A vocabulary without an unknown token may have no token for a probe.
            starts = [i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare]
            if starts:
                return whole[: starts[0]], whole[starts[0] + len(bare) :]

        # No probe has tokens of its own: the end token is all that may stand behind.
        behind = [i for i in whole[1:] if i == self.tokenizer.eos_token_id]
        return whole[: len(whole) - len(behind)], behind

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text that is continued: one beginning token at most, and no end token behind."""
        return self._with_beginning(self._bare(text))

    def _with_beginning(self, bare: list[int]) -> list[int]:
        before, _ = self.added
        # A text may begin with the token itself, as chat templates write it.
        return bare if bare[: len(before)] == before else [*before, *bare]

    def _with_end(self, ids: list[int]) -> list[int]:
        _, after = self.added
        return ids if not after or ids[-len(after) :] == after else [*ids, *after]

    def _bare(self, text: str) -> list[int]:
        """Return the ids of a text without any special token that is not in it."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _bare_all(self, texts: Sequence[str]) -> list[list[int]]:
        # Many at once are tokenised in parallel; none at all is an error of the library.
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    # --- prompts -----------------------------------------------------------------------------------------------------

    def prompt_text(self, item: Item) -> str:
        """Return what a model is given for an item's question, as text. Raises DataError as ``render`` does."""
        return self.render(item.messages, is_prompt=True) if self._is_chat(item) else item.question

    def prompt(self, item: Item) -> list[int]:
        """Return the ids that a served model is given for an item's question."""
        text = self.prompt_text(item)
        # The template has all special tokens that the model wants.
        return self._bare(text) if self._is_chat(item) else self.ids(text)

    def _is_chat(self, item: Item) -> bool:
        # A mere text is nobody's message.
        return self.is_chat and bool(item.messages)

    def render(self, messages: Sequence[Message], *, is_prompt: bool = False) -> str:
        """Return what the chat template writes for a conversation.

        Args:
            messages: The conversation.
            is_prompt: Let it end where the assistant begins to write.

        Raises:
            DataError: The template does not take it: roles that do not alternate, a system message where there is none.
        """
        try:
            return self._apply(messages, as_parts=self._takes_parts, is_prompt=is_prompt)
        except REFUSALS as error:
            shown = " | ".join(f"{message['role']}: {message['content']}" for message in messages)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise DataError(f"the chat template does not take {shown[:SHOWN_CHARACTERS]!r} ({reason})") from None

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether the chat template reads contents as lists of parts alone, in which form vLLM then passes them."""
        question = PROBE_CHAT[0]
        for as_parts in (False, True):
            try:
                if question["content"] in self._apply([question], as_parts=as_parts):
                    return as_parts
            except REFUSALS:
                continue
        return False

    def _apply(self, messages: Sequence[Message], *, as_parts: bool, is_prompt: bool = False) -> str:
        """Return what the template writes.

        Raises what the template raises, one of ``REFUSALS``, and ConfigError where it goes beyond the limits.
        """
        conversation: list[dict[str, Any]] = [*messages]
        if as_parts:
            conversation = [_with_parts(message) for message in messages]

        try:
            text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=is_prompt)
        except (TemplateLimitError, RecursionError) as error:
            # Not a conversation that it does not take, which would be left out, but a template to stay away from.
            raise ConfigError(f"model.source: the tokenizer's chat template is refused ({error})") from None

        assert isinstance(text, str), "one conversation without tokenising is one text"
        return text

    # --- whole texts -------------------------------------------------------------------------------------------------

    def rendered(self, item: Item, count: Count = "all") -> RenderedText:
        """Return the whole text that the model is calibrated on, and what of it counts.

        Raises DataError as ``render`` does.
        """
        if self._is_chat(item):
            prompt = self.prompt_text(item)
            rest = self._answered(item, prompt, item.answer)
            spans = self._assistant_spans(item, prompt + rest, len(prompt)) if count == "assistant" else None
            return RenderedText(prompt, rest, True, spans)

        # The text of the paper's authors may not end with the answer as it stands in the item.
        has_answer = bool(item.prompt) and item.text.endswith(item.answer)
        start = len(item.text) - len(item.answer) if has_answer else 0
        # The space before an answer is its own, as where it is judged.
        begin = start - len(item.separator) if item.text[:start].endswith(item.separator) else start
        answer = ((begin, len(item.text)),) if count == "assistant" and has_answer else None
        return RenderedText(item.text[:start], item.text[start:], False, answer)

    def text(self, item: Item) -> str:
        """Return the whole text that the model is calibrated on. Raises DataError as ``render`` does."""
        return self.rendered(item).text

    def sequence(self, item: Item, count: Count = "all") -> Sequence[int]:
        """Return the ids of the whole text that the model is calibrated on. Raises DataError as ``render`` does."""
        (sequence,) = self.sequences([self.rendered(item, count)])
        return sequence

    def sequences(self, texts: Sequence[RenderedText]) -> list[Sequence[int]]:
        """Return the ids of whole texts of items; what counts of them is in a ``CountedSequence``."""
        wholes = self._bare_all([rendered.text for rendered in texts])
        # Of a plain text the prompt's ids are not needed.
        prompts = self._bare_all([rendered.prompt for rendered in texts]) if self.is_chat else wholes

        sequences: list[Sequence[int]] = []
        for rendered, whole, prompt in zip(texts, wholes, prompts, strict=True):
            if rendered.is_chat:
                ids, _ = self.after_prompt(prompt, whole, rendered.rest)
            else:
                ids = self._with_end(self._with_beginning(whole))
            sequences.append(self._counted(ids, rendered))
        return sequences

    def check_ids(self, sequences: Iterable[Sequence[int]], vocabulary_size: int) -> None:
        """Raise DataError for a token that a model with so many rows in its embedding has none for."""
        for ids in sequences:
            largest = max(ids, default=0)
            if largest >= vocabulary_size:
                token = self.tokenizer.convert_ids_to_tokens([largest])[0]
                raise DataError(
                    f"the tokenizer has token {token!r} as number {largest}, but the model's embedding has "
                    f"{vocabulary_size} rows; tokenizer and weights are not of one model"
                )

    def _answered(self, item: Item, prompt: str, answer: str) -> str:
        """Return what the template writes behind the prompt for an answer; the bare answer where it does not go on."""
        message: Message = {"role": "assistant", "content": answer}
        whole = self.render([*item.messages, message])
        return whole[len(prompt) :] if whole.startswith(prompt) and len(whole) > len(prompt) else answer

    def after_prompt(self, prompt: list[int], whole: list[int], rest: str) -> tuple[list[int], int]:
        """Return ids that begin with the prompt's, as a model is given them, and where the rest begins in them."""
        if whole[: len(prompt)] == prompt:
            return whole, len(prompt)

        # A token of the whole lies across the prompt's end. A line break before the rest keeps a tokenizer from the
        # space that it puts before a text.
        line_break = self._bare("\n")
        after = self._bare("\n" + rest)
        is_apart = after[: len(line_break)] == line_break
        return [*prompt, *(after[len(line_break) :] if is_apart else self._bare(rest))], len(prompt)

    # --- judging -----------------------------------------------------------------------------------------------------

    def continuation(self, item: Item, answer: str) -> tuple[list[int], int]:
        """Return the ids of an item's question and an answer, and where the answer begins in them, never at 0.

        In a chat the answer is as it stands in the whole conversation; what ends the assistant's turn is not part of
        it, nor what the template itself writes before it. Raises DataError as ``render`` does.
        """
        if not self._is_chat(item):
            context = item.prompt
            return self._split(context, f"{context}{item.separator}{answer}" if context else answer)

        prompt = self.prompt_text(item)
        rest = self._answered(item, prompt, answer)
        lead, tail = self._around_answer(item, prompt)
        if rest.startswith(lead) and rest.endswith(tail):
            rest = rest[: len(rest) - len(tail)]
        else:
            lead = ""
            rest = answer

        # Words of the template, such as an empty thought, are given; a mere space is the answer's own.
        if lead.strip():
            prompt += lead
            rest = rest[len(lead) :]
        return self.after_prompt(self._bare(prompt), self._bare(prompt + rest), rest)

    def _around_answer(self, item: Item, prompt: str) -> tuple[str, str]:
        """Return what the template writes between a prompt and an answer, and behind the answer."""
        # A word that stands in no template shows where answers begin and end.
        word = PROBE_CHAT[-1]["content"]
        lead, _, tail = self._answered(item, prompt, word).partition(word)
        return lead, tail

    def whole(self, item: Item) -> tuple[list[int], int]:
        """Return the ids of an item's text and where a perplexity begins in them, never at 0.

        It is of the whole text; of a conversation only the answer counts. Raises DataError as ``render`` does.
        """
        if self._is_chat(item):
            return self.continuation(item, item.answer)
        return self._split("", item.text)

    def _split(self, context: str, text: str) -> tuple[list[int], int]:
        """Return the ids of a plain text, and where what follows its beginning ``context`` begins in them."""
        ids = self.ids(text)
        # Tokens that lie across the end of the context are not part of it.
        start = len(commonprefix([self.ids(context), ids]))
        first = self._first_token
        # Nothing predicts a first token: where there is no context, one stands before it.
        if not start and ids[:1] == [first]:
            start = 1
        if not start and first is not None:
            ids = [first, *ids]
            start = 1
        return ids, max(start, 1)

    @property
    def _first_token(self) -> int | None:
        begin = self.tokenizer.bos_token_id
        return begin if begin is not None else self.tokenizer.eos_token_id

    # --- which tokens count ------------------------------------------------------------------------------------------

    def _assistant_spans(self, item: Item, text: str, n_prompt: int) -> tuple[tuple[int, int], ...]:
        """Return the characters of all of the assistant's messages in a conversation's text.

        The mark that ends a message is part of it, the line break behind that is not.
        """
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(item.messages):
            if message["role"] == "assistant":
                after = spans[-1][1] if spans else 0
                span = self._message_span(item.messages[: i + 1], text, after)
                spans += [span] if span else []
        return (*spans, (n_prompt, len(text.rstrip())))

    def _message_span(self, messages: Sequence[Message], text: str, after: int) -> tuple[int, int] | None:
        """Return the characters of the last of a conversation's first messages; None where it is not in the text."""
        try:
            before = self.render(messages[:-1], is_prompt=True)
            until = self.render(messages).rstrip()
        # Some templates want a user first, or last.
        except DataError:
            before = until = ""
        if before and text.startswith(until) and until.startswith(before):
            return len(before), len(until)

        # The template writes earlier messages otherwise than later ones: their words are looked for.
        content = messages[-1]["content"].strip()
        start = text.find(content, after)
        return (start, start + len(content)) if content and start >= 0 else None

    def _counted(self, ids: list[int], rendered: RenderedText) -> Sequence[int]:
        """Return the ids with a mark at those that count."""
        if rendered.spans is None:
            return ids

        counted = [False] * len(ids)
        for start, end in rendered.spans:
            first = self._n_tokens(ids, rendered, start)
            # What the tokenizer adds behind the last span is part of it.
            last = self._n_tokens(ids, rendered, end) if end < len(rendered.text) else len(ids)
            counted[first:last] = [True] * max(0, last - first)
        return CountedSequence(ids, counted)

    def _n_tokens(self, ids: list[int], rendered: RenderedText, end: int) -> int:
        """Return how many of a text's tokens lie within its first characters."""
        beginning = self._bare(rendered.text[:end])
        if not rendered.is_chat:
            beginning = self._with_beginning(beginning)
        elif end > len(rendered.prompt):
            # Cut behind the prompt, as the whole is where a token would lie across the prompt's end.
            answered = rendered.text[len(rendered.prompt) : end]
            beginning, _ = self.after_prompt(self._bare(rendered.prompt), beginning, answered)
        return len(commonprefix([beginning, ids]))


# --- checks before any work ------------------------------------------------------------------------------------------


def bos_warning(encoding: Encoding, family: "Family") -> str | None:
    """Return a warning where a family's models need a beginning token that texts or chats do not get; else None."""
    if not family.needs_bos:
        return None

    tokenizer = encoding.tokenizer
    # In a chat the template writes the token, or nobody does.
    ids = encoding._bare(encoding.render(PROBE_CHAT)) if encoding.is_chat else encoding.ids(PROBES[0])
    if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]:
        return None

    where = "chat template gives chats" if encoding.is_chat else "tokenizer gives texts"
    remedy = "write it in the template" if encoding.is_chat else "let the post_processor of tokenizer.json add it"
    token = tokenizer.bos_token or ""
    return f"model.source: this model needs its beginning token {token}, and its {where} none; {remedy}"
