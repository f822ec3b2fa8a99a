"""Router: against scikit-learn and counts in plain Python, on the demo model; its promises are counted again."""

import json
import math
import random
import shutil
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import t as student
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from seap_ray.demo import skills
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.corpus import Renderer, load_tokenizer
from seap_ray.routing import fitting as module
from seap_ray.routing.fitting import fit, split
from seap_ray.routing.router import MAX_PROMPT_CHARACTERS, PromptFrame, Router
from seap_ray.storage.run import Run
from seap_ray.tasks import BUILT_IN
from tests.support import DATA
from tests.support.builders import demo_with_template

FILES = ("tokenizer.json", "router.safetensors", "router.json")


def questions(skill: str, n: int, split: str, seed: int) -> list[str]:
    return [row["question"] for row in skills.rows(skill, n, split=split, seed=seed)]


PROMPTS = {skill: questions(skill, 200, "train", 0) for skill in skills.SKILLS}


def letters(n: int, common: str, seed: int, step: int = 0) -> list[str]:
    """Words of random letters, some more common than others; a fifth of them a step from the letter before."""
    rng = random.Random(seed)
    some = "abcdefghij"
    words = []
    for _ in range(n):
        word = rng.choice(some)
        while len(word) < 6:
            follows = step and rng.random() < 0.2
            word += some[(some.index(word[-1]) + step) % 10] if follows else rng.choice(some + common)
        words.append(word)
    return words


def fitted(folder: Path, prompts=PROMPTS, seed: int = 0) -> tuple[Router, dict]:
    run = Run(folder)
    report = fit(Checkpoint.open("demo"), prompts, run, seed=seed)
    return Router.load(run.router), report


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Run of a router on the demo's six tasks: to change it, copy it."""
    folder = tmp_path_factory.mktemp("run")
    fitted(folder)
    return folder


@pytest.fixture(scope="module")
def router(folder) -> Router:
    return Router.load(Run(folder).router)


@pytest.fixture(scope="module")
def report(folder) -> dict:
    return json.loads((Run(folder).router / "router.json").read_text())["report"]


@pytest.fixture(scope="module")
def confused(tmp_path_factory) -> Router:
    """A router of two tasks that cannot always be told apart; ``CONFUSED`` are their prompts."""
    return fitted(tmp_path_factory.mktemp("confused"), CONFUSED)[0]


CONFUSED = {"one": letters(400, "abc", 1, 1), "two": letters(400, "hij", 2, -1)}


# --- what is computed ------------------------------------------------------------------------------------------------


def neighbours(ids: list) -> list[tuple]:
    """Every token with the one after it; None is the beginning and the end."""
    return list(zip([None, *ids], [*ids, None], strict=True))


def witten_bell(streams_of: dict[str, list[list]], n: int):
    """``p(task, a, b)`` as the textbook writes it, from counters. None is the beginning and the end."""
    pairs = {t: Counter() for t in streams_of}
    for t, streams in streams_of.items():
        for stream in streams:
            pairs[t].update(neighbours(stream))
    after = {t: Counter() for t in pairs}
    before = {t: Counter() for t in pairs}
    for t, c in pairs.items():
        for (a, b), count in c.items():
            after[t][b] += count
            before[t][a] += count
    everywhere = sum(after.values(), Counter())
    total = sum(everywhere.values())

    def p(t, a, b):
        p_any = (everywhere[b] + len(everywhere) / n) / (total + len(everywhere))
        p_b = (after[t][b] + len(after[t]) * p_any) / (sum(after[t].values()) + len(after[t]))
        kinds = len({y for x, y in pairs[t] if x == a})
        return (pairs[t][a, b] + kinds * p_b) / (before[t][a] + kinds) if kinds else p_b

    return p


