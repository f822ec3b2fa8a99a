"""Engine: one expert's vLLM inside a Serve replica, from its start to its end."""

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
"""Key of the configuration that says where an expert lies; an engine reads its node's copy of a bucket."""
HEALTH_CHECK_S = 2
"""Seconds between two looks of Serve at a replica."""


class Engine(VLLMEngine):
    """vLLM; on one CPU rank in two processes, where ``ray.serve.llm`` asks for a third, which gains nothing there."""

    async def start(self) -> None:
        # The expert lies on this node by now; Ray would start a process, seconds of imports, to hand its path back.
        self.llm_config.get_or_create_callback().ctx.run_init_node = False
        await super().start()

    def _start_async_llm_engine(self, engine_args: Any, engine_config: Any, placement_group: Any) -> Any:
        parallel = engine_config.parallel_config
        if parallel.world_size == 1 and engine_config.device_config.device_type == "cpu":
            parallel.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(engine_args, engine_config, placement_group)


class ExpertServer(LLMServer):
    """An engine that ends with its vLLM: Serve then starts another at once, not after three failed health checks."""

    _default_engine_cls = Engine

    async def start(self) -> None:
        check_registered()
        folder = parse_path(self._llm_config.experimental_configs[FOLDER])
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} is not there on this node; run.storage should be a folder that every node sees, or a bucket"
            )
        copy = str(stage(folder))
        self._llm_config.model_loading_config.model_source = copy
        self._llm_config.get_engine_config().hf_model_id = copy  # made on the driver, of the driver's copy
        await super().start()
        self._watching = asyncio.create_task(self._watch_engine())

    async def _start_engine(self) -> None:
        await self._while_alive(super()._start_engine())

    async def _while_alive(self, work: Awaitable[Any]) -> None:
        """Await what the engine does. Raises EngineDeadError if it dies: vLLM would wait for its answer for ever."""
        doing = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({doing}, timeout=HEALTH_CHECK_S / 4))[0]:
                if self.engine._engine_client:
                    await self.engine.check_health()
            if doing.cancelled():  # vLLM closes its sockets when the engine dies, and with them what is being sent
                raise EngineDeadError
            await doing
        finally:
            doing.cancel()

    async def _watch_engine(self) -> None:
        while True:
            await asyncio.sleep(HEALTH_CHECK_S / 4)
            try:
                await self.engine.check_health()
            except Exception as error:
                await self._engine_died(error)

    async def _engine_died(self, error: Exception) -> None:
        logger.error(f"the vLLM engine is dead ({error}); its replica ends, and Serve starts another")
        os._exit(1)

    def __del__(self) -> None:
        """Serve calls this once the last request is done. vLLM's own processes end here, not as orphans."""
        if watching := getattr(self, "_watching", None):
            watching.cancel()
        self._close_engine()

    def _close_engine(self) -> None:
        if engine := getattr(getattr(self, "engine", None), "_engine_client", None):
            engine.shutdown()
