"""Sweeps against the models they speak of: a cascade, and a model whose config limits where a text may leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import BertTokenizer, DataCollatorWithPadding, PreTrainedModel, pipeline

from fastbert_hf import CascadeForSequenceClassification, FastBertForSequenceClassification
from fastbert_hf.evaluation import ExitRecord, record_exits, sweep_depths, sweep_speeds

from ..common import assert_close, stock, tiny_model, tiny_texts, tiny_tokenizer
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


class Case(NamedTuple):
    """
    A cascade to ask and what is to be seen.

    Args:
        members (`Callable`): Makes them.
        places (`set`): Where texts leave, of all places: member, and layers executed by then.
        exit_policy (`str`): Of the cascade.
        tokenizers (`list`): One for all members, or one for each.
    """

    members: Callable[[], list[PreTrainedModel]]
    places: set[tuple[int, int]]
    exit_policy: str = "confidence"
    tokenizers: tuple[BertTokenizer, ...] = (tiny_tokenizer(),)

    def cascade(self) -> CascadeForSequenceClassification:
        members = self.members()
        tokenizers = list(self.tokenizers) * (len(members) // len(self.tokenizers))
        return CascadeForSequenceClassification.from_members(members, tokenizers, exit_policy=self.exit_policy)

    def rows(self, labels: bool = True) -> tuple[Any, Any]:
        """The texts as `record_exits` takes them, and what collates them."""
        datasets = [[dict(tokenizer(text)) for text in tiny_texts(NUM_TEXTS)] for tokenizer in self.tokenizers]
        for rows in datasets if labels else ():
            for number, row in enumerate(rows):
                row["labels"] = number % 3
        collators = list(map(DataCollatorWithPadding, self.tokenizers))
        return (datasets, collators) if len(self.tokenizers) > 1 else (datasets[0], collators[0])

    def inputs(self) -> dict[str, Any]:
        """The same texts for the cascade's own forward."""
        encoded = [
            tokenizer(tiny_texts(NUM_TEXTS), padding=True, return_tensors="pt") for tokenizer in self.tokenizers
        ]
        return {"member_inputs": encoded} if len(encoded) > 1 else dict(encoded[0])


CASES = {
    "stock": Case(lambda: [stock(num_layers=1, seed=1), stock(num_layers=3, seed=2)], {(1, 1), (2, 3), (2, 4)}),
    # ELECTRA has a projection before its first layer.
    "three": Case(
        lambda: [stock(num_layers=1, seed=1), stock("electra", 2, 2), stock(num_layers=4, seed=3)],
        {(1, 1), (2, 3), (3, 4), (3, 7)},
        "margin",
    ),
    "fastbert": Case(
        lambda: [two_layers(tiny_model(seed=1)), tiny_model("electra", 2)],
        {(1, 1), (1, 2), (2, 4), (2, 5), (2, 6)},
        "entropy",
    ),
    "limited": Case(
        lambda: [tiny_model(seed=seed, min_exit_layer=2, max_layers=3) for seed in (1, 2)],
        {(1, 2), (1, 3), (2, 3), (2, 5), (2, 6)},
    ),
    "own tokenizers": Case(
        lambda: [stock("distilbert", 1, 4), stock(num_layers=3, seed=5)],
        {(1, 1), (2, 3), (2, 4)},
        tokenizers=(tiny_tokenizer(), splitting_tokenizer()),
    ),
}


def recorded(cascade: CascadeForSequenceClassification, case: Case, labels: bool = True) -> ExitRecord:
    return record_exits(cascade, *case.rows(labels), batch_size=7, progress=False)


def answers_of(cascade: CascadeForSequenceClassification, case: Case, **arguments):
    with torch.no_grad():
        return cascade(**case.inputs(), **arguments)


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def cascade(case) -> CascadeForSequenceClassification:
    return case.cascade()


@pytest.fixture(scope="module")
def record(cascade, case) -> ExitRecord:
    return recorded(cascade, case)


@pytest.fixture(scope="module")
def table(cascade, record) -> pd.DataFrame:
    return sweep_speeds(cascade, record, SPEEDS)


@pytest.fixture(scope="module")
def of_stock() -> CascadeForSequenceClassification:
    return CASES["stock"].cascade()


@pytest.fixture(scope="module")
def of_stock_record(of_stock) -> ExitRecord:
    return recorded(of_stock, CASES["stock"])


