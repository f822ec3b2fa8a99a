"""The server of a pack with a played engine: which expert answers, and what becomes of requests when a swap fails."""

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from seap_ray.errors import ConfigError
from seap_ray.storage.digests import digest_of_file
from serve.errors import DeadlyRequestError, ModelDownError
from serve.schedule import QueueFullError

pytestmark = [
    pytest.mark.vllm,
    # What vLLM, torch and Ray warn of while they are imported.
    pytest.mark.filterwarnings(r"ignore::FutureWarning:vllm\.", r"ignore::DeprecationWarning"),
]

EXPERTS = ("general", "sums", "verse")
KILL = object()
LIMITS = {"running": 4, "waiting": 100, "max_wait_s": 0.05, "weights": {}}


class PlayedEngine:
    """Answers with the expert whose weights are in it; ``faults`` are what its next swaps do instead."""

    faults: list = []
    made: list = []

    def __init__(self, config):
        self.name = str(config.model_loading_config.model_source)
        self.running, self.swaps, self.is_killed = Counter(), [], False
        self._engine_client = SimpleNamespace(shutdown=lambda: None)
        self.made.append(self)

    async def start(self):
        await asyncio.sleep(0)

    async def check_health(self):
        if self.is_killed:
            raise RuntimeError("EngineCore encountered an issue")

    async def killed(self):
        """As vLLM when its engine's process is killed: whatever was asked of it is not answered any more."""
        self.is_killed = True
        await asyncio.Event().wait()

    async def pause(self, *, mode, clear_cache):
        assert not sum(self.running.values()), "a swap while a request runs"

    async def resume(self):
        pass

    async def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.name = "torn"
        await asyncio.sleep(0.002)
        if self.faults and (fault := self.faults.pop(0)):
            if fault is KILL:
                await self.killed()
            raise fault
        self.name = kwargs["weights_path"]
        self.swaps.append(self.name)

    async def chat(self, request, raw_request_info):
        self.running[self.name] += 1
        try:
            for _ in range(3):
                await asyncio.sleep(0.001)
                assert len(+self.running) == 1
                text = f"{self.name.split('/')[-1]} {request.cache_salt}"
                yield f'data: {{"model":"{request.model}","text":"{text}"}}\n\n'
        finally:
            self.running[self.name] -= 1


@pytest.fixture
def folders(tmp_path):
    for name in EXPERTS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
        files = {"model.safetensors": {"digest": digest_of_file(tmp_path / name / "model.safetensors")}}
        (tmp_path / name / "seap.json").write_text(json.dumps({"files": files}))
    return {name: str(tmp_path / name) for name in EXPERTS}


@asynccontextmanager
async def serving(folders, monkeypatch, faults=(), engine_cls=PlayedEngine, **limits):
    from serve import engine, shared_engine

    monkeypatch.setattr(engine, "check_registered", lambda: None)
    monkeypatch.setattr(PlayedEngine, "faults", list(faults))
    monkeypatch.setattr(PlayedEngine, "made", [])
    pack = {"folders": folders, "time_slice_s": 0.01, "limits": LIMITS | limits}
    config = SimpleNamespace(
        model_id="shared_engine",
        experimental_configs={engine.FOLDER: folders["general"], shared_engine.SHARED_ENGINE: pack},
        model_loading_config=SimpleNamespace(model_source=None),
        get_engine_config=lambda: SimpleNamespace(),
        multiplex_config=lambda: None,
    )

    monkeypatch.setattr(engine.LLMServer, "_start_engine", lambda self: self.engine.start())

    class Server(shared_engine.SharedEngineServer):
        def _batch_output_stream(self, stream):
            return stream

    server = Server.sync_init(config, engine_cls=engine_cls)
    await server.start()
    try:
        yield server
    finally:
        server._turns.cancel()
        server._watching.cancel()


