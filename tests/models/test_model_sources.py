"""Model sources: what model.source names, and what of it depends on the node."""

from pathlib import Path

import pytest

from seap_ray.errors import ConfigError
from seap_ray.models import model_sources
from seap_ray.models.model_sources import (
    MODEL_FILES,
    BucketModel,
    BuiltInModel,
    GgufFile,
    HubModel,
    LocalModel,
    parse_model_source,
)


@pytest.mark.parametrize(
    ("name", "kind", "is_copied", "hub_id"),
    [
        ("demo", BuiltInModel, False, None),
        ("s3://lab/models/mine", BucketModel, True, None),
        ("gs://lab/mine", BucketModel, True, None),
        ("meta-llama/Llama-2-7b-hf", HubModel, True, "meta-llama/Llama-2-7b-hf"),
        ("./mine", LocalModel, False, None),
        ("/models/mine", LocalModel, False, None),
        ("a/b/c", LocalModel, False, None),
        ("nowhere", LocalModel, False, None),
        ("/models/mine.Q4_K_M.gguf", GgufFile, False, None),
        ("s3://lab/mine.gguf", GgufFile, True, None),
    ],
)
def test_kinds_of_sources_are_told_apart_by_their_names(name, kind, is_copied, hub_id):
    source = parse_model_source(name, "main")
    assert type(source) is kind
    assert (source.name, source.revision, source.is_copied, source.hub_id) == (name, "main", is_copied, hub_id)


def test_a_folder_is_named_by_its_whole_path_whatever_it_looks_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    source = parse_model_source("owner/name")
    assert type(source) is LocalModel
    assert source.name == str(tmp_path / "owner" / "name") and source.fetch() == tmp_path / "owner" / "name"


def test_a_folder_that_is_not_there_is_refused_when_it_is_fetched():
    with pytest.raises(ConfigError, match=r"model.source: ./nowhere is not a folder with a model, not a hub id"):
        parse_model_source("./nowhere").fetch()


def test_a_model_of_the_hub_is_pinned_to_the_commit_that_was_fetched_and_others_are_as_they_are():
    hub, demo = parse_model_source("lab/model", "main"), parse_model_source("demo", "main")
    assert hub.pinned(Path("/cache/models--lab--model/snapshots/0123")) == parse_model_source("lab/model", "0123")
    assert hub.pinned(Path("/elsewhere")) == hub and demo.pinned(Path("/a/snapshots/0123")) == demo


@pytest.mark.parametrize(
    ("files", "more"),
    [
        (["model.safetensors"], []),
        (["adapter_model.safetensors"], []),
        ([], ["pytorch_model*.bin", "adapter_model.bin"]),
    ],
)
def test_pickled_weights_are_downloaded_where_the_hub_has_no_others(tmp_path, monkeypatch, files, more):
    folder = tmp_path / "snapshots" / "0123"
    folder.mkdir(parents=True)
    for name in ["config.json", *files]:
        (folder / name).touch()
    asked = []

    def snapshot_download(hub_id, *, revision, allow_patterns):
        asked.append((hub_id, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model_sources._download.cache_clear()
    assert parse_model_source("lab/model", "main").fetch() == folder
    assert asked[0] == ("lab/model", "main", [*MODEL_FILES])
    assert asked[1:] == [("lab/model", "0123", [*MODEL_FILES, *more])] * bool(more)
    model_sources._download.cache_clear()


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ConfigError, match="unknown scheme ftp://"):
        parse_model_source("ftp://lab/model")