def test_probabilities_are_those_of_scikit_learn_and_of_counted_pairs(router):
    demo = Checkpoint.open("demo").folder
    tokenizer = AutoTokenizer.from_pretrained(demo)
    embed = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float64).get_input_embeddings()

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def means(texts):
        return np.array([embed(torch.tensor(ids_of(text))).mean(0).numpy() for text in texts])

    fitting, _, held_out = split(PROMPTS, 0)
    texts, tasks = zip(*fitting, strict=True)
    pca = PCA(64, whiten=True).fit(means(texts))
    search = GridSearchCV(
        LogisticRegression(max_iter=10_000, tol=1e-6),
        {"C": [0.01, 0.1, 1, 10]},
        cv=StratifiedKFold(3, shuffle=True, random_state=0),
        scoring="neg_log_loss",
    ).fit(pca.transform(means(texts)), tasks)
    streams_of = {task: [] for task in PROMPTS}
    for text, task in fitting:
        streams_of[task].append(ids_of(text))
    p = witten_bell(streams_of, len(tokenizer) + 1)

    fresh = [text for text, _ in held_out[::7]] + ["What is the capital of France?", "sort of true, 12", "x"]
    for text, logs in zip(fresh, search.predict_log_proba(pca.transform(means(fresh))), strict=True):
        ids = ids_of(text)
        nats = {}
        for task in PROMPTS:
            nats[task] = -statistics.mean(math.log(p(task, a, b)) for a, b in neighbours(ids))
        evidence = [
            float(logs[list(search.classes_).index(task)]) - router.weight * math.sqrt(len(ids) + 1) * nats[task]
            for task in PROMPTS
        ]
        powers = [math.exp(e / router.temperature) for e in evidence]
        route = router.route(text)
        assert list(route.probabilities) == list(PROMPTS)
        np.testing.assert_allclose(list(route.probabilities.values()), np.array(powers) / sum(powers), atol=1e-4)
        assert route.confidence == max(route.probabilities.values())
        np.testing.assert_allclose(router.surprise(router.ids(text)), list(nats.values()), atol=1e-5)


def test_in_every_task_the_probabilities_of_what_follows_a_token_sum_to_one(router):
    arrays = router.arrays
    n = len(router.arrays["token_logs"])
    follows = np.exp(arrays["rest_logs"].astype(float))[:, None] * np.exp(arrays["token_logs"].astype(float))[None]
    follows = follows.reshape(n * n, -1)
    follows[arrays["pair_keys"]] = np.exp(arrays["pair_logs"].astype(float))
    np.testing.assert_allclose(follows.reshape(n, n, -1).sum(1), 1, atol=1e-5)


def test_no_other_temperature_or_weight_has_a_smaller_loss_on_the_calibration_prompts(confused):
    _, calibration, _ = split(CONFUSED, 0)
    n = len(calibration)
    tasks = list(CONFUSED)

    def loss(router):
        total = 0.0
        for text, task in calibration:
            for other, p in router.route(text).probabilities.items():
                total -= ((n if task == other else 0) + 1) / (n + len(tasks)) * math.log(p)
        return total

    least = loss(confused)
    for temperature, weight in ((1.03, 1), (0.97, 1), (1, 1.05), (1, 0.95), (1.03, 1.05), (2, 1), (1, 0), (0.5, 0.3)):
        other = replace(confused, temperature=confused.temperature * temperature, weight=confused.weight * weight)
        assert loss(other) > least


def test_a_confidence_is_the_share_that_is_right(confused):
    fresh = [("one", text) for text in letters(2000, "abc", 3, 1)]
    fresh += [("two", text) for text in letters(2000, "hij", 4, -1)]
    routes = [(confused.route(text, threshold=0), task) for task, text in fresh]
    for low, high in ((0.5, 0.7), (0.7, 0.85), (0.85, 0.95)):
        some = [(r.confidence, max(r.probabilities, key=r.probabilities.get) == t) for r, t in routes]
        some = [(c, right) for c, right in some if low <= c < high]
        assert statistics.mean(right for _, right in some) == pytest.approx(
            statistics.mean(c for c, _ in some), abs=0.07
        )


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_the_temperature_does_not_change_the_winner(router, temperature):
    other = replace(router, temperature=temperature)
    for text in [texts[0] for texts in PROMPTS.values()] + ["What is it?", "def f(x):", "12", "reverse sort"]:
        one = router.route(text).probabilities
        two = other.route(text).probabilities
        assert max(one, key=one.get) == max(two, key=two.get)


def test_a_bound_is_the_prediction_limit_of_the_calibration_prompts(router):
    _, calibration, _ = split(PROMPTS, 0)
    for i, task in enumerate(PROMPTS):
        nats = [router.surprise(router.ids(text))[i] for text, t in calibration if t == task]
        n = len(nats)
        spread = statistics.stdev(nats)
        limit = student.interval(0.998, n - 1, statistics.mean(nats), spread * math.sqrt((n + 1) / n))[1]
        assert router.bounds[i] == pytest.approx(limit, rel=1e-6)


