"""Limits of templates: whatever a template does, it ends with what it makes or with one clear error.

The limits are lowered here, so that templates that go beyond them are harmless ones elsewhere.
"""

import threading

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from seap_ray.errors import ConfigError, DataError
from seap_ray.judges import lm_eval
from seap_ray.models import template_limits
from seap_ray.models.corpus import Renderer
from seap_ray.models.encoding import Encoding, writes_conversations
from seap_ray.models.template_limits import LimitedEnvironment, TemplateLimitError, limit_chat_templates
from seap_ray.tasks import Task

LOOP = "{% for i in range(3000) %}"
END = "{% endfor %}"
DOUBLED = "{% set n = namespace(s=START) %}{% for i in range(20) %}{% set n.s = NEXT %}{% endfor %}"
LONG = "{% set s = 'abc' * 300 %}"
SLOW = {
    "loops inside of loops": LOOP * 3 + END * 3,
    "a loop that leaves all out": LOOP + "{% for j in range(90000) if j < 0 %}" + END * 2,
    "a macro that calls itself twice": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(40) }}",
    "filters of filters": LOOP + "{% set x = range(3000) | map('string') | map('int') | sum %}" + END,
    "blocks inside of loops": LOOP + "{% block b scoped %}" + LOOP + END + "{% endblock %}" + END,
}
LARGE = {
    "a repeated text": "{{ 'a' * 2000 }}",
    "a text that is doubled": DOUBLED.replace("START", "'ab'").replace("NEXT", "n.s ~ n.s"),
    "a list that is doubled": DOUBLED.replace("START", "[1]").replace("NEXT", "n.s + n.s"),
    "lists of the same list": DOUBLED.replace("START", "[1]").replace("NEXT", "[n.s, n.s]"),
    "mappings of the same one": DOUBLED.replace("START", "{}").replace("NEXT", "{1: n.s, 2: n.s}"),
    "what a loop writes": LOOP + "abc" + END,
    "what a macro writes": "{% macro f() %}" + LOOP + "abc" + END + "{% endmacro %}{{ f() }}",
    "a wide filter": "{{ 'a' | center(2000) }}",
    "a wide method": "{{ 'a'.ljust(2000) }}",
    "an indentation": "{{ 'a\nb' | indent(1000) }}",
    "a filled list": "{{ [1] | batch(2000, 0) | list }}",
    "a filter in a filter": "{{ range(90) | map('center', 90) | join }}",
    "a replacement": LONG + "{{ s | replace('a', 'abcde') }}",
    "a replacement by a method": LONG + "{{ s.replace('a', 'abcde') }}",
    "a separator": LONG + "{{ [1, 2, 3] | join(s) }}",
    "a separator by a method": LONG + "{{ s.join(['1', '2', '3']) }}",
    "a format with percent signs": "{{ '%2000d' % 1 }}",
    "a format by a filter": LONG + "{{ '%s%s' | format(s, s) }}",
    "a format with braces": LONG + "{{ '{0}{0}'.format(s) }}",
}


@pytest.fixture
def low_limits(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(template_limits, "MAX_CHARACTERS", 1000)


def rendered(template, **values):
    return LimitedEnvironment().from_string(template).render(values)


@pytest.mark.parametrize("template", SLOW.values(), ids=SLOW)
def test_a_template_that_does_not_end_is_stopped_by_its_cpu_time(monkeypatch, template):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.05)
    with pytest.raises(TemplateLimitError, match=r"takes more than 0\.05 CPU seconds"):
        rendered(template)


