"""Keys: which API keys are valid, by their hashes, from the environment or from a file that is read again on change."""

import hashlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from seap_ray.config import ServeSection
from seap_ray.errors import ConfigError

logger = logging.getLogger("ray.serve")

KEYS_VARIABLE = "SEAP_API_KEYS"
KEYS_SETTING = "serve.api_keys_file"
MIN_KEY_LENGTH = 16
"""Least characters of a key: a shorter one can be guessed."""
LOOK_EVERY_S = 1.0
"""Seconds between two looks at the file of keys."""


@dataclass(frozen=True, slots=True)
class ApiKeys:
    """The API keys of a service, to be handed on in place of the keys themselves."""

    hashes: tuple[bytes, ...]
    """SHA-256 of every key."""
    file: Path | None = None
    """File that they were read from."""
    setting: str = KEYS_SETTING
    """Key of the configuration that names the file."""


def read_keys(config: ServeSection) -> ApiKeys | None:
    """Read the API keys; None when authentication is off.

    Raises:
        ConfigError: Keys are required and there are none, or one is too short.
    """
    if config.auth == "none":
        return None

    if not config.api_keys_file:
        return ApiKeys(_hashes(KEYS_VARIABLE, os.environ.get(KEYS_VARIABLE, "").replace(",", "\n")))
    # Where both are set the file counts. Other processes may have another folder.
    path = Path(config.api_keys_file).expanduser().absolute()
    return ApiKeys(_hashes_in(path, KEYS_SETTING), path)


def read_operator_keys(config: ServeSection) -> ApiKeys | None:
    """Read the keys of those who may demote experts; None where every key may.

    Raises:
        ConfigError: The file cannot be read, has no key, or one that is too short.
    """
    if not config.guard.operator_keys_file:
        return None

    path = Path(config.guard.operator_keys_file).expanduser().absolute()
    setting = "serve.guard.operator_keys_file"
    return ApiKeys(_hashes_in(path, setting), path, setting)


def _hashes_in(path: Path, setting: str) -> tuple[bytes, ...]:
    """Return the hash of every key in a file. Raises ConfigError for one that cannot be read or has none."""
    where = f"{setting}: {path}"
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read ({getattr(error, 'strerror', None) or 'no text'})") from None
    return _hashes(where, text)


def _hashes(where: str, text: str) -> tuple[bytes, ...]:
    """Return the hash of every key in a text, one a line.

    Raises ConfigError, with ``where`` the text is from, where there is none, or one is too short.
    """
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(
            f"{where} holds no API key; set {KEYS_VARIABLE}, or serve.api_keys_file, or, to answer this machine alone, "
            "serve.auth=none"
        )

    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY_LENGTH:
            raise ConfigError(
                f"{where}: key {number} has under {MIN_KEY_LENGTH} characters; `openssl rand -hex 16` makes a good one"
            )

    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


class KeyRing:
    """The hashes of the keys that are valid now: a file that changes is read again, so that keys are rotated.

    What cannot be read, or holds no key, leaves those that were valid before, and a line in the log. A node that does
    not have the file keeps those that it was started with.
    """

    def __init__(self, keys: ApiKeys):
        self._hashes = keys.hashes
        self._file = keys.file
        self._setting = keys.setting
        self._looked_at = 0.0
        # Of the file's content that was read last; the first look reads it.
        self._state: tuple[int, int, int] | None = None

    def hashes(self) -> tuple[bytes, ...]:
        """Return the hashes, after a look at the file where the last one is a while ago."""
        if self._file is not None and time.monotonic() - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = time.monotonic()
            self._look(self._file)
        return self._hashes

    def _look(self, file: Path) -> None:
        try:
            about = file.stat()
        except OSError:
            return
        # A file that is replaced has another inode, also within one tick of the clock.
        state = (about.st_mtime_ns, about.st_size, about.st_ino)
        if state == self._state:
            return

        self._state = state
        try:
            self._hashes = _hashes_in(file, self._setting)
        except ConfigError as error:
            logger.warning(f"{error}; the keys from before stay valid")
