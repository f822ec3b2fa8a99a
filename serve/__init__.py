"""Ray Serve deployments of a finished run: ``serve run serve.app:build``.

In this repository the bare name ``serve`` always means Ray Serve (``from ray import serve``); what is in this package
is imported by its full name. The path of a request: ``gate`` (key, size, id), ``ingress`` (which model), ``experts``
(vLLM), and back.
"""
