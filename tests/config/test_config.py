"""Config: what is refused and how, what overrides what, and that every key says what it is."""

import textwrap

import pytest
import yaml
from pydantic import ValidationError

from seap_ray.config import Baseline, Config, PlanSettings, help_text, load_config, walk
from seap_ray.config.load import DEMO_PATH
from seap_ray.errors import ConfigError
from seap_ray.tasks import BUILT_IN, Task
from tests.support import ROOT

MINE = "{name: mine, path: /data/mine.jsonl, answer: '{{ text }}'}"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("SEAP_RAY_CONFIG", raising=False)


@pytest.fixture
def empty(tmp_path):
    """An empty config file, so that only what the test says counts."""
    path = tmp_path / "empty.yaml"
    path.write_text("")
    return f"config={path}"


def refusal(*arguments):
    with pytest.raises(ConfigError) as error:
        load_config(arguments)
    assert "\n" not in str(error.value), "one line"
    return str(error.value)


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_repositorys_own_config_loads(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config([])
    assert config.model.source == "demo"
    assert [task.name for task in config.tasks] == ["arithmetic", "reverse", "sort", "logic", "facts", "prose"]


def test_a_file_is_named_by_argument_then_by_variable_then_by_default(tmp_path, monkeypatch):
    for name in ("argument", "variable", "ray_config"):
        (tmp_path / f"{name}.yaml").write_text(f"run: {{name: {name}}}")
    monkeypatch.chdir(tmp_path)
    assert load_config([]).run.name == "ray_config"
    monkeypatch.setenv("SEAP_RAY_CONFIG", str(tmp_path / "variable.yaml"))
    assert load_config([]).run.name == "variable"
    assert load_config(["config=argument.yaml"]).run.name == "argument"


def test_without_any_file_the_demos_settings_hold_and_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    config = load_config([])
    assert capsys.readouterr().err == ""

    monkeypatch.chdir(tmp_path)
    assert load_config([]) == config
    note = capsys.readouterr().err
    assert "no ray_config.yaml here" in note and "config=PATH" in note and note.count("\n") == 1
    assert load_config(["run.name=mine"]).run.name == "mine"
    assert "ray_config.yaml: no such file" in refusal("config=ray_config.yaml"), "a file that is named has to be there"


def test_the_packages_copy_of_the_demos_settings_is_the_repositorys_file():
    assert DEMO_PATH.read_bytes() == (ROOT / "ray_config.yaml").read_bytes()


def test_a_missing_file_is_named(tmp_path):
    message = refusal(f"config={tmp_path}/nowhere.yaml")
    assert f"{tmp_path}/nowhere.yaml" in message and "config=PATH" in message


@pytest.mark.parametrize(
    ("contents", "expected"),
    [("a: [1\nb: 2\n", "not valid YAML, see line 2"), ("- a\n- b\n", "sections"), ("just words", "sections")],
)
def test_a_file_that_holds_no_config_is_refused(tmp_path, contents, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(contents)
    message = refusal(f"config={path}")
    assert str(path) in message and expected in message


def test_a_folder_or_another_kind_of_file_is_refused_in_one_line(tmp_path):
    assert str(tmp_path) in refusal(f"config={tmp_path}")
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00\x81")
    assert "weights.bin" in refusal(f"config={tmp_path}/weights.bin")


# --- keys and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [
        ("pruning.ratoi=0.3", "pruning.ratio"),
        ("pruning.alocation.k=2", "pruning.allocation"),
        ("calibration.wokers=2", "calibration.workers"),
        ("modle.source=demo", "model"),
        ("tasks=[{name: piqa, pathh: /data}]", "tasks.0.path"),
        ("pruning.baselines.plain.scor=energy", "pruning.baselines.plain.score"),
    ],
)
def test_an_unknown_key_names_the_nearest(empty, argument, nearest):
    key = argument.partition("=")[0]
    message = refusal(empty, argument)
    assert "unknown key" in message and f"did you mean {nearest}?" in message
    assert key.split(".")[0] in message


