"""Sweeps against the models they speak of: a cascade, and a model whose config limits where a text may leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import BertTokenizer, DataCollatorWithPadding, pipeline

from fastbert_hf import CascadeForSequenceClassification, FastBertForSequenceClassification
from fastbert_hf.evaluation import ExitRecord, record_exits, record_members, sweep_cascade, sweep_speeds

from ..common import assert_close, tiny_model, tiny_texts, tiny_tokenizer
from ..modeling.test_cascade import stock
from .test_flops import counted


SPEEDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
NUM_TEXTS = 40


def splitting_tokenizer() -> BertTokenizer:
    """Each word of `tiny_texts` in pieces, so that no text is as long as with `tiny_tokenizer`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word", *(f"##{digit}" for digit in range(10))]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=64)


def two_layers(model: FastBertForSequenceClassification) -> FastBertForSequenceClassification:
    """The first two layers of a model, with its first exit and its teacher."""
    del model.fastbert.backbone.encoder.layer[2:], model.exits[1:3]
    model.config.text_config.num_hidden_layers = 2
    return model


def cascade_of(*members, **settings) -> CascadeForSequenceClassification:
    tokenizers = settings.pop("tokenizers", [tiny_tokenizer()] * len(members))
    return CascadeForSequenceClassification.from_members(members, tokenizers, **settings)


# Members to ask and, of all that is to be seen, where texts leave: member and layers executed by then.
CASCADES = {
    "stock": (lambda: cascade_of(stock(num_layers=1, seed=1), stock(num_layers=3, seed=2)), {(1, 1), (2, 3), (2, 4)}),
    # ELECTRA has a projection before its first layer.
    "three": (
        lambda: cascade_of(
            stock(num_layers=1, seed=1), stock("electra", 2, 2), stock(num_layers=4, seed=3), exit_policy="margin"
        ),
        {(1, 1), (2, 3), (3, 4), (3, 7)},
    ),
    "fastbert": (
        lambda: cascade_of(two_layers(tiny_model(seed=1)), tiny_model("electra", 2), exit_policy="entropy"),
        {(1, 1), (1, 2), (2, 4), (2, 5), (2, 6)},
    ),
    "limited": (
        lambda: cascade_of(
            tiny_model(seed=1, min_exit_layer=2, max_layers=3), tiny_model(seed=2, min_exit_layer=2, max_layers=3)
        ),
        {(1, 2), (1, 3), (2, 3), (2, 5), (2, 6)},
    ),
    "own tokenizers": (
        lambda: cascade_of(
            stock("distilbert", 1, 4),
            stock(num_layers=3, seed=5),
            tokenizers=[tiny_tokenizer(), splitting_tokenizer()],
        ),
        {(1, 1), (2, 3), (2, 4)},
    ),
}


def recorded(cascade: CascadeForSequenceClassification, labels: bool = True) -> list[ExitRecord]:
    datasets = [[dict(tokenizer(text)) for text in tiny_texts(NUM_TEXTS)] for tokenizer in cascade.tokenizers]
    for rows in datasets if labels else ():
        for number, row in enumerate(rows):
            row["labels"] = number % 3
    collators = list(map(DataCollatorWithPadding, cascade.tokenizers))
    if not cascade.config.own_tokenizers:
        (datasets,), (collators,) = datasets, collators
    return record_members(cascade, datasets, collators, batch_size=7, progress=False)


def inputs_of(cascade: CascadeForSequenceClassification) -> dict[str, Any]:
    """The same texts for the cascade's own forward."""
    encoded = [tokenizer(tiny_texts(NUM_TEXTS), padding=True, return_tensors="pt") for tokenizer in cascade.tokenizers]
    return {"member_inputs": encoded} if cascade.config.own_tokenizers else dict(encoded[0])


def answers_of(cascade: CascadeForSequenceClassification, **arguments):
    with torch.no_grad():
        return cascade(**inputs_of(cascade), **arguments)


