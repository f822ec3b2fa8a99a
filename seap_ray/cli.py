"""Command line: ``seap-ray VERB``, and the same verbs as ``python jobs/VERB.py``.

Each verb reads a config, does its work, and says in one line what a user can fix. What a verb imports for its work is
imported when it starts, so that help and a misspelt key are answered at once.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from seap_ray.config import Config, help_text, load_config
from seap_ray.config.schema import nearest
from seap_ray.errors import ConfigError, IncompleteError, SeapError
from seap_ray.methods import STUDIES
from seap_ray.models.quick_imports import quick_imports

HELP = {"-h", "--help"}
RESUMES = "stopped; the same command goes on from here"


@dataclass(frozen=True, slots=True)
class Request:
    """A command line, read."""

    config: Config
    words: Sequence[str]
    """Arguments that are neither ``key=value`` nor options, for the verbs that take them."""
    overrides: Sequence[str]
    """Arguments of the form ``key=value``, as they were written."""


@dataclass(frozen=True, slots=True)
class Verb:
    """What ``seap-ray VERB`` does."""

    summary: str
    """One line for the list of verbs."""
    usage: str
    """The beginning of ``--help``; the list of keys follows."""
    work: Callable[[Request], None]
    takes_words: bool = False
    """Whether arguments without ``=`` are for ``work``; elsewhere they are refused."""
    stopped: str = "stopped"
    """What is said after Ctrl-C or SIGTERM."""
    stopped_code: int = 0
    """Exit code after Ctrl-C or SIGTERM."""


# --- prune -----------------------------------------------------------------------------------------------------------

PRUNE = """\
seap-ray prune [config=ray_config.yaml] [dotted.key=value ...]
python jobs/prune.py [config=ray_config.yaml] [dotted.key=value ...]

Prunes a model into task experts, on this machine or over a Ray cluster: records the statistics of the model's
activations on every task's corpus, writes one expert per task and one general model for all tasks, fits the router
that sends a prompt to an expert, and evaluates all of them beside the dense model.

In:   a model (model.source), corpora (tasks) and the share to remove (pruning.ratio), or what a pruned model may take
      (pruning.target). ray_config.yaml names those of the demo, a small model that comes with the package: nothing is
      downloaded. So does a folder without that file.
Out:  the folder <run.storage>/<run.name>, with checkpoints for transformers and vLLM in experts/<ratio>/<name>, the
      table results.json, the page report.html, and statistics, plans and the router.

The same command resumes what was cut short. On a finished run another pruning.ratio, score or allocation uses the
recorded statistics: it only plans, writes and evaluates.

Examples:
  seap-ray prune
  seap-ray prune config=configs/llama-3.1-8b.yaml pruning.ratio=0.3
  seap-ray prune config=configs/llama-3.1-8b.yaml pruning.target.memory=24GB
  ray job submit --working-dir . -- python jobs/prune.py run.storage=/mnt/shared/runs

Exit codes: 0 done, 2 a key or the model is wrong, 3 a corpus is wrong, 4 cut short: the same command goes on.
"""


def _prune(request: Request) -> None:
    with quick_imports():
        from seap_ray.pipeline.job import run_job

    run_job(request.config)


# --- eval ------------------------------------------------------------------------------------------------------------

STUDY_LIST = "\n".join(f"  {name:15} {study.question}" for name, study in STUDIES.items())
EVAL = f"""\
seap-ray eval [study=table] [config=ray_config.yaml] [dotted.key=value ...]
python jobs/eval.py [study=table] [config=ray_config.yaml] [dotted.key=value ...]

Compares pruning methods, one study a command, all from one set of statistics. What each study asks
(docs/evaluation.md says more):

{STUDY_LIST}

In:   the config of a run. Statistics that the run lacks are recorded first, as seap-ray prune does it.
Out:  <run>/results/<study>.json and .csv, and <run>/report.html with the study's pictures.

The same command resumes what was cut short; a model that was evaluated on a task is not evaluated there again.

Examples:
  seap-ray eval
  seap-ray eval study=ratio "pruning.ratio=[0.2, 0.4, 0.6]" evaluation.samples=200