def test_an_unknown_key_in_the_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("pruning: {ratoi: 0.3}")
    message = refusal(f"config={path}")
    assert message.startswith(f"{path}: pruning.ratoi: unknown key; did you mean pruning.ratio?")


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("corpus.samples=many", "corpus.samples"),
        ("corpus.samples=1.5", "corpus.samples"),
        ("corpus.samples=0", "corpus.samples"),
        ("pruning=3", "pruning"),
        ("pruning.score=wand", "pruning.score"),
        ("model.dtype=int4", "model.dtype"),
        ("run.name=a/b", "run.name"),
        ("run.name=..", "run.name"),
        ("pruning.align=0", "pruning.align"),
        ("pruning.align=some", "pruning.align"),
        ("pruning.allocation.protect_first=-1", "pruning.allocation.protect_first"),
        ("pruning.allocation.k=.inf", "pruning.allocation.k"),
        ("export.max_shard_size=5", "export.max_shard_size"),
        ("calibration.num_gpus=-1", "calibration.num_gpus"),
        ("calibration.num_gpus=1.5", "calibration: num_gpus=1.5: more than one are a whole number"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_was_given(empty, argument, named):
    message = refusal(empty, argument)
    value = argument.partition("=")[2]
    assert f": {named}" in message
    assert value.removeprefix(".") in message


def test_several_gpus_are_for_the_placement_that_uses_them(empty):
    message = refusal(empty, "calibration={num_gpus: 2, placement: stream}")
    assert "calibration: num_gpus=2: placement stream works on one; choose device_map" in message
    assert load_config([empty, "calibration.num_gpus=2"]).calibration.placement == "auto"


@pytest.mark.parametrize("ratio", ["1", "1.5", "-0.1", "[0.2, 1.0]", ".nan", "half", "null", "[]"])
def test_a_ratio_outside_zero_to_one_is_refused(empty, ratio):
    assert ": pruning.ratio" in refusal(empty, f"pruning.ratio={ratio}")


def test_a_ratio_is_one_number_or_a_list(empty):
    assert load_config([empty, "pruning.ratio=0.35"]).pruning.ratio == (0.35,)
    assert load_config([empty, "pruning.ratio=0"]).pruning.ratio == (0.0,)
    assert load_config([empty, "pruning.ratio=[0.2, 0.5]"]).pruning.ratio == (0.2, 0.5)


def test_a_ratio_named_twice_is_refused(empty):
    # Both would be written to one folder.
    assert "0.2" in refusal(empty, "pruning.ratio=[0.2, 0.5, 0.20]")


@pytest.mark.parametrize("argument", ["pruning.ratio", "=3", "pruning.ratio=["])
def test_what_is_no_override_is_refused(empty, argument):
    assert argument.strip("=")[:13] in refusal(empty, argument)


@pytest.mark.parametrize("argument", ["model.source.x=1", "tasks.0.name=sort", "tasks.name=sort"])
def test_a_key_below_a_value_is_refused(tmp_path, argument):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {source: demo}\ntasks: [sort]")
    assert argument.split(".")[0] in refusal(f"config={path}", argument)


def test_overrides_are_yaml_and_win_over_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("pruning: {ratio: 0.2, score: energy}\nmodel: {revision: abc}")
    config = load_config(
        [
            f"config={path}",
            "pruning.ratio=[0.1, 0.3]",
            "pruning.allocation={kind: uniform}",
            "calibration.skip_first_token=yes",
            "model.revision=null",
            "tasks=[sort, reverse]",
            "pruning.baselines.plain.tasks=[sort]",
        ]
    )
    assert config.pruning.ratio == (0.1, 0.3)
    assert config.pruning.score == "energy", "what is not overridden stays"
    assert config.pruning.allocation.kind == "uniform" and config.pruning.allocation.k == 1.0
    assert config.calibration.skip_first_token is True
    assert config.model.revision is None
    assert [task.name for task in config.tasks] == ["sort", "reverse"]
    assert config.pruning.baselines["plain"].tasks == ("sort",)


def test_the_last_of_two_overrides_wins(empty):
    assert load_config([empty, "run.seed=1", "run.seed=2"]).run.seed == 2


def test_a_config_is_frozen(empty):
    config = load_config([empty])
    owners = {"run": config, "name": config.run, "k": config.pruning.allocation, "path": config.tasks[0]}
    for key, section in owners.items():
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, None)


