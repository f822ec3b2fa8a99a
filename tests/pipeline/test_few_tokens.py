"""Few tokens for a fit over many columns are warned of, with what would be right."""

import pytest

from seap_ray.config import Config
from seap_ray.models.checkpoint import Checkpoint
from seap_ray.pipeline.job import few_tokens_warning
from seap_ray.pipeline.shards import Manifest, Shard

DEMO = Checkpoint.open("demo")
COLUMNS = max(DEMO.architecture.widths)


def manifest(*, n_tokens: int, n_uncounted: int = 0) -> Manifest:
    shard = Shard("sort", "00000", n_sequences=10, n_tokens=n_tokens, digest="", n_uncounted=n_uncounted)
    return Manifest("sort", "key", (shard,), n_rows=10, n_cut=0, prompts="", rows="")


def config(statistics="covariance", count="all") -> Config:
    return Config.model_validate({"calibration": {"statistics": statistics}, "corpus": {"count": count}})


def test_tokens_that_count_are_those_of_all_shards_less_those_that_do_not():
    assert manifest(n_tokens=100, n_uncounted=30).n_counted == 70


@pytest.mark.parametrize(("n_uncounted", "warns"), [(0, False), (1, True)])
def test_two_tokens_for_each_column_are_enough(n_uncounted, warns):
    warning = few_tokens_warning(config(), DEMO, manifest(n_tokens=2 * COLUMNS, n_uncounted=n_uncounted))
    assert bool(warning) == warns


def test_the_warning_names_task_tokens_columns_and_the_keys_that_help():
    few = manifest(n_tokens=5000, n_uncounted=4900)
    warning = few_tokens_warning(config(count="assistant"), DEMO, few)
    assert warning.startswith(
        f"tasks.sort: 100 tokens count, few for a fit over {COLUMNS} columns; raise corpus.samples"
    )
    assert "corpus.count=all" in warning and "corpus.count" not in few_tokens_warning(config(), DEMO, few)


def test_moments_need_no_fit():
    assert few_tokens_warning(config("moments"), DEMO, manifest(n_tokens=1)) is None