Exit codes: 0 done, 2 a key or the model is wrong, 3 a corpus is wrong, 4 cut short: the same command goes on. Where a
model could not be evaluated on a task, all else is done first, and the code is that of the reason (1: a fault).
"""


def _eval(request: Request) -> None:
    with quick_imports():
        from seap_ray.studies.run import run_study

    run_study(request.config)


# --- deploy ----------------------------------------------------------------------------------------------------------

DEPLOY = """\
seap-ray deploy [config=ray_config.yaml] [dotted.key=value ...]
python jobs/deploy.py [config=ray_config.yaml] [dotted.key=value ...]

Serves a finished run through vLLM: every expert, the general model and the router behind one OpenAI-compatible
endpoint. With RAY_ADDRESS it is deployed on that cluster and stays; without, it runs on this machine until Ctrl-C.

In:   a run that seap-ray prune has finished (run.storage, run.name), and one or more API keys of at least 16
      characters, in the environment variable SEAP_API_KEYS or in the file serve.api_keys_file. A request needs one.
Out:  http://<serve.host>:<serve.port>/v1, and a playground at /. A request names an expert as its model, or "auto" to
      leave the choice to the router.

Example:
  export SEAP_API_KEYS=$(openssl rand -hex 16)
  seap-ray deploy run.name=demo serve.port=8000

Exit codes: 0 done, 2 a key, the run or the cluster is wrong, 4 the engines did not start.
"""


def _deploy(request: Request) -> None:
    from serve.session import enter_own_session

    # A service that ends with this process; on a cluster it stays.
    if os.environ.get("RAY_ADDRESS", "local") == "local":
        enter_own_session()

    from seap_ray.vllm_plugin.plugin import check_registered

    logging.disable(logging.WARNING)  # vLLM and Ray speak of the machine while they are imported
    check_registered()
    from serve import deployment

    logging.disable(logging.NOTSET)
    deployment.deploy(request.config)


# --- report ----------------------------------------------------------------------------------------------------------

REPORT = """\
seap-ray report [RUN ...] [config=ray_config.yaml] [dotted.key=value ...]
seap-ray report compare RUN_A RUN_B
python jobs/report.py [RUN ...] [config=ray_config.yaml] [dotted.key=value ...]
python jobs/report.py compare RUN_A RUN_B

Prints the tables of a run and draws its page again; or, with `compare`, prints what differs between two runs.

In:   a run: a folder, or a name below run.storage. Without one, run.name.
Out:  tables on the terminal, <run>/report.html, which needs no network, and its pictures as files in <run>/pictures.

Examples:
  seap-ray report runs/demo
  seap-ray report compare demo demo-corpus

Exit codes: 0 done, 2 there is no such run, or a key is wrong.
"""


def _report(request: Request) -> None:
    from seap_ray.report.page import save_figures, write_report
    from seap_ray.report.summary import compare, find, summary

    if request.words[:1] == ["compare"]:
        if len(request.words) != 3:
            raise ConfigError("compare: name two runs: seap-ray report compare RUN_A RUN_B")

        print(compare(*(find(request.config, name) for name in request.words[1:])))
        return

    for name in request.words or [request.config.run.name]:
        run = find(request.config, name)
        print(summary(run))
        save_figures(run, run.pictures)
        print(f"\n{write_report(run)}")


# --- bench -----------------------------------------------------------------------------------------------------------

BENCH = """\
seap-ray bench [SUITE ...] [config=ray_config.yaml] [dotted.key=value ...]
seap-ray bench docs
python jobs/bench.py [SUITE ...] [config=ray_config.yaml] [dotted.key=value ...]
python jobs/bench.py docs

Measures speed: our code and a baseline in turns, beside what the machine allows. It needs a clone of the repository:
benchmarks are no part of the installed package.

In:   suites, by default calibrate, merge, plan, compact and startup, which take some minutes on two cores. With vLLM
      also serve (a dense model beside pruned ones), route (what the endpoint adds) and widths (the time of a layer at
      every width, for pruning.target.latency).
Out:  a table on the terminal and <benchmarks.folder>/<suite>.json. `docs` puts the tables of all suites into
      <benchmarks.folder>.md.

Examples:
  seap-ray bench calibrate merge benchmarks.rounds=5
  seap-ray bench docs