def test_the_parts_are_disjoint_and_a_matter_of_content_and_seed():
    parts = [set(part) for part in split(PROMPTS, 0)]
    assert [len(part) for part in parts] == [661, 220, 221]
    assert len(set.union(*parts)) == sum(map(len, parts)) == sum(map(len, PROMPTS.values()))
    shuffled = {task: random.Random(1).sample(texts, len(texts)) * 2 for task, texts in PROMPTS.items()}
    assert split(shuffled, 0) == split(PROMPTS, 0) != split(PROMPTS, 1)


# --- what is promised ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strange", [0, 4])
def test_the_threshold_is_the_smallest_that_keeps_its_promise_on_what_is_not_unlike(confused, strange):
    calibration = split(CONFUSED, 0)[1] + [("abcdefghZZZZZZZZZ", "two")] * strange
    router = module._calibrate(confused, calibration)
    assert strange or router.threshold == pytest.approx(confused.threshold, rel=1e-6)
    routes = [(router.route(text, threshold=0), task) for text, task in calibration]
    known = sorted((r.confidence, r.task == task) for r, task in routes if r.task)
    assert len(known) == len(calibration) - strange

    def share(threshold):
        return statistics.mean(right for confidence, right in known if confidence >= threshold)

    assert share(0) < 0.95 <= share(router.threshold)
    assert all(share(confidence) < 0.95 for confidence, _ in known if confidence < router.threshold)
    assert router.threshold in [confidence for confidence, _ in known]


def test_a_promise_beyond_reach_leaves_the_best_share_and_one_that_always_holds_no_threshold(tmp_path, router):
    assert router.threshold == 0
    same = {"one": letters(300, "", 5), "two": letters(300, "", 6)}
    blind, _ = fitted(tmp_path, same)
    routes = [(blind.route(text, threshold=0), task) for text, task in split(same, 0)[1]]
    known = [(r.confidence, r.task == task) for r, task in routes if r.task]

    def share(threshold):
        return statistics.mean(right for confidence, right in known if confidence >= threshold)

    shares = {confidence: share(confidence) for confidence, _ in known}
    best = max(shares.values())
    assert best < 0.95 or blind.threshold == min(c for c, at_least in shares.items() if at_least >= 0.95)
    assert share(blind.threshold) >= min(0.95, best)


@pytest.mark.parametrize("strange", [0, 5])
def test_every_figure_of_the_report_is_what_route_does(confused, tmp_path, strange):
    held_out = split(CONFUSED, 0)[2] + [("abcdefghZZZZZZZZZ", "two")] * strange
    report = module.measure(confused, held_out) if strange else fitted(tmp_path, CONFUSED)[1]
    routes = [(confused.route(text), task) for text, task in held_out]
    n = len(routes)
    assert report["n"] == n == 159 + strange
    assert report["threshold"] == confused.threshold and report["temperature"] == confused.temperature
    assert report["accuracy"] == sum(max(r.probabilities, key=r.probabilities.get) == t for r, t in routes) / n
    assert report["routed"] == sum(r.task is not None for r, _ in routes) / n
    assert 0 < report["unsure"] == sum(r.reason == "unsure" for r, _ in routes) / n
    assert report["unlike"] == sum(r.reason == "unlike" for r, _ in routes) / n
    for task, row in report["confusion"].items():
        assert row == Counter(r.task or "general" for r, t in routes if t == task)
    alone = [(replace(confused, weight=0.0).route(text).probabilities, task) for text, task in held_out]
    assert report["accuracy_of_embeddings"] == sum(max(p, key=p.get) == task for p, task in alone) / n
    assert len(report["coverage"]) == 11
    for point in report["coverage"]:
        sent = [(confused.route(text, threshold=point["threshold"]).task, task) for text, task in held_out]
        sent = [(to, task) for to, task in sent if to]
        assert point["coverage"] == len(sent) / n
        assert point["accuracy"] == (sum(to == task for to, task in sent) / len(sent) if sent else None)


def test_held_out_prompts_of_the_demo_go_to_their_tasks(router, report):
    assert report["accuracy"] >= 0.99 and report["n"] == 221
    for skill in skills.SKILLS:
        texts = questions(skill, 150, "test", 3)
        assert statistics.mean(router.route(text).task == skill for text in texts) >= 0.96


