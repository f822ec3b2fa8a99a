"""What is refused before an engine starts, what engines are told, and the metrics page. No engine runs here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from seap_ray.config import load_config
from seap_ray.errors import ConfigError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.export import CheckpointExport
from serve.app import _dotted
from serve.node_metrics import merged
from tests.support import ROOT
from tests.support.builders import random_plan, write_compacted

pytestmark = [
    pytest.mark.vllm,
    # What vLLM, torch and Ray warn of while they are imported.
    pytest.mark.filterwarnings(r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning"),
]


@pytest.fixture
def app():
    import serve.application

    return serve.application


@pytest.fixture
def run(tmp_path, dense, monkeypatch):
    """A folder like a run's, at two ratios, without a router."""
    monkeypatch.setenv("SEAP_API_KEYS", "a-key-of-these-tests")
    checkpoint = Checkpoint.open(str(dense("llama_gqa")))
    root = tmp_path / "run"
    for ratio in ("0.20", "0.50"):
        for name, kind in (("general", "general"), ("alpha", "expert"), ("beta", "expert"), ("wanda_sp", "baseline")):
            folder = root / "experts" / ratio / name
            folder.mkdir(parents=True)
            write_compacted(CheckpointExport(checkpoint, random_plan(checkpoint.architecture, seed=1), {}), folder)
            about = {"requested_ratio": float(ratio), "parameters": 7, "kv_bytes_per_token": 64, "plan": {"kind": kind}}
            (folder / "seap.json").write_text(json.dumps(about))
    (root / "config.json").write_text("{}")
    return root


def config(run, *arguments):
    path = run.parent / "c.yaml"
    path.write_text(f"run: {{storage: {run.parent}, name: {run.name}}}")
    return load_config([f"config={path}", *arguments])


def names(app, run, *arguments):
    from serve.experts import find_experts

    made = config(run, *arguments)
    return [(expert.name, expert.ratio) for expert in find_experts(made, app.Run.of(made))]


def test_the_general_model_and_all_experts_of_the_smallest_ratio_are_served_and_no_baseline(app, run):
    assert names(app, run) == [("general", 0.2), ("alpha", 0.2), ("beta", 0.2)]
    assert names(app, run, "serve.ratio=0.5", "serve.experts=[beta]") == [("general", 0.5), ("beta", 0.5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.name=none"], "none: no such run; make it with jobs/prune.py"),
        (["serve.ratio=0.3"], "serve.ratio: .* holds 0.20, 0.50, not 0.3"),
        (["serve.experts=[gamma]"], "serve.experts: .* holds no expert gamma; it holds alpha, beta"),
        (["serve.experts=[wanda_sp]"], "serve.experts: .* holds no expert wanda_sp"),
        ([], "router: no usable router"),
    ],
)
def test_what_is_not_there_is_named(app, run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        app.prepare(config(run, *arguments))


def test_a_run_without_a_whole_general_model_is_not_served(app, run):
    (run / "experts/0.20/general/seap.json").unlink()
    assert names(app, run)[0] == ("general", 0.5)
    with pytest.raises(ConfigError, match="0.20 holds no whole general model"):
        names(app, run, "serve.ratio=0.2")


def test_a_checkpoint_that_is_not_what_it_declares_is_not_served(app, run):
    path = run / "experts/0.20/alpha/config.json"
    about = json.loads(path.read_text())
    layer = about["per_layer_config"][min(about["per_layer_config"])]
    layer["o_proj_bias"] = True
    path.write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"alpha: the checkpoint lacks model\.layers\.\d\.self_attn\.o_proj\.bias"):
        app.prepare(config(run))


@pytest.mark.parametrize(
    ("argument", "can_chat"), [("serve.num_cpus=1", False), ("serve.engine.chat_template=a", True)]
)
def test_models_chat_with_the_template_of_their_tokenizer_or_of_the_config(app, run, argument, can_chat):
    for path in run.rglob("*"):
        if path.name in ("chat_template.jinja", "tokenizer_config.json"):
            path.unlink()
    service = app.prepare(config(run, "serve.experts=[]", argument))
    assert service.can_chat == service.experts[0].card["chat"] == can_chat