Exit codes: 0 done, whether targets are met or not, 2 a suite or a key is wrong, 4 cut short.
"""


def _bench(request: Request) -> None:
    try:
        from benchmarks.suites import run_suites, write_page
    except ModuleNotFoundError as error:
        # Another module that is missing is a fault of the installation, and its name should be seen.
        if error.name not in ("benchmarks", "benchmarks.suites"):
            raise
        raise ConfigError(
            "bench: benchmarks are no part of the installed package; clone the repository, install that, and run "
            "python jobs/bench.py there"
        ) from None

    if request.words == ["docs"]:
        print(write_page(request.config))
    else:
        run_suites(request.config, request.words, request.overrides)


# --- doctor ----------------------------------------------------------------------------------------------------------

DOCTOR = """\
seap-ray doctor [config=ray_config.yaml] [dotted.key=value ...]
python jobs/doctor.py [config=ray_config.yaml] [dotted.key=value ...]

Says what a job with this config needs (memory, disk by kind, hours), from the model's config.json alone, then looks at
what is there: versions, the model, corpora, access tokens, and on every node of the cluster of RAY_ADDRESS GPUs,
memory, disk, and whether it sees the run's folder, the model and the corpora. Every job looks at the cluster in this
way before it starts.

In:   the config and the environment of the job.
Out:  one line a check: ok, warning, or error with its remedy. Nothing is written.

Examples:
  seap-ray doctor config=configs/llama-3.1-8b.yaml
  ray job submit --working-dir . -- python jobs/doctor.py run.storage=/mnt/shared/runs

Exit codes: 0 a job can run, 2 something is wrong, 3 a corpus is wrong, 4 storage or GPUs cannot be had now.
"""


def _doctor(request: Request) -> None:
    with quick_imports():
        from seap_ray.pipeline.doctor import diagnose

    diagnose(request.config)


# --- all verbs -------------------------------------------------------------------------------------------------------

VERBS: dict[str, Verb] = {
    "prune": Verb(
        "prune a model into task experts and evaluate them",
        PRUNE,
        _prune,
        stopped=RESUMES,
        stopped_code=IncompleteError.exit_code,
    ),
    "eval": Verb(
        "compare pruning methods in a study",
        EVAL,
        _eval,
        stopped=RESUMES,
        stopped_code=IncompleteError.exit_code,
    ),
    "deploy": Verb("serve a finished run behind an OpenAI-compatible endpoint", DEPLOY, _deploy),
    "report": Verb("print the tables of a run, draw its page, compare two runs", REPORT, _report, takes_words=True),
    "bench": Verb(
        "measure speed, in a clone of the repository",
        BENCH,
        _bench,
        takes_words=True,
        stopped="stopped; what was measured is written",
        stopped_code=IncompleteError.exit_code,
    ),
    "doctor": Verb("check what a job needs before it starts", DOCTOR, _doctor),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what ``seap-ray ARGUMENTS`` asks for and return the exit code; by default the process's own arguments."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in HELP:
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(f"seap-ray {version('seap-ray')}")
        return 0

    name, *rest = arguments
    if name not in VERBS:
        print(f"error: seap-ray has no verb {name!r}{nearest(name, list(VERBS))}", file=sys.stderr)
        return ConfigError.exit_code
    return run_verb(name, rest)


def overview() -> str:
    """Return the help of ``seap-ray`` itself: every verb with one line."""
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "seap-ray VERB [config=ray_config.yaml] [dotted.key=value ...]",
            "",
            "Prunes language models into task experts on Ray, and serves them through vLLM.",
            "",
            *lines,
            "",
            "seap-ray VERB --help tells what a verb reads and writes, and lists every key of the config.",
        ]
    )


def run_verb(name: str, arguments: Sequence[str]) -> int:
    """Do one verb's work with the config that ``arguments`` describe and return the exit code.

    An error that a user can fix is one line on stderr; help is answered without reading a config.
    """
    verb = VERBS[name]
    # Anywhere among the arguments, so that it can be added to a command that was just typed.
    if HELP & set(arguments):
        print(help_text(verb.usage))
        return 0

    # A scheduler stops a job by SIGTERM; it then ends as by Ctrl-C, and says how to go on.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    words, overrides = _words_and_overrides(verb, arguments)
    try:
        verb.work(Request(load_config(overrides), words, overrides))
    except SeapError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(verb.stopped, file=sys.stderr)
        return verb.stopped_code

    return 0


def _words_and_overrides(verb: Verb, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the arguments; a verb without words leaves them among the overrides, where they are refused."""
    if not verb.takes_words:
        return [], list(arguments)
    words = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    return words, [argument for argument in arguments if argument not in words]
