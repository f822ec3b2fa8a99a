"""Pack server: one vLLM engine, several experts of equal shapes, one of them in it at a time.

Requests wait for their expert's turn here (see ``schedule``), so that what runs in the engine is all of one expert. A
swap is vLLM's own ``reload_weights``, of what differs (see ``seap_ray.vllm_plugin.loader``). An engine that dies, in a
swap or else, is started again in this process, and those who wait go on waiting.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ray.util import metrics
from vllm.v1.engine.exceptions import EngineDeadError

from seap_ray.errors import ConfigError
from seap_ray.storage.files import read_json, sha256_of, stage
from seap_ray.storage.paths import parse_path
from serve.engine import HEALTH_CHECK_S, ExpertServer
from serve.errors import DeadlyRequestError, ModelDownError
from serve.replies import error_in, joined, tells_of_death
from serve.schedule import Admit, Limits, Schedule, Swap

logger = logging.getLogger("ray.serve")

PACK = "pack"
"""Key of the configuration that holds the experts' folders by their names, the limits and the time slice."""
ATTEMPTS = 3
"""To swap an expert in, to start an engine, or to answer a request at which engines die, before it is given up."""
SLICE_IN_SWAPS = 5
"""Length of an automatic time slice: swaps take a sixth of a busy engine's time at most."""
WAITS_S = [0.01 * 2**i for i in range(14)]


