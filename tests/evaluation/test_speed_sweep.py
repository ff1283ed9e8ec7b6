from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import DataCollatorWithPadding

from fastbert_hf.evaluation import (
    ExitRecord,
    at_speed_up,
    executed_flops,
    load_table,
    paper_flops,
    record_exits,
    save_table,
    sweep_depths,
    sweep_speeds,
    time_speeds,
)

from ..common import NUM_LAYERS, tiny_model, tiny_texts, tiny_tokenizer


SPEEDS = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)


def rows(labels: bool = True, number: int = 40) -> list[dict]:
    tokenizer = tiny_tokenizer()
    encoded = [dict(tokenizer(text)) for text in tiny_texts(number)]
    return [{**row, "labels": index % 3} for index, row in enumerate(encoded)] if labels else encoded


def recorded(model, labels: bool = True) -> ExitRecord:
    return record_exits(model, rows(labels), DataCollatorWithPadding(tiny_tokenizer()), progress=False)


def lengths() -> torch.Tensor:
    return torch.tensor([len(row["input_ids"]) for row in rows()])


def with_answers(exit_logits: torch.Tensor, labels: list[int]) -> ExitRecord:
    """A record of given answers, at some cost."""
    costs = torch.ones(exit_logits.shape[:2], dtype=torch.long)
    return ExitRecord(exit_logits, costs, costs, torch.tensor(labels))


