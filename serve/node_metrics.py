"""Node metrics: what Ray's agent on every node exports about this service, as one page for Prometheus."""

import asyncio
import re
from collections import defaultdict
from typing import Any

import httpx

OURS = re.compile(r"ray_(seap_|vllm|serve_)")
TIMEOUT_S = 5.0


async def gather(nodes: list[dict[str, Any]]) -> str:
    """Lines of all nodes, by metric. Ours lose Ray's prefix: ``seap_route_total``. A silent node is left out."""
    addresses = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes if node["Alive"]]
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        pages = await asyncio.gather(*(client.get(address) for address in addresses), return_exceptions=True)
    return merged([page.text for page in pages if isinstance(page, httpx.Response) and page.is_success])


def merged(pages: list[str]) -> str:
    """One page of several: a metric's HELP and TYPE once, then its samples from everywhere."""
    about: dict[str, dict[str, str]] = defaultdict(dict)
    samples: dict[str, list[str]] = defaultdict(list)
    for page in pages:
        family = ""
        for line in page.splitlines():
            if line.startswith("#"):
                _, kind, family = line.split(" ", 3)[:3]
                about[family].setdefault(kind, line)
            else:
                samples[family].append(line)
    ours = sorted(filter(OURS.match, about))
    text = "".join(f"{line}\n" for family in ours for line in (*about[family].values(), *samples[family]))
    return re.sub(r"(?m)^((?:# \w+ )?)ray_(seap_)", r"\1\2", text)
