"""The service of a finished run as Ray Serve deployments: ``serve run serve.app:build``.

In this repository the bare name ``serve`` always means Ray Serve (``from ray import serve``). The modules of this
package are imported by their full names.

Start-up: ``app`` or ``deployment`` (entry points) -> ``application`` -> ``experts`` (checkpoints to serve) ->
``engines`` (which of them share an engine) -> ``llm_config`` (settings for ``ray.serve.llm``).

A request: ``gate`` (size, and API key by ``keys``) -> ``ingress`` (whose bodies ``messages`` and ``prompts`` read) ->
``choice`` (which model) -> ``model_calls`` (what to do when it is dead) -> ``engine`` or ``shared_engine``.

After the reply of some: ``judging`` (which, and in what turn) -> ``shadow`` (what the reference says of the expert) ->
``guard_server`` -> ``guard`` (who is demoted) by ``evidence``; ``choice`` goes by it.
"""
