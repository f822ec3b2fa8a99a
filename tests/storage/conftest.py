"""A real S3 server on this machine (moto's, over HTTP), and a folder of its bucket for each test."""

import hashlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from pyarrow.fs import S3FileSystem

from seap_ray.storage import paths as paths_module
from seap_ray.storage.paths import BucketPath

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Iterator[dict[str, str]]:
    """What tells a process of the server: its address, keys, and a cache of this module's own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL
    )
    variables = {
        **KEYS,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "SEAP_RAY_CACHE": str(tmp_path_factory.mktemp("cache")),
    }
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, "the server did not start"
                time.sleep(0.1)
        with pytest.MonkeyPatch.context() as patch:
            for key, value in variables.items():
                patch.setenv(key, value)
            paths_module._opened.cache_clear()  # each module has a server of its own, at another address
            S3FileSystem(endpoint_override=variables["AWS_ENDPOINT_URL"], allow_bucket_creation=True).create_dir("lab")
            yield variables
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def bucket(environment, request) -> BucketPath:
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    return BucketPath(f"s3://lab/{name}")
