"""Shared engine: serves several experts of equal shapes from one vLLM engine, one of them in it at a time.

Requests wait here for their expert's turn (see ``schedule``), so that all that runs in the engine is for one expert. A
swap is vLLM's own ``reload_weights`` of the files that differ (see ``seap_ray.vllm_plugin.loader``). An engine that
dies, in a swap or at another time, is restarted in this process, and the requests that wait go on waiting.
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
from seap_ray.storage.digests import has_digest, stated_digest
from seap_ray.storage.files import read_json, stage
from seap_ray.storage.paths import inside, parse_path
from serve.engine import HEALTH_CHECK_S, ExpertServer
from serve.errors import DeadlyRequestError, ModelDownError
from serve.replies import error_in, is_engine_death, joined
from serve.schedule import Admit, Limits, Schedule, Swap

logger = logging.getLogger("ray.serve")

SHARED_ENGINE = "shared_engine"
"""Key of ``experimental_configs`` with the experts' folders by name, the limits and the time slice."""
ATTEMPTS = 3
"""Attempts to swap an expert in, to start an engine, or to answer a request at which engines die."""
SLICE_IN_SWAPS = 5
"""Length of an automatic time slice in swaps: they take a sixth of a busy engine's time at most."""
LAST_WORDS_S = 2
"""Seconds in which vLLM should fail the requests of an engine that died."""
HISTOGRAM_S = [0.01 * 2**i for i in range(14)]
"""Bounds of the histograms of waiting and swapping, in seconds."""


