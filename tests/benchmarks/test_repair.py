"""The benchmark of repairs: its worker on a small site, and what it makes of seconds and results."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import load_rows
from benchmarks.repair import (
    PARTS,
    SHAPES,
    SiteShape,
    _Contest,
    _differences,
    _report,
    _rows,
    _shown,
    _smaller,
    _write_site,
    main,
)
from benchmarks.repair import _Worker as Worker


def test_a_worker_does_all_parts_of_a_site_and_two_of_one_build_make_the_same(tmp_path):
    site = SiteShape("small", 8, 96, 4)
    _write_site(tmp_path, site)
    for name in ("new", "old"):
        worker = Worker({"folder": str(tmp_path), "block": site.block, "results": str(tmp_path / name)})
        assert all(worker.measure(part) >= 0 for part in PARTS)
    assert torch.load(tmp_path / "new" / "weight.pt").shape == (8, 48)
    assert torch.load(tmp_path / "new" / "obs.pt").shape == (24,)

    differences = dict(_differences(tmp_path, PARTS))
    assert len(differences) == 5 and not any(differences.values())
    scores = torch.load(tmp_path / "old" / "obs.pt")
    torch.save(-scores, tmp_path / "old" / "obs.pt")
    assert dict(_differences(tmp_path, ["obs"]))["units kept otherwise, of half of them"] == 12


def test_rows_are_of_each_part_and_of_all_together_round_by_round(tmp_path, capsys):
    contests = []
    for site in SHAPES["7b"]:
        contest = _Contest(site, ("merge", "obs"), Path("old"), rounds=2)
        contest.seconds = {("new", "merge"): [1, 2], ("old", "merge"): [4, 4]}
        contest.seconds |= {("new", "obs"): [1, 1], ("old", "obs"): [8, 12]}
        contest.differences = {"ridges chosen otherwise": 0.0}
        contests.append(contest)
    _report([*_rows(contests, "command")], tmp_path)

    _, rows = load_rows(tmp_path / "repair.json")
    by_name = {row.name: row for row in rows}
    together = by_name["all of them"]
    assert (together.baseline, together.ours) == (28, 5) and together.spread == (1 / 6, 6 / 32) and together.met
    assert by_name["down_proj of Llama-2-7B: obs"].ratio == pytest.approx((1 / 8 + 1 / 12) / 2)
    assert by_name["o_proj of Llama-2-7B: ridges chosen otherwise"].ours == 0
    assert len(rows) == 7 and "all of them" in capsys.readouterr().out


def test_widths_are_divided_and_folders_of_one_machine_are_not_shown():
    assert _smaller(SHAPES["7b"][0], 2) == SiteShape("1/2 of o_proj of Llama-2-7B", 2048, 2048, 64)
    assert _smaller(SHAPES["8b"][1], 1) is SHAPES["8b"][1]
    assert _shown(["--old", "a", "--rounds", "2", "--save", "b"]) == ["--rounds", "2"]


def test_a_folder_that_is_no_checkout_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["repair", "--old", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "no checkout of the repository" in capsys.readouterr().err
