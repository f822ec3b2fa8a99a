"""Ray Serve deployments of a finished run.

In this repository the bare name ``serve`` always means Ray Serve (``from ray import serve``); what is in this
package is imported by its full name. It holds no deployment yet: compacted checkpoints load in transformers.
"""