class SharedEngineServer(ExpertServer):
    """``ray.serve.llm``'s server of one model, which stands for several experts."""

    async def start(self) -> None:
        """Start the engine with the first expert, and begin to take turns.

        Raises:
            ConfigError: The first expert's files are damaged, or as ``ExpertServer.start`` does.
        """
        # The base class's constructor ends with this call, so what the other methods need is made here.
        about = self._llm_config.experimental_configs[SHARED_ENGINE]
        self._folders = {name: stage(parse_path(folder)) for name, folder in about["folders"].items()}
        self._slice_s = about["time_slice_s"]
        self._swap_s = 0.0
        self._failed: dict[str, str] = {}
        self._attempts = dict.fromkeys(self._folders, 0)

        self._has_changed = asyncio.Event()
        self._died: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._first = next(iter(self._folders))
        self._schedule = Schedule(self._folders, self._first, Limits(**about["limits"]), time.monotonic())
        self._make_metrics()

        # All experts are hashed in the background. Afterwards their files are in the page cache, too.
        self._is_intact = {
            name: asyncio.ensure_future(asyncio.to_thread(_is_intact, folder)) for name, folder in self._folders.items()
        }
        await super().start()

        # Hashed while vLLM starts; nobody has got a reply yet from what may be damaged.
        if not await self._is_intact[self._first]:
            raise ConfigError(f"{self._folders[self._first]}: damaged, by the hashes in its seap.json; make it again")

        self._turns = asyncio.create_task(self._take_turns())

    def _make_metrics(self) -> None:
        """Register the metrics of a shared engine."""
        self._swaps = metrics.Counter("seap_swaps_total", "Swaps of the expert in an engine", ("expert",))
        self._swap_seconds = metrics.Histogram("seap_swap_seconds", "Time that a swap takes", HISTOGRAM_S)
        self._wait_seconds = metrics.Histogram("seap_wait_seconds", "Time until a turn", HISTOGRAM_S, ("expert",))
        self._waiting = metrics.Gauge("seap_waiting", "Requests that wait for an expert's turn", ("expert",))
        self._resident = metrics.Gauge("seap_resident", "1 for the expert in the engine", ("expert",))

    # --- requests ----------------------------------------------------------------------------------------------------

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Answer a chat completion in the turn of the expert that it names."""
        return self._answer(super().chat, request, raw_request_info)

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        """Answer a text completion in the turn of the expert that it names."""
        return self._answer(super().completions, request, raw_request_info)

    async def residence(self) -> dict[str, Any]:
        """Return the expert in the engine, how many requests wait for each, and which cannot be loaded."""
        return {"resident": self._schedule.resident, "waiting": self._schedule.waiting, "failed": [*self._failed]}

    async def _answer(
        self, answer: Callable[..., Awaitable[Any]], request: Any, raw_request_info: Any
    ) -> AsyncGenerator[Any, None]:
        """Yield the replies to a request, from the expert that it names.

        Raises:
            DeadlyRequestError: Every engine that had the request died.
        """
        # vLLM knows the engine's one model, by the engine's name.
        expert = request.model
        engine_name = self._llm_config.model_id
        request.model = engine_name

        # Cached keys and values belong to the weights that made them. With a salt of its own an expert finds its own
        # entries when it is in the engine again, and never those of another.
        request.cache_salt = f"{expert}/{request.cache_salt or ''}"

        for _ in range(ATTEMPTS):  # one attempt, unless the engine dies before its first reply
            has_begun = False
            try:
                async with self._turn(expert):
                    died = self._died
                    async for reply in _until_engine_death(await answer(request, raw_request_info), died):
                        has_begun = True
                        yield _renamed(reply, engine_name, expert)
                    return
            except EngineDeadError:
                # The loop restarts the engine before it lets this request's next attempt proceed.
                self._mark_dead(died)
                if has_begun:  # a second attempt would repeat what the client has already read
                    raise

        raise DeadlyRequestError(f"{ATTEMPTS} engines died while they had this request")

    @asynccontextmanager
    async def _turn(self, expert: str) -> AsyncIterator[None]:
        """Wait for the expert's turn. It does not end while inside.

        Raises:
            QueueFullError: As many requests wait for the expert as may.
            ModelDownError: The expert cannot be loaded.
        """
        if expert in self._failed:
            raise ModelDownError(f"{expert}: {self._failed[expert]}")

        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        arrived = time.monotonic()
        self._schedule.offer(granted, expert, arrived)
        self._schedule_changed(expert)

        # Whoever leaves, answered or while waiting, makes room for the next one.
        try:
            await granted
            self._wait_seconds.observe(time.monotonic() - arrived, {"expert": expert})
            yield
        finally:
            self._schedule.leave(granted)
            self._schedule_changed(expert)

    def _schedule_changed(self, expert: str) -> None:
        """Wake the loop that takes turns, after a request for the expert has arrived or left."""
        self._waiting.set(self._schedule.waiting[expert], {"expert": expert})
        self._has_changed.set()

    # --- turns -------------------------------------------------------------------------------------------------------

    async def _take_turns(self) -> None:
        """Do what the schedule says, for ever. End this replica where the engine cannot be restarted."""
        try:
            while True:
                # Cleared before the schedule is asked: what changes after that wakes the wait below.
                self._has_changed.clear()
                if self._died.done():
                    await self._restart()

                step = self._schedule.next(time.monotonic(), self._time_slice_s)
                if isinstance(step, Admit):
                    _settle(step.request)
                elif isinstance(step, Swap):
                    await self._swap(step.expert)
                else:
                    await self._has_changed.wait()
        except Exception:
            # Nobody awaits this task, so its error would go unnoticed and every request would wait for ever.
            logger.exception("the shared engine cannot be restarted; its replica ends, and Serve starts another")
            os._exit(1)

    @property
    def _time_slice_s(self) -> float:
        """Least seconds of a turn while requests for other experts wait."""
        return SLICE_IN_SWAPS * self._swap_s if self._slice_s == "auto" else self._slice_s

    async def _swap(self, expert: str) -> None:
        """Put an expert into the engine, or give it up after ``ATTEMPTS``."""
        started = time.monotonic()
        try:
            if not await self._is_intact[expert]:
                return self._give_up(expert, "its files are damaged")
            # A death in the middle would leave the call to vLLM without an answer.
            await self._await_unless_engine_dies(self._reload(self._folders[expert]))
        except Exception as error:
            # The engine may hold weights of both experts now, so it is restarted.
            logger.error(f"the swap to {expert} failed ({error})")
            self._attempts[expert] += 1
            if self._attempts[expert] >= ATTEMPTS:
                self._give_up(expert, "it cannot be loaded")

            return await self._restart()

        self._attempts[expert] = 0
        # An automatic time slice follows the last swap's time.
        self._swap_s = time.monotonic() - started
        self._swaps.inc(tags={"expert": expert})
        self._swap_seconds.observe(self._swap_s)
        self._enter(expert)

    async def _reload(self, folder: Path) -> None:
        """Replace the weights in the engine by those of a folder."""
        # Aborted requests may still run for a moment. What they leave in the cache has the old expert's salt.
        await self.engine.pause(mode="abort", clear_cache=False)
        await self.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        await self.engine.resume()

    def _enter(self, expert: str) -> None:
        """Note that an expert is in the engine now."""
        self._schedule.swapped(expert, time.monotonic())
        for name in self._folders:
            self._resident.set(float(name == expert), {"expert": name})

    def _give_up(self, expert: str, reason: str) -> None:
        """Serve an expert no more, and fail the requests that wait for it."""
        logger.error(f"{expert} is not served any more: {reason}")
        self._failed[expert] = reason
        for granted in self._schedule.drop(expert):
            _settle(granted, ModelDownError(f"{expert}: {reason}"))

    async def _restart(self) -> None:
        """Start an engine in place of the dead one, with the first expert in it.

        Raises what the last of ``ATTEMPTS`` raised.
        """
        for attempt in range(1, ATTEMPTS + 1):
            logger.error(f"the shared engine is being restarted, attempt {attempt}")
            # The old processes hold the memory that the new engine needs.
            self._close_engine()
            self.engine = self._engine_cls(self._llm_config)
            try:
                await self._start_engine()
                break
            except Exception:
                if attempt == ATTEMPTS:
                    raise

        # The engine's config names the first expert, whichever was in it before.
        self._died = asyncio.get_running_loop().create_future()
        self._enter(self._first)

    async def _engine_died(self, error: Exception) -> None:
        """Have the engine restarted, and wait until it is."""
        logger.error(f"the shared engine is dead ({error})")
        self._mark_dead(self._died)
        # Until then each further health check would report the same death.
        while self._died.done():
            await asyncio.sleep(HEALTH_CHECK_S / 4)

    def _mark_dead(self, died: asyncio.Future[None]) -> None:
        """Tell all that an engine died, and wake the loop that takes turns, to restart it.

        ``died`` is the engine's, so that who learns late of a death does not have the next engine restarted.
        """
        if not died.done():
            died.set_result(None)
        self._has_changed.set()

    async def check_health(self) -> None:
        """Report this process as healthy: it restarts its engine itself."""


def _settle(granted: Any, error: Exception | None = None) -> None:
    """Let a request that still waits proceed, or fail with ``error``."""
    if granted.done():  # its client has left, which cancels the future
        return

    if error:
        granted.set_exception(error)
    else:
        granted.set_result(None)


def _is_intact(folder: Path) -> bool:
    """Return whether all files of a checkpoint have the digests that its manifest states."""
    manifest = read_json(folder / "seap.json") or {}
    files = manifest.get("files", {})
    # A manifest that names no file vouches for none.
    return bool(files) and all(
        has_digest(inside(folder, name, folder), stated_digest(about)) for name, about in files.items()
    )


async def _until_engine_death(replies: AsyncGenerator[Any, None], died: asyncio.Future[None]) -> AsyncIterator[Any]:
    """Yield replies of an engine; ``died`` is done once it is known to be dead.

    Raises:
        EngineDeadError: A reply says that the engine is dead, or none comes after its death.
    """
    while True:
        coming = asyncio.ensure_future(anext(replies, None))
        try:
            await asyncio.wait({coming, died}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                # vLLM fails what a dead engine had, as a rule. Where it does not, the request would wait for ever.
                await asyncio.wait({coming}, timeout=LAST_WORDS_S)
            if not coming.done() or coming.cancelled():
                raise EngineDeadError
        finally:
            coming.cancel()  # also where the client leaves; does nothing to one that is done

        reply = coming.result()
        if reply is None:
            return
        if (error := error_in(joined(reply))) and is_engine_death(error):
            raise EngineDeadError
        yield reply


def _renamed(reply: Any, engine_name: str, expert: str) -> Any:
    """Return a reply, or chunks of a stream, with the expert's name in the field ``model``.

    In JSON the quotes within a text are escaped, so only the field itself can match.
    """
    if isinstance(reply, str):
        return reply.replace(f'"model":"{engine_name}"', f'"model":"{expert}"')
    if isinstance(reply, list):
        return [_renamed(chunk, engine_name, expert) for chunk in reply]

    # An error has no such field.
    if hasattr(reply, "model"):
        reply.model = expert

    return reply
