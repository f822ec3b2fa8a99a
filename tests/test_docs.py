"""Documentation: README's code blocks run as they stand, each in a fresh process, and what documents name exists."""

import ast
import math
import os
import re
import shlex
import stat
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import yaml

from seap_ray.config import load_config
from seap_ray.errors import ConfigError
from seap_ray.models.corpus import check_evaluation, check_source
from seap_ray.models.hf.shapes import check_folder
from seap_ray.pipeline.needs import ModelSize, needs
from seap_ray.progress import size
from tests.support import ROOT
from tests.support.served import START_S, free_port

README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "cluster" / "README.md"])
CONFIGS = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*.yaml")])
KEY = "the-key-that-openssl-would-draw"

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def runs_the_demo(test):
    """Mark a test that needs the run of README's first block; its time counts what its fixtures take."""
    for mark in (pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)):
        test = mark(test)
    return test


def serves(test):
    """Mark a test that needs the run, and engines that serve it."""
    return pytest.mark.vllm(runs_the_demo(test))


class Block(NamedTuple):
    """A fenced code block of a document."""

    language: str
    text: str


def blocks(path, language=None):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in fenced if language in (None, block[0])]


def block_with(words, language):
    """The one block of README in ``language`` that holds ``words``."""
    (block,) = (block for block in blocks(README, language) if words in block.text)
    return block.text


# --- what documents name ---------------------------------------------------------------------------------------------


def command_lines(path):
    """Commands of a document, each as its words: in blocks, in indented lines and between backticks."""
    text = path.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        for code in re.findall(r"`([^`]+)`", line) or [line]:
            if re.search(r"jobs/\w+\.py|-m benchmarks|\bseap-ray \w|^make \w", code):
                yield code


def words_of(command):
    return shlex.split(command, comments=True)


def usable(words):
    """Arguments that can be checked: not those with a variable, an ellipsis or a choice in the place of a value."""
    arguments = [word for word in words if "=" in word and not re.search(r"\$|\.\.\.|^\[|^-|^[A-Z_]+=", word)]
    # README's reader writes my.yaml; test_yaml_blocks_are_configurations loads what it holds.
    arguments = [argument for argument in arguments if argument != "config=my.yaml"]
    # Images and nodes have the tree under a path of their own.
    return [re.sub("^config=/(app|srv/seap_ray)/", "config=", argument) for argument in arguments]


@each_document
def test_every_job_that_a_document_names_exists_and_takes_the_arguments(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in command_lines(path):
        for job, arguments in re.findall(r"jobs/(\w+)\.py([^|;&)]*)", command):
            assert (ROOT / "jobs" / f"{job}.py").is_file(), command
            if "'" in arguments and arguments.count("'") % 2:
                continue  # prose between two commands
            try:
                load_config(usable(words_of(arguments)))
            except ConfigError as error:
                pytest.fail(f"{command}: {error}")


@each_document
def test_every_module_verb_and_target_that_a_document_names_exists(path):
    makefile = (ROOT / "Makefile").read_text()
    for command in command_lines(path):
        for module in re.findall(r"-m (benchmarks[\w.]*)", command):
            assert find_spec(module), command
        for verb in re.findall(r"\bseap-ray (\w+)", command):
            assert (ROOT / "jobs" / f"{verb}.py").is_file(), command
        for target in re.findall(r"^make ([\w-]+)", command):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), command


@each_document
def test_every_path_that_a_document_names_exists(path):
    for name in re.findall(
        r"`((?:seap_ray|tests|benchmarks|jobs|serve|examples|configs|docs)/[\w./-]+)`", path.read_text()
    ):
        assert (ROOT / name).exists(), name