async def ask(server, expert, salt=None):
    """What a streamed chat says: the model it names, and whose weights answered under which salt."""
    request = SimpleNamespace(model=expert, cache_salt=salt, stream=True)
    pieces = [json.loads(piece[6:]) async for piece in await server.chat(request)]
    assert len(pieces) == 3 and all(piece == pieces[0] for piece in pieces)
    return pieces[0]["model"], *pieces[0]["text"].split()


def test_every_request_is_answered_by_its_own_expert_in_its_name_and_under_its_salt(folders, monkeypatch):
    async def run():
        async with serving(folders, monkeypatch) as server:
            asked = [EXPERTS[i % 3] for i in range(90)]
            answers = await asyncio.gather(*(ask(server, expert, salt="mine") for expert in asked))
            assert answers == [(expert, expert, f"{expert}/mine") for expert in asked]
            state = await server.residence()
            assert state["resident"] in EXPERTS and set(state["waiting"].values()) == {0} and not state["failed"]
            (engine,) = PlayedEngine.made
            assert 2 <= len(engine.swaps) < 60

    asyncio.run(run())


def test_an_engine_that_dies_in_a_swap_is_started_again_and_nobody_is_lost(folders, monkeypatch):
    async def run():
        faults = [RuntimeError("EngineCore encountered an issue"), None, RuntimeError("once more")]
        async with serving(folders, monkeypatch, faults, max_wait_s=0.0) as server:
            asked = [EXPERTS[i % 3] for i in range(60)]
            answers = await asyncio.gather(*(ask(server, expert) for expert in asked))
            assert [(model, weights) for model, weights, _ in answers] == [(expert, expert) for expert in asked]
            assert len(PlayedEngine.made) == 3

    asyncio.run(run())


def test_an_engine_that_is_killed_in_a_swap_or_in_its_start_and_says_nothing_is_started_again(folders, monkeypatch):
    class OftenKilled(PlayedEngine):
        async def start(self):
            if len(self.made) == 2:
                await self.killed()

    async def run():
        async with serving(folders, monkeypatch, [KILL], OftenKilled) as server:
            asked = [EXPERTS[i % 3] for i in range(30)]
            answers = await asyncio.wait_for(asyncio.gather(*(ask(server, expert) for expert in asked)), 20)
            assert [(model, weights) for model, weights, _ in answers] == [(expert, expert) for expert in asked]
            assert [engine.is_killed for engine in PlayedEngine.made] == [True, True, False]

    asyncio.run(run())


def test_an_expert_that_cannot_be_loaded_is_given_up_and_the_others_are_served(folders, monkeypatch):
    async def run():
        bad = [RuntimeError("model.layers.0.mlp.up_proj.weight is [3, 4] in the checkpoint")] * 3
        async with serving(folders, monkeypatch, bad) as server:
            lost = await asyncio.gather(*(ask(server, "verse") for _ in range(3)), return_exceptions=True)
            assert [type(error) for error in lost] == [ModelDownError] * 3
            with pytest.raises(ModelDownError, match="verse: it cannot be loaded"):
                await ask(server, "verse")
            assert (await ask(server, "sums"))[:2] == ("sums", "sums")
            assert (await server.residence())["failed"] == ["verse"]

    asyncio.run(run())


def test_an_expert_whose_files_are_damaged_never_comes_into_the_engine(folders, monkeypatch):
    async def run():
        async with serving(folders, monkeypatch) as server:
            with pytest.raises(ModelDownError, match="sums: its files are damaged"):
                await ask(server, "sums")
            assert (await ask(server, "general"))[:2] == ("general", "general")
            assert len(PlayedEngine.made) == 1 and not PlayedEngine.made[0].swaps

    with open(f"{folders['sums']}/model.safetensors", "a") as file:
        file.write("!")
    asyncio.run(run())


def test_an_engine_that_dies_between_swaps_is_started_again(folders, monkeypatch):
    from serve import engine

    async def run():
        monkeypatch.setattr(engine, "HEALTH_CHECK_S", 0.04)
        async with serving(folders, monkeypatch) as server:
            await ask(server, "sums")

            async def dead():
                raise RuntimeError("dead")

            server.engine.check_health = dead
            while len(PlayedEngine.made) < 2:
                await asyncio.sleep(0.01)
            assert (await ask(server, "sums"))[:2] == ("sums", "sums")
            await server.check_health()

    asyncio.run(run())


