"""Shard records: the moments, and if asked for the covariances, that were measured in each shard of a run.

A record is replaced, never added to: an actor that is killed, or a row that Ray delivers twice, changes nothing. What
is whole is reused, so the same command resumes whatever was cut short.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seap_ray.config import Config
from seap_ray.core.architecture import Architecture
from seap_ray.core.moments import RECORDED, Site
from seap_ray.errors import IncompleteError
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.models.input_records import inputs_file
from seap_ray.models.loading import model_dtype
from seap_ray.models.records import TensorFile, covariance_file
from seap_ray.pipeline.cluster import all_checked
from seap_ray.pipeline.shards import Shard
from seap_ray.storage.artifact import Artifact
from seap_ray.storage.files import atomic_write, writable
from seap_ray.storage.paths import StoragePath
from seap_ray.storage.run import Run, fingerprint

SCHEMA = 3
"""Version of the record's contents; raise it when the numbers change."""
MAX_ATTEMPTS = 3
"""Times that a shard may end its worker's process before it is given up: Ray itself would try for ever."""
RECORD_FILE = TensorFile("fingerprint")
"""Format of a record's files."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Everything that a record depends on besides its shard."""

    model: str
    """Fingerprint of the checkpoint."""
    dtype: str
    """Type that the model computes in."""
    skip_first_token: bool
    batch_tokens: int
    covariance: bool = False
    """Whether covariances are recorded, too; the moments are the same bytes either way."""
    inputs: bool = False
    """Whether covariances of a layer's other inputs are recorded, too, in files of their own."""
    schema: int = SCHEMA
    sites: tuple[Site, ...] = RECORDED
    """Kinds of sites that are recorded."""

    @classmethod
    def of(cls, config: Config, checkpoint: Checkpoint) -> "Calibration":
        """Read the settings that records depend on."""
        settings = config.calibration
        return cls(
            checkpoint.fingerprint,
            str(model_dtype(config.model, checkpoint)),
            settings.skip_first_token,
            settings.batch_tokens,
            settings.statistics == "covariance",
            config.records_inputs,
            sites=checkpoint.architecture.recorded,
        )

    def fingerprint(self, shard: Shard) -> str:
        """Return the key of a shard's record."""
        # The order is part of the key: another one would make all records of older runs again. Covariances are no
        # part of it: with or without them the moments are the same.
        parts = (self.model, self.dtype, self.skip_first_token, self.batch_tokens, self.schema)
        return fingerprint(parts, shard.digest, self.sites)

    def n_tokens(self, shard: Shard) -> int:
        """Return the number of a shard's tokens that count in its record."""
        n_counted = shard.n_tokens - shard.n_uncounted
        # One first token for each sequence is skipped, but for those that do not count anyway.
        return n_counted - self.skip_first_token * (shard.n_sequences - shard.n_uncounted_first)


