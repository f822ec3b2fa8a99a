"""GGUF header: counts and lengths that a file cannot hold are refused; the files here hold some bytes."""

import struct

import pytest

from seap_ray.errors import ConfigError
from seap_ray.models.conversion import gguf_header
from seap_ray.models.conversion.gguf_header import check_header
from tests.support.gguf_files import save_llama, write_gguf

MANY = 1 << 50
FLOAT32, TEXT, ARRAY, UINT64 = 6, 8, 9, 10


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*parts: bytes, n_tensors: int = 0, n_values: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + b"".join(parts)


def value(kind: int, content: bytes, name: str = "a") -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def tensor(*dimensions: int) -> bytes:
    n = len(dimensions)
    return text("t") + struct.pack(f"<I{n}QIQ", n, *dimensions, 0, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF",
        header(n_values=MANY),
        header(n_tensors=MANY),
        header(struct.pack("<Q", MANY), n_values=1),
        header(value(TEXT, struct.pack("<Q", MANY)), n_values=1),
        header(value(ARRAY, struct.pack("<IQ", FLOAT32, MANY)), n_values=1),
        header(value(ARRAY, struct.pack("<IQ", TEXT, MANY)), n_values=1),
        header(value(ARRAY, struct.pack("<IQ", TEXT, 2) + text("a") + struct.pack("<Q", MANY)), n_values=1),
        header(tensor(MANY), n_tensors=1),
        header(tensor(1 << 20, 1 << 20, 1 << 20, 1 << 20), n_tensors=1),
    ],
)
def test_what_a_header_says_and_the_file_cannot_hold_is_one_line(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=r"^model\.source: .*m\.gguf is truncated, or its header is damaged$"):
        check_header(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (header(value(99, b""), n_values=1), "metadata of an unknown type 99"),
        (header(value(ARRAY, struct.pack("<IQ", ARRAY, 1)), n_values=1), "a list of lists"),
        (header(tensor(1, 1, 1, 1, 1), n_tensors=1), "tensor t with 5 dimensions"),
        (header(value(UINT64, struct.pack("<Q", 21), "llama.block_count"), n_values=1), "block_count 21, and 20 is"),
        (header(value(UINT64, struct.pack("<Q", 21), "llama.expert_count"), n_values=1), "expert_count 21, and 20 is"),
    ],
)
def test_a_header_that_no_model_has_is_one_line(tmp_path, monkeypatch, content, reason):
    monkeypatch.setattr(gguf_header, "MAX_COUNT", 20)
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=f"m.gguf: its header is damaged \\(.*{reason}"):
        check_header(tmp_path / "m.gguf")


def test_a_whole_file_passes_and_one_of_another_format_is_left_to_its_reader(tmp_path):
    save_llama(tmp_path / "base")
    check_header(write_gguf(tmp_path / "m.gguf", tmp_path / "base"))
    (tmp_path / "other.gguf").write_bytes(b"PK" + bytes(50))
    check_header(tmp_path / "other.gguf")