@pytest.fixture(scope="module", params=CASCADES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def cascade(name) -> CascadeForSequenceClassification:
    return CASCADES[name][0]()


@pytest.fixture(scope="module")
def records(cascade) -> list[ExitRecord]:
    return recorded(cascade)


@pytest.fixture(scope="module")
def table(cascade, records) -> pd.DataFrame:
    return sweep_cascade(cascade, records, SPEEDS)


@pytest.fixture(scope="module")
def of_stock() -> CascadeForSequenceClassification:
    return CASCADES["stock"][0]()


@pytest.fixture(scope="module")
def of_stock_records(of_stock) -> list[ExitRecord]:
    return recorded(of_stock)


def mean(column: torch.Tensor) -> float:
    return column.double().mean().item()


def test_records_are_of_each_member_on_what_it_reads(cascade, records):
    inputs = inputs_of(cascade)
    own = inputs.get("member_inputs", [inputs] * len(cascade.members))
    for member, record, batch in zip(cascade.members, records, own, strict=True):
        with torch.no_grad():
            assert_close(record.exit_logits, member(**batch, output_exit_logits=True).exit_logits)
        assert record.lengths.tolist() == batch["attention_mask"].sum(1).tolist()
        assert record.labels.tolist() == [row % 3 for row in range(NUM_TEXTS)]


def test_every_row_of_the_sweep_is_what_the_cascade_does(name, cascade, records, table):
    labels, full, left = records[0].labels, answers_of(cascade).logits.argmax(-1), set()
    assert table["speed"].tolist() == list(SPEEDS)
    for _, row in table.iterrows():
        output = answers_of(cascade, speed=row["speed"])
        answers = output.logits.argmax(-1)
        left |= set(zip(output.exit_member.tolist(), output.exit_layer.tolist(), strict=True))
        assert row["policy"] == cascade.config.exit_policy
        assert row["accuracy"] == pytest.approx(mean(answers == labels))
        assert row["agreement"] == pytest.approx(mean(answers == full))
        assert row["mean_exit_layer"] == pytest.approx(mean(output.exit_layer))
        shares = [row[f"member_{number}"] for number in range(1, len(cascade.members) + 1)]
        assert shares == pytest.approx(
            [mean(output.exit_member == number) for number in range(1, len(cascade.members) + 1)]
        )
    assert CASCADES[name][1] <= left
    assert table["accuracy"].nunique() > 2


def test_executed_count_is_what_torch_counts_over_the_forward_of_the_cascade(cascade, table):
    for _, row in table.iterrows():
        total, _ = counted(cascade, **inputs_of(cascade), speed=row["speed"])
        assert row["executed_flops"] * NUM_TEXTS == pytest.approx(total, rel=1e-12)


def test_speed_0_is_the_last_member_alone(cascade, table):
    last, inputs = cascade.members[-1], inputs_of(cascade)
    limits = {"max_layers": last.config.max_layers}
    total, exit_layer = counted(last, **inputs.get("member_inputs", [inputs])[-1], **limits)
    first = table.iloc[0]
    assert first["executed_flops"] * NUM_TEXTS == pytest.approx(total, rel=1e-12)
    assert first["mean_exit_layer"] == mean(exit_layer)
    assert first[[f"member_{number}" for number in range(1, len(cascade.members) + 1)]].tolist() == (
        [0.0] * (len(cascade.members) - 1) + [1.0]
    )
    assert first["agreement"] == 1
    for unit, cost in (("layer", "mean_exit_layer"), ("paper", "paper_flops"), ("executed", "executed_flops")):
        assert table[f"{unit}_speed_up"].tolist() == pytest.approx((first[cost] / table[cost]).tolist())


def test_speed_ups_compare_to_speed_0_whether_it_is_asked_for_or_not(of_stock, of_stock_records):
    whole, alone = (sweep_cascade(of_stock, of_stock_records, speeds) for speeds in ([0, 0.8], iter([0.8])))
    pd.testing.assert_frame_equal(alone, whole.iloc[1:].reset_index(drop=True))


def test_paper_count_by_hand():
    cascade = cascade_of(stock(num_layers=1), tiny_model())
    sure, unsure = [9.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    # Of the first text the first member is sure, of the second the second exit of the other, of the third nobody.
    small = ExitRecord(torch.tensor([[sure], [unsure], [unsure]]), torch.tensor([3, 4, 5]), torch.tensor([0, 0, 0]))
    exit_logits = torch.tensor([[unsure] * 4, [unsure, sure, sure, sure], [unsure] * 4])
    # Even at speed 1 nobody is sure of equal logits.
    table = sweep_cascade(cascade, [small, replace(small, exit_logits=exit_logits)], [0, 0.5, 1])
    layer = 128 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    of_stock, attention = 2 * 32 * 32, 2 * (128 * (32 * 128 + 4 * 128 * 128) + 128 * 128)
    by_hand = [
        layer + of_stock,
        layer + of_stock + 2 * layer + 2 * attention,
        layer + of_stock + 4 * layer + 4 * attention,
    ]
    mean_of_them = sum(by_hand) / 3
    assert table["paper_flops"].tolist() == pytest.approx([4 * layer + attention, mean_of_them, mean_of_them])
    assert table["mean_exit_layer"].tolist() == [4, 3, 3]
    assert table["member_1"].tolist() == pytest.approx([0, 1 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("f1", lambda labels, answers: f1_score(labels, answers, average="macro", zero_division=0)),
        ("matthews_correlation", matthews_corrcoef),
    ],
)
def test_metrics_of_the_task_replace_accuracy(of_stock, of_stock_records, metric, expected):
    table = sweep_cascade(of_stock, of_stock_records, [0.8], metric=metric)
    assert "accuracy" not in table
    answers = answers_of(of_stock, speed=0.8).logits.argmax(-1)
    assert table[metric][0] == pytest.approx(expected(of_stock_records[0].labels, answers))


def test_f1_of_two_labels_is_that_of_label_one():
    cascade = cascade_of(stock(num_layers=1, num_labels=2), stock(num_layers=1, num_labels=2))
    exit_logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])[:, None]
    record = ExitRecord(exit_logits, torch.full((4,), 3), torch.tensor([1, 0, 0, 0]))
    assert sweep_cascade(cascade, [record] * 2, [0], metric="f1")["f1"][0] == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_data_without_labels_gives_agreement_and_says_so_where_the_sweep_was_called(of_stock, of_stock_records):
    records = recorded(of_stock, labels=False)
    with pytest.warns(UserWarning, match="no labels, so there is no accuracy") as warned:
        table = sweep_cascade(of_stock, records, SPEEDS)
    assert [warning.filename for warning in warned] == [__file__]
    labelled = sweep_cascade(of_stock, of_stock_records, SPEEDS)
    pd.testing.assert_frame_equal(table, labelled.drop(columns="accuracy"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "bleu"}, "metric='bleu' is not known; choose one of accuracy, f1, matthews_correlation"),
        ({"speeds": [0.5, 1.5]}, r"speed must be a number in \[0, 1\], got 1.5"),
        ({"speeds": [float("nan")]}, r"speed must be a number in \[0, 1\], got nan"),
    ],
)
def test_unknown_settings_are_refused(of_stock, of_stock_records, arguments, message):
    with pytest.raises(ValueError, match=message):
        sweep_cascade(of_stock, of_stock_records, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: records[:1], r"of 2 members needs a record of each.* got \[40\] rows"),
        (lambda records: [*records, records[1]], r"of 2 members needs a record of each.* got \[40, 40, 40\] rows"),
        (
            lambda records: [records[0], records[1].select(torch.arange(9))],
            r"of the same rows, got \[40, 9\] rows: record_members\(cascade, dataset, data_collator\)",
        ),
    ],
)
def test_records_of_other_members_or_rows_are_refused(of_stock, of_stock_records, change, message):
    with pytest.raises(ValueError, match=message):
        sweep_cascade(of_stock, change(of_stock_records))


