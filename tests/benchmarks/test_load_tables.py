"""docs/serving.md is what its numbers give, and they keep what the page promises."""

from __future__ import annotations

import json
from pathlib import Path

from ..common import load_script


BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
DOCS = BENCHMARKS.parent / "docs"


def test_page_of_the_project_is_what_its_numbers_give(tmp_path):
    (tmp_path / "serving").symlink_to(DOCS / "serving")
    load_script(BENCHMARKS / "load_report.py").write(tmp_path)
    page = (tmp_path / "serving.md").read_text(encoding="utf-8")
    assert page == (DOCS / "serving.md").read_text(encoding="utf-8") and "{{" not in page and "not run" not in page
    assert (tmp_path / "figures" / "load.png").exists()


def test_what_is_accepted_is_in_time():
    found = json.loads((DOCS / "serving" / "load.json").read_text(encoding="utf-8"))
    for run in found["runs"]:
        own = run["rows"]["`LoadControl`"]
        assert own["in_time"] >= 0.99
        assert own["accuracy"] > run["rows"]["the greatest speed"]["accuracy"]