def test_a_general_model_alone_needs_no_router(app, run):
    service = app.prepare(config(run, "serve.experts=[]"))
    assert [expert.name for expert in service.experts] == ["general"] and service.router is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve.engine.trust_remote_code=true"], "engine.trust_remote_code would let code in"),
        (["serve.engine.model=x"], "engine.model is set by the service itself"),
        (["serve.min_replicas=3", "serve.max_replicas=2"], "min_replicas=3 is more than max_replicas=2"),
        (["serve.auth=none", "serve.host=10.0.0.1"], "auth=none is for the hosts 127.0.0.1, localhost, ::1 only"),
        (["serve.port=0"], "serve.port"),
    ],
)
def test_settings_that_contradict_or_endanger_are_refused(run, arguments, message):
    with pytest.raises(ConfigError, match=message):
        config(run, *arguments)


def test_engines_are_told_every_limit(app, run):
    from serve.engines import EngineGroup
    from serve.experts import find_experts
    from serve.llm_config import llm_config

    made = config(run, "serve.engine.max_model_len=32", "serve.device=gpu", "serve.num_gpus=0.5", "model.dtype=float16")
    experts = find_experts(made, app.Run.of(made))
    pack = EngineGroup((experts[0],))
    told = llm_config(made, pack)
    assert told.engine_kwargs == {"dtype": "float16", "max_model_len": 32}
    assert told.placement_group_config == {"bundle_per_worker": {"CPU": 1.0, "GPU": 0.5}}
    assert told.deployment_config["max_ongoing_requests"] == told.deployment_config["max_queued_requests"] == 64
    on_cpu = llm_config(config(run, "serve.device=cpu", "serve.engine.max_model_len=32"), pack).engine_kwargs
    assert on_cpu["kv_cache_memory_bytes"] == 2 * 64 * 32 * 64, "of 64 requests, 32 tokens and 64 bytes; twice"
    shared = llm_config(made, EngineGroup(tuple(experts)))
    assert shared.engine_kwargs["load_format"] == "seap_ray" and shared.model_id == "shared_engine"
    assert shared.deployment_config["max_ongoing_requests"] > 64 + 3 * 64, "all may wait in the server"
    assert shared.deployment_config["health_check_timeout_s"] >= 600, "it says nothing while its engine starts again"
    about = shared.experimental_configs["shared_engine"]
    assert [*about["folders"]] == ["general", "alpha", "beta"] and about["limits"]["running"] == 64


@pytest.mark.parametrize(
    ("arguments", "gpus", "engines", "reason"),
    [
        (["serve.device=cpu"], 0, 1, "one engine for 3 models of equal shapes: there is room for 1 engine"),
        (["serve.device=gpu"], 2, 1, "one engine for 3 models of equal shapes: there is room for 2 engines"),
        (["serve.device=gpu"], 3, 3, "an engine for each model: there is room for 3 engines"),
        (["serve.device=gpu", "serve.num_gpus=0.5"], 2, 3, "an engine for each model: there is room for 4 engines"),
        (["serve.device=gpu", "serve.engine.tensor_parallel_size=2"], 4, 1, ".* room for 2 engines"),
        (["serve.device=gpu", "serve.packing=shared"], 8, 1, "one engine for 3 models of equal shapes"),
        (["serve.device=cpu", "serve.packing=separate"], 0, 3, "an engine for each model"),
        (["serve.device=cpu", "serve.experts=[]"], 0, 1, "an engine for each model"),
        (["serve.device=cpu", "serve.engine.load_format=dummy"], 0, 3, ".* since serve.engine has load_format"),
    ],
)
def test_models_share_an_engine_where_they_outnumber_accelerators(
    app, run, monkeypatch, arguments, gpus, engines, reason
):
    import torch

    from serve.engines import engine_groups
    from serve.experts import find_experts

    monkeypatch.setattr("ray.is_initialized", lambda: False)  # the cluster of tests before has no GPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    made = config(run, *arguments)
    found, why = engine_groups(made, find_experts(made, app.Run.of(made)))
    assert len(found) == engines and re.fullmatch(reason, why), why


def test_models_of_other_shapes_do_not_share_an_engine(app, run):
    from serve.engines import engine_groups
    from serve.experts import find_experts

    path = run / "experts/0.20/beta/config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | {"rope_theta": 5e5}))
    made = config(run, "serve.device=cpu")
    found, why = engine_groups(made, find_experts(made, app.Run.of(made)))
    assert len(found) == 3 and why == "an engine for each model, since beta has another config.json than general"
    with pytest.raises(ConfigError, match="serve.packing: shared is not possible, since beta has another config.json"):
        app.prepare(config(run, "serve.packing=shared"))