def mean(column: torch.Tensor) -> float:
    return column.double().mean().item()


def test_a_record_holds_each_member_on_what_it_reads(cascade, case, record):
    inputs = case.inputs()
    own = inputs.get("member_inputs", [inputs] * len(cascade.members))
    assert record.member_layers == tuple(len(member.exits) for member in cascade.members)
    assert record.labels.tolist() == [row % 3 for row in range(NUM_TEXTS)]
    for number, (member, batch) in enumerate(zip(cascade.members, own, strict=True), start=1):
        of_member = record.of_member(number)
        with torch.no_grad():
            assert_close(of_member.exit_logits, member(**batch, output_exit_logits=True).exit_logits)
        total, _ = counted(member, **batch, output_exit_logits=True)
        assert (of_member.layer_flops + of_member.exit_flops).sum() == total


def test_every_row_of_the_sweep_is_what_the_cascade_does(cascade, case, record, table):
    labels, full, left = record.labels, answers_of(cascade, case).logits.argmax(-1), set()
    assert table["speed"].tolist() == list(SPEEDS)
    for _, row in table.iterrows():
        output = answers_of(cascade, case, speed=row["speed"])
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
    assert case.places <= left
    assert table["accuracy"].nunique() > 2


def test_executed_count_is_what_torch_counts_over_the_forward_of_the_cascade(cascade, case, table):
    for _, row in table.iterrows():
        total, _ = counted(cascade, **case.inputs(), speed=row["speed"])
        assert row["executed_flops"] * NUM_TEXTS == pytest.approx(total, rel=1e-12)


def test_speed_0_is_the_last_member_alone(cascade, case, table):
    last, inputs = cascade.members[-1], case.inputs()
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


def test_speed_ups_compare_to_speed_0_whether_it_is_asked_for_or_not(of_stock, of_stock_record):
    whole, alone = (sweep_speeds(of_stock, of_stock_record, speeds) for speeds in ([0, 0.8], iter([0.8])))
    pd.testing.assert_frame_equal(alone, whole.iloc[1:].reset_index(drop=True))


def test_paper_count_by_hand():
    cascade = Case(lambda: [stock(num_layers=1), tiny_model()], set()).cascade()
    sure, unsure = [9.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    # Of the first text the first member is sure, of the second the second exit of the other, of the third nobody.
    exit_logits = [[sure] + [unsure] * 4, [unsure] * 2 + [sure] * 3, [unsure] * 5]
    costs = torch.ones(3, 5, dtype=torch.long)
    record = ExitRecord(torch.tensor(exit_logits), costs, costs, torch.tensor([0, 0, 0]), (1, 4))
    # Even at speed 1 nobody is sure of equal logits.
    table = sweep_speeds(cascade, record, [0, 0.5, 1])
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
def test_metrics_of_the_task_replace_accuracy(of_stock, of_stock_record, metric, expected):
    table = sweep_speeds(of_stock, of_stock_record, [0.8], metric=metric)
    assert "accuracy" not in table
    answers = answers_of(of_stock, CASES["stock"], speed=0.8).logits.argmax(-1)
    assert table[metric][0] == pytest.approx(expected(of_stock_record.labels, answers))


def test_f1_of_two_labels_is_that_of_label_one():
    cascade = Case(lambda: [stock(num_layers=1, num_labels=2) for _ in range(2)], set()).cascade()
    exit_logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])[:, None].repeat(1, 2, 1)
    costs = torch.ones(4, 2, dtype=torch.long)
    record = ExitRecord(exit_logits, costs, costs, torch.tensor([1, 0, 0, 0]), (1, 1))
    assert sweep_speeds(cascade, record, [0], metric="f1")["f1"][0] == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_data_without_labels_gives_agreement_and_says_so_where_the_sweep_was_called(of_stock, of_stock_record):
    record = recorded(of_stock, CASES["stock"], labels=False)
    with pytest.warns(UserWarning, match="no labels, so there is no accuracy") as warned:
        table = sweep_speeds(of_stock, record, SPEEDS)
    assert [warning.filename for warning in warned] == [__file__]
    labelled = sweep_speeds(of_stock, of_stock_record, SPEEDS)
    pd.testing.assert_frame_equal(table, labelled.drop(columns="accuracy"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "bleu"}, "metric='bleu' is not known for .*; choose one of accuracy, f1, matthews_correlation"),
        ({"speeds": [0.5, 1.5]}, r"speed must be a number in \[0, 1\], got 1.5"),
        ({"speeds": [float("nan")]}, r"speed must be a number in \[0, 1\], got nan"),
    ],
)
def test_unknown_settings_are_refused(of_stock, of_stock_record, arguments, message):
    with pytest.raises(ValueError, match=message):
        sweep_speeds(of_stock, of_stock_record, **arguments)