@dataclass(frozen=True, slots=True)
class ShardRecords:
    """The records of a run under one calibration of one model: a file of moments for each shard.

    Covariances lie beside the moments, a file for each layer. The object is small: Ray tasks and actors have it.
    """

    calibration: Calibration
    run: Run
    architecture: Architecture

    @classmethod
    def of(cls, config: Config, checkpoint: Checkpoint, run: Run) -> "ShardRecords":
        """Return the records that a run has, or will have, under this config."""
        return cls(Calibration.of(config, checkpoint), run, checkpoint.architecture)

    def path(self, shard: Shard) -> StoragePath:
        """Return where a shard's moments lie; the name carries the first digits of the key."""
        return self.run.records(shard.task) / f"{shard.shard}-{self.key(shard)[:12]}.safetensors"

    def key(self, shard: Shard) -> str:
        """Return the fingerprint of everything that a shard's record depends on."""
        return self.calibration.fingerprint(shard)

    def merged_key(self, shards: Sequence[Shard]) -> str:
        """Return the fingerprint of the statistics that are merged from the records of some shards, in this order."""
        return fingerprint([self.key(shard) for shard in shards])

    def is_whole(self, shard: Shard) -> bool:
        """Return whether a shard's moments, and covariances where they are asked for, are there and undamaged."""
        return all_made(self.files(self.path(shard), self.key(shard), RECORD_FILE))

    def files(self, moments: StoragePath, key: str, file_format: TensorFile) -> list[Artifact[Any]]:
        """Return a file of moments with those of the covariances beside it, if this calibration has them."""
        # The moments come first: theirs is the one file that every record has.
        paths = [moments]
        # A covariance file is as much a part of a record as the moments: its absence has the record made again.
        layers = range(self.architecture.n_layers)
        if self.calibration.covariance:
            paths += [covariance_file(moments, layer) for layer in layers]
        if self.calibration.inputs:
            inputs = inputs_file(moments)
            paths += [inputs, *(covariance_file(inputs, layer) for layer in layers)]
        return [Artifact(path, key, file_format) for path in paths]

    def missing(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return the shards without a whole record. Every file is read to its end."""
        answers = zip(shards, all_checked(self.is_whole, shards), strict=True)
        return [shard for shard, is_whole in answers if not is_whole]

    def absent(self, shards: Sequence[Shard]) -> list[Shard]:
        """Return the shards of whose records a file is not even there. No file is read."""
        absent: list[Shard] = []
        for shard in shards:
            files = self.files(self.path(shard), self.key(shard), RECORD_FILE)
            if not all(file.path.is_file() for file in files):
                absent.append(shard)
        return absent

    def existing_paths(self, shards: Sequence[Shard]) -> list[StoragePath]:
        """Return the paths of the records of a task's shards, in this order.

        Raises IncompleteError when one is missing; it names a shard that was given up.
        """
        task = shards[0].task
        # Here it is enough that they are there: ``missing`` has read them to their ends.
        missing = [shard for shard in shards if not self.path(shard).is_file()]
        given_up = [shard for shard in missing if self.attempts(shard) >= MAX_ATTEMPTS]

        if given_up:
            names = ", ".join(shard.shard for shard in given_up)
            raise IncompleteError(
                f"{task}: shard {names} ended its worker's process {MAX_ATTEMPTS} times and was given up; look at its "
                f"texts, {given_up[0].path(self.run)}, and at the workers' memory; all records are kept, the same "
                "command goes on"
            )

        if missing:
            name = self.path(missing[0]).name
            raise IncompleteError(f"{task}: {len(missing)} records are missing ({name}, ...); run the command again")

        return [self.path(shard) for shard in shards]

    # --- attempts ----------------------------------------------------------------------------------------------------

    def attempt_marker(self, shard: Shard) -> StoragePath:
        """Return the path of a file with a byte for each attempt: it outlives the process that an attempt ends."""
        record = self.path(shard)
        return record.with_name(f".{record.stem}.tried")

    def attempts(self, shard: Shard) -> int:
        """Return how many attempts at a record have been begun and did not end."""
        marker = self.attempt_marker(shard)
        return marker.stat().st_size if marker.exists() else 0

    def mark_attempt(self, shard: Shard) -> None:
        """Count one more attempt, before it begins."""
        # Replaced as a whole, since an object in a bucket cannot be added to.
        with atomic_write(self.attempt_marker(shard)) as temporary:
            temporary.write_bytes(b"." * (self.attempts(shard) + 1))

    def clear_attempts(self, shard: Shard) -> None:
        """Forget the attempts at a record: one has ended well or with an error, or a new job begins."""
        marker = self.attempt_marker(shard)
        with writable(marker):
            marker.unlink(missing_ok=True)


def all_made(artifacts: Sequence[Artifact[Any]]) -> bool:
    """Return whether all artifacts are made; none is read to its end while another is not even there."""
    return all(artifact.path.is_file() for artifact in artifacts) and all(artifact.is_made() for artifact in artifacts)