def test_the_dumped_config_loads_again(tmp_path, empty):
    config = load_config([empty, "tasks=[piqa, " + MINE + "]", "pruning.baselines.plain.score=magnitude"])
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config([f"config={path}"]) == config


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_a_built_in_task_goes_by_its_name(empty):
    assert load_config([empty, "tasks=[piqa, wikitext2]"]).tasks == (BUILT_IN["piqa"], BUILT_IN["wikitext2"])


def test_a_built_in_task_may_lie_elsewhere(empty):
    (task,) = load_config([empty, "tasks=[{name: piqa, path: /data/piqa, weight: 1}]"]).tasks
    assert task == BUILT_IN["piqa"].model_copy(update={"path": "/data/piqa", "weight": 1.0})


def test_a_task_of_ones_own_needs_a_path(empty):
    (task,) = load_config([empty, f"tasks=[{MINE}]"]).tasks
    assert (task.name, task.path, task.split, task.weight) == ("mine", "/data/mine.jsonl", "train", 2.0)
    assert "path" in refusal(empty, "tasks=[{name: mine, answer: x}]")


@pytest.mark.parametrize(
    "keys, said",
    [
        ("messages: '{{ chat }}', question: '{{ q }}'", "messages: the question stands in them"),
        ("messages: chat", 'messages: should be one expression in braces, such as "{{ messages }}"'),
        ("question: '{{ q }}'", "answer: a question needs one"),
        ("answer: '{{ text }}', system: 'Be brief.'", "system: a task of mere texts has no conversation"),
        ("answer: '{{ text }}', chat: always", "chat: a task of mere texts has no conversation"),
        ("format: vicuna", "format"),
    ],
)
def test_templates_that_do_not_fit_each_other_are_refused(empty, keys, said):
    assert said in refusal(empty, f"tasks=[{{name: mine, path: /data/mine.jsonl, {keys}}}]")


def test_a_conversation_is_judged_by_perplexity_unless_the_task_says_otherwise(empty):
    chat = "{name: chat, path: chat.jsonl, messages: '{{ messages }}'}"
    alpaca = "{name: alpaca, path: alpaca.json, metric: exact_match}"
    tasks = load_config([empty, f"tasks=[{chat}, {alpaca}]"]).tasks
    assert [task.metric for task in tasks] == ["perplexity", "exact_match"]
    assert [task.has_templates for task in tasks] == [True, False]


def test_a_chat_template_is_refused_for_mere_texts_and_for_the_authors_texts(empty):
    assert "such as those of mine" in refusal(empty, f"tasks=[{MINE}]", "corpus.chat=always")
    assert "prompt_format official" in refusal(
        empty, "tasks=[boolq]", "corpus.chat=always", "corpus.prompt_format=official"
    )
    load_config([empty, f"tasks=[boolq, {MINE[:-1]}, chat: never}}]", "corpus.chat=always"])


def test_an_unknown_task_names_the_built_in_ones(empty):
    message = refusal(empty, "tasks=[piqqa]")
    assert "tasks.0" in message and all(name in message for name in BUILT_IN)


def test_no_tasks_are_too_few(empty):
    assert "tasks" in refusal(empty, "tasks=[]")


def test_a_task_named_twice_is_refused(empty):
    assert "sort is named twice" in refusal(empty, "tasks=[sort, reverse, {name: sort, path: /data}]")


@pytest.mark.parametrize("name", ["general", "dense"])
def test_a_task_may_not_take_the_name_of_another_model(empty, name):
    assert name in refusal(empty, f"tasks=[{{name: {name}, path: /data, answer: x}}]")


