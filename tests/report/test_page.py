"""The page: its text and structure by a parser, its looks in a real Chromium."""

import hashlib
import json
import re
from html import unescape
from html.parser import HTMLParser

import pytest

from seap_ray.errors import ConfigError
from seap_ray.report.page import facts, render, save_figures, sections, write_report
from seap_ray.report.run_data import RunData
from seap_ray.storage.run import Run
from tests.support.browser import MISSING, chromium
from tests.support.made_run import RATIOS, REPORT_STUDIES, TASKS, edit, judge_plans, make_run
from tests.support.oracles import contrast

VOID = {"meta", "link", "br", "use", "path"}


class Page(HTMLParser):
    """Every element with its attributes, and every cell of every table by its row and column heads."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.tables = []
        self.open = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "demo", studies=REPORT_STUDIES)
    judge_plans(run)
    write_report(run)
    return run


def page_of(run):
    return Page(write_report(run).read_text())


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_results(run):
    data = RunData.of(run)
    page = page_of(run)
    head, *rows = page.tables[0]
    head = [" ".join(name.split()) for name in head]
    names = [row[0] for row in rows if len(row) > 1]
    models = data.main.models
    assert sorted(names) == sorted(model.name for model in models)
    by_ratio = {}
    ratio = None
    for row in rows:
        if len(row) == 1:
            ratio = float(row[0].split()[0]) / 100
        else:
            by_ratio[row[0], ratio] = dict(zip(head, row, strict=True))
    for model in models:
        row = by_ratio[model.name, model.ratio]
        for task, cell in model.quality.items():
            assert row[f"{task} em"] == f"{cell.value:.3f} ±{cell.stderr:.3f}"
        mean = sum(cell.value for cell in model.quality.values()) / len(model.quality)
        assert row["mean accuracy"].split(" ±")[0] == f"{mean:.3f}"
        assert row["removed"] == ("" if model.ratio is None else f"{model.realised_ratio:.4f}")


def test_a_mean_is_over_all_tasks_of_its_kind_and_over_more_than_one(tmp_path):
    run = make_run(tmp_path / "demo")
    content = json.loads(run.results.read_text())
    content["tasks"]["prose"] |= {"metric": "perplexity", "short": "ppl"}
    for model in content["models"]:
        model["quality"]["prose"] |= {"metric": "perplexity", "value": 1234.5, "stderr": 0.1}
        if model["name"] == "sort":
            del model["quality"]["arithmetic"]
    run.results.write_text(json.dumps(content))

    head, *rows = page_of(run).tables[0]
    head = [" ".join(name.split()) for name in head]
    assert head == ["model", "removed", "parameters", "mean accuracy", "arithmetic em", "sort em", "prose ppl"]
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows if len(row) > 1}
    assert cells["sort"]["mean accuracy"] == "" != cells["arithmetic"]["mean accuracy"]
    assert cells["sort"]["prose ppl"] == "1234 ±123", "a model that is lost has no digits"


def test_the_facts_of_the_run_are_told(run):
    text = page_of(run).text
    for fact in ("1,000,000", "20 %, 40 %", "score wifv, allocation logistic (k 1, x0 0.3)", "seap-ray 0.1.0", "3,702"):
        assert fact in text


def test_the_type_that_models_were_judged_in_is_told(tmp_path):
    judged = make_run(tmp_path / "demo")
    # The results of an older version held the setting alone.
    assert facts(RunData.of(judged))["Dtype"] == "auto"

    edit(judged.results, lambda values: values.update(dtype="bfloat16"))
    assert facts(RunData.of(judged))["Dtype"] == "bfloat16 (auto)"

    edit(judged.results, lambda values: values["config"]["model"].update(dtype="float32"))
    edit(judged.results, lambda values: values.update(dtype="float32"))
    assert facts(RunData.of(judged))["Dtype"] == "float32"


def test_what_auto_became_is_told_by_ratio_where_ratios_differ(tmp_path):
    run = make_run(tmp_path / "demo")
    edit(run.results, lambda values: values["config"]["pruning"].update(compensation="auto", attention_unit="auto"))
    edit(run.results, lambda values: values["config"]["pruning"]["allocation"].update(kind="auto"))
    for name in (*TASKS, "general"):
        edit(run.plan(RATIOS[1], name), lambda plan: plan["allocation"].update(kind="measured"))
        edit(run.plan(RATIOS[0], name), lambda plan: plan.update(compensation="mean"))
        edit(run.plan(RATIOS[1], name), lambda plan: plan.update(compensation="mean"))
    edit(run.plan(RATIOS[0], "sort"), lambda plan: plan.update(compensation="none"))

    pruning = facts(RunData.of(run))["Pruning"]
    assert "score wifv, allocation logistic at 20 % and measured at 40 % (auto), " in pruning
    assert "compensation mean or none at 20 % and mean at 40 % (auto), attention unit group (auto)" in pruning

    assert "error correction" not in pruning
    edit(run.results, lambda values: values["config"]["pruning"].update(error_correction=0.5))
    assert facts(RunData.of(run))["Pruning"].endswith(", error correction 0.5")

    # Plans that are gone say nothing.
    for path in run.root.glob("plans/*/*.json"):
        path.unlink()
    assert "allocation auto, compensation auto" in facts(RunData.of(run))["Pruning"]


def test_rows_that_do_not_count_are_told_by_task_and_reason(run, tmp_path):
    assert "Rows that were left out, or are worth a look" not in page_of(run).text

    counted = make_run(tmp_path / "demo")
    manifest = counted.shards("sort") / "manifest.json"
    edit(manifest, lambda values: values.update(n_rows=6000, n_cut=3, counts={"held_out": 1200, "no_answer": 2}))
    edit(counted.shards("prose") / "manifest.json", lambda values: values.update(n_rows=70, n_blank=7))
    edit(counted.results, lambda values: values["tasks"]["sort"].update(n_rows=6000, counts={"wrong_answer": 5}))

    table = next(table for table in page_of(counted).tables if table[0][:2] == ["task", "drawn for"])
    reasons = ["blank", "without an answer", "held out for evaluation", "whose answer is none of their choices"]
    assert table == [
        ["task", "drawn for", "rows", *reasons, "cut at the longest sequence"],
        ["sort", "calibration", "6,000", "", "2", "1,200", "", "3"],
        ["sort", "evaluation", "6,000", "", "", "", "5", ""],
        ["prose", "calibration", "70", "7", "", "", "", ""],
    ]


def test_what_was_not_measured_leaves_no_heading_behind(run, studied):
    pages = write_report(run).read_text(), studied.report.read_text()
    few, many = (re.findall(r'<h2 id="(\w+)"', page) for page in pages)
    assert few == ["summary", "quality", "transfer", "sparsity", "overlap", "clusters", "scores", "router"]
    all_but_studies = ["summary", "quality", "transfer", "choices", "sparsity", "sensitivities", *few[4:]]
    assert many == [
        *all_but_studies,
        "speed",
        "corpus",
        "allocation",
        "curve",
        "reconstruction",
        "ood",
        "routing",
        "pooling",
        "synthesis",
        "paper",
    ]


def test_a_model_whose_attention_is_not_looked_at_has_a_page(tmp_path):
    run = make_run(tmp_path / "demo", model="gemma4", pruning={"attention_unit": "none"})
    page = page_of(run)
    assert "How unequal are the scores?" in page.text


def test_a_run_of_one_study_alone_has_a_page(run, tmp_path):
    alone = make_run(tmp_path / "demo", studies=("pooling",))
    for path in (alone.results, *alone.root.glob("plans/*/*")):
        path.unlink()
    assert "Does an expert gain by its task's data, or only by more data?" in page_of(alone).text


def test_a_run_without_results_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="has no results; run jobs/prune.py or jobs/eval.py first$"):
        write_report(Run(tmp_path))


def test_a_run_that_was_not_evaluated_shows_what_was_cut(tmp_path):
    run = make_run(tmp_path / "demo")
    edit(run.results, lambda results: [model.update(quality={}) for model in results["models"]])
    keys = [section.key for section in sections(RunData.of(run))]
    assert keys == ["sparsity", "overlap", "clusters", "scores", "router"]
    assert "general" in page_of(run).text


def test_a_failed_cell_says_why_and_is_not_obeyed(tmp_path):
    run = make_run(tmp_path / "demo", studies=("table",))
    error = '<script>alert(1)</script> & "task" $x_1$'

    def fail(results):
        for model in results["models"][1:4]:
            model["quality"]["sort"] = {"error": error}
        results["models"][0]["quality"]["prose"] = {"error": "another"}
        unplanned = {"name": "unplanned", "kind": "baseline", "realised_ratio": None, "parameters": None}
        results["models"].append({**results["models"][1], **unplanned})

    edit(run.study("table"), fail)
    html = write_report(run).read_text()
    page = Page(html)
    assert "<script" not in html and error in page.text
    assert [cell for row in page.tables[0] for cell in row if "failed" in cell] == ["failed1", *["failed2"] * 4]
    assert next(row for row in page.tables[0] if row[0] == "unplanned")[1:3] == ["", ""]
    assert len(re.findall("<li>another</li>", html)) == 1


def test_names_from_files_are_text(run, tmp_path):
    odd = make_run(tmp_path / "<i>odd & name")

    def rename(results):
        for model in results["models"]:
            if model["name"] == "uniform":
                model.update(name="<u>x</u>", method="<u>x</u>")

    edit(odd.results, rename)
    html = write_report(odd).read_text()
    assert "<i>" not in html and "<u>" not in html
    assert "<i>odd & name: pruned models" in unescape(html) and "&lt;u&gt;x&lt;/u&gt;" in html


# --- how it is made --------------------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_page(studied):
    first = hashlib.sha256(studied.report.read_bytes()).hexdigest()
    second = hashlib.sha256(write_report(studied).read_bytes()).hexdigest()
    assert first == second


def test_a_page_is_drawn_again_only_where_it_is_damaged_or_would_differ(tmp_path, monkeypatch):
    run = make_run(tmp_path / "demo")
    page = write_report(run).read_bytes()
    drawn = []

    def render_again(content):
        drawn.append(content)
        return render(content)

    monkeypatch.setattr("seap_ray.report.page.render", render_again)
    assert write_report(run).read_bytes() == page and not drawn

    run.report.write_bytes(page[:1000])
    assert write_report(run).read_bytes() == page and len(drawn) == 1

    results = json.loads(run.results.read_text())
    results["models"][0]["parameters"] += 1
    run.results.write_text(json.dumps(results))
    assert write_report(run).read_bytes() != page and len(drawn) == 2


def test_the_page_asks_for_nothing_and_runs_nothing(studied):
    html = studied.report.read_text()
    page = Page(html)
    assert not {"script", "img", "iframe", "object", "embed", "video", "audio", "form"} & {
        tag for tag, _ in page.elements
    }
    targets = [
        value for _, attributes in page.elements for key, value in attributes.items() if key.endswith(("href", "src"))
    ]
    assert targets and all(target.startswith(("#", "data:,")) for target in targets)
    assert not re.search(r"@import|@font-face|url\((?!#)", html)
    assert set(re.findall(r"https?://[^\"'\s<]*", html)) == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_ids_are_single_and_what_is_referred_to_is_there(studied):
    html = studied.report.read_text()
    ids = [attributes["id"] for _, attributes in Page(html).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set()
    for names in re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)|labelledby="([^"]*)"', html):
        used |= set(names)
    assert used - {""} <= set(ids)


def test_pictures_and_tables_can_be_read_without_eyes(studied):
    page = Page(studied.report.read_text())
    for svg in page.all("svg"):
        assert svg.get("aria-hidden") == "true" or (svg.get("role") == "img" and svg["aria-label"].strip())
    assert len(page.all("figure")) == len(page.all("figcaption")) > 10
    assert all("scope" in head for head in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert page.all("html") == [{"lang": "en"}]
    assert page.open == []


def test_pictures_are_saved_one_a_file(run, tmp_path):
    paths = save_figures(run, tmp_path / "pictures")
    assert [path.name for path in paths] == [
        f"{name}.svg" for name in ("quality", "transfer", "sparsity", "overlap", "clusters", "scores", "router")
    ]
    assert all(path.read_text().startswith("<svg") for path in paths)


# --- in a browser ----------------------------------------------------------------------------------------------------


def in_a_browser(test):
    return pytest.mark.slow(pytest.mark.skipif(bool(MISSING), reason=MISSING)(test))


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def open_report(browser, studied):
    """``open_report(**context)``: the page; on the way out it must have asked for nothing and complained of nothing."""
    seen = []
    sessions = []

    def opened(**context):
        session = browser.new_context(**context)
        sessions.append(session)
        page = session.new_page()
        page.on("request", lambda request: seen.append(request.url))
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.goto(studied.report.as_uri())
        return page

    yield opened
    for session in sessions:
        session.close()
    assert [each for each in seen if each != studied.report.as_uri()] == []


@in_a_browser
@pytest.mark.parametrize("width", [390, 768, 1400])
def test_nothing_sticks_out_of_the_page(open_report, width):
    page = open_report(viewport={"width": width, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = [box.bounding_box() for box in page.locator(".scroll, .panel").all()]
    assert len(boxes) > 30
    assert [box for box in boxes if box["x"] < 0 or box["x"] + box["width"] > width] == []


@in_a_browser
@pytest.mark.parametrize("width", [390, 1400])
def test_the_text_of_pictures_is_large_enough_and_lies_within_them(open_report, width):
    page = open_report(viewport={"width": width, "height": 900})
    small, outside = page.evaluate(
        """() => {
            const small = [], outside = [];
            for (const svg of document.querySelectorAll("svg[role=img]")) {
                const own = svg.getBoundingClientRect();
                for (const text of svg.querySelectorAll("text")) {
                    const at = text.getBoundingClientRect();
                    const size = parseFloat(getComputedStyle(text).fontSize) * own.width / svg.viewBox.baseVal.width;
                    if (size < 8.3) small.push([text.textContent, size]);
                    if (at.left < own.left - 1 || at.right > own.right + 1 || at.top < own.top - 1
                        || at.bottom > own.bottom + 1) outside.push(text.textContent);
                }
            }
            return [small, outside];
        }"""
    )
    assert (small, outside) == ([], [])


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(open_report, scheme):
    page = open_report(color_scheme=scheme)
    colours = page.evaluate(
        """() => {
            const found = new Map();
            for (const element of document.querySelectorAll("h1, h2, p, dt, dd, td, th, caption, figcaption, .how, li, "
                 + "a, summary, svg[role=img] text")) {
                const style = getComputedStyle(element);
                let behind = element;
                while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") {
                    behind = behind.parentElement;
                }
                const ink = element.tagName === "text" ? style.fill : style.color;
                found.set(ink + getComputedStyle(behind).backgroundColor,
                          [ink, getComputedStyle(behind).backgroundColor, element.tagName]);
            }
            return [...found.values()];
        }"""
    )

    def as_hex(colour):
        return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)[:3])

    assert len(colours) >= 4
    assert [(ink, page_, tag) for ink, page_, tag in colours if contrast(as_hex(ink), as_hex(page_)) < 4.5] == []
    backgrounds = {as_hex(page_) for _, page_, _ in colours}
    assert (contrast(min(backgrounds), "#ffffff") > 10) == (scheme == "dark")


@in_a_browser
def test_paper_is_white_and_has_all_tables(open_report):
    page = open_report(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    seen = "[...document.querySelectorAll('table')].filter(table => table.checkVisibility()).length"
    assert page.evaluate(seen) == page.locator("table").count()
    page.emulate_media(media="screen")
    assert 2 <= page.evaluate(seen) < page.locator("table").count(), "long ones are folded away on a screen"