@pytest.mark.parametrize("numbers", [(1, 0), (0, 0), (1, 1)])
def test_records_of_members_of_another_depth_are_refused(numbers):
    cascade = cascade_of(two_layers(tiny_model(seed=1)), tiny_model())
    records = recorded(cascade)
    with pytest.raises(ValueError, match="exits"):
        sweep_cascade(cascade, [records[number] for number in numbers], [0.5])


@pytest.mark.parametrize("policy", ["entropy", "confidence", "margin", "patience"])
def test_a_sweep_of_speeds_keeps_to_the_limits_of_the_config_as_the_pipeline_does(policy):
    limits, tokenizer, texts = {"min_exit_layer": 2, "max_layers": 3}, tiny_tokenizer(), tiny_texts(NUM_TEXTS)
    model = tiny_model(seed=2, exit_policy=policy, patience=2, **limits)
    classifier = pipeline("fast-text-classification", model=model, tokenizer=tokenizer)
    batch, rows = (
        tokenizer(texts, padding=True, return_tensors="pt"),
        [{**tokenizer(text), "labels": 1} for text in texts],
    )
    record = record_exits(model, rows, DataCollatorWithPadding(tokenizer), progress=False)
    left = set()
    for row in sweep_speeds(model, record, (0.0, 0.5, 0.8, 1.0)).to_dict("records"):
        answers = classifier(texts, speed=row["speed"])
        layers = [answer["exit_layer"] for answer in answers]
        left |= set(layers)
        shares = [row[f"exit_{depth}"] for depth in range(1, 5)]
        assert shares == pytest.approx([layers.count(depth) / NUM_TEXTS for depth in range(1, 5)])
        assert row["mean_exit_layer"] == pytest.approx(sum(layers) / NUM_TEXTS)
        assert row["accuracy"] == pytest.approx(sum(answer["label"] == "LABEL_1" for answer in answers) / NUM_TEXTS)
        total, _ = counted(model, **batch, speed=row["speed"], **limits)
        assert row["executed_flops"] * NUM_TEXTS == pytest.approx(total, rel=1e-12)
    # Patience begins to count where the first exit is evaluated.
    assert left == ({3} if policy == "patience" else {2, 3})
