"""Templates over rows: what null and what is missing give, what is refused, and what JSON looks like."""

import json

import pytest
from jinja2.exceptions import SecurityError, UndefinedError

from seap_ray.models.row_values import parse_object
from seap_ray.models.templates import RowEnvironment, WholeValueError, without_missing


def rendered(template, row):
    environment = RowEnvironment()
    return environment.from_string(template).render(environment.context(row))


def undefined(template, row):
    environment = RowEnvironment()
    environment.from_string(template).render(environment.context(row))
    return list(environment.used)


@pytest.mark.parametrize("row", [{"a": None, "b": "x"}, {"b": "x"}], ids=["null", "left out"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ a }}", ""),
        ("{{ a | upper }}{{ a | trim }}{{ a | capitalize }}{{ a ~ b }}{{ [a, b] | join('-') }}", "x-x"),
        ("{{ a.text }}{{ a[0].text }}{{ a[:1] }}", ""),
        ("{{ a | default('d') }}{{ a | default(b) }}", "dx"),
        ("{{ 'n' if a is none else 'y' }}{{ 'n' if a == none else 'y' }}{{ 'n' if a is not defined else 'y' }}", "nnn"),
        ("{% for x in a %}{{ x }}{% endfor %}{{ a | length }}", "0"),
        ("{{ ['p', 'q'][a | int] }}{{ a | int }}{{ a | float }}", ""),
        ("{{ a | int(7) }}", "7"),
        ("{{ b | replace('x', a) }}", ""),
        ("{{ a | tojson }}", "null"),
    ],
)
def test_null_and_what_is_left_out_are_empty_and_never_the_word_none(template, row, expected):
    assert rendered(template, row) == expected


def test_null_inside_values_is_empty_too():
    row = {"a": {"text": None, "list": [None, "x"]}}
    assert rendered("{{ a.text }}{{ a['text'] }}{{ a.list[0] }}{{ a.get('text') ~ 'y' }}", row) == "y"
    assert rendered("{{ a.list | join('-') }}{{ [a] | join('-', attribute='text') }}", row) == "-x"
    assert rendered("{% for x in a.list %}<{{ x }}>{% endfor %}", row) == "<><x>"


def test_what_cannot_be_computed_from_null_is_an_error():
    with pytest.raises(UndefinedError, match="'a' is null"):
        rendered("{{ a + 1 }}", {"a": None})
    with pytest.raises(UndefinedError, match="'a' is undefined"):
        rendered("{{ a + 1 }}", {})


@pytest.mark.parametrize("label", ["", "none", None])
def test_a_label_that_is_no_number_chooses_nothing_and_not_the_first(label):
    row = {"endings": ["p", "q"], "label": label}
    assert rendered("{{ endings[label | int] }}", row) == ""
    assert rendered("{{ endings[label | int] }}", row | {"label": "1"}) == "q"


def test_what_a_row_lacks_is_told_where_it_is_used_and_not_where_the_template_provides_for_it():
    assert undefined("{{ a }}{{ b.c }}", {"b": {}}) == ["'a' is undefined", "'dict object' has no attribute 'c'"]
    assert undefined("{% if a %}{% endif %}", {}) == ["'a' is undefined"]
    assert undefined("{{ a | default('x') }}{{ 1 if a is defined }}{{ 1 if a is none }}", {}) == []
    assert undefined("{{ a }}{{ a.b }}", {"a": None}) == []


def test_the_whole_row_has_a_name_unless_a_column_has_it():
    assert rendered("{{ row['a b'] }}{{ row['no such'] }}", {"a b": "x"}) == "x"
    assert rendered("{{ row }}", {"row": "mine"}) == "mine"


def test_json_is_that_of_chat_templates():
    assert rendered("{{ a | tojson }}", {"a": {"x": "<é> & '", "y": None}}) == '{"x": "<é> & \'", "y": null}'
    assert rendered("{{ a | tojson(indent=1) }}", {"a": [1]}) == "[\n 1\n]"


@pytest.mark.parametrize("value", [[], [1], {"a": 1}, ()])
def test_a_list_or_a_mapping_is_not_printed_whole(value):
    with pytest.raises(WholeValueError, match="prints a whole (list|mapping)"):
        rendered("{{ a }}", {"a": value})
    assert rendered("{{ a | tojson }}{{ a | length }}", {"a": value}).startswith(json.dumps(value))


def test_numbers_print_as_in_the_file_and_truth_values_as_in_python():
    row = parse_object('{"a": 2.50, "b": 5, "c": 1e3, "d": true, "e": 12345678901234567890123, "f": "02108"}')
    assert rendered("{{ a }} {{ b }} {{ c }} {{ d }} {{ e }} {{ f }}", row) == (
        "2.50 5 1e3 True 12345678901234567890123 02108"
    )


def test_python_is_out_of_reach_even_where_nothing_is_printed():
    with pytest.raises(SecurityError):
        rendered("{{ ''.__class__ }}", {})


def test_a_value_of_an_expression_has_null_for_what_is_missing():
    environment = RowEnvironment()
    expression = environment.compile_expression("[{'role': 'user', 'content': a}, b]", undefined_to_none=False)
    value = expression(environment.context({"b": None}))
    assert without_missing(value) == [{"role": "user", "content": None}, None]
