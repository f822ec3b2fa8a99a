"""Digests: what shows that bytes are those that were written.

A digest names its algorithm, as in ``blake3:6437b3ac…``. It is BLAKE3, by which a core hashes several times as many
bytes as by SHA-256. 64 hexadecimal digits alone are a SHA-256, which manifests of earlier versions state; what they
vouch for stays whole.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from seap_ray.errors import IncompleteError
from seap_ray.storage.paths import StoragePath, storage_path

PREFIX = "blake3:"


def new_hasher(like: str = PREFIX) -> Any:
    """Return an object with hashlib's ``update``, for BLAKE3 or for the algorithm of another digest."""
    return blake3() if like.startswith(PREFIX) else hashlib.sha256()


def digest_of(hasher: Any) -> str:
    """Return the digest of the bytes that a hasher of ``new_hasher`` was given."""
    prefix = PREFIX if hasher.name == "blake3" else ""
    return f"{prefix}{hasher.hexdigest()}"


def digest_of_file(path: StoragePath | Path, like: str = PREFIX) -> str:
    """Return the digest of a file's bytes, by BLAKE3 or by the algorithm of another digest. Raises OSError."""
    with path.open("rb") as file:
        content: Any = file  # a bucket's file has what file_digest needs, but not the declared type
        return digest_of(hashlib.file_digest(content, lambda: new_hasher(like)))


def has_digest(path: StoragePath | Path, digest: str) -> bool:
    """Return whether a file is there and its bytes have this digest.

    Raises:
        IncompleteError: A bucket does not answer, which says nothing about the file.
    """
    try:
        return digest_of_file(path, like=digest) == digest
    except FileNotFoundError:
        return False
    except OSError as error:
        if not storage_path(path).is_remote:  # a disk that cannot read a file has a damaged one
            return False
        raise IncompleteError(f"{path}: cannot be read ({error}); fix that and run the same command again") from error


def stated_digest(about: Mapping[str, Any]) -> str:
    """Return the digest that a manifest states: its ``digest``, or ``sha256`` in manifests of earlier versions.

    Raises KeyError where it states none.
    """
    return about["digest"] if "digest" in about else about["sha256"]