def test_quantised_models_share_an_engine_where_all_are_of_one_scheme(app, run):
    from serve.engines import engine_groups
    from serve.experts import find_experts

    for name, bits in {"general": 4, "alpha": 4, "beta": 4}.items():
        quantise(run / f"experts/0.20/{name}", bits)
    made = config(run, "serve.device=cpu")
    found, why = engine_groups(made, find_experts(made, app.Run.of(made)))
    assert len(found) == 1 and why.startswith("one engine for 3 models of equal shapes")

    quantise(run / "experts/0.20/beta", 8)
    found, why = engine_groups(made, find_experts(made, app.Run.of(made)))
    assert len(found) == 3 and why == "an engine for each model, since beta has another config.json than general"


def test_experts_with_int8_activations_have_engines_of_their_own_on_a_cpu(app, run):
    from serve.engines import engine_groups
    from serve.experts import find_experts

    group = {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8, "type": "int", "dynamic": True}}
    for name in ("general", "alpha", "beta"):
        path = run / f"experts/0.20/{name}/config.json"
        about = {"quantization_config": {"config_groups": {"group_0": group}}}
        path.write_text(json.dumps(json.loads(path.read_text()) | about))
    for device, engines in (("cpu", 3), ("gpu", 1)):
        made = config(run, f"serve.device={device}", "serve.num_gpus=1")
        found, why = engine_groups(made, find_experts(made, app.Run.of(made)))
        assert len(found) == engines and ("W8A8 on a CPU" in why) == (device == "cpu")


def quantise(folder: Path, bits: int) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"bits": bits}}))


def test_the_dense_model_is_served_on_request_by_an_engine_of_its_own(app, run, dense):
    from serve.engines import engine_groups
    from serve.experts import find_experts

    source = f"model.source={dense('llama_gqa')}"
    assert [name for name, _ in names(app, run, source)] == ["general", "alpha", "beta"]
    made = config(run, source, "serve.dense=true", "serve.device=cpu")
    found = find_experts(made, app.Run.of(made))
    groups, why = engine_groups(made, found)
    assert [[expert.name for expert in group.experts] for group in groups] == [["general", "alpha", "beta"], ["dense"]]
    assert why.startswith("one engine for 3 models of equal shapes")
    assert found[-1].parameters == Checkpoint.open(str(dense("llama_gqa"))).parameters and found[-1].ratio == 0
    with pytest.raises(ConfigError, match="guard.reference=dense needs dense=true"):
        config(run, "serve.guard.reference=dense")


@pytest.mark.parametrize(
    ("arguments", "reference", "floors"),
    [
        ([], "general", {"alpha": 0.83, "beta": None}),
        (["serve.dense=true"], "dense", {"alpha": 0.88, "beta": None}),
        (["serve.dense=true", "serve.guard.reference=general"], "general", {"alpha": 0.83, "beta": None}),
        (["serve.guard.margin=0.3"], "general", {"alpha": 0.58, "beta": None}),
        (["serve.guard.margin=0.95"], "general", {"alpha": None, "beta": None}),
        (["serve.guard.floor=0.7"], "general", {"alpha": 0.7, "beta": 0.7}),
    ],
)
def test_experts_are_held_to_what_the_job_has_measured(app, run, dense, arguments, reference, floors):
    from serve.experts import find_experts

    about = {"dense": {"share": 0.95, "stderr": 0.01, "n": 64}, "general": {"share": 0.9, "stderr": 0.01, "n": 64}}
    (run / "agreements" / "0.20").mkdir(parents=True)
    (run / "agreements" / "0.20" / "alpha.json").write_text(json.dumps(about))
    made = config(run, f"model.source={dense('llama_gqa')}", *arguments)
    settings = app._guard_settings(made, find_experts(made, app.Run.of(made)))
    assert settings.reference == reference
    assert settings.floors == pytest.approx(floors)


@pytest.mark.parametrize("argument", ["serve.guard.share=0", "serve.experts=[]"])
def test_where_nothing_is_judged_there_is_no_guard(app, run, argument):
    from serve.experts import find_experts

    made = config(run, argument)
    assert app._guard_settings(made, find_experts(made, app.Run.of(made))) is None


