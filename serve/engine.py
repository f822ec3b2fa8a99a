"""Engine: runs the vLLM engine of one expert inside a Serve replica, from its start to its end."""

import asyncio
import logging
import os
from collections.abc import Awaitable
from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMServer
from vllm.v1.engine.exceptions import EngineDeadError

from seap_ray.errors import ConfigError
from seap_ray.storage.files import stage
from seap_ray.storage.paths import parse_path
from seap_ray.vllm_plugin.plugin import check_registered

logger = logging.getLogger("ray.serve")

FOLDER = "folder"
"""Key of ``experimental_configs`` with an expert's folder. Where it is in a bucket, an engine reads its node's copy."""
HEALTH_CHECK_S = 2
"""Seconds between two health checks of Serve."""


class Engine(VLLMEngine):
    """vLLM's engine, started with fewer processes than ``ray.serve.llm`` would start."""

    async def start(self) -> None:
        """Start the engine without Ray's task that prepares a node.

        The expert is on this node by now, and the task would import vLLM for seconds to return its path.
        """
        callback = self.llm_config.get_or_create_callback()
        assert callback is not None, "Ray makes one where the config names none"
        callback.ctx.run_init_node = False
        await super().start()

    def _start_async_llm_engine(self, engine_args: Any, engine_config: Any, placement_group: Any) -> Any:
        """Start vLLM. One rank on a CPU needs no executor process of its own, which gains nothing there."""
        # Where there are several ranks or a GPU, the executor that Ray's placement group needs stays.
        parallel = engine_config.parallel_config
        if parallel.world_size == 1 and engine_config.device_config.device_type == "cpu":
            parallel.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(engine_args, engine_config, placement_group)


class ExpertServer(LLMServer):
    """A replica that ends when its engine dies: Serve then starts another at once, not after three health checks."""

    _default_engine_cls: Any = Engine
    _engine_cls: type[Engine]
    engine: Engine
    """The engine; it is there from ``start`` on."""

    async def start(self) -> None:
        """Start the engine from this node's copy of the expert, and watch it.

        Raises:
            ConfigError: The plugin is not installed on this node, or the expert's folder is not there.
        """
        # This runs on the engine's node, whose installation and disks may differ from the driver's.
        check_registered()
        folder = parse_path(self._llm_config.experimental_configs[FOLDER])
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} is not there on this node; run.storage should be a folder that every node sees, or a bucket"
            )

        copy = str(stage(folder))
        # Of a class that is not public.
        loading: Any = self._llm_config.model_loading_config
        loading.model_source = copy
        # The engine's config was made on the driver, with the path of the driver's copy.
        engine_config: Any = self._llm_config.get_engine_config()
        engine_config.hf_model_id = copy
        await super().start()
        # Kept, since Python's loop holds tasks weakly: one that nobody refers to may vanish.
        self._watching = asyncio.create_task(self._watch_engine())

    async def _start_engine(self) -> None:
        await self._await_unless_engine_dies(super()._start_engine())

    async def _await_unless_engine_dies(self, work: Awaitable[Any]) -> None:
        """Await a call to the engine.

        Raises:
            EngineDeadError: The engine died. vLLM itself would wait for its answer for ever.
        """
        call = asyncio.ensure_future(work)
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=HEALTH_CHECK_S / 4)
                # Before the engine has a client there is nothing to check. The check raises where the engine is dead.
                if not call.done() and self.engine._engine_client:
                    await self.engine.check_health()

            if call.cancelled():  # vLLM closes its sockets when the engine dies, which cancels the call
                raise EngineDeadError

            await call  # it is done: this raises its error, if any
        finally:
            call.cancel()

    async def _watch_engine(self) -> None:
        """Check the engine's health again and again, and act when it is dead."""
        while True:
            await asyncio.sleep(HEALTH_CHECK_S / 4)
            try:
                await self.engine.check_health()
            except Exception as error:  # whatever it is, the engine does not answer
                await self._engine_died(error)

    async def _engine_died(self, error: Exception) -> None:
        """End this replica."""
        logger.error(f"the vLLM engine is dead ({error}); its replica ends, and Serve starts another")
        os._exit(1)  # `sys.exit` would end this task alone

    def __del__(self) -> None:  # type: ignore[override]  # Ray's own is a coroutine, which Python itself never awaits
        """End vLLM's processes, which would be orphans otherwise. Serve calls this after the last request."""
        # Attributes may be missing: Python also calls this after a constructor that has failed.
        if watching := getattr(self, "_watching", None):
            watching.cancel()
        self._close_engine()

    def _close_engine(self) -> None:
        """End vLLM's processes, if there are any."""
        if engine := getattr(getattr(self, "engine", None), "_engine_client", None):
            engine.shutdown()
