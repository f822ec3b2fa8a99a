"""Node metrics: joins what Ray's agent on every node exports about this service to one page for Prometheus."""

import asyncio
import re
from collections import defaultdict
from typing import Any

import httpx

EXPORTED = re.compile(r"ray_(seap_|vllm|serve_)")
"""Names of the metrics that are shown."""
TIMEOUT_S = 5.0
"""Seconds that a node's agent may take to answer."""


async def gather(nodes: list[dict[str, Any]]) -> str:
    """Fetch the metrics of all nodes. A node that does not answer is left out.

    Metrics of this service lose Ray's prefix: ``seap_route_total``.
    """
    addresses = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes if node["Alive"]]
    # All at once, so that a node that does not answer costs the timeout once.
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        pages = await asyncio.gather(*(client.get(address) for address in addresses), return_exceptions=True)
    return merged([page.text for page in pages if isinstance(page, httpx.Response) and page.is_success])


def merged(pages: list[str]) -> str:
    """Return one page from several: each metric's HELP and TYPE once, then its samples of all pages."""
    about: dict[str, dict[str, str]] = defaultdict(dict)
    samples: dict[str, list[str]] = defaultdict(list)
    # Prometheus refuses a page with a metric's HELP or TYPE twice, and nodes export the same metrics.
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith("#"):
                _, kind, family = line.split(" ", 3)[:3]  # "# HELP name text": samples below are of this metric
                about[family].setdefault(kind, line)
            else:
                samples[family].append(line)

    lines: list[str] = []
    for family in sorted(filter(EXPORTED.match, about)):
        lines += about[family].values()
        lines += samples[family]

    text = "".join(f"{line}\n" for line in lines)
    return re.sub(r"(?m)^((?:# \w+ )?)ray_(seap_)", r"\1\2", text)