def test_a_weight_of_what_is_not_served_is_refused(app, run):
    with pytest.raises(ConfigError, match="serve.pack.weights: gamma is not served; served are general, alpha, beta"):
        app.prepare(config(run, "serve.pack.weights={gamma: 2}"))


def test_serve_run_ends_with_one_line_and_no_traceback(run):
    command = [Path(sys.executable).parent / "serve", "run", "serve.app:build", f"run.storage={run.parent}"]
    done = subprocess.run([*command, "run.name=none"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "error: " in done.stderr and "none: no such run" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_job_ends_with_one_line_and_no_traceback(run):
    command = [sys.executable, "jobs/deploy.py", f"run.storage={run.parent}", "run.name=none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.ray
def test_a_cluster_without_room_ends_the_job_with_one_line_and_no_traceback(run):
    """Ray runs by then, and has to be stopped; Serve does not."""
    command = [sys.executable, "jobs/deploy.py", f"run.storage={run.parent}", f"run.name={run.name}"]
    settings = ["serve.experts=[]", "serve.device=cpu", "serve.num_cpus=9999"]
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    done = subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: serve.num_cpus: 1 engine reserves 9999 CPUs, and the cluster has ")
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stdout


def test_the_end_of_a_serve_that_is_gone_shows_no_traceback(monkeypatch, capsys):
    from serve import deployment

    def delete(name):
        raise RuntimeError("the controller is gone")

    monkeypatch.setattr(deployment.serve, "delete", delete)
    monkeypatch.setattr(deployment, "_is_alive", lambda: True)
    deployment._take_down(drain_timeout_s=5)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "header"),
    [
        ("serve.auth=keys", ' -H "Authorization: Bearer $SEAP_API_KEYS"'),
        ("serve.api_keys_file=keys", ' -H "Authorization: Bearer KEY"'),
        ("serve.auth=none", ""),
    ],
)
def test_the_command_that_is_told_has_the_key_from_where_it_is(run, capsys, setting, header):
    from serve.deployment import _print_addresses

    _print_addresses(config(run, setting), ["general"])
    assert f"  curl http://127.0.0.1:8000/v1/models{header}\n" in capsys.readouterr().out


def test_arguments_may_be_nested_as_in_a_file():
    args = {"config": "c.yaml", "serve": {"engine": {"max_model_len": 8}, "experts": ["a"]}, "run": {"name": "x"}}
    assert dict(_dotted(args)) == {
        "config": "c.yaml",
        "serve.engine.max_model_len": "8",
        "serve.experts": '["a"]',
        "run.name": "x",
    }


def test_metrics_of_nodes_are_one_page_with_each_metric_once():
    one = "# HELP ray_seap_route_total n\n# TYPE ray_seap_route_total counter\n"
    page = one + 'ray_seap_route_total{node="a"} 1.0\n# HELP ray_other x\n# TYPE ray_other gauge\nray_other 3\n'
    other = one + 'ray_seap_route_total{node="b"} 2.0\n# HELP ray_vllm_x y\n# TYPE ray_vllm_x gauge\nray_vllm_x 4\n'
    assert merged([page, other]).splitlines() == [
        "# HELP seap_route_total n",
        "# TYPE seap_route_total counter",
        'seap_route_total{node="a"} 1.0',
        'seap_route_total{node="b"} 2.0',
        "# HELP ray_vllm_x y",
        "# TYPE ray_vllm_x gauge",
        "ray_vllm_x 4",
    ]


def test_prompts_are_routed_by_what_the_job_has_measured(app, run):
    from serve.experts import find_experts

    def row(name, kind, ratio, **values):
        cells = {task: {"metric": "acc", "value": value, "stderr": 0.01, "n": 9} for task, value in values.items()}
        return {"name": name, "method": kind, "kind": kind, "ratio": ratio, "quality": cells}

    rows = [
        row("dense", "dense", None, alpha=0.8, beta=0.5),
        row("general", "general", 0.2, alpha=0.4, beta=0.4),
        row("alpha", "expert", 0.2, alpha=0.8, beta=0.1),
        row("wanda_sp", "baseline", 0.2, alpha=0.1, beta=0.1),
        row("general", "general", 0.5, alpha=0.1, beta=0.1),
    ]
    made = config(run)

    def kept():
        about = {"command": "", "config": {}, "seed": 0, "dtype": "float32", "tasks": {}, "versions": {}}
        (run / "results.json").write_text(json.dumps({**about, "models": rows, "router": None}))
        return app._kept_quality(app.Run.of(made), find_experts(made, app.Run.of(made)))

    with pytest.raises(ConfigError, match="serve.router.rule: .* has no results of jobs/prune.py"):
        app._kept_quality(app.Run.of(made), find_experts(made, app.Run.of(made)))
    assert kept().by_model == {"general": {"alpha": 0.5, "beta": 0.8}, "alpha": {"alpha": 1.0, "beta": 0.2}}
    rows[2]["quality"]["beta"] = {"error": "lost"}
    with pytest.raises(ConfigError, match="serve.router.rule: alpha was not judged on every task"):
        kept()


@pytest.mark.parametrize(
    ("written", "parser"),
    [
        ("<tool_call>\n{{ call | tojson }}\n</tool_call>", "hermes"),
        ("<tool_call><function={{ call.name }}>", "qwen3_coder"),
        ("<tool_call>{{ call.name }}<arg_key>", "glm45"),
        ("[TOOL_CALLS]{{ calls | tojson }}", "mistral"),
        ("<|python_tag|>{{ call | tojson }}", "llama3_json"),
        ("<function_calls>{{ calls }}</function_calls>", "olmo3"),
    ],
)
def test_calls_of_tools_are_read_in_the_form_that_the_chat_template_writes(app, run, written, parser):
    from vllm.tool_parsers import ToolParserManager

    from serve.engines import EngineGroup
    from serve.experts import find_experts
    from serve.llm_config import llm_config

    assert parser in ToolParserManager.list_registered()
    for folder in (run / "experts" / "0.20").iterdir():
        (folder / "chat_template.jinja").write_text("{% for m in messages %}" + written + "{% endfor %}")
    made = config(run, "serve.device=gpu", "serve.tools=auto")
    experts = find_experts(made, app.Run.of(made))
    arguments = llm_config(made, EngineGroup((experts[0],))).engine_kwargs
    assert (arguments["enable_auto_tool_choice"], arguments["tool_call_parser"]) == (True, parser)
    told = llm_config(config(run, "serve.device=gpu"), EngineGroup((experts[0],))).engine_kwargs
    assert "tool_call_parser" not in told


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("serve.tools=nope", r"serve.tools: vLLM has no parser 'nope'; it has .*hermes"),
        ("serve.tools=auto", r"serve.tools: the chat template of general writes tool calls in no form that auto knows"),
    ],
)
def test_a_parser_that_is_not_there_is_told_before_an_engine_starts(app, run, argument, message):
    for folder in (run / "experts" / "0.20").iterdir():
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ConfigError, match=message):
        app.prepare(config(run, argument))