class PackServer(ExpertServer):
    """``ray.serve.llm``'s server of one model, which is several."""

    async def start(self) -> None:
        about = self._llm_config.experimental_configs[PACK]
        self._folders = {name: stage(parse_path(folder)) for name, folder in about["folders"].items()}
        self._slice_s = about["time_slice_s"]
        self._swap_s = 0.0
        self._failed: dict[str, str] = {}
        self._attempts = dict.fromkeys(self._folders, 0)
        self._has_changed = asyncio.Event()
        self._is_dead = False
        self._first = next(iter(self._folders))
        self._schedule = Schedule(self._folders, self._first, Limits(**about["limits"]), time.monotonic())
        self._make_metrics()
        # Once read, an expert is in the page cache, too.
        self._whole = {n: asyncio.ensure_future(asyncio.to_thread(_is_whole, f)) for n, f in self._folders.items()}
        await super().start()
        if not await self._whole[self._first]:
            raise ConfigError(f"{self._folders[self._first]}: damaged, by the hashes in its seap.json; make it again")
        self._turns = asyncio.create_task(self._take_turns())

    def _make_metrics(self) -> None:
        self._swaps = metrics.Counter("seap_swaps_total", "Swaps of the expert in an engine", ("expert",))
        self._swap_seconds = metrics.Histogram("seap_swap_seconds", "Time that a swap takes", WAITS_S)
        self._wait_seconds = metrics.Histogram("seap_wait_seconds", "Time until a turn", WAITS_S, ("expert",))
        self._waiting = metrics.Gauge("seap_waiting", "Requests that wait for an expert's turn", ("expert",))
        self._resident = metrics.Gauge("seap_resident", "1 for the expert in the engine", ("expert",))

    # --- requests ----------------------------------------------------------------------------------------------------

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return self._answer(super().chat, request, raw_request_info)

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return self._answer(super().completions, request, raw_request_info)

    async def residence(self) -> dict[str, Any]:
        """The expert in the engine, how many requests wait for each, and which cannot be loaded."""
        return {"resident": self._schedule.resident, "waiting": self._schedule.waiting, "failed": [*self._failed]}

    async def _answer(
        self, answer: Callable[..., Awaitable[Any]], request: Any, raw_request_info: Any
    ) -> AsyncGenerator[Any, None]:
        expert, own = request.model, self._llm_config.model_id
        request.model = own
        # Cached keys and values are those of the weights that made them. Under a salt of its own an expert finds its
        # own once more when it is in the engine again, and never another's.
        request.cache_salt = f"{expert}/{request.cache_salt or ''}"
        for _ in range(ATTEMPTS):  # one, unless the engine dies before its first word
            has_begun = False
            try:
                async with self._turn(expert):
                    async for reply in _living(await answer(request, raw_request_info)):
                        has_begun = True
                        yield _named(reply, own, expert)
                    return
            except EngineDeadError:
                self._tell_dead()
                if has_begun:
                    raise
        raise DeadlyRequestError(f"{ATTEMPTS} engines died while they had this request")

    @asynccontextmanager
    async def _turn(self, expert: str) -> AsyncIterator[None]:
        """Wait for the expert's turn, and hold it up while inside. Raises QueueFullError, or ModelDownError for an
        expert that cannot be loaded."""
        if expert in self._failed:
            raise ModelDownError(f"{expert}: {self._failed[expert]}")
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        came = time.monotonic()
        self._schedule.offer(granted, expert, came)
        self._changed(expert)
        try:
            await granted
            self._wait_seconds.observe(time.monotonic() - came, {"expert": expert})
            yield
        finally:
            self._schedule.leave(granted)
            self._changed(expert)

    def _changed(self, expert: str) -> None:
        self._waiting.set(self._schedule.waiting[expert], {"expert": expert})
        self._has_changed.set()

    # --- turns -------------------------------------------------------------------------------------------------------

    async def _take_turns(self) -> None:
        try:
            while True:
                self._has_changed.clear()
                if self._is_dead:
                    await self._restart()
                step = self._schedule.next(time.monotonic(), self._time_slice_s)
                if isinstance(step, Admit):
                    _settle(step.request)
                elif isinstance(step, Swap):
                    await self._swap(step.expert)
                else:
                    await self._has_changed.wait()
        except Exception:
            logger.exception("the pack's engine cannot be started again; its replica ends, and Serve starts another")
            os._exit(1)

    @property
    def _time_slice_s(self) -> float:
        return SLICE_IN_SWAPS * self._swap_s if self._slice_s == "auto" else self._slice_s

    async def _swap(self, expert: str) -> None:
        started = time.monotonic()
        try:
            if not await self._whole[expert]:
                return self._give_up(expert, "its files are damaged")
            await self._while_alive(self._reload(self._folders[expert]))
        except Exception as error:
            # Weights may be those of both experts now.
            logger.error(f"the swap to {expert} failed ({error})")
            self._attempts[expert] += 1
            if self._attempts[expert] >= ATTEMPTS:
                self._give_up(expert, "it cannot be loaded")
            return await self._restart()
        self._attempts[expert] = 0
        self._swap_s = time.monotonic() - started
        self._swaps.inc(tags={"expert": expert})
        self._swap_seconds.observe(self._swap_s)
        self._enter(expert)

    async def _reload(self, folder: Path) -> None:
        # Requests that were given up may still run for a moment; what they leave in the cache is this expert's.
        await self.engine.pause(mode="abort", clear_cache=False)
        await self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        await self.engine.resume()

    def _enter(self, expert: str) -> None:
        self._schedule.swapped(expert, time.monotonic())
        for name in self._folders:
            self._resident.set(float(name == expert), {"expert": name})

    def _give_up(self, expert: str, why: str) -> None:
        logger.error(f"{expert} is not served any more: {why}")
        self._failed[expert] = why
        for granted in self._schedule.drop(expert):
            _settle(granted, ModelDownError(f"{expert}: {why}"))

    async def _restart(self) -> None:
        """Another engine in the dead one's place, with the first expert in it. Raises what the last attempt did."""
        for attempt in range(1, ATTEMPTS + 1):
            logger.error(f"the pack's engine is started again, attempt {attempt}")
            self._close_engine()
            self.engine = self._engine_cls(self._llm_config)
            try:
                await self._start_engine()
                break
            except Exception:
                if attempt == ATTEMPTS:
                    raise
        self._is_dead = False
        self._enter(self._first)

    async def _engine_died(self, error: Exception) -> None:
        logger.error(f"the pack's engine is dead ({error})")
        self._tell_dead()
        while self._is_dead:
            await asyncio.sleep(HEALTH_CHECK_S / 4)

    def _tell_dead(self) -> None:
        self._is_dead = True
        self._has_changed.set()

    async def check_health(self) -> None:
        """Of this process: it takes care of its engine itself."""


def _settle(granted: Any, error: Exception | None = None) -> None:
    """Let one go who waits, if he still does."""
    if granted.done():
        return
    if error:
        granted.set_exception(error)
    else:
        granted.set_result(None)


def _is_whole(folder: Path) -> bool:
    """Whether the weights are those that were written."""
    files = (read_json(folder / "seap.json") or {}).get("files", {})
    try:
        return bool(files) and all(sha256_of(folder / name) == about["sha256"] for name, about in files.items())
    except OSError:
        return False


async def _living(replies: AsyncGenerator[Any, None]) -> AsyncIterator[Any]:
    """Replies, but those that say that the engine is dead. Raises EngineDeadError for them."""
    async for reply in replies:
        if (error := error_in(joined(reply))) and tells_of_death(error):
            raise EngineDeadError
        yield reply


def _named(reply: Any, own: str, expert: str) -> Any:
    """A reply, or pieces of a stream, in the name of the expert. Quotes within text are escaped, so it is the field."""
    if isinstance(reply, str):
        return reply.replace(f'"model":"{own}"', f'"model":"{expert}"')
    if isinstance(reply, list):
        return [_named(piece, own, expert) for piece in reply]
    if hasattr(reply, "model"):
        reply.model = expert
    return reply
