"""Where a cluster's tasks run: on a real head and a real node beside it."""

import subprocess
import sys

import pytest
import ray
import torch

from seap_ray.errors import IncompleteError
from seap_ray.pipeline.cluster import HEAD, _not_on_head, connect, work_task
from tests.support import ROOT

TWO_NODES = """
import os
import ray
from ray.cluster_utils import Cluster
from seap_ray.pipeline.cluster import all_checked, connect, work_task

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
node = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address
connect()
where = work_task(lambda: ray.get_runtime_context().get_node_id())
found = set(ray.get([where.remote() for _ in range(8)]))
head = ray.get_runtime_context().get_node_id()
checked = all_checked(lambda item: ray.get_runtime_context().get_node_id() == item, [node.node_id, head])
print(found == {node.node_id}, checked == [True, False], flush=True)
ray.shutdown()
cluster.shutdown()
"""


def node(name: str, cpus: float, *, head: bool = False, alive: bool = True) -> dict:
    resources = {"CPU": cpus} | ({HEAD: 1.0} if head else {})
    return {"NodeID": name, "Alive": alive, "Resources": resources}


@pytest.mark.parametrize(
    "nodes, selector",
    [
        ([node("h", 2, head=True), node("a", 1)], {"ray.io/node-id": "!h"}),
        ([node("h", 2, head=True)], {}),
        ([node("h", 2, head=True), node("a", 1, alive=False), node("b", 0)], {}),
        ([node("h", 0, head=True), node("a", 1)], {}),
    ],
    ids=["a head and a node", "one machine", "nobody else has CPUs", "a head without work"],
)
def test_work_stays_off_a_head_where_other_nodes_have_cpus(nodes, selector):
    assert _not_on_head(nodes) == selector


@pytest.mark.ray
def test_on_a_real_cluster_no_work_reaches_the_head():
    done = subprocess.run([sys.executable, "-c", TWO_NODES], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.stdout.strip().splitlines()[-1:] == ["True True"], done.stdout + done.stderr


@pytest.mark.ray
def test_a_machine_too_busy_to_start_a_node_is_said_so_in_a_line(monkeypatch):
    def init(*_, **__):
        raise Exception("The current node timed out during startup. This could happen because the GCS is overloaded.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(IncompleteError, match=r"within 30 seconds: other processes .*; run the same command again"):
        connect()


def test_work_runs_on_one_thread_whatever_its_process_did_before(cluster):
    # Both processes of the cluster, whichever takes the work. Lambdas, since workers cannot import this file.
    other_work = ray.remote(num_cpus=1)(lambda: torch.set_num_threads(2))
    ray.get([other_work.remote() for _ in range(8)])

    work = work_task(lambda: torch.get_num_threads())

    assert ray.get([work.remote() for _ in range(4)]) == [1] * 4