def test_a_task_may_not_take_the_name_of_another_file(empty):
    # <run>/statistics/weight_norms.safetensors
    assert "weight_norms" in refusal(empty, "tasks=[{name: weight_norms, path: /data, answer: x}]")


@pytest.mark.parametrize("name", ["sort", "general", "dense"])
def test_a_baseline_may_not_take_the_name_of_another_model(empty, name):
    message = refusal(empty, "tasks=[sort]", f"pruning.baselines={{{name}: {{score: magnitude}}}}")
    assert "pruning.baselines" in message and name in message


def test_a_baseline_is_named_like_a_folder(empty):
    for name in ("a/b", "..", ""):
        assert "pruning.baselines" in refusal(empty, f"pruning.baselines={{'{name}': {{score: magnitude}}}}")


def test_a_baseline_of_an_unknown_task_names_the_nearest(empty):
    message = refusal(empty, "tasks=[sort, reverse]", "pruning.baselines={plain: {tasks: [revers]}}")
    assert "pruning.baselines.plain.tasks" in message and "did you mean reverse?" in message


def test_a_baseline_of_a_task_that_was_left_out_says_what_to_do(empty):
    message = refusal(empty, "tasks=[sort, reverse]", "pruning.baselines={plain: {tasks: [prose]}}")
    assert "prose is not among tasks (sort, reverse)" in message and "pruning.baselines={}" in message


def test_a_value_in_place_of_a_section_names_a_key_of_it(empty):
    assert "pruning.allocation: is a section" in refusal(empty, "pruning.allocation=uniform")
    assert "such as pruning.allocation.kind" in refusal(empty, "pruning.allocation=uniform")


def test_a_sections_own_keys_come_before_its_subsections():
    """In help a key stands under the heading above it."""
    keys = [key for key, _ in walk(Config)]
    assert keys.index("tasks") < keys.index("run.name")
    assert keys.index("pruning.baselines") < keys.index("pruning.allocation.kind")
    assert keys.index("serve.engine") < keys.index("serve.router.threshold")


def test_what_a_plan_leaves_out_comes_from_the_pruning_section(empty):
    config = load_config([empty, "pruning.score=wifn", "pruning.allocation={kind: uniform, k: 2}", "run.seed=7"])
    whole = config.plan_settings(PlanSettings())
    assert whole.model_dump() == {
        "score": "wifn",
        "allocation": "uniform",
        "compensation": "auto",
        "bias": True,
        "error_correction": 0.0,
        "attention_unit": "auto",
        "mlp_unit": "channel",
        "budget": "exact",
        "k": 2,
        "x0": 0.3,
        "seed": 7,
    }
    own = PlanSettings(score="energy", compensation="none", x0=0.0, seed=0)
    assert config.plan_settings(own) == whole.model_copy(update=own.model_dump(exclude_none=True))


def test_what_needs_covariances_asks_for_them(empty):
    for key in ("pruning.compensation=least_squares", "pruning.score=obs", "pruning.score=block_wifv"):
        assert refusal(empty, key).endswith(
            f"pruning.experts: {key.partition('=')[2]} needs calibration.statistics=covariance (with moments: "
            "pruning.score=wifv pruning.compensation=mean)"
        )
    assert "pruning.general: least_squares" in refusal(empty, "pruning.general.compensation=least_squares")
    assert "pruning.baselines.mine: obs" in refusal(empty, "pruning.baselines={mine: {score: obs}}")
    load_config([empty, "pruning.compensation=least_squares", "calibration.statistics=covariance"])


def test_scores_of_units_do_not_go_with_a_ranking_of_columns(empty):
    message = refusal(
        empty, "calibration.statistics=covariance", "pruning.score=obs", "pruning.allocation.kind=standardised"
    )
    assert "standardised ranks single columns" in message and "obs" in message