@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE)
def test_a_template_that_makes_too_much_is_stopped_by_its_size(low_limits, monkeypatch, template):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 60)
    with pytest.raises(TemplateLimitError, match="makes more than 1,000 characters"):
        rendered(template)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 10 ** 100000 }}", "a number of more than 100,000 bits"),
        ("{{ (10 ** 20000) * (10 ** 20000) }}", "a number of more than 100,000 bits"),
        ("{{ '%*d' % (9, 1) }}", "a width that an argument gives"),
        ("{{ '{:{}}'.format(1, 9) }}", "a width that an argument gives"),
    ],
)
def test_numbers_and_widths_without_bound_are_refused(template, reason):
    with pytest.raises(TemplateLimitError, match=reason):
        rendered(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in rows %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{{ loop.index0 }}{% endfor %}",
        "{% for x in rows recursive %}{{ loop(x) if x is iterable else x }};{% endfor %}",
        "{% for x in nothing %}{{ x }}{% else %}none{% endfor %}",
        "{% for k, v in {'a': 1, 'b': [x]}.items() %}{{ k ~ v }}{% endfor %}{% set a, b = x, (x, 2) %}{{ b }}",
        "{{ rows | map('string') | join('-') }}{{ '-'.join(['a', x]) }}{{ [{'a': 1}] | join(',', attribute='a') }}",
        "{{ '**Q** 1234567, 100%% %s of %5.1f' % (x, 2) }}{{ '{} 1234567 {:>5}'.format(x, 2) }}",
        "{{ '{a.b}'.format(a={'b': x}) }}{{ '%s' | format(x) }}",
        "{{ x | upper | replace('X', 'yz') | center(9) }}|{{ 'a\nb' | indent(2) }}{{ 2.567 | round(1) }}",
        "{% macro f(y) %}<{{ y }}>{{ caller() }}{% endmacro %}{% call f(x) %}inner{% endcall %}",
        "{% block b %}{{ x }}{% endblock %}{{ self.b() }}{{ [x, 1] | tojson(indent=1) }}{{ rows + [x] }}",
        "{{ rows | batch(2, '-') | list }}{{ 'a b' | wordwrap(1) }}{{ (5).to_bytes(2) }}{{ 'a\tb'.expandtabs(4) }}",
        "{{ 'ab'[:1] * 3 }}{{ 2 ** 9 * 3 }}{{ x | e }}",
    ],
)
def test_what_stays_within_the_limits_is_written_as_in_jinja_s_own_sandbox(template):
    values = {"rows": [1, [2, 3], 4], "x": "x"}
    assert rendered(template, **values) == ImmutableSandboxedEnvironment().from_string(template).render(values)


def test_the_limits_hold_in_a_thread_and_for_each_rendering_anew(monkeypatch):
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.05)
    template = LimitedEnvironment().from_string(
        "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}."
    )
    outcomes = []

    def render(n):
        try:
            outcomes.append(template.render(n=n))
        except TemplateLimitError:
            outcomes.append("stopped")

    for n in (10, 90_000, 10):
        thread = threading.Thread(target=render, args=(n,))
        thread.start()
        thread.join()
    assert outcomes == [".", "stopped", "."]


# --- which error it is -----------------------------------------------------------------------------------------------


def task(**templates) -> Task:
    return Task(**({"name": "mine", "path": "/x", "question": "{{ q }}", "answer": "a"} | templates))


def test_a_task_s_template_beyond_the_limits_names_the_task_the_key_and_the_row(low_limits):
    with pytest.raises(DataError, match=r'^tasks\.mine\.question: takes more than 0\.05 CPU seconds .*row {"q": 1}$'):
        Renderer(task(question=SLOW["loops inside of loops"])).item({"q": 1})
    with pytest.raises(DataError, match=r"^tasks\.mine\.choices: makes more than 1,000 characters"):
        Renderer(task(choices="['a'] * 2000")).item({"q": 1})


def test_a_task_s_template_that_calls_itself_names_the_task_and_the_key():
    with pytest.raises(DataError, match=r"^tasks\.mine\.answer: calls itself without end"):
        Renderer(task(answer="{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")).item({"q": 1})
    with pytest.raises(DataError, match=r"^tasks\.mine\.answer: nested too deeply"):
        Renderer(task(answer="{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}")).item({"q": 1})


def test_the_system_message_that_lm_eval_is_given_has_the_limits(low_limits, monkeypatch):
    with pytest.raises(ConfigError, match=r"^tasks\.mine\.system: takes more than 0\.05 CPU seconds"):
        lm_eval._system(task(system=SLOW["loops inside of loops"]))


def test_a_chat_template_beyond_the_limits_is_refused_and_not_taken_for_none(low_limits, small_tokenizer):
    limit_chat_templates()
    small_tokenizer.chat_template = SLOW["loops inside of loops"]
    with pytest.raises(
        ConfigError, match=r"^model\.source: the tokenizer's chat template is refused \(takes more than"
    ):
        writes_conversations(small_tokenizer)
    small_tokenizer.chat_template = "{{ messages[0]['content'] * 2000 }}"
    with pytest.raises(ConfigError, match=r"refused \(makes more than 1,000 characters\)"):
        Encoding(small_tokenizer, is_chat=True).render([{"role": "user", "content": "abc"}])


@pytest.fixture
def small_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
