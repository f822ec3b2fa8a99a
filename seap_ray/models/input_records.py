"""Input records: the covariances of a layer's other inputs (``INPUTS``) on disk.

They lie beside those of the outputs' sites as a second set of moments and covariances in the same formats, so that the
files of a calibration without them stay what they are.
"""

from dataclasses import dataclass

from seap_ray.core.architecture import Architecture
from seap_ray.core.inputs import INPUTS
from seap_ray.core.moments import Covariance, Site, pooled_covariance
from seap_ray.models.records import load_covariance
from seap_ray.storage.paths import StoragePath


def inputs_file(moments: StoragePath) -> StoragePath:
    """Return where the moments of the inputs lie whose other moments are in the file ``moments``.

    Their covariances lie beside that, as ``records.covariance_file`` says.
    """
    return moments.with_suffix(".covariances") / "inputs.safetensors"


def input_keys(architecture: Architecture) -> list[tuple[int, Site]]:
    """Return every (layer, input) of a model."""
    return [(layer, site) for layer in range(architecture.n_layers) for site in INPUTS]


def input_covariance_bytes(architecture: Architecture) -> int:
    """Return the bytes of the co-moments of one layer's inputs as full float32 matrices."""
    return 4 * len(INPUTS) * architecture.hidden_size**2


def input_files_bytes(architecture: Architecture) -> int:
    """Return the size of the inputs' covariances of one shard, or one task: triangles of float32."""
    triangle = architecture.hidden_size * (architecture.hidden_size + 1) // 2
    return 4 * architecture.n_layers * len(INPUTS) * triangle


@dataclass(frozen=True, slots=True)
class PooledInputs:
    """Covariances of the inputs of several streams as one, each with its weight; they are read when asked for."""

    sources: tuple[StoragePath, ...]
    """Statistics files, with the covariances of inputs beside them."""
    weights: tuple[float, ...]

    def __getitem__(self, key: tuple[int, Site]) -> Covariance:
        """Return the pooled covariance of one (layer, input), float64."""
        parts = (load_covariance(inputs_file(source), key) for source in self.sources)
        return pooled_covariance(parts, self.weights)
