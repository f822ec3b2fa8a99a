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
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
"""Debian's package faketime."""
RPC = {"num_failures": 20, "req_failure_prob": 20, "resp_failure_prob": 20, "in_flight_failure_prob": 0}
"""Share in percent of the first calls that fail before they are sent, or before their answer is back."""


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """Variables that processes have which are started inside."""
    os.environ.update(more)
    try:
        yield
    finally:
        for key in more:
            del os.environ[key]


@dataclass
class Machines:
    """A head and two nodes, and the job that runs on them."""

    environment: dict[str, str] = field(default_factory=dict)

    odd: dict[str, str] = field(default_factory=dict)
    """Environment of one of the nodes alone."""
    storage: Path = Path()
    """Of the job that was started last."""

    def __post_init__(self) -> None:
        with _environment(USUAL | self.environment):
            self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
            with _environment(self.odd):
                first = self.cluster.add_node(num_cpus=1)
            self.nodes = [first, self.cluster.add_node(num_cpus=1)]
            self.cluster.wait_for_nodes()

    def start(self, storage: Path) -> subprocess.Popen:
        job = [sys.executable, "jobs/prune.py", f"run.storage={storage}", "run.name=run", *JOB]
        environment = {**os.environ, **USUAL, **self.environment, "RAY_ADDRESS": self.cluster.address}
        self.storage = storage
        storage.mkdir(exist_ok=True)
        with storage.with_suffix(".stderr").open("w") as said:
            return subprocess.Popen(job, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said)

    def processes(self, node: Any) -> list[psutil.Process]:
        """A node's raylet and everything that it started."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]

    def workers(self, title: str) -> list[psutil.Process]:
        found = []
        for node in self.nodes:
            with suppress(psutil.Error):
                found += [process for process in self.processes(node) if title in " ".join(process.cmdline())]
        return found

    def stop(self) -> None:
        with suppress(Exception):
            self.cluster.shutdown()


# --- faults ----------------------------------------------------------------------------------------------------------


def actor(machines: Machines, _job: subprocess.Popen, draw: random.Random) -> str:
    """Kill a process that holds the model, or wait until there is one."""
    for _ in range(200):
        if found := machines.workers("Calibrator"):
            return _kill(draw.choice(found))
        time.sleep(0.05)
    return "none was there"


def worker(machines: Machines, _job: subprocess.Popen, draw: random.Random) -> str:
    found = machines.workers("ray::")
    return _kill(draw.choice(found)) if found else "none was there"


def node(machines: Machines, _job: subprocess.Popen, draw: random.Random) -> str:
    machines.cluster.remove_node(machines.nodes.pop(draw.randrange(2)), allow_graceful=False)
    machines.nodes.append(machines.cluster.add_node(num_cpus=1))
    return "one of two, replaced"


def driver(_machines: Machines, job: subprocess.Popen, _draw: random.Random) -> str:
    job.kill()
    return "SIGKILL"


def head(machines: Machines, _job: subprocess.Popen, _draw: random.Random) -> str:
    machines.cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    return "with all its processes"


def pause(machines: Machines, _job: subprocess.Popen, draw: random.Random) -> str:
    """A node that does not answer for a while."""
    seconds, stopped = draw.uniform(2, 10), machines.processes(draw.choice(machines.nodes))
    for process in stopped:
        with suppress(psutil.Error):
            process.suspend()
    time.sleep(seconds)
    for process in stopped:
        with suppress(psutil.Error):
            process.resume()
    return f"{seconds:.1f} s"


def rpc(_machines: Machines, _job: subprocess.Popen, _draw: random.Random) -> str:
    return "from the start"


def full(_machines: Machines, _job: subprocess.Popen, _draw: random.Random) -> str:
    return "a disk of 100 to 140 MB"


def readonly(machines: Machines, _job: subprocess.Popen, _draw: random.Random) -> str:
    subprocess.run(["chattr", "-R", "+i", machines.storage], stderr=subprocess.DEVNULL)  # files may go meanwhile
    return "no file can be made, changed or removed"


def corrupt(_machines: Machines, job: subprocess.Popen, _draw: random.Random) -> str:
    """The driver is killed, and before the next command a file of the run is damaged."""
    job.kill()
    return "a file, after SIGKILL of the driver"


def clock(_machines: Machines, _job: subprocess.Popen, _draw: random.Random) -> str:
    return "one node is an hour ahead, from the start"


def _kill(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        name = process.cmdline()[0]
        process.send_signal(signal.SIGKILL)
        return name.removeprefix("ray::")
    return "it was gone"


FAULTS: dict[str, Callable[[Machines, subprocess.Popen, random.Random], str]] = {
    of.__name__: of for of in (actor, worker, node, driver, head, pause, rpc, full, readonly, corrupt, clock)
}
USUAL = {"RAY_worker_niceness": "0"}
"""Ray's workers have niceness 15, and starve beside anything else that this machine does."""
ODD = {"clock": {"LD_PRELOAD": FAKETIME, "FAKETIME": "+3600s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}}
"""Environment of one of two nodes."""
ENVIRONMENT = {
    "rpc": {
        "RAY_testing_rpc_failure": json.dumps(
            {f"CoreWorkerService.grpc_client.{call}": RPC for call in ("PushTask", "GetObjectStatus")}
        )
    }
}


def _room(storage: Path, _draw: random.Random) -> None:
    subprocess.run(["mount", "-o", "remount,size=1g", storage], check=True)


def _writable(storage: Path, _draw: random.Random) -> None:
    subprocess.run(["chattr", "-R", "-i", storage], check=True)


def _damage(storage: Path, draw: random.Random) -> None:
    """Cut a file of the run in half, or change a byte of it."""
    files = [path for path in sorted(storage.rglob("*")) if path.is_file() and path.stat().st_size]
    if not files:
        return
    content = bytearray((path := draw.choice(files)).read_bytes())
    if draw.random() < 0.5:
        content = content[: len(content) // 2]
    else:
        content[draw.randrange(len(content))] ^= 1
    path.write_bytes(content)
    print(f"  damaged {path.relative_to(storage)}", file=sys.stderr)


MENDED: dict[str, Callable[[Path, random.Random], None]] = {"full": _room, "readonly": _writable, "corrupt": _damage}
"""What happens before the command is given again."""


# --- runs ------------------------------------------------------------------------------------------------------------


def main(runs: int, seed: int, *kinds: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        machines = Machines()
        started = time.monotonic()
        finished = _ends(machines.start(Path(folder) / "reference"))
        usual = time.monotonic() - started
        machines.stop()
        assert finished == 0, "the job fails without any fault"
        reference = _hashes(Path(folder) / "reference")
        print(f"{len(reference)} files, {usual:.0f} s without a fault", file=sys.stderr)
        found = []
        for number in range(seed, seed + runs):
            one = _run(Path(folder) / str(number), number, kinds or tuple(FAULTS), usual, reference)
            print(json.dumps(one), file=sys.stderr, flush=True)
            found.append(one)
    by_kind = {kind: [one for one in found if one["fault"] == kind] for kind in kinds or FAULTS}
    summary = {
        kind: {
            "runs": len(of),
            "went on by itself": sum(one["commands"] == 1 for one in of),
            "equal": sum(one["equal"] for one in of),
            "tracebacks": sum(one["traceback"] for one in of),
        }
        for kind, of in by_kind.items()
    }
    print(json.dumps({"seconds without a fault": round(usual, 1), "faults": summary}, indent=2))


def _run(storage: Path, number: int, kinds: Sequence[str], usual: float, reference: dict[str, str]) -> dict[str, Any]:
    draw = random.Random(number)
    kind = kinds[number % len(kinds)]
    machines = Machines(ENVIRONMENT.get(kind, {}), ODD.get(kind, {}))
    moment, exits = draw.uniform(0.05, 0.95) * usual, []
    if kind == "full":
        storage.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={draw.randint(100, 140)}m", "tmpfs", storage], check=True)
    try:
        job = machines.start(storage)
        time.sleep(moment)
        what = FAULTS[kind](machines, job, draw)
        exits.append(_ends(job))
        said = storage.with_suffix(".stderr").read_text()
        MENDED.get(kind, lambda _storage, _draw: None)(storage, draw)
        while exits[-1] != 0 and len(exits) < 4:
            if kind == "head":
                machines.stop()
                machines = Machines()
            exits.append(_ends(machines.start(storage)))
    finally:
        machines.stop()
    hashes = _hashes(storage)
    if kind == "full":
        subprocess.run(["umount", "--lazy", storage], check=True)
    different = Counter(path.split("/")[0] for path in reference if hashes.get(path) != reference[path])
    return {
        "run": number,
        "fault": kind,
        "what": what,
        "after": round(moment, 1),
        "exits": exits,
        "commands": len(exits),
        "said": said.strip().splitlines()[-1:],
        "traceback": "Traceback" in said,
        "equal": hashes == reference,
        "different": dict(different),
    }


def _ends(job: subprocess.Popen) -> int | str:
    try:
        return job.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()
        return "hung"


def _hashes(storage: Path) -> dict[str, str]:
    """Of every statistic, plan and weight of a run."""
    run = storage / "run"
    files = [
        path for kind in ("statistics", "plans", "experts") for path in sorted((run / kind).rglob("*.safetensors"))
    ]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:3]]
    main(*(numbers + [50, 0][len(numbers) :]), *sys.argv[3:])
