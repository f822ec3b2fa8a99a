"""Tasks: where a corpus lies, and how a row of it becomes a question and its right answer.

Templates are Jinja, as in lm-eval's task files. The calibration text is the question, a space and the right answer, or
the conversation in the model's chat template; ``official`` is the text that the SEAP authors' code feeds for the same
task, its lower-casing included.
"""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Metric = Literal["acc", "acc_norm", "exact_match", "perplexity", "window_perplexity"]
COLUMN_HEADS = {"acc": "acc", "acc_norm": "acc_n", "exact_match": "em", "perplexity": "ppl", "window_perplexity": "ppl"}
"""Column heads of the metrics."""
CorpusFormat = Literal["auto", "alpaca", "sharegpt", "messages"]
MULTIPLE_CHOICE = ("acc", "acc_norm")
"""Metrics of tasks whose answer is one of several."""


def is_perplexity(metric: str) -> bool:
    """Return whether lower values of a metric are better; a mean of accuracies leaves such metrics out."""
    return metric.endswith("perplexity")


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Task(Section):
    """A task: its corpus, its templates and how it is evaluated."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Name of the task, of its expert and of its folders: small letters, digits and underscores."""
    path: str
    """The corpus: the id of a data set on the Hugging Face hub, or a file, folder or glob pattern of parquet, jsonl,
    json, csv, txt or arrow files, on a disk or in a bucket (docs/corpora.md)."""
    format: CorpusFormat = "auto"
    """Layout of the rows of a task that has neither `answer` nor `messages`: `alpaca` (instruction, input, output),
    `sharegpt` (conversations of from and value), `messages` (OpenAI's role and content); `auto`: by the columns."""
    subset: str | None = None
    """Configuration (subset) of a hub data set, `name` in datasets.load_dataset; null: its only one."""
    split: str = "train"
    """Split that calibration rows are drawn from."""
    evaluation_path: str | None = None
    """Where evaluation rows lie, in the forms of `path`; null: under `path`, too."""
    evaluation_split: str | None = None
    """Split that evaluation rows are drawn from; null: `validation` where there is one. Where the rows are none but
    those of the corpus, a fifth of these is held out for evaluation, by a hash of their content."""
    held_out: bool = True
    """Whether a row that was calibrated on, or a duplicate of one, is left out of the evaluation; false is for tasks of
    recall."""
    question: str = ""
    """Jinja template of the prompt, without the answer; the columns of a row are its variables, and `row` is all of
    them: row['a b']."""
    answer: str = ""
    """Jinja template of the right answer."""
    messages: str | None = None
    """Jinja expression in braces that gives a conversation, such as "{{ messages }}": a list of roles (system, user,
    assistant, tool) with their contents. Without `answer` the last message is the right answer."""
    system: str | None = None
    """Jinja template of the system message that conversations, and questions in a chat template, begin with."""
    chat: Literal["always", "never"] | None = None
    """Whether the task's texts are in the model's chat template; null: corpus.chat."""
    choices: str | None = None
    """For a multiple-choice task: Jinja expression that gives the list of possible answers."""
    official: str | None = None
    """Jinja template of the calibration text under corpus.prompt_format `official`; null: question, space, answer."""
    metric: Metric = "acc"
    """How evaluation rows are judged; where there is no `answer`, `perplexity` is the default. `acc`: the likeliest
    choice is the right one. `acc_norm`: the same, by likelihood
    per byte of the answer. `exact_match`: the generated answer is the right one. `perplexity`: of each row.
    `window_perplexity`: of all rows as one text, in windows."""
    lm_eval: str | None = None
    """Name of the task in lm-eval, which then judges it in seap-ray eval; null: `metric` does."""
    weight: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    """Weight of the task in the general model. The SEAP paper gives language-model corpora 3 and other tasks 2."""

    @model_validator(mode="before")
    @classmethod
    def _judge_conversations_by_perplexity(cls, values: Any) -> Any:
        # A conversation's answer is free text, for which no choice and no exact match is right.
        if isinstance(values, dict) and not values.get("answer"):
            return {"metric": "perplexity", **values}
        return values

    @field_validator("messages")
    @classmethod
    def _messages_are_one_expression(cls, messages: str | None) -> str | None:
        # A template would give the list's text; what stands in the braces gives the list itself.
        if messages is not None and not re.fullmatch(r"\s*\{\{.*\}\}\s*", messages, re.DOTALL):
            raise ValueError('should be one expression in braces, such as "{{ messages }}"')
        return messages

    @model_validator(mode="after")
    def _templates_fit_each_other(self) -> "Task":
        if self.messages and self.question:
            raise ValueError("messages: the question stands in them; leave out one of messages and question")
        if self.question and not self.answer:
            raise ValueError("answer: a question needs one")
        # Before the rows are seen, a task without templates may be anything.
        if self.has_templates and not self.has_prompt and (self.system or self.chat == "always"):
            key = "system" if self.system else "chat"
            raise ValueError(f"{key}: a task of mere texts has no conversation; give it a question, or messages")
        return self

    @property
    def has_prompt(self) -> bool:
        """Return whether an answer follows something that a user says; else the rows are mere texts."""
        return bool(self.question or self.messages)

    @property
    def has_templates(self) -> bool:
        """Return whether the task says what its rows mean; else their columns do."""
        return bool(self.answer or self.messages)


