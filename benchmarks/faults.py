"""python -m benchmarks.faults [runs=50] [seed=0] [KIND ...]

The main job under faults: a head without work and two worker nodes, real raylets on this machine, and in every run one
fault at a moment drawn at random. Where the job ends by it, the same command is run again, on a new cluster if that is
gone. Then every statistic, plan and weight must have the sha256 of a run without faults. Prints a line a run, and JSON.
Full and read-only storage take mounts and file attributes, and so root; the clock takes libfaketime.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

ROOT = Path(__file__).resolve().parents[1]
JOB = [
    "tasks=[sort, logic]",
    "corpus.samples=48",
    "corpus.shard_sequences=4",
    "evaluation.samples=0",
    "pruning.ratio=0.5",
    "pruning.baselines={}",
]
LIMIT_S = 300
"""Seconds after which a job counts as hung."""
MAX_COMMANDS = 4
"""Times that the command is given, the first included."""
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
"""Library of Debian's package faketime."""
RPC = {"num_failures": 20, "req_failure_prob": 20, "resp_failure_prob": 20, "in_flight_failure_prob": 0}
"""Share in percent of the first calls that fail before they are sent, or before their answer is back."""
RPC_CALLS = ("PushTask", "GetObjectStatus")
DEFAULT_ENVIRONMENT = {"RAY_worker_niceness": "0"}
"""Ray's workers have niceness 15, and starve beside anything else that this machine does."""
ENVIRONMENTS = {
    "rpc": {"RAY_testing_rpc_failure": json.dumps({f"CoreWorkerService.grpc_client.{call}": RPC for call in RPC_CALLS})}
}
"""Environment of all processes, by kind of fault."""
ONE_NODE_ENVIRONMENTS = {"clock": {"LD_PRELOAD": FAKETIME, "FAKETIME": "+3600s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}}
"""Environment of one of two nodes, by kind of fault."""


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for processes that are started inside the block."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


@dataclass
class Machines:
    """A head and two nodes, and the job that runs on them."""

    environment: dict[str, str] = field(default_factory=dict)
    """Environment of all of them and of the job."""
    one_node_environment: dict[str, str] = field(default_factory=dict)
    """Environment of one of the nodes alone."""
    storage: Path = Path()
    """Storage of the job that was started last."""

    def __post_init__(self) -> None:
        with _environment(DEFAULT_ENVIRONMENT | self.environment):
            # The head does no work, so that a fault of a node is never one of the head.
            self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
            with _environment(self.one_node_environment):
                first = self.cluster.add_node(num_cpus=1)
            self.nodes = [first, self.cluster.add_node(num_cpus=1)]
            self.cluster.wait_for_nodes()

    def start(self, storage: Path) -> subprocess.Popen:
        """Start the job as a process; its standard error is in a file beside the storage."""
        job = [sys.executable, "jobs/prune.py", f"run.storage={storage}", "run.name=run", *JOB]
        environment = os.environ | DEFAULT_ENVIRONMENT | self.environment | {"RAY_ADDRESS": self.cluster.address}
        self.storage = storage
        storage.mkdir(exist_ok=True)
        with storage.with_suffix(".stderr").open("w") as stderr:
            return subprocess.Popen(job, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)

    def processes(self, node: Any) -> list[psutil.Process]:
        """Return a node's raylet and everything that it started."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]

    def workers(self, title: str) -> list[psutil.Process]:
        """Return the processes of the nodes whose command has ``title``."""
        workers: list[psutil.Process] = []
        for node in self.nodes:
            with suppress(psutil.Error):  # one that ends meanwhile
                workers += [process for process in self.processes(node) if title in " ".join(process.cmdline())]
        return workers

    def stop(self) -> None:
        """End all nodes, as far as they still run."""
        with suppress(Exception):
            self.cluster.shutdown()


# --- faults ----------------------------------------------------------------------------------------------------------
# Each is given the machines, the job's process and a source of random numbers, and returns what it did, in words.


def kill_actor(machines: Machines, _job: subprocess.Popen, draw: random.Random) -> str:
    """Kill a process that holds the model, or wait until there is one."""
    for _ in range(200):
        actors = machines.workers("Calibrator")
        if actors:
            return _kill(draw.choice(actors))
        time.sleep(0.05)
    return "none was there"


def kill_worker(machines: Machines, _job: subprocess.Popen, draw: random.Random) -> str:
    """Kill any of Ray's workers."""
    workers = machines.workers("ray::")
    return _kill(draw.choice(workers)) if workers else "none was there"


def replace_node(machines: Machines, _job: subprocess.Popen, draw: random.Random) -> str:
    """Kill a node, and add another one."""
    machines.cluster.remove_node(machines.nodes.pop(draw.randrange(2)), allow_graceful=False)
    machines.nodes.append(machines.cluster.add_node(num_cpus=1))
    return "one of two, replaced"


def kill_driver(_machines: Machines, job: subprocess.Popen, _draw: random.Random) -> str:
    """Kill the job's own process."""
    job.kill()
    return "SIGKILL"


def kill_head(machines: Machines, _job: subprocess.Popen, _draw: random.Random) -> str:
    """Kill the head node."""
    head: Any = machines.cluster.head_node
    head.kill_all_processes(check_alive=False, allow_graceful=False)
    return "with all its processes"


def pause_node(machines: Machines, _job: subprocess.Popen, draw: random.Random) -> str:
    """Make a node not answer for a while."""
    seconds = draw.uniform(2, 10)
    processes = machines.processes(draw.choice(machines.nodes))
    for process in processes:
        with suppress(psutil.Error):
            process.suspend()

    time.sleep(seconds)
    for process in processes:
        with suppress(psutil.Error):
            process.resume()
    return f"{seconds:.1f} s"


def fail_calls(_machines: Machines, _job: subprocess.Popen, _draw: random.Random) -> str:
    """Do nothing: by its environment Ray fails some of its own calls."""
    return "from the start"


def fill_disk(_machines: Machines, _job: subprocess.Popen, _draw: random.Random) -> str:
    """Do nothing: the storage is a small disk from the start."""
    return "a disk of 100 to 140 MB"


def forbid_writes(machines: Machines, _job: subprocess.Popen, _draw: random.Random) -> str:
    """Make the storage read-only."""
    # Files may go meanwhile, which chattr complains about.
    subprocess.run(["chattr", "-R", "+i", machines.storage], stderr=subprocess.DEVNULL)
    return "no file can be made, changed or removed"


def damage_file(_machines: Machines, job: subprocess.Popen, _draw: random.Random) -> str:
    """Kill the driver; before the next command a file of the run is damaged."""
    job.kill()
    return "a file, after SIGKILL of the driver"


def skew_clock(_machines: Machines, _job: subprocess.Popen, _draw: random.Random) -> str:
    """Do nothing: by its environment one node has another time."""
    return "one node is an hour ahead, from the start"


def _kill(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        name = process.cmdline()[0]
        process.send_signal(signal.SIGKILL)
        return name.removeprefix("ray::")
    return "it was gone"


FAULTS: dict[str, Callable[[Machines, subprocess.Popen, random.Random], str]] = {
    "actor": kill_actor,
    "worker": kill_worker,
    "node": replace_node,
    "driver": kill_driver,
    "head": kill_head,
    "pause": pause_node,
    "rpc": fail_calls,
    "full": fill_disk,
    "readonly": forbid_writes,
    "corrupt": damage_file,
    "clock": skew_clock,
}


# --- repairs, before the command is given again ----------------------------------------------------------------------


def _enlarge_disk(storage: Path, _draw: random.Random) -> None:
    subprocess.run(["mount", "-o", "remount,size=1g", storage], check=True)


def _allow_writes(storage: Path, _draw: random.Random) -> None:
    subprocess.run(["chattr", "-R", "-i", storage], check=True)


def _damage_random_file(storage: Path, draw: random.Random) -> None:
    """Cut a file of the run in half, or change a byte of it."""
    files = [path for path in sorted(storage.rglob("*")) if path.is_file() and path.stat().st_size]
    if not files:
        return
    path = draw.choice(files)
    # Half of the faults are a torn file, half a flipped bit.
    content = bytearray(path.read_bytes())
    if draw.random() < 0.5:
        content = content[: len(content) // 2]
    else:
        content[draw.randrange(len(content))] ^= 1

    path.write_bytes(content)
    print(f"  damaged {path.relative_to(storage)}", file=sys.stderr)


REPAIRS: dict[str, Callable[[Path, random.Random], None]] = {
    "full": _enlarge_disk,
    "readonly": _allow_writes,
    "corrupt": _damage_random_file,
}


# --- runs ------------------------------------------------------------------------------------------------------------


def main(runs: int, seed: int, kinds: Sequence[str]) -> None:
    """Make a run without a fault, then runs with faults of these kinds in turns, and print a summary as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        machines = Machines()
        started = time.monotonic()
        reference_exit = _exit_code(machines.start(Path(folder) / "reference"))
        usual_s = time.monotonic() - started
        # Every run has a cluster of its own.
        machines.stop()
        assert reference_exit == 0, "the job fails without any fault"
        reference = _hashes(Path(folder) / "reference")
        print(f"{len(reference)} files, {usual_s:.0f} s without a fault", file=sys.stderr)

        results: list[dict[str, Any]] = []
        for number in range(seed, seed + runs):
            kind = kinds[number % len(kinds)]
            result = _run_with_fault(Path(folder) / str(number), number, kind, usual_s, reference)
            print(json.dumps(result), file=sys.stderr, flush=True)
            results.append(result)

    summary = {kind: _summary(results, kind) for kind in kinds}
    print(json.dumps({"seconds without a fault": round(usual_s, 1), "faults": summary}, indent=2))


def _summary(results: Sequence[dict[str, Any]], kind: str) -> dict[str, int]:
    """Return what became of the runs with one kind of fault."""
    of_kind = [result for result in results if result["fault"] == kind]
    return {
        "runs": len(of_kind),
        "went on by itself": sum(result["commands"] == 1 for result in of_kind),
        "equal": sum(result["equal"] for result in of_kind),
        "tracebacks": sum(result["traceback"] for result in of_kind),
    }


def _run_with_fault(storage: Path, number: int, kind: str, usual_s: float, reference: dict[str, str]) -> dict[str, Any]:
    """Run the job under one fault until it ends well, and compare what it wrote."""
    draw = random.Random(number)
    machines = Machines(ENVIRONMENTS.get(kind, {}), ONE_NODE_ENVIRONMENTS.get(kind, {}))
    # Never at the very begin or end, where there is little to fail.
    moment_s = draw.uniform(0.05, 0.95) * usual_s
    exits: list[int | str] = []
    if kind == "full":
        storage.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={draw.randint(100, 140)}m", "tmpfs", storage], check=True)

    try:
        job = machines.start(storage)
        time.sleep(moment_s)
        what = FAULTS[kind](machines, job, draw)
        exits.append(_exit_code(job))
        stderr = storage.with_suffix(".stderr").read_text()
        if kind in REPAIRS:
            REPAIRS[kind](storage, draw)
        # As a user would: the same command again.
        while exits[-1] != 0 and len(exits) < MAX_COMMANDS:
            if kind == "head":
                machines.stop()
                machines = Machines()
            exits.append(_exit_code(machines.start(storage)))
    finally:
        machines.stop()

    hashes = _hashes(storage)
    if kind == "full":
        subprocess.run(["umount", "--lazy", storage], check=True)
    # By folder: statistics, plans, experts.
    different = Counter(path.split("/")[0] for path in reference if hashes.get(path) != reference[path])

    return {
        "run": number,
        "fault": kind,
        "what": what,
        "after": round(moment_s, 1),
        "exits": exits,
        "commands": len(exits),
        "last line": stderr.strip().splitlines()[-1:],
        "traceback": "Traceback" in stderr,
        "equal": hashes == reference,
        "different": dict(different),
    }


def _exit_code(job: subprocess.Popen) -> int | str:
    """Wait for a job; ``hung`` where it takes too long, and is killed."""
    try:
        return job.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()
        return "hung"


def _hashes(storage: Path) -> dict[str, str]:
    """Return the sha256 of every statistic, plan and weight of a run."""
    run = storage / "run"
    hashes: dict[str, str] = {}
    for kind in ("statistics", "plans", "experts"):
        for path in sorted((run / kind).rglob("*.safetensors")):
            hashes[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 50,
        int(sys.argv[2]) if len(sys.argv) > 2 else 0,
        sys.argv[3:] or list(FAULTS),
    )
