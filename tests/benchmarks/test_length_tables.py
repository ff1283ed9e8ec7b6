"""The part "Length" of docs/results.md: what each control is, and what the tables say of numbers that are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbert_hf.evaluation import executed_flops
from fastbert_hf.training import retention_schedule

from ..common import load_script, tiny_model


BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
LENGTHS = (30, 21, 21, 12, 5)


@pytest.fixture(scope="module")
def runs():
    return load_script(BENCHMARKS / "length_runs.py")


@pytest.fixture(scope="module")
def report(runs):
    return load_script(BENCHMARKS / "length_report.py")


def texts() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(5, 100, (length,), generator=generator).tolist()} for length in LENGTHS]


def logits_of(model, rows) -> torch.Tensor:
    return torch.stack([answer.logits for answer in model.predict(rows, speed=0.0)])


@pytest.mark.parametrize("kind", ["drop", "mean", "weighted", "first", "random", "truncate", "searched"])
def test_every_kind_costs_what_its_ratio_says_and_depends_on_the_text_alone(runs, kind):
    model, lengths = tiny_model(), torch.tensor(LENGTHS).repeat(20)
    depth = torch.full_like(lengths, 4)
    full = executed_flops(model, depth, lengths, students=False).double().mean()
    searched = {"layers": [1, 2, 3], "retention": [0.8, 0.6, 0.5]}
    dial = runs.dial_of(model, kind, 1.5, lengths, searched)
    assert model.config.coarsening is None
    most_tokens = runs.make_shorter(model, kind, dial, searched)
    assert (most_tokens is None) == (kind != "truncate")
    own = lengths if most_tokens is None else lengths.clamp(max=most_tokens)
    assert (full / executed_flops(model, depth, own, students=False).double().mean()) == pytest.approx(1.5, rel=0.1)
    rows = texts()
    together = logits_of(model, rows)
    alone = torch.cat([logits_of(model, [row]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_text_that_is_cut_keeps_its_beginning_and_its_last_token(runs):
    model = tiny_model()
    assert runs.make_shorter(model, "truncate", 10.0) == 10
    for row, actual in zip(texts(), logits_of(model, texts()), strict=True):
        ids = row["input_ids"]
        places = list(range(len(ids))) if len(ids) <= 10 else [*range(9), len(ids) - 1]
        cut = torch.tensor([[ids[place] for place in places]])
        with torch.no_grad():
            expected = tiny_model()(cut, position_ids=torch.tensor([places])).logits[0]
        torch.testing.assert_close(actual, expected)


def test_the_first_tokens_are_kept_by_place(runs):
    model = tiny_model()
    schedule = retention_schedule(4, 0.6)
    runs.make_shorter(model, "first", 0.6)
    changed = [{"input_ids": [*row["input_ids"][:-1], 7]} for row in texts()[:1]]
    first = [logits_of(model, rows) for rows in (texts()[:1], changed)]
    assert model.config.coarsening == {**schedule, "merge": "drop"}
    assert not torch.equal(*first)  # read by the layers before
    kept = runs.ByRule({2: 0.5}, merge="drop", rule="first").units(2, torch.tensor([10]), torch.tensor([10]))
    assert kept.tolist() == [5]


def test_runs_are_named_by_what_they_are(runs):
    names = [run.name for run in runs.runs_of("imdb-512")]
    assert names[:4] == ["imdb-512-full", "imdb-512-drop-2x", "imdb-512-mean-2x", "imdb-512-truncate-2x"]
    assert len(names) == len(set(names)) == 14 and "imdb-512-random-2x" in names and "imdb-512-mean-1.5x" in names


def measured(accuracy: float) -> dict:
    return {part: {"accuracy": accuracy, "executed_flops": 1.0} for part in ("dev", "test")}


def test_points_are_lost_against_the_full_model(report, runs):
    results = {
        "rte-full": {"distilled": measured(0.7), "tokens": {"test": 64.2}},
        "rte-drop-2x": {"distilled": measured(0.685)},
        "rte-random-2x": {"distilled": measured(0.6)},
    }
    lines = report.ratios_table(results).splitlines()[2:]
    assert lines == [
        "| rte | all 64 tokens | 70.0 |  |  |",
        "| rte | **dropped** (PoWER-BERT) |  | 68.5 (1.5) |  |",
        "| rte | random ones kept |  | 60.0 (10.0) |  |",
    ]
    numbers = report.numbers(results)
    assert numbers["lost_rte_drop_2"] == "1.5" and numbers["lost_rte_mean_2"] == "not run"
    assert set(report.numbers({}).values()) == {"not run"} and report.ratios_table({}) == "not run"


def test_the_frontier_is_told_against_exits_alone(report):
    def sweep(accuracies: list[float], flops: list[float]) -> dict:
        table = {"speed": [0.0, 0.5, 1.0], "accuracy": accuracies, "executed_flops": flops}
        return {"dev": table, "test": table}

    results = {"frontier-full": sweep([0.9, 0.9, 0.8], [100, 50, 20])}
    assert report.numbers(results)["length_gain"] == "not run"
    results["frontier-drop-2x"] = sweep([0.898, 0.896, 0.7], [50, 20, 10])
    numbers = report.numbers(results)
    assert (numbers["length_gain"], numbers["length_frontier_drop_2x"]) == ("2.50", "5.0x")
    assert report.plot_frontier(results) is not None and "exits alone" in report.frontier_table(results)