@each_document
def test_every_relative_link_leads_to_a_file(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_each_step_of_the_way_to_an_expert_is_called_by_one_above_it():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("to a written expert")[2].partition("After that")[0]
    files = re.findall(r"^\| \d+ \| `([\w/]+\.py)`", table, re.MULTILINE)
    assert len(files) == 15
    for i, file in enumerate(files[1:], 1):
        above = {module for earlier in files[:i] for module in imported_modules(earlier)}
        module = file.removesuffix(".py").replace("/", ".")
        assert {module, module.rpartition(".")[0]} & above, file
        assert i < 4 or not {"seap_ray.cli", "seap_ray.pipeline.job"} & {*imported_modules(file)}, file


def test_the_job_calls_the_steps_that_the_way_names():
    way = (ROOT / "CONTRIBUTING.md").read_text().partition("to a written expert")[2].partition("After that")[0]
    (steps,) = re.findall(r"`job.py` calls ([\d, and]+) in this order", way)
    job = (ROOT / "seap_ray/pipeline/job.py").read_text()
    for step in re.findall(r"\d+", steps):
        (file,) = re.findall(rf"^\| {step} \| `([\w/]+)\.py`", way, re.MULTILINE)
        assert f"from {file.replace('/', '.')} import" in job, file


def test_the_layers_are_those_of_the_import_contract_from_the_top():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| layer | folders |")[2].partition("\n\n")[0]
    rows = [row.split("|")[2] for row in table.splitlines()[2:]]
    named = [re.findall(r"`(?:seap_ray/)?(\w+)(?:\.py|/)`", row) for row in rows]
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    heights = {
        module.strip().removeprefix("seap_ray."): height
        for height, layer in enumerate(layers)
        for module in layer.split("|")
    }
    order = [heights[name] for row in named for name in row if name != "jobs"]
    assert order == sorted(order) and len(order) == len(heights)


def imported_modules(file):
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_extras_of_the_test_command_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    _, tests, *_ = blocks(README, "bash")
    (extras,) = re.findall(r"--extras (\S+)", tests.text)
    assert set(extras.split(",")) <= {*project["optional-dependencies"]}
    assert tests.text.rstrip().endswith(".venv/bin/python -m pytest")


@pytest.mark.parametrize("block", blocks(README, "yaml"), ids=lambda block: block.text.split(":")[0])
def test_yaml_blocks_are_configurations(block, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "config.yaml"
    file.write_text(block.text)
    check_own_tasks(load_config([f"config={file}"]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configurations_load_and_fit_their_files(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_own_tasks(load_config([f"config={path}"]))


LLAMA_3_1_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
"""What the model's config.json says of its dimensions."""
(LEAST_SQUARES,) = re.findall(r"`(calibration\.[^`]+compensation=least_squares[^`]*)`", README.read_text())


@pytest.mark.parametrize(("column", "overrides"), [(0, ""), (1, LEAST_SQUARES)], ids=["as configured", "least squares"])
def test_the_needs_of_the_8b_model_are_those_of_the_doctors_formulas(column, overrides, monkeypatch):
    monkeypatch.chdir(ROOT)
    model = ModelSize.from_config(LLAMA_3_1_8B)
    needed = needs(model, load_config(["config=configs/llama-3.1-8b.yaml", *overrides.split()]))
    memory = needed.memory
    time = needed.time
    steps = (time.calibration, time.choice, time.judging, time.writing)
    expected = [
        f"{size(memory.single)} / {size(memory.stream)}",
        size(memory.host),
        size(memory.covariance_task) if memory.covariance_task else "none",
        size(needed.disk.total),
        " / ".join(f"{math.ceil(seconds / 60)} min" for seconds in steps),
    ]
    rows = README.read_text().partition("| | as configured |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[1 + column] for row in cells] == expected
    # Two numbers stand in the words of a row: the model's own size, and what README's second ratio adds.
    (second_ratio,) = re.findall(r"^python jobs/prune.py .*pruning.ratio=(\S+)", README.read_text(), re.MULTILINE)
    both_ratios = load_config(["config=configs/llama-3.1-8b.yaml", f"pruning.ratio=[0.2, {second_ratio}]"])
    as_configured = load_config(["config=configs/llama-3.1-8b.yaml"])
    added = needs(model, both_ratios).disk.total - needs(model, as_configured).disk.total
    (words_of_disk,) = (row[0] for row in cells if row[0].startswith("disk"))
    assert f"{size(added)} more" in words_of_disk and f"{size(model.n_bytes)} for the model" in words_of_disk


def test_readmes_run_with_least_squares_is_not_the_run_whose_corpus_has_other_shards(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(["config=configs/llama-3.1-8b.yaml"])
    least_squares = load_config(["config=configs/llama-3.1-8b.yaml", *LEAST_SQUARES.split()])
    assert config.corpus != least_squares.corpus and config.run.name != least_squares.run.name


def test_blocks_that_serve_print_a_key_and_end_with_the_job_that_does_not_return():
    serving = [block.text for block in blocks(README, "bash") if "jobs/deploy.py" in block.text]
    assert len(serving) == 2
    for text in serving:
        assert "export SEAP_API_KEYS=$(openssl rand -hex 16); echo $SEAP_API_KEYS" in text
        assert text.splitlines()[-1].startswith("python jobs/deploy.py")


def test_the_tokenizer_of_an_expert_loads_without_trust_in_its_code():
    # On a terminal transformers asks, and reads the next line that was pasted: an empty one is lost without harm.
    assert "AutoTokenizer.from_pretrained(folder)\n\n" in block_with("from_pretrained(folder", "python")


def test_readme_is_short():
    assert len(README.read_bytes()) < 12_000


def check_own_tasks(config):
    """Render a row of every task whose files are in the tree."""
    for task in config.tasks:
        if Path(task.path).exists():
            check_source(task, official=False)
            check_evaluation(task)


# --- blocks that run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clone:
    """A folder that looks like a fresh clone with its environment, and has a demo of two tasks and few rows."""

    folder: Path
    port: int

    @classmethod
    def make(cls, folder):
        for name in ("jobs", "configs", "examples", "docs"):
            if (ROOT / name).exists():
                (folder / name).symlink_to(ROOT / name)
        port = free_port()
        config = yaml.safe_load((ROOT / "ray_config.yaml").read_text())
        config |= {"tasks": ["arithmetic", "reverse"], "corpus": {"samples": 150}}
        config |= {"evaluation": {"samples": 20, "speed": {"rounds": 0}}}
        config["pruning"] |= {"ratio": 0.2, "baselines": {}}
        config["calibration"] |= {"workers": 1}
        config["serve"] |= {"num_cpus": 0.25, "port": port, "engine": {"kv_cache_memory_bytes": 1 << 26}}
        (folder / "ray_config.yaml").write_text(yaml.safe_dump(config))
        clone = cls(folder, port)
        clone._make_environment()
        return clone

    def _make_environment(self):
        """The running Python under the names that README uses, and commands that would change the machine played."""
        bin = self.folder / ".venv" / "bin"
        bin.mkdir(parents=True)
        (bin / "activate").write_text(f"PATH={bin}:$PATH\n")
        write_script(bin / "python", f'exec {sys.executable} "$@"')
        played = self.folder / "played"
        played.mkdir()
        # The environment is there, so the installer only says which arguments it takes.
        write_script(played / "python3", f'exec {sys.executable} "$@" --help')
        write_script(played / "openssl", f"echo {KEY}")

    def environment(self):
        path = f"{self.folder / 'played'}:{os.environ['PATH']}"
        offline = {"HF_HUB_OFFLINE": "1", "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT), "SEAP_API_KEYS": KEY}
        return {**os.environ, **offline, "PATH": path}

    def popen(self, *command, **kwargs):
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment(), stdin=subprocess.DEVNULL, text=True, **kwargs
        )

    def run(self, *command):
        """Run to the end without a terminal, and return what was printed."""
        process = self.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output
        return output

    def bash(self, text):
        return self.run("bash", "-euo", "pipefail", "-c", self.at_port(text))

    def python(self, text):
        return self.run(sys.executable, "-c", self.at_port(text))

    def at_port(self, text):
        return text.replace(":8000/", f":{self.port}/")


def write_script(path, line):
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone in which README's first block has run."""
    clone = Clone.make(tmp_path_factory.mktemp("clone"))
    output = clone.bash(blocks(README, "bash")[0].text)
    assert "experts, own task" in output
    return clone


@pytest.mark.slow
def test_the_example_prunes_on_one_machine_without_ray(tmp_path):
    command = [sys.executable, "examples/one_machine.py", str(tmp_path / "expert")]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "20.1% of the decoder removed" in done.stdout
    assert re.search(r"\d+ [+-] \d+ = \d+", done.stdout), done.stdout
    assert len((ROOT / "examples" / "one_machine.py").read_text().splitlines()) < 70


@runs_the_demo
def test_the_example_fine_tunes_an_expert_that_then_loads_as_before(clone, tmp_path):
    expert = clone.folder / "runs/demo/experts/0.20/arithmetic"
    command = [sys.executable, str(ROOT / "examples/fine_tune.py"), str(expert), str(tmp_path / "tuned")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=one_thread)
    assert done.returncode == 0, done.stderr
    first, last = re.findall(r"loss ([\d.]+)", done.stdout)
    # What so little is cut of has forgotten nothing, and keeps what it is taught.
    assert float(last) < max(float(first), 0.05)
    assert {"modeling_seap.py", "configuration_seap.py"} <= {*os.listdir(tmp_path / "tuned")}
    check_folder(tmp_path / "tuned")


@runs_the_demo
def test_an_expert_loads_and_generates(clone):
    assert "20 - 14 =" in clone.python(block_with("from_pretrained(folder)", "python"))


@runs_the_demo
def test_a_study_and_the_report(clone):
    output = clone.bash(block_with("study=transfer", "bash"))
    assert "report.html" in output
    assert (clone.folder / "runs" / "demo" / "report.html").is_file()


@pytest.fixture(scope="module")
def served(clone, tmp_path_factory):
    """The clone while README's block serves it."""
    log = tmp_path_factory.mktemp("deploy") / "log"
    block = block_with("\npython jobs/deploy.py\n", "bash")
    with log.open("w") as out:
        process = clone.popen("bash", "-euo", "pipefail", "-c", block, stdout=out, stderr=out)
    deadline = time.monotonic() + START_S
    while "are served at" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    yield clone
    stop_deploy(process)


@serves
def test_curl_is_answered_by_the_expert_of_the_prompt(served):
    reply = served.bash(block_with("curl", "bash"))
    assert "x-seap-expert: arithmetic" in reply and '"model":"arithmetic"' in reply


@serves
def test_the_openai_client_is_answered(served):
    pytest.importorskip("openai")
    lines = served.python(block_with("openai.OpenAI", "python")).splitlines()
    assert lines[0].startswith("'20 - 14 =' -> arithmetic:") and len(lines) == 2


def stop_deploy(process):
    """End the job itself, as Ctrl-C in its terminal would; the shell above it ends with it."""
    for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        if "jobs/deploy.py" in " ".join(child.cmdline()) and "bash" not in child.cmdline()[0]:
            child.terminate()
            break
    process.wait(120)