@pytest.mark.parametrize(
    ("compensation", "own", "expected"),
    [
        ("mean", {}, ("energy", "none")),
        ("none", {}, ("energy", "none")),
        ("mean", {"compensation": "mean"}, ("auto", "mean")),
        ("mean", {"score": "wifn"}, ("wifn", "none")),
        ("least_squares", {}, ("auto", "least_squares")),
        ("auto", {}, ("auto", "auto")),
        ("least_squares", {"compensation": "none"}, ("energy", "none")),
    ],
)
def test_the_general_model_has_no_mean_unless_it_is_told_to(empty, compensation, own, expected):
    whole = load_config(
        [empty, "calibration.statistics=covariance", f"pruning.compensation={compensation}", f"pruning.general={own}"]
    )
    settings = whole.plan_settings(whole.pruning.general)
    assert (settings.score, settings.compensation) == expected


# --- methods and studies ---------------------------------------------------------------------------------------------


def test_a_baseline_by_name_has_its_authors_settings_and_ones_own_go_before_them(empty):
    config = load_config([empty, "pruning.baselines={flap: {}, depth: null, wanda_sp: {allocation: logistic}}"])
    assert {name: own.allocation for name, own in config.pruning.baselines.items()} == {
        "flap": "standardised",
        "depth": "depth",
        "wanda_sp": "logistic",
    }
    assert config.pruning.baselines["wanda_sp"].score == "wanda_sp"


def test_a_study_sets_keys_that_neither_the_file_nor_the_default_but_the_command_line_may_change(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("pruning: {ratio: 0.4}\n")
    assert len(load_config([f"config={file}", "study=ratio"]).pruning.ratio) == 7
    assert load_config([f"config={file}", "study=ratio", "pruning.ratio=0.3"]).pruning.ratio == (0.3,)
    assert load_config([f"config={file}", "study=transfer"]).pruning.ratio == (0.4,)


def test_a_study_of_another_corpus_has_a_run_of_its_own(empty):
    names = {
        study: load_config([empty, f"study={study}", "run.name=a"]).run.name for study in ("ratio", "corpus", "paper")
    }
    assert names == {"ratio": "a", "corpus": "a-corpus", "paper": "a-paper"}


def test_the_papers_tasks_lie_where_the_file_says(tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text("tasks: [{name: piqa, path: /data/piqa}, sort]\n")
    tasks = {task.name: task.path for task in load_config([f"config={file}", "study=paper"]).tasks}
    assert len(tasks) == 9 and tasks["piqa"] == "/data/piqa" and tasks["boolq"] == "google/boolq"


@pytest.mark.parametrize("name", ["stories", "paper"])
def test_the_configs_of_the_docs_are_whole_and_ask_nothing_of_a_hub(name):
    file = ROOT / "docs" / "results" / f"{name}.yaml"
    config = load_config([f"config={file}", *(["study=paper"] if name == "paper" else [])])
    assert all(task.path.startswith("data/") for task in config.tasks)
    assert len(config.tasks) == (9 if name == "paper" else 4)


def test_an_unknown_study_is_refused_with_those_there_are(empty):
    with pytest.raises(ConfigError, match="study: .*'ood'.*not 'odd'"):
        load_config([empty, "study=odd"])


# --- help ------------------------------------------------------------------------------------------------------------


def test_every_key_has_a_description():
    fields = [*walk(Config), *walk(Task, "tasks."), *walk(Baseline, "pruning.baselines.NAME.")]
    assert len(fields) > 50
    assert [key for key, field in fields if not (field.description or "").strip()] == []


def test_help_lists_every_key_with_its_description():
    text = help_text("usage: this")
    assert text.startswith("usage: this")
    lines = text.splitlines()
    for key, field in [*walk(Config), *walk(Task)]:
        at = next(i for i, line in enumerate(lines) if line.startswith((f"  {key} = ", f"  {key} (required)")))
        first = textwrap.wrap(field.description, 94)[0]
        assert lines[at + 1].strip() == first
    assert all(name in lines[-1] for name in BUILT_IN)


def test_help_has_a_title_for_each_section_before_its_first_key():
    lines = help_text("").splitlines()
    sections = {key.rpartition(".")[0] for key, _ in walk(Config)} - {""}
    assert {"run", "pruning", "pruning.allocation", "serve.pack"} <= sections
    for section in sections:
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"{section}: "))
        assert lines[at].endswith(".") and lines[at + 1] == "" and lines[at + 2].startswith(f"  {section}.")


