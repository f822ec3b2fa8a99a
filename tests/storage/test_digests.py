"""Digests: those of the algorithms' own test vectors, and what earlier versions vouched for stays vouched for."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from seap_ray.models.records import is_whole, save_tensors
from seap_ray.pipeline.shards import Shard
from seap_ray.storage.digests import digest_of, digest_of_file, has_digest, new_hasher, stated_digest
from seap_ray.storage.paths import LocalPath

SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def counting_bytes(n: int) -> bytes:
    """Return the input of BLAKE3's published test vectors: 0, 1, ..., 250, 0, 1, ..."""
    return bytes(i % 251 for i in range(n))


@pytest.mark.parametrize(
    ("n_bytes", "hexadecimal"),
    [
        (0, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        (1, "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"),
        (1025, "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444"),
    ],
)
def test_digests_are_those_of_blake3s_test_vectors(n_bytes, hexadecimal, tmp_path):
    (tmp_path / "file").write_bytes(counting_bytes(n_bytes))
    assert digest_of_file(tmp_path / "file") == f"blake3:{hexadecimal}"


def test_bytes_in_pieces_have_the_digest_of_the_whole(tmp_path):
    content = counting_bytes(3_000_000)
    (tmp_path / "file").write_bytes(content)
    hasher = new_hasher()
    for start in range(0, len(content), 999_983):
        hasher.update(content[start : start + 999_983])
    assert digest_of(hasher) == digest_of_file(tmp_path / "file")


@pytest.mark.parametrize("digest", [SHA256_OF_ABC, None])
def test_a_file_has_the_digest_of_its_bytes_by_either_algorithm_and_no_other(digest, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    digest = digest or digest_of_file(file)
    assert has_digest(file, digest)
    assert not has_digest(file, digest[:-1] + ("0" if digest[-1] != "0" else "1"))
    assert not has_digest(file, "") and not has_digest(file, f"blake3:{SHA256_OF_ABC}")
    file.write_bytes(b"abd")
    assert not has_digest(file, digest)
    assert not has_digest(tmp_path / "missing", digest)


def test_a_manifest_states_a_digest_or_the_sha256_of_earlier_versions():
    assert stated_digest({"digest": "blake3:00", "bytes": 1}) == "blake3:00"
    assert stated_digest({"sha256": SHA256_OF_ABC, "bytes": 1}) == SHA256_OF_ABC
    with pytest.raises(KeyError):
        stated_digest({"bytes": 1})


def test_shards_of_an_earlier_manifest_keep_their_digests_and_so_the_records_made_of_them():
    earlier = {"task": "sort", "shard": "00000", "n_sequences": 2, "n_tokens": 9, "sha256": SHA256_OF_ABC}
    assert Shard.from_json(earlier) == Shard("sort", "00000", 2, 9, digest=SHA256_OF_ABC)


def test_a_file_of_tensors_from_an_earlier_version_is_whole_until_a_byte_changes(tmp_path):
    path = LocalPath(tmp_path / "statistics.safetensors")
    tensors = {"mean": torch.arange(4.0), "count": torch.tensor([3])}
    save_tensors(path, tensors, task="sort")
    assert is_whole(path, task="sort")

    # As it was written then: the same bytes hashed in the same order.
    hasher = new_hasher(like=SHA256_OF_ABC)
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].numpy().tobytes())
    about = {"task": "sort", "sha256": hasher.hexdigest()}
    save_file(tensors, path, metadata={"about": json.dumps(about)})
    assert is_whole(path, task="sort") and not is_whole(path, task="other")

    save_file({**tensors, "count": torch.tensor([4])}, path, metadata={"about": json.dumps(about)})
    with safe_open(path, "pt") as file:
        assert file.get_tensor("count").item() == 4
    assert not is_whole(path, task="sort")