@pytest.mark.parametrize(
    "text",
    [
        "", " \n\t ", "\ud800", "\0", "日本語の文章です", "xkcd qwrt zzzz vbn", ")(*&^%$#@!", "jfkdlsa;",
        "What is the capital of France?", "Who wrote Hamlet?", "Tell me a joke.", "Hello, how are you today?",
        "Was ist die Hauptstadt von Frankreich?", "Wie geht es dir heute?", "Der schnelle braune Fuchs springt.",
        "def f(x):\n    return x + 1", "for i in range(10):\n    print(i)", "import numpy as np",
        '{"name": "Anna", "age": 3}', "[1, 2, 3, 4]", '{"ok": true, "error": null}', "What is 2 plus 2?",
        "reverse 12345:", "sort these numbers: 5 3 9 1", "true or false?", "The population of France is", "17 * 23 =",
    ],
)  # fmt: skip
def test_a_prompt_unlike_all_tasks_goes_to_the_general_model_at_any_threshold(router, text):
    route = router.route(text, threshold=0)
    assert (route.task, route.reason) == (None, "unlike")


def test_a_prompt_of_tokens_never_fitted_is_unlike_even_where_no_bound_is_known(tmp_path):
    router, _ = fitted(tmp_path, {"few": ["reverse abc:"], "others": ["1 + 2 ="]})
    assert router.bounds == (math.inf, math.inf)
    assert router.route("reverse cab:").task == "few" and router.route("2 + 1 =").task == "others"
    assert router.route("WXYZ WXYZ").reason == "unlike"


def test_the_threshold_may_be_another_than_the_fitted_one(router):
    text = PROMPTS["logic"][0]
    assert (router.route(text).task, router.route(text).reason) == ("logic", "routed")
    unsure = router.route(text, threshold=1.01)
    assert (unsure.task, unsure.reason, unsure.confidence) == (None, "unsure", router.route(text).confidence)
    assert replace(router, threshold=1.01).route(text, threshold=0).task == "logic"
    assert router.route(text, threshold=router.route(text).confidence).task == "logic"


@example("\ud800")
@example("sort \udfff abc:")
@example("\0" * 50)
@example("🙂" * 5000)
@given(st.text(st.characters(exclude_categories=()), max_size=200))
def test_no_text_raises_and_probabilities_sum_to_one(router, text):
    route = router.route(text)
    assert sum(route.probabilities.values()) == pytest.approx(1, abs=1e-12)
    assert route.reason in ("routed", "unsure", "unlike") and (route.task is None) == (route.reason != "routed")


def test_only_the_beginning_of_a_long_text_counts(router):
    text = "sort " * MAX_PROMPT_CHARACTERS
    assert router.route(text + "x" * 10**6) == router.route(text[:MAX_PROMPT_CHARACTERS])
    assert len(router.ids("x" * 10**6)) == MAX_PROMPT_CHARACTERS
    assert router.route(f"  {PROMPTS['sort'][0]}\n") == router.route(PROMPTS["sort"][0])


# --- small tasks, other models ---------------------------------------------------------------------------------------


def test_with_one_task_only_likeness_decides(tmp_path):
    router, report = fitted(tmp_path, {"facts": PROMPTS["facts"]})
    route = router.route(PROMPTS["facts"][0])
    assert (route.task, route.confidence, route.probabilities) == ("facts", 1.0, {"facts": 1.0})
    assert router.route("What is the capital of France?").reason == "unlike"
    assert report["accuracy"] == 1 and report["threshold"] == 0


@pytest.mark.parametrize("sizes", [(1, 1), (1, 40), (3, 3), (5, 2), (40, 1)])
def test_a_handful_of_prompts_is_enough_to_go_on(tmp_path, sizes):
    prompts = {"sort": PROMPTS["sort"][: sizes[0]], "logic": PROMPTS["logic"][: sizes[1]]}
    router, report = fitted(tmp_path, prompts)
    assert report["n"] == len(split(prompts, 0)[2])
    for task, texts in prompts.items():
        p = router.route(texts[0]).probabilities
        assert max(p, key=p.get) == task


def test_without_calibration_prompts_probabilities_are_those_of_the_regression(tmp_path):
    router, _ = fitted(tmp_path, {"one": ["1 + 2 ="], "two": ["sort abc:"]})
    means = [router.feature(router.ids(text)) for text in ("1 + 2 =", "sort abc:", "3 + 3 :")]
    expected = LogisticRegression(tol=1e-6).fit(means[:2], [0, 1]).predict_proba(means[2:])[0]
    assert list(router.route("3 + 3 :").probabilities.values()) == pytest.approx(expected, abs=1e-4)