def test_who_was_told_nothing_yet_by_an_engine_that_dies_is_answered_by_the_next_one(folders, monkeypatch):
    from vllm.v1.engine.exceptions import EngineDeadError

    async def run():
        async with serving(folders, monkeypatch) as server:

            async def dead(request, raw_request_info):
                raise EngineDeadError
                yield

            async def says_so(request, raw_request_info):
                error = {"error": {"message": str(EngineDeadError()), "code": 500}}
                yield f"data: {json.dumps(error)}\n\n"

            for fault in (dead, says_so):
                server.engine.chat = fault
                answers = await asyncio.gather(*(ask(server, "sums") for _ in range(6)))
                assert [answer[:2] for answer in answers] == [("sums", "sums")] * 6
            assert len(PlayedEngine.made) == 3

    asyncio.run(run())


@pytest.mark.parametrize("learns", ["late", "never"])
def test_who_does_not_learn_of_an_engines_death_at_once_holds_nobody_up_and_is_answered(folders, monkeypatch, learns):
    from vllm.v1.engine.exceptions import EngineDeadError

    from serve import shared_engine

    async def run():
        monkeypatch.setattr(shared_engine, "LAST_WORDS_S", 1)
        async with serving(folders, monkeypatch) as server:
            is_told = asyncio.Event()

            async def dead(request, raw_request_info):
                if request.cache_salt == "sums/slow":
                    await is_told.wait()
                raise EngineDeadError
                yield

            server.engine.chat = dead
            slow = asyncio.create_task(ask(server, "sums", salt="slow"))
            for other in ("sums", "verse"):  # the first one is told, and the engine started again
                assert (await ask(server, other))[:2] == (other, other) and not slow.done()
            if learns == "late":
                is_told.set()
            assert (await slow)[:2] == ("sums", "sums")
            assert len(PlayedEngine.made) == 2, "the engine that lives is not started again"

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_request_at_which_engines_die_is_given_up_and_the_next_one_is_answered(folders, monkeypatch):
    from vllm.v1.engine.exceptions import EngineDeadError

    class Fragile(PlayedEngine):
        async def chat(self, request, raw_request_info):
            if request.cache_salt == "sums/deadly":
                raise EngineDeadError
            async for piece in PlayedEngine.chat(self, request, raw_request_info):
                yield piece

    async def run():
        async with serving(folders, monkeypatch, engine_cls=Fragile) as server:
            with pytest.raises(DeadlyRequestError, match="3 engines died"):
                await ask(server, "sums", salt="deadly")
            assert (await ask(server, "sums"))[:2] == ("sums", "sums")
            assert len(PlayedEngine.made) == 4

    asyncio.run(run())


def test_a_pack_does_not_start_with_damaged_files_in_its_engine(folders, monkeypatch):
    async def run():
        with pytest.raises(ConfigError, match="general: damaged, by the hashes in its seap.json"):
            async with serving(folders, monkeypatch):
                raise AssertionError("it started")

    with open(f"{folders['general']}/model.safetensors", "a") as file:
        file.write("!")
    asyncio.run(run())


def test_more_requests_than_may_wait_are_refused_and_who_leaves_makes_room(folders, monkeypatch):
    async def run():
        async with serving(folders, monkeypatch, running=1, waiting=2) as server:
            first = [asyncio.create_task(ask(server, "general")) for _ in range(3)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            refused = await asyncio.gather(*(ask(server, "general") for _ in range(5)), return_exceptions=True)
            assert sum(isinstance(one, QueueFullError) for one in refused) >= 3
            first[2].cancel()
            await asyncio.gather(*first, return_exceptions=True)
            assert (await ask(server, "general"))[:2] == ("general", "general")
            assert (await server.residence())["waiting"]["general"] == 0

    asyncio.run(run())