def test_every_policy_but_patience_can_be_swept(of_stock, of_stock_record):
    tables = sweep_speeds(of_stock, of_stock_record, SPEEDS, ["entropy", "margin"]).groupby("policy")
    of_stock.config.exit_policy = "margin"
    alone = sweep_speeds(of_stock, of_stock_record, SPEEDS)
    of_stock.config.exit_policy = "confidence"
    pd.testing.assert_frame_equal(tables.get_group("margin").reset_index(drop=True), alone)
    with pytest.raises(ValueError, match="exit policy 'patience' is not known for this model; choose one of conf"):
        sweep_speeds(of_stock, of_stock_record, SPEEDS, ["patience"])


def test_the_depths_of_a_cascade_are_those_of_its_members(of_stock, of_stock_record):
    with pytest.raises(ValueError, match=r"sweep_depths\(cascade.members\[0\], record.of_member\(1\)\)"):
        sweep_depths(of_stock, of_stock_record)
    assert len(sweep_depths(of_stock.members[1], of_stock_record.of_member(2))) == 3


@pytest.mark.parametrize("change", [lambda rows: rows[0], lambda rows: rows[:1], lambda rows: [*rows, rows[0]]])
def test_members_with_their_own_tokenizers_need_data_of_each(change):
    case = CASES["own tokenizers"]
    datasets, collators = case.rows()
    for parts in ((change(datasets), collators), (datasets, change(collators))):
        with pytest.raises(ValueError, match="each of the 2 members has its own tokenizer: give a list of 2 datasets"):
            record_exits(case.cascade(), *parts, progress=False)


def test_members_with_their_own_tokenizers_need_data_of_the_same_rows():
    case = CASES["own tokenizers"]
    datasets, collators = case.rows()
    with pytest.raises(ValueError, match=r"of the same rows, got \[40, 9\] rows"):
        record_exits(case.cascade(), [datasets[0], datasets[1][:9]], collators, progress=False)


@pytest.mark.parametrize("numbers", [(2, 1), (1, 1), (1,), (1, 2, 2)])
def test_records_of_other_members_are_refused(of_stock, of_stock_record, numbers):
    record = ExitRecord.of_members([of_stock_record.of_member(number) for number in numbers])
    with pytest.raises(ValueError, match=r"exits and the model 1 \+ 3: give the model that made it"):
        sweep_speeds(of_stock, record, [0.5])


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
    left, full = set(), model(**batch).logits.argmax(-1).tolist()
    for row in sweep_speeds(model, record, (0.0, 0.5, 0.8, 1.0)).to_dict("records"):
        answers = classifier(texts, speed=row["speed"])
        layers = [answer["exit_layer"] for answer in answers]
        left |= set(layers)
        shares = [row[f"exit_{depth}"] for depth in range(1, 5)]
        assert shares == pytest.approx([layers.count(depth) / NUM_TEXTS for depth in range(1, 5)])
        assert row["mean_exit_layer"] == pytest.approx(sum(layers) / NUM_TEXTS)
        # The full model is every layer, beyond what the config lets a text run through.
        assert row["layer_speed_up"] == pytest.approx(4 * NUM_TEXTS / sum(layers))
        same = [answer["label"] == f"LABEL_{label}" for answer, label in zip(answers, full, strict=True)]
        assert row["agreement"] == pytest.approx(sum(same) / NUM_TEXTS)
        assert row["accuracy"] == pytest.approx(sum(answer["label"] == "LABEL_1" for answer in answers) / NUM_TEXTS)
        total, _ = counted(model, **batch, speed=row["speed"], **limits)
        assert row["executed_flops"] * NUM_TEXTS == pytest.approx(total, rel=1e-12)
    # Patience begins to count where the first exit is evaluated.
    assert left == ({3} if policy == "patience" else {2, 3})