def test_equal_prompts_in_two_tasks_leave_both_equally_likely(tmp_path):
    router, _ = fitted(tmp_path, {"one": ["1 + 1 ="], "two": ["1 + 1 ="]})
    assert router.route("1 + 1 =").confidence == pytest.approx(0.5)


def test_a_bfloat16_embedding_is_read_in_blocks_and_short_of_tokens_in_the_tokenizer(dense, tmp_path, monkeypatch):
    model = shutil.copytree(dense("llama_gqa", torch.bfloat16), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    prompts = {"sums": [f"{i} + {i}" for i in range(50)], "words": letters(49, "", 7) + ["abc <extra>"]}
    tables = []
    for rows in (7, 8192):
        monkeypatch.setattr(module, "BLOCK_ROWS", rows)
        run = Run(tmp_path / str(rows))
        fit(Checkpoint.open(str(model)), prompts, run, seed=0)
        tables.append(Router.load(run.router).arrays["table"])
    np.testing.assert_allclose(tables[0], tables[1], atol=1e-5)
    router = Router.load(run.router)
    assert router.route("abc <extra>").task == "words" and router.route("12 + 12").task == "sums"
    assert len(tables[0]) == len(tokenizer) and not tables[0][-1].any()


def test_a_model_without_a_fast_tokenizer_has_no_router(monkeypatch, tmp_path):
    monkeypatch.setattr("seap_ray.models.corpus.load_tokenizer", lambda *_args, **_kwargs: object())
    with pytest.raises(ConfigError, match="has no tokenizer.json, which the router needs"):
        fitted(tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data beside the repository")
def test_a_real_model_tells_real_tasks_apart(tmp_path):
    places = {
        "boolq": "boolq/train-00000-of-00001.parquet",
        "piqa": "piqa/plain_text_train_0000.parquet",
        "gsm8k": "gsm8k/train-00000-of-00001.parquet",
        "wikitext2": "wikitext2/raw_test_0000.parquet",
    }
    prompts = {}
    for name, place in places.items():
        rows = pq.read_table(DATA / "tasks" / place).slice(0, 1500 if name == "wikitext2" else 400).to_pylist()
        items = [Renderer(BUILT_IN[name]).item(row) for row in rows]
        prompts[name] = [item.question or item.text for item in items if item.text][:400]
    report = fit(Checkpoint.open(str(DATA / "models" / "stories260k")), prompts, Run(tmp_path), seed=0)
    assert report["accuracy"] >= 0.91 and report["accuracy_of_embeddings"] >= 0.7
    assert report["routed"] >= 0.8 and report["unlike"] <= 0.06
    router = Router.load(Run(tmp_path).router)
    for text in ("def f(x):\n    return x + 1", '{"a": 1, "b": [1, 2, 3]}', "%$#@ qxz ^^ jjjj"):
        assert router.route(text).task is None


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_same_prompts_in_any_order_give_the_same_bytes(folder, tmp_path):
    shuffled = {task: random.Random(2).sample(texts, len(texts)) for task, texts in PROMPTS.items()}
    fitted(tmp_path / "1")
    fitted(tmp_path / "2", shuffled)
    for name in FILES:
        written = (folder / "router" / name).read_bytes()
        assert (tmp_path / "1" / "router" / name).read_bytes() == written
        assert name == "router.json" or (tmp_path / "2" / "router" / name).read_bytes() == written


def times(folder: Path) -> list[int]:
    return [(folder / "router" / name).stat().st_mtime_ns for name in FILES]


def test_a_router_that_holds_is_not_fitted_again_and_any_other_is(folder, tmp_path, report):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    before = times(tmp_path)
    assert fitted(tmp_path)[1] == report and times(tmp_path) == before
    for prompts, seed in ((PROMPTS, 1), ({**PROMPTS, "facts": PROMPTS["facts"][:-1]}, 1), (PROMPTS, 0)):
        fitted(tmp_path, prompts, seed)
        assert all(new > old for new, old in zip(times(tmp_path), before, strict=True))
        before = times(tmp_path)
    (tmp_path / "router" / "router.safetensors").unlink()
    assert fitted(tmp_path)[1] == report


@pytest.mark.parametrize("key", ["threshold", "unlike", "files"])
def test_a_manifest_that_the_router_cannot_be_read_by_is_made_again(tmp_path, key):
    prompts = {"one": PROMPTS["sort"], "two": PROMPTS["logic"]}
    _, report = fitted(tmp_path, prompts)
    path = tmp_path / "router" / "router.json"
    manifest = json.loads(path.read_text())
    del manifest[key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="the job makes it again"):
        Router.load(tmp_path / "router")
    assert fitted(tmp_path, prompts)[1] == report


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "cut", "flipped"])
def test_a_damaged_or_missing_file_is_refused_in_one_line(folder, tmp_path, name, how):
    shutil.copytree(folder / "router", tmp_path, dirs_exist_ok=True)
    if (name, how) == ("router.json", "flipped"):
        how = "cut"  # any number in there may be another one
    damage(tmp_path / name, how)
    with pytest.raises(ConfigError) as error:
        Router.load(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"files": 3}', '{"files": {}, "unlike": [1]}', "\x00"])
