"""Which model answers, and which when one fails, with a router, a watch and vLLM played by the test."""

import asyncio
from types import SimpleNamespace

import pytest

from seap_ray.routing.router import MAX_PROMPT_CHARACTERS, Route
from serve.choice import Chooser
from serve.errors import ApiError

# What vLLM, torch and Ray warn of while they are imported.
pytestmark = pytest.mark.filterwarnings(r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning")

MODELS = ("general", "sums", "verse")


class PlayedRouter:
    """Routes a prompt ``task confidence``; a task of its own for token ids; asks for the threshold it was given."""

    threshold = 0.4

    def __init__(self):
        self.read = []

    def route(self, text, *, threshold):
        self.read.append(text)
        task, confidence = text.split()
        reason = "unlike" if task == "strange" else "routed" if float(confidence) >= threshold else "unsure"
        probabilities = {"sums": float(confidence)}
        return Route(task if reason == "routed" else None, reason, float(confidence), probabilities)

    def decode(self, ids):
        assert len(ids) <= MAX_PROMPT_CHARACTERS
        return f"verse 0.{ids[0]}"


def chooser(*down, named_falls_back=True, threshold=None, router=True):
    watch = SimpleNamespace(is_up=lambda model: model not in down)
    played = PlayedRouter() if router else None
    return Chooser(MODELS, played, watch, threshold=threshold, named_falls_back=named_falls_back)


def choose(made, model, *prompts):
    decision = asyncio.run(made.choose(model, prompts))
    return decision.model, decision.reason


@pytest.mark.parametrize("model", [None, "auto"])
@pytest.mark.parametrize(
    ("prompts", "chosen"),
    [
        (["sums 0.9"], ("sums", "routed")),
        (["sums 0.3"], ("general", "unsure")),
        (["strange 0.9"], ("general", "unlike")),
        (["maps 0.9"], ("general", "not_served")),
        (["sums 0.9", "sums 0.5"], ("sums", "routed")),
        (["sums 0.9", "verse 0.9"], ("general", "mixed")),
        (["sums 0.9", "strange 0.9"], ("general", "mixed")),
        ([[5, 7]], ("verse", "routed")),
        ([[5] * (MAX_PROMPT_CHARACTERS + 9)], ("verse", "routed")),
    ],
)
def test_auto_and_no_name_are_routed_by_all_prompts(model, prompts, chosen):
    assert choose(chooser(), model, *prompts) == chosen


def test_of_several_prompts_the_least_sure_speaks():
    decision = asyncio.run(chooser().choose("auto", ["sums 0.9", "sums 0.5"]))
    assert (decision.confidence, decision.task) == (0.5, "sums")


def test_a_name_is_obeyed_and_no_prompt_read():
    made = chooser()
    assert choose(made, "verse", "sums 0.9") == ("verse", "named") and made._router.read == []


def test_a_name_that_is_not_there_is_404_with_those_that_are():
    with pytest.raises(ApiError, match="no model 'maps'; models are auto, general, sums, verse") as refused:
        choose(chooser(), "maps")
    assert refused.value.status == 404


def test_a_configured_threshold_takes_the_fitted_ones_place():
    assert chooser().threshold == 0.4
    assert choose(chooser(threshold=0.95), "auto", "sums 0.9") == ("general", "unsure")
    assert choose(chooser(threshold=0.0), "auto", "sums 0.1") == ("sums", "routed")


def test_without_experts_all_goes_to_the_general_model():
    assert choose(chooser(router=False), "auto", "sums 0.9") == ("general", "no_router")


def test_the_general_model_stands_in_for_one_that_is_down():
    assert choose(chooser("sums"), "auto", "sums 0.9") == ("general", "expert_down")
    assert choose(chooser("sums"), "sums", "sums 0.9") == ("general", "expert_down")
    assert choose(chooser("sums"), "auto", "verse 0.9") == ("verse", "routed")


def test_what_is_said_of_the_prompt_stays_true_when_another_model_stands_in():
    headers = asyncio.run(chooser("sums").choose("auto", ["sums 0.9"])).headers
    assert headers == {
        "x-seap-expert": "general",
        "x-seap-reason": "expert_down",
        "x-seap-task": "sums",
        "x-seap-confidence": "0.9000",
    }


@pytest.mark.parametrize(
    ("made", "model"),
    [
        (chooser("sums", named_falls_back=False), "sums"),
        (chooser("sums", "general"), "auto"),
        (chooser("general"), "general"),
        (chooser("general", router=False), "auto"),
    ],
)
def test_what_nobody_stands_in_for_is_503_and_says_when_to_come_back(made, model):
    with pytest.raises(ApiError, match="is being started again") as refused:
        choose(made, model, "sums 0.9")
    assert refused.value.status == 503 and int(refused.value.headers["retry-after"]) > 0


def test_a_routed_prompt_is_stood_in_for_even_where_a_name_is_not():
    assert choose(chooser("sums", named_falls_back=False), "auto", "sums 0.9") == ("general", "expert_down")


# --- what fails ------------------------------------------------------------------------------------------------------

DEAD = "its engine is dead"


@pytest.fixture
def module():
    import serve.model_calls  # vLLM warns while it is imported

    return serve.model_calls


def calls(module, *outcomes, has_one_replica):
    """Calls to models that give ``outcomes`` one after the other, and that note whom they ask."""
    down, left = set(), iter(outcomes)
    doubt = down.add if has_one_replica else lambda model: None
    watch = SimpleNamespace(is_up=lambda model: model not in down, doubt=doubt, alarm=lambda: None)
    chooser = Chooser(MODELS, None, watch, threshold=None, named_falls_back=True)
    made = module.ModelCalls(None, chooser, watch, timeout_s=600)
    made.asked = []

    async def first(method, body, model):
        made.asked.append(model)
        outcome = next(left)
        if outcome is DEAD:
            raise module.EngineDeadError()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome, None

    made._call = first
    return made


def begin(made):
    decision, reply, _ = asyncio.run(made.start("chat", SimpleNamespace(model="verse"), ["a"]))
    return decision.model, decision.reason, reply


@pytest.mark.parametrize(
    ("has_one_replica", "outcomes", "answer", "asked"),
    [
        (True, [DEAD, "hello"], ("general", "expert_down", "hello"), ["verse", "general"]),
        (False, [DEAD, "hello"], ("verse", "named", "hello"), ["verse", "verse"]),
        (False, [DEAD, DEAD, "hello"], ("general", "expert_down", "hello"), ["verse", "verse", "general"]),
    ],
)
@pytest.mark.vllm
def test_a_dead_replica_of_several_is_no_dead_model(module, has_one_replica, outcomes, answer, asked):
    made = calls(module, *outcomes, has_one_replica=has_one_replica)
    assert begin(made) == answer and made.asked == asked


@pytest.mark.parametrize("has_one_replica", [True, False])
@pytest.mark.vllm
def test_who_asks_dead_engines_alone_is_told_to_come_back(module, has_one_replica):
    with pytest.raises(ApiError, match="is being started again"):
        begin(calls(module, *[DEAD] * 9, has_one_replica=has_one_replica))


def as_vllm_says(error):
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    return create_error_response(error).error.model_dump()


@pytest.mark.vllm
def test_a_failure_of_a_healthy_engine_takes_no_model_down(module):
    from vllm.exceptions import GenerationError

    for error, status in ((GenerationError("secret detail"), 500), (NotImplementedError("secret detail"), 501)):
        failure = module.refused(as_vllm_says(error))
        made = calls(module, failure, has_one_replica=True)
        with pytest.raises(ApiError, match="^vLLM failed at this request$") as told:
            begin(made)
        assert told.value.status == status and made.asked == ["verse"] and made._watch.is_up("verse")


@pytest.mark.vllm
def test_a_dead_engine_is_known_by_vllms_words_in_a_stream(module):
    assert isinstance(module.refused(as_vllm_says(module.EngineDeadError())), module.DEAD)


def demoting(*demoted, down=(), named_falls_back=True):
    """A chooser whose guard has demoted some experts, with the dense model as the reference."""
    watch = SimpleNamespace(is_up=lambda model: model not in down)
    return Chooser(
        (*MODELS, "dense"),
        PlayedRouter(),
        watch,
        threshold=None,
        named_falls_back=named_falls_back,
        reference="dense",
        demoted=lambda: frozenset(demoted),
    )


def test_the_reference_answers_for_a_demoted_expert():
    assert choose(demoting("sums"), "auto", "sums 0.9") == ("dense", "demoted")
    assert choose(demoting("sums"), "sums", "sums 0.9") == ("dense", "demoted")
    assert choose(demoting("sums"), "auto", "verse 0.9") == ("verse", "routed")
    assert choose(demoting("sums"), "general", "sums 0.9") == ("general", "named")
    decision = asyncio.run(demoting("sums").choose("auto", ["sums 0.9"]))
    assert (decision.instead_of, decision.task) == ("sums", "sums")


def test_who_is_obeyed_by_name_gets_a_demoted_expert_where_nobody_may_stand_in():
    assert choose(demoting("sums", named_falls_back=False), "sums", "sums 0.9") == ("sums", "named")
    assert choose(demoting("sums", named_falls_back=False), "auto", "sums 0.9") == ("dense", "demoted")


def test_a_demoted_expert_answers_while_the_reference_is_down():
    assert choose(demoting("sums", down=["dense"]), "auto", "sums 0.9") == ("sums", "routed")


def test_without_a_threshold_measured_quality_decides():
    from seap_ray.routing.expected_quality import KeptQuality

    kept = KeptQuality({"sums": {"sums": 1.0}, "verse": {"verse": 1.0, "sums": 0.0}, "general": {"sums": 0.9}})
    up = SimpleNamespace(is_up=lambda model: True)
    made = Chooser(MODELS, PlayedRouter(), up, threshold=None, named_falls_back=True, kept=kept)
    # The played router's probabilities are of sums alone: the threshold is no longer its 0.4.
    assert choose(made, "auto", "sums 0.1") == ("sums", "routed") and made.threshold is None
    assert choose(made, "auto", "verse 0.9") == ("general", "unsure")
    assert choose(made, "auto", "strange 0.9") == ("general", "unlike")
    configured = Chooser(MODELS, PlayedRouter(), up, threshold=0.5, named_falls_back=True, kept=kept)
    assert choose(configured, "auto", "verse 0.9") == ("verse", "routed") and configured.threshold == 0.5