def test_in_speculative_mode_the_dense_model_is_alone_with_its_draft(app, run, dense):
    from serve.engines import engine_groups
    from serve.experts import find_experts
    from serve.llm_config import llm_config

    made = config(
        run,
        f"model.source={dense('llama_gqa')}",
        *("serve.mode=speculative", "serve.device=cpu", "serve.ratio=0.5", "serve.draft.tokens=3"),
    )
    (served,) = find_experts(made, app.Run.of(made))
    assert (served.name, served.kind, served.draft) == ("dense", "dense", run / "experts/0.50/general")
    assert served.kv_bytes_per_token > 64, "the draft's keys and values lie beside its own"
    (group,), _ = engine_groups(made, [served])
    told = llm_config(made, group)
    assert told.engine_kwargs["speculative_config"] == {
        "method": "draft_model",
        "model": str(run / "experts/0.50/general"),
        "num_speculative_tokens": 3,
    }
    assert told.model_id == "dense"
    service = app.prepare(made)
    assert (service.main, service.router, service.guard, service.kept) == ("dense", None, None, None)


def test_a_draft_that_is_not_there_is_named(app, run, dense):
    arguments = [f"model.source={dense('llama_gqa')}", "serve.mode=speculative", "serve.draft.model=gamma"]
    with pytest.raises(ConfigError, match=r"serve.draft.model: .* holds no gamma; it holds general, alpha, beta"):
        app.prepare(config(run, *arguments))