def test_a_description_that_is_none_is_refused_in_one_line(folder, tmp_path, content):
    shutil.copytree(folder / "router", tmp_path, dirs_exist_ok=True)
    (tmp_path / "router.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^.*\brouter\b.*$"):
        Router.load(tmp_path)


def test_bounds_that_are_not_known_survive_the_file(tmp_path):
    fitted(tmp_path, {"one": PROMPTS["sort"], "two": PROMPTS["logic"][:1]})
    assert json.loads((tmp_path / "router" / "router.json").read_text())["unlike"]["two"] is None
    router = Router.load(tmp_path / "router")
    assert router.tasks == ("one", "two") and router.bounds[1] == math.inf > router.bounds[0]


# --- prompts in a chat template --------------------------------------------------------------------------------------

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def chat_model(tmp_path) -> Checkpoint:
    """The demo model with a chat template that writes conversations."""
    return Checkpoint.open(str(demo_with_template(tmp_path / "model", CHAT)))


def test_in_a_chat_the_words_of_the_user_are_read_where_they_stand_in_the_prompt(chat_model, tmp_path):
    run = Run(tmp_path)
    prompts = {skill: texts[:40] for skill, texts in PROMPTS.items()}
    fit(chat_model, prompts, run, seed=0, is_chat=True)
    router = Router.load(run.router)
    assert router.frame == PromptFrame("<bos>user: ", "\nassistant: ")

    tokenizer = load_tokenizer(chat_model.folder)
    for text in ("12 + 34 =", " sort: 3 1 2 =", "user: assistant: ", "", "naïve \ud800 x"):
        read = text.strip().encode("utf-8", "replace").decode()
        messages = [{"role": "user", "content": read}]
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert router.prompt_ids(text) == whole
        ids = router.ids(text).tolist()
        # A token of the demo is a character.
        assert len(ids) == len(read)
        start = len(tokenizer("<bos>user: ", add_special_tokens=False)["input_ids"])
        assert whole[start : start + len(ids)] == ids

    # A router of plain texts is another one.
    fit(chat_model, prompts, run, seed=0)
    plain = Router.load(run.router)
    assert plain.frame is None and "frame" not in json.loads((run.router / "router.json").read_text())
    assert plain.prompt_ids("12 + 34 =") == tokenizer("12 + 34 =")["input_ids"]
    assert plain.prompt_ids("<bos>12") == tokenizer("<bos>12", add_special_tokens=False)["input_ids"]


def test_a_template_that_does_not_write_a_message_once_has_no_frame(chat_model, tmp_path):
    run = Run(tmp_path)
    for template in (
        "{{ messages[0]['content'] | upper }}",
        "{{ messages[0]['content'] * 2 }}",
        "{{ raise_exception('no') }}",
    ):
        (chat_model.folder / "chat_template.jinja").write_text(template)
        fit(chat_model, {"sort": PROMPTS["sort"][:20]}, run, seed=0, is_chat=True)
        assert Router.load(run.router).frame is None


def test_a_token_of_the_users_words_may_have_a_space_of_the_template():
    backend = Tokenizer(models.BPE({"[": 0, "]": 1, "▁": 2, "a": 3, "▁a": 4, "b": 5}, [("▁", "a")]))
    backend.normalizer = normalizers.Replace(" ", "▁")
    router = Router(backend, ("x",), {}, (math.inf,), frame=PromptFrame("[ ", " ]"))
    assert router.prompt_ids("ab") == [0, 4, 5, 2, 1]
    assert router.ids("ab").tolist() == [4, 5]
