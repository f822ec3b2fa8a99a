"""Inputs: what the modules of a decoder layer read that make its queries, keys and values, and that begin its MLP.

Calibration records them on demand, beside the inputs of ``o_proj`` and ``down_proj``: with all four of a layer each of
its weights can be rounded by what it multiplies.
"""

from seap_ray.core.families import Family
from seap_ray.core.moments import Site

INPUTS: tuple[Site, ...] = ("attn_in", "mlp_in")
"""``attn_in`` is the input of the modules that make queries, keys and values, ``mlp_in`` that of the MLP."""


def input_modules(family: Family) -> dict[Site, tuple[str, ...]]:
    """Return the modules that read each of ``INPUTS``; in a mixture of experts those of its MoE experts."""
    is_mlp = {module: "channels" in rows.units for module, rows in family.rows.items()}
    return {
        "attn_in": tuple(module for module in family.rows if not is_mlp[module]),
        "mlp_in": tuple(module for module in family.rows if is_mlp[module]),
    }