def _arc(name: str, subset: str) -> Task:
    """Return one of the two parts of ARC."""
    # Labels are letters in some rows and numbers in others, so the answer is found by its label.
    right = "choices.text[choices.label.index(answerKey)]"
    return Task(
        name=name,
        path="allenai/ai2_arc",
        subset=subset,
        question="{{ question }}",
        answer="{{ " + right + " }}",
        choices="choices.text",
        metric="acc" if subset == "ARC-Easy" else "acc_norm",
        lm_eval=name,
    )


def _demo(name: str, weight: float = 2.0) -> Task:
    """Return the task of a skill of the demo model, whose rows are generated."""
    return Task(
        name=name,
        path=f"demo:{name}",
        evaluation_split="test",
        # What is to be remembered must have been seen.
        held_out=name != "facts",
        question="{{ question }}",
        answer="{{ answer }}",
        # The demo's model was trained on plain texts; its chat template is for the endpoint.
        chat="never",
        metric="exact_match",
        weight=weight,
    )


_RIGHT_ENDING = "{{ endings[label | int] if label | int in range(endings | length) }}"
_YES_OR_NO = "'Yes' if answer in (True, 1, 'True', 'true') else 'No' if answer in (False, 0, 'False', 'false')"
# Splits whose answers are kept secret have none, or -1: such rows have no right answer, rather than the last one.
_FILLED = (
    "{{ sentence | replace('_', option1) if answer | string == '1' "
    "else sentence | replace('_', option2) if answer | string == '2' }}"
)
_OBQA_RIGHT = "{{ choices.text[choices.label.index(answerKey)] }}"

BUILT_IN: dict[str, Task] = {
    task.name: task
    for task in (
        _arc("arc_easy", "ARC-Easy"),
        _arc("arc_challenge", "ARC-Challenge"),
        Task(
            name="boolq",
            lm_eval="boolq",
            path="google/boolq",
            question="{{ passage }} {{ question[:1] | upper }}{{ question[1:] }}?",
            answer="{{ " + _YES_OR_NO + " }}",
            choices="['No', 'Yes']",
            official="{{ passage }} {{ question | capitalize }}? {{ " + _YES_OR_NO + " }}",
        ),
        Task(
            name="gsm8k",
            lm_eval="gsm8k",
            path="openai/gsm8k",
            subset="main",
            evaluation_split="test",
            question="{{ question }}",
            answer="{{ answer }}",
            metric="perplexity",
        ),
        Task(
            name="hellaswag",
            lm_eval="hellaswag",
            path="Rowan/hellaswag",
            question="{{ ctx | default(query) }}",
            answer=_RIGHT_ENDING,
            choices="endings",
            metric="acc_norm",
        ),
        Task(
            name="openbookqa",
            lm_eval="openbookqa",
            path="allenai/openbookqa",
            subset="additional",
            question="{{ fact1[:1] | upper }}{{ fact1[1:] }}. {{ question_stem }}",
            answer=_OBQA_RIGHT,
            choices="choices.text",
            official="{{ fact1 | capitalize }}. {{ question_stem }} " + _OBQA_RIGHT,
            metric="acc_norm",
        ),
        Task(
            name="piqa",
            lm_eval="piqa",
            path="ybisk/piqa",
            question="{{ goal }}",
            answer="{{ sol1 if label | int == 0 else sol2 if label | int == 1 }}",
            choices="[sol1, sol2]",
            metric="acc_norm",
        ),
        Task(
            name="winogrande",
            lm_eval="winogrande",
            path="allenai/winogrande",
            subset="winogrande_m",
            answer=_FILLED,
            choices="[sentence | replace('_', option1), sentence | replace('_', option2)]",
        ),
        Task(
            name="wikitext2",
            path="Salesforce/wikitext",
            subset="wikitext-2-raw-v1",
            answer="{{ text }}",
            chat="never",
            metric="window_perplexity",
            weight=3.0,
        ),
        _demo("arithmetic"),
        _demo("reverse"),
        _demo("sort"),
        _demo("logic"),
        _demo("facts"),
        _demo("prose", weight=3.0),
    )
}
"""Built-in tasks by name: the nine of the SEAP paper, and the six skills of the demo model."""


def complete(task: Any) -> Any:
    """Return the whole mapping of a task's fields for a built-in task's name, or a mapping that names one.

    Fields of the mapping win over the built-in ones; anything else is returned as it is, for the config to judge.
    """
    if isinstance(task, str):
        task = {"name": task}

    if isinstance(task, dict) and task.get("name") in BUILT_IN:
        return {**BUILT_IN[task["name"]].model_dump(), **task}
    return task