def test_help_shows_defaults_and_choices():
    text = help_text("")
    assert "  pruning.ratio = [0.2, 0.5]\n" in text
    assert "  model.revision = null\n" in text
    assert "  calibration.skip_first_token = false\n" in text
    assert "  corpus.packing = bucket   (bucket | pack)\n" in text
    assert "  tasks = [arithmetic, reverse, sort, logic, facts, prose]\n" in text


# --- targets ---------------------------------------------------------------------------------------------------------


def target(empty, value):
    return load_config([empty, f"pruning.target={value}"]).pruning.target


def test_numbers_of_targets_have_units_of_thousands_or_of_1024(empty):
    assert target(empty, "{parameters: 6.5B}").parameters == 6_500_000_000
    assert target(empty, "{parameters: 900000}").parameters == 900_000
    assert target(empty, "{weights: 6.7 GB}").weights == 6_700_000_000
    assert target(empty, "{weights: 1.5MiB}").weights == 3 << 19
    assert target(empty, "{memory: 24GB}") == target(empty, "{memory: {total: 24000000000}}")
    whole = target(empty, "{memory: {total: 24GB, tokens: 4096, sequences: 4, workspace: 500MB}}").memory
    assert (whole.tokens, whole.sequences, whole.workspace) == (4096, 4, 500_000_000)
    assert target(empty, "{latency: {tokens_per_second: 40}}").kinds == ["latency"] and target(empty, "{}").kinds == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{parameters: 6.5GB}", "pruning.target.parameters: should be a whole number, or one with K, M, B behind it"),
        ("{weights: 12Gb}", "pruning.target.weights: should be a whole number, or one with B, KB, MB, GB"),
        ("{weights: -1}", "pruning.target.weights: Input should be greater than or equal to 0"),
        ("{parameters: 1B, weights: 2GB}", "pruning.target: parameters and weights exclude each other"),
        ("{memory: {tokens: 5}}", "pruning.target: memory needs its total"),
        ("{memory: 1GB}", "pruning.target: memory: the workspace alone takes 2 GB"),
        ("{latency: {batch: 2}}", "pruning.target: latency needs its tokens_per_second"),
        ("{weight: 1GB}", "pruning.target.weight: unknown key; did you mean pruning.target.weights?"),
        ("12GB", "pruning.target: is a section with keys of its own"),
    ],
)
def test_a_target_that_says_too_little_or_too_much_is_refused(empty, value, message):
    assert f": {message}" in refusal(empty, f"pruning.target={value}")


def test_a_ratio_and_a_target_exclude_each_other_and_the_command_line_takes_back_the_files(tmp_path):
    both = "pruning: ratio and target.weights exclude each other; leave one"
    file = tmp_path / "file.yaml"
    file.write_text("pruning: {ratio: 0.3, target: {weights: 1GB}}")
    assert both in refusal(f"config={file}")
    assert both in refusal(f"config={file}", "pruning.ratio=0.3", "pruning.target.weights=1GB")
    assert load_config([f"config={file}", "pruning.ratio=0.4"]).pruning.target.kinds == []

    config = load_config([f"config={file}", "pruning.target.parameters=1M", "pruning.target.weights=null"])
    assert config.pruning.target.kinds == ["parameters"]
    # What a run keeps of its config has the target and the ratio that stands for it, and can be read again.
    resolved = config.model_copy(update={"pruning": config.pruning.model_copy(update={"ratio": (0.25,)})})
    assert Config.model_validate(resolved.model_dump(mode="json")) == resolved