def answers_of(model, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and exit layers that the real adaptive forward gives."""
    batch = tiny_tokenizer()(tiny_texts(40), padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch, **arguments)
    return output.logits.argmax(-1), output.exit_layer


@pytest.mark.parametrize("policy", ["entropy", "confidence", "margin", "patience"])
def test_every_row_of_the_sweep_is_what_the_adaptive_forward_does(policy):
    model = tiny_model(exit_policy=policy, patience=2)
    record = recorded(model)
    table = sweep_speeds(model, record, SPEEDS)
    full, left = answers_of(model)[0], set()
    for _, row in table.iterrows():
        answers, exit_layer = answers_of(model, speed=row["speed"])
        left |= set(exit_layer.tolist())
        assert row["policy"] == policy
        assert row["accuracy"] == pytest.approx((answers == record.labels).double().mean().item())
        assert row["agreement"] == pytest.approx((answers == full).double().mean().item())
        assert row["mean_exit_layer"] == pytest.approx(exit_layer.double().mean().item())
        assert row["layer_speed_up"] == pytest.approx(NUM_LAYERS / row["mean_exit_layer"])
        students = row["speed"] > 0
        paper = paper_flops(model, exit_layer, students).double().mean().item()
        executed = executed_flops(model, exit_layer, lengths(), students).double().mean().item()
        assert row["paper_flops"] == pytest.approx(paper)
        assert row["executed_flops"] == pytest.approx(executed)
        shares = [row[f"exit_{depth}"] for depth in range(1, NUM_LAYERS + 1)]
        assert shares == pytest.approx([(exit_layer == depth).double().mean().item() for depth in range(1, 5)])
    assert len(left) > 1
    first = table.iloc[0]
    assert first[["paper_speed_up", "executed_speed_up", "layer_speed_up"]].tolist() == [1, 1, 1]
    assert (table["paper_speed_up"] * table["paper_flops"]).round(3).nunique() == 1


def test_every_depth_of_the_sweep_is_what_max_layers_does():
    model = tiny_model()
    record = recorded(model)
    table = sweep_depths(model, record)
    for depth in range(1, NUM_LAYERS + 1):
        row = table.iloc[depth - 1]
        answers, exit_layer = answers_of(model, max_layers=depth)
        assert row["max_layers"] == row["mean_exit_layer"] == depth
        assert row["accuracy"] == pytest.approx((answers == record.labels).double().mean().item())
        flops = executed_flops(model, exit_layer, lengths(), students=False).double().mean().item()
        assert row["executed_flops"] == pytest.approx(flops)


def test_several_policies_stand_below_each_other():
    model = tiny_model()
    table = sweep_speeds(model, recorded(model), SPEEDS, policies=["entropy", "margin"])
    assert table["policy"].tolist() == ["entropy"] * len(SPEEDS) + ["margin"] * len(SPEEDS)
    alone = sweep_speeds(model, recorded(model), SPEEDS, policies=["margin"])
    pd.testing.assert_frame_equal(table.iloc[len(SPEEDS) :].reset_index(drop=True), alone)


def test_the_default_sweep_goes_from_0_to_1_and_is_finer_near_0():
    model = tiny_model()
    table = sweep_speeds(model, recorded(model))
    expected = [step / 1000 for step in range(101)] + [step / 100 for step in range(11, 101)]
    assert table["speed"].tolist() == expected
    assert table["mean_exit_layer"].is_monotonic_decreasing


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("f1", lambda labels, answers: f1_score(labels, answers, average="macro", zero_division=0)),
        ("matthews_correlation", matthews_corrcoef),
    ],
)
def test_metrics_of_the_task_replace_accuracy(metric, expected):
    model = tiny_model()
    record = recorded(model)
    table = sweep_speeds(model, record, [0.8], metric=metric)
    assert "accuracy" not in table
    assert table[metric][0] == pytest.approx(expected(record.labels, answers_of(model, speed=0.8)[0]))


def test_f1_of_two_labels_is_that_of_label_one():
    exit_logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])[:, None].repeat(1, NUM_LAYERS, 1)
    record = with_answers(exit_logits, [1, 0, 0, 0])
    table = sweep_depths(tiny_model(num_labels=2), record, metric="f1")
    assert table["f1"][0] == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_f1_of_three_labels_is_macro_even_where_one_is_absent():
    exit_logits = torch.eye(3)[torch.tensor([0, 1, 1, 0])][:, None].repeat(1, NUM_LAYERS, 1)
    labels = [0, 1, 0, 0]
    table = sweep_depths(tiny_model(), with_answers(exit_logits, labels), metric="f1")
    assert table["f1"][0] == pytest.approx(f1_score(labels, [0, 1, 1, 0], average="macro"))


def test_speeds_may_be_a_generator():
    model = tiny_model()
    table = sweep_speeds(model, recorded(model), (speed for speed in SPEEDS), policies=["entropy", "margin"])
    assert len(table) == 2 * len(SPEEDS)


def test_data_without_labels_gives_agreement_and_says_what_is_missing():
    model = tiny_model()
    with pytest.warns(UserWarning, match="no labels, so there is no accuracy"):
        table = sweep_speeds(model, recorded(model, labels=False), SPEEDS)
    assert "accuracy" not in table
    assert table["agreement"][0] == 1


def test_data_with_labels_warns_of_nothing():
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep_speeds(model, recorded(model), SPEEDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "bleu"}, "metric='bleu' is not known for .*; choose one of accuracy, f1, matthews_correlation"),
        ({"policies": ["hope"]}, "exit policy 'hope' is not known"),
        ({"speeds": [0.5, 1.5]}, r"speed must be a number in \[0, 1\], got 1.5"),
    ],
)
def test_unknown_settings_are_refused(arguments, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        sweep_speeds(model, recorded(model), **arguments)


def test_the_record_of_another_model_is_refused():
    for sweep in (sweep_speeds, sweep_depths):
        with pytest.raises(ValueError, match=f"the record has 2 exits and the model {NUM_LAYERS}"):
            sweep(tiny_model(), with_answers(torch.randn(4, 2, 3), [0] * 4))


def test_a_record_without_costs_is_refused():
    with pytest.raises(ValueError, match="the record has no costs: record_exits"):
        sweep_speeds(tiny_model(), ExitRecord(torch.randn(4, NUM_LAYERS, 3)))


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_a_saved_table_comes_back(tmp_path, suffix):
    model = tiny_model()
    table = sweep_speeds(model, recorded(model), SPEEDS)
    table.attrs = {"model": "org/model", "rows": 40}
    path = tmp_path / "new" / f"table{suffix}"
    save_table(table, path)
    back = load_table(path)
    pd.testing.assert_frame_equal(back, table, check_dtype=False)
    assert back.attrs == (table.attrs if suffix == ".json" else {})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    reference = tmp_path / "reference"
    reference.touch()
    assert path.stat().st_mode == reference.stat().st_mode


def test_a_table_of_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"saved as \.csv or \.json"):
        save_table(pd.DataFrame(), tmp_path / "table.xlsx")


def test_times_are_measured_for_every_speed_beside_full_depth():
    model, calls = tiny_model(), []
    predict = model.predict

    def watched(texts, speed, batch_size):
        answers = list(predict(texts, speed=speed, batch_size=batch_size))
        calls.append((speed, len(answers), batch_size))
        yield from answers

    model.predict = watched
    table = time_speeds(model, rows(), speeds=(0.8, 1.0), batch_size=16, repeats=3, progress=False)
    assert table["speed"].tolist() == [0.0, 0.8, 1.0]
    # One round that does not count, and the speeds take turns, all texts each time.
    assert calls == [(speed, 40, 16) for _ in range(4) for speed in (0.0, 0.8, 1.0)]
    assert (table["texts_per_second"] > 0).all()
    assert table["time_speed_up"][0] == 1
    assert (table["time_speed_up_min"] <= table["time_speed_up"]).all()
    assert (table["time_speed_up"] <= table["time_speed_up_max"]).all()


@pytest.mark.parametrize(("data", "repeats"), [([], 3), (rows(number=2), 0)])
def test_nothing_to_time_is_refused(data, repeats):
    with pytest.raises(ValueError, match="at least one row and one repeat"):
        time_speeds(tiny_model(), data, repeats=repeats)


def dial(layers: list[float], accuracy: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"layer_speed_up": 6 / np.array(layers), "accuracy": accuracy})


def test_a_speed_up_between_two_settings_splits_the_texts_so_that_dev_reaches_it():
    dev = dial([6, 4, 2], [0.9, 0.85, 0.8])
    test = dial([6, 4.2, 2.1], [0.95, 0.9, 0.7])
    # 3 layers on dev: half of the texts with 4, half with 2.
    point = at_speed_up(dev, test, 2)
    assert point["accuracy"] == pytest.approx(0.8)
    assert point["layer_speed_up"] == pytest.approx(6 / 3.15)


def test_a_speed_up_that_a_setting_has_takes_it():
    dev = dial([6, 3, 2], [0.9, 0.85, 0.8])
    assert at_speed_up(dev, dev, 2) == {"accuracy": pytest.approx(0.85), "layer_speed_up": pytest.approx(2)}


def test_settings_may_come_in_any_order():
    dev = dial([2, 6, 4], [0.8, 0.9, 0.85])
    assert at_speed_up(dev, dev, 2)["accuracy"] == pytest.approx(0.825)


def test_a_speed_up_beyond_the_dial_is_none():
    dev = dial([6, 4, 2], [0.9, 0.85, 0.8])
    assert at_speed_up(dev, dev, 3.1) is None
    assert at_speed_up(dev, dev, 0.9) is None


def test_settings_on_both_data_must_be_the_same():
    with pytest.raises(ValueError, match="got 3 and 2 rows"):
        at_speed_up(dial([6, 4, 2], [1, 1, 1]), dial([6, 4], [1, 1]), 2)
