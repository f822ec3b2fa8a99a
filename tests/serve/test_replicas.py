"""Replicas of a shared engine: which of them an expert's requests go to, in Ray Serve itself."""

import asyncio
import time
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve
from ray.serve.config import RequestRouterConfig

from serve.replicas import home, joined_states

EXPERTS = [f"expert{i}" for i in range(7)]


@given(st.integers(1, 40), st.integers(1, 40))
def test_experts_are_spread_evenly_over_replicas(n_experts, n_replicas):
    homes = [home(place, n_experts, n_replicas) for place in range(n_experts)]
    per_replica = Counter(replica for own in homes for replica in own)
    # No replica is idle, and none has more than one expert more than another.
    assert set(per_replica) == set(range(n_replicas))
    assert max(per_replica.values()) - min(per_replica.values()) <= 1
    per_expert = [len(own) for own in homes]
    assert max(per_expert) - min(per_expert) <= 1
    assert min(len(homes[place]) for place in range(n_experts)) == max(1, n_replicas // n_experts)


def test_the_state_of_an_expert_is_what_all_replicas_say_of_it():
    first = {"resident": "a", "waiting": {"a": 2, "b": 1}, "failed": ["b"]}
    second = {"resident": "b", "waiting": {"a": 0, "b": 4}, "failed": []}
    assert joined_states([first, second]) == {
        "a": {"resident": True, "waiting": 2},
        "b": {"resident": True, "waiting": 5},
    }
    assert joined_states([first]) == {
        "a": {"resident": True, "waiting": 2},
        "b": {"resident": False, "waiting": 1, "up": False},
    }
    assert joined_states([]) == {}


@serve.deployment(num_replicas=4, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100)
class Replica:
    """Says which replica it is, after a while where it is told to."""

    async def answer(self, request, _info):
        await asyncio.sleep(request.seconds)
        return serve.get_replica_context().replica_id.unique_id


@pytest.fixture
def handle(cluster):
    router = {"experts": EXPERTS, "spill": 5}
    config = RequestRouterConfig(
        request_router_class="serve.replicas.ExpertReplicaRouter", request_router_kwargs=router
    )
    serve.start(proxy_location="Disabled")
    yield serve.run(Replica.options(request_router_config=config).bind(), name="replicas", route_prefix=None)
    serve.shutdown()


def request(expert, seconds=0.0):
    return SimpleNamespace(model=expert, seconds=seconds)


@pytest.mark.ray
@pytest.mark.slow
def test_an_experts_requests_go_to_one_replica_until_it_has_much_more_to_do_than_others(handle):
    replicas = defaultdict(set)
    for _ in range(5):
        for expert in EXPERTS:
            replicas[expert].add(handle.answer.remote(request(expert), None).result(timeout_s=30))
    assert all(len(own) == 1 for own in replicas.values())
    per_replica = Counter(replica for own in replicas.values() for replica in own)
    assert sorted(per_replica.values()) == [1, 2, 2, 2]

    # What runs for one expert is more than its replica's share, so others take part.
    running = []
    for _ in range(30):
        running.append(handle.answer.remote(request(EXPERTS[0], seconds=5), None))
        time.sleep(0.05)
    answered = Counter(reply.result(timeout_s=60) for reply in running)
    (own,) = replicas[EXPERTS[0]]
    assert len(answered) > 1 and answered.most_common(1)[0][0] == own, answered
