"""Model cards: what they say, that they say nothing that was not measured, and that they survive a reload."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import DataCollatorWithPadding, Trainer

from fastbert_hf import (
    CascadeForSequenceClassification,
    Measured,
    SelfDistillationArguments,
    SelfDistillationTrainer,
    calibrate,
    write_model_card,
)
from fastbert_hf.evaluation import record_exits, replay_at_speed, sweep_speeds
from fastbert_hf.sharing.with_code import write_code

from ..common import stock, tiny_model, tiny_texts, tiny_tokenizer


SPEEDS = [
    {"speed": 0, "accuracy": 0.9, "agreement": 1.0, "mean_exit_layer": 4.0, "layer_speed_up": 1.0},
    {"speed": 0.5, "accuracy": 0.875, "agreement": 0.95, "mean_exit_layer": 1.6, "layer_speed_up": 2.5},
]


def trainer_in(folder: Path, **arguments) -> SelfDistillationTrainer:
    tokenizer = tiny_tokenizer()
    rows = [{**tokenizer(text), "labels": row % 3} for row, text in enumerate(tiny_texts(24))]
    arguments = SelfDistillationArguments(
        str(folder / "run"), max_steps=2, eval_speeds=[0.5, 0.9], use_cpu=True, seed=7, temperature=2.0, **arguments
    )
    return SelfDistillationTrainer(
        tiny_model(), arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )


@pytest.fixture
def trainer(tmp_path) -> SelfDistillationTrainer:
    return trainer_in(tmp_path)


def numbers(text: str) -> set[str]:
    """Every number with a fraction or a percentage, as printed."""
    return set(re.findall(r"\d+\.\d+%?x?", text))


def table_of(card: ModelCard) -> list[list[str]]:
    lines = [line for line in card.text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_metadata_and_table_say_what_was_measured(tmp_path):
    model = tiny_model(speed=0.5, id2label={0: "bad", 1: "fair", 2: "good"})
    card = write_model_card(
        tmp_path,
        model,
        Measured(SPEEDS, rows=1234, dataset="stanfordnlp/sst2", split="test"),
        repo_id="org/fastbert-test",
        base_model="org/backbone",
        datasets=["stanfordnlp/imdb"],
        language="en",
        license="apache-2.0",
        tags=["sentiment"],
        training={"learning rate": 1e-4, "epochs": 3},
        notes="A note of mine.",
        example="Lovely.",
    )
    data = card.data.to_dict()
    assert data["library_name"] == "fastbert_hf"
    assert data["pipeline_tag"] == "text-classification"
    assert data["base_model"] == "org/backbone"
    assert data["datasets"] == ["stanfordnlp/imdb", "stanfordnlp/sst2"]
    assert data["metrics"] == ["accuracy"]
    assert (data["language"], data["license"]) == ("en", "apache-2.0")
    assert {"fastbert", "early-exit", "sentiment"} <= set(data["tags"])
    (results,) = data["model-index"]
    assert results["name"] == "fastbert-test"
    (result,) = results["results"]
    assert result["dataset"] == {"name": "stanfordnlp/sst2", "type": "stanfordnlp/sst2", "split": "test"}
    assert [(metric["type"], metric["name"], metric["value"]) for metric in result["metrics"]] == [
        ("accuracy", "accuracy at speed 0", 0.9),
        ("accuracy", "accuracy at speed 0.5", 0.875),
    ]
    assert table_of(card)[:4] == [
        ["speed", "accuracy", "agreement", "layers", "fewer layers"],
        ["---"] * 5,
        ["0", "90.0%", "100.0%", "4", "1.00x"],
        ["0.5", "87.5%", "95.0%", "1.6", "2.50x"],
    ]
    for part in (
        "Measured on 1,234 texts of stanfordnlp/sst2 (test)",
        'pipeline("fast-text-classification", model="org/fastbert-test")',
        'classifier("Lovely.", speed=0.5)',
        "Labels: bad, fair, good.",
        "| learning rate | 0.0001 |",
        "A note of mine.",
        "## Limits",
        "max_layers",
        "liu-etal-2020-fastbert",
    ):
        assert part in card.text
    with Image.open(tmp_path / "speed_accuracy.png") as plot:
        assert plot.size[0] > 400
    assert "(speed_accuracy.png)" in card.text


def test_a_card_survives_a_reload(tmp_path):
    written = write_model_card(tmp_path, tiny_model(), Measured(SPEEDS, dataset="a/b"), language="en", license="mit")
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.to_dict() == written.data.to_dict()
    assert loaded.text == written.text
    loaded.save(tmp_path / "again.md")
    assert (tmp_path / "again.md").read_bytes() == (tmp_path / "README.md").read_bytes()


def test_without_a_measurement_a_card_has_no_numbers_of_its_own(tmp_path):
    card = write_model_card(tmp_path, tiny_model(speed=0.25))
    assert "Nothing was measured for this card." in card.text
    assert "model-index" not in card.data.to_dict() and "metrics" not in card.data.to_dict()
    assert table_of(card) == []
    assert not (tmp_path / "speed_accuracy.png").exists()
    assert "speed_accuracy.png" not in card.text
    assert numbers(card.text) == {"0.25"} | numbers("2020.acl-main.537")


def test_code_is_mentioned_where_it_is(tmp_path):
    model = tiny_model()
    assert "trust_remote_code" not in write_model_card(tmp_path, model).text
    model.save_pretrained(tmp_path)
    write_code(tmp_path)
    assert (
        'pipeline("fast-text-classification", model="org/name", trust_remote_code=True)'
        in write_model_card(tmp_path, model, repo_id="org/name").text
    )


@pytest.mark.parametrize("kind", ["model", "cascade"])
def test_a_table_of_sweep_speeds_is_taken_as_it_is(tmp_path, kind):
    model, tokenizer = tiny_model(speed=0.8) if kind == "model" else tiny_cascade(), tiny_tokenizer()
    rows = [{**tokenizer(text), "labels": row % 3} for row, text in enumerate(tiny_texts(12))]
    record = record_exits(model, rows, DataCollatorWithPadding(tokenizer), progress=False)
    table = sweep_speeds(model, record, [0, 0.3, 0.8], metric="f1")
    card = write_model_card(
        tmp_path, model, Measured(table, rows=len(rows), curve=sweep_speeds(model, record, metric="f1"))
    )
    header, _, *lines = table_of(card)
    assert header == ["speed", "F1", "agreement", "layers", "fewer layers", "fewer FLOPs"]
    for line, row in zip(lines, table.to_dict("records"), strict=True):
        assert line == [
            f"{row['speed']:g}",
            f"{row['f1']:.1%}",
            f"{row['agreement']:.1%}",
            f"{row['mean_exit_layer']:.4g}",
            f"{row['layer_speed_up']:.2f}x",
            f"{row['executed_speed_up']:.2f}x",
        ]
    assert "Measured on 12 texts" in card.text
    assert ("the last member alone has 4." if kind == "cascade" else "how many of the 4 layers") in card.text
    assert card.data.metrics == ["f1"]
    (result,) = card.data.to_dict()["model-index"][0]["results"]
    assert [(metric["name"], metric["value"]) for metric in result["metrics"]] == [
        ("F1 at speed 0", table["f1"][0]),
        ("F1 at speed 0.8", table["f1"][2]),
    ]


def test_texts_without_labels_have_no_metric_and_no_plot(tmp_path):
    rows = [{name: value for name, value in row.items() if name != "accuracy"} for row in SPEEDS]
    card = write_model_card(tmp_path, tiny_model(), Measured(rows))
    assert table_of(card)[0] == ["speed", "agreement", "layers", "fewer layers"]
    assert "model-index" not in card.data.to_dict()
    assert not (tmp_path / "speed_accuracy.png").exists()


def test_metrics_of_any_library_are_written_and_what_is_no_number_is_left_out(tmp_path):
    rows = [
        {**row, "accuracy": kind(row["accuracy"]), "per_class": {"a": 1}, "matrix": np.eye(2), "none": None}
        for row, kind in zip(SPEEDS, (np.float64, torch.tensor), strict=True)
    ]
    rows[0]["only_here"] = 1.0
    card = write_model_card(tmp_path, tiny_model(speed=0.5), Measured([*rows, {**rows[0], "speed": 0.0}]))
    assert table_of(card)[0] == ["speed", "accuracy", "agreement", "layers", "fewer layers"]
    assert len(table_of(card)) == 4
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == card.data.to_dict()
    metrics = card.data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert [metric["value"] for metric in metrics] == pytest.approx([0.9, 0.875])


def test_a_table_alone_will_do_and_an_empty_one_is_none(tmp_path):
    assert len(table_of(write_model_card(tmp_path, tiny_model(), SPEEDS))) == 4
    assert "Nothing was measured" in write_model_card(tmp_path, tiny_model(), []).text


def test_odd_names_leave_the_code_and_the_tables_whole(tmp_path):
    name, example, label = 'my "model": #1', 'He said "no|yes".\nThen left.', "very | good\n非常好"
    model = tiny_model(id2label={0: label, 1: "b", 2: "c"})
    card = write_model_card(
        tmp_path, model, model_name=name, example=example, tags="one", training={"a|b": "c\nd"}, datasets="x/y"
    )
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    *_, build, call = ast.parse(code).body
    assert build.value.keywords[0].value.value == name
    assert call.value.args[0].value == example
    assert "Labels: very | good 非常好, b, c." in card.text
    assert "| a\\|b | c d |" in card.text
    assert "one" in card.data.tags and card.data.datasets == ["x/y"]
    assert ModelCard.load(tmp_path / "README.md").text == card.text


@pytest.mark.parametrize("config", [{"exit_type": "linear_mean"}, {"exit_policy": "patience"}])
def test_a_card_says_what_kind_of_exits_there_are(tmp_path, config):
    text = write_model_card(tmp_path, tiny_model(**config)).text
    ((name, value),) = config.items()
    assert f"`{name}={value}`" in text


def test_a_card_tells_which_speed_ups_may_be_asked_for(tmp_path):
    model = tiny_model()
    assert "speedup" not in write_model_card(tmp_path, model).text
    told = calibrate(model, tiny_texts(400), tiny_tokenizer(), progress=False)
    text = " ".join(write_model_card(tmp_path, model).text.split())
    assert "times fewer executed FLOPs than at speed 0 were spent on the texts of the calibration (400 texts" in text
    assert f"Any `speedup` up to {math.floor(100 * told.greatest) / 100:g} may be asked for." in text
    assert "is certified with confidence 0.9 by 400 texts" in text and told.certified
    for risk, speed_up in told.certified.items():
        assert f"disagreement={risk:g} | " in text and f" | {speed_up:.2f} |" in text
    model.config.calibration = None
    text = write_model_card(tmp_path, model).text
    assert "may be asked for" not in text and "disagreement=0.05 | " in text


def tiny_cascade(small: str = "", large: str = "") -> CascadeForSequenceClassification:
    """A stock member and one that texts leave early, under the names of their backbones."""
    members = [stock("roberta", 1, 1), tiny_model(seed=1)]
    cascade = CascadeForSequenceClassification.from_members(members, exit_policy="margin", speed=0.8)
    for config, name in zip(cascade.config.members, (small, large), strict=True):
        config.text_config._name_or_path = name
    return cascade


def test_the_card_of_a_cascade_speaks_of_its_members(tmp_path):
    card = write_model_card(tmp_path, tiny_cascade("org/small", "org/large"), repo_id="org/cascade", language="en")
    data = card.data.to_dict()
    assert data["base_model"] == ["org/small", "org/large"]
    assert (data["library_name"], data["pipeline_tag"]) == ("fastbert_hf", "text-classification")
    assert "cascadebert" in data["tags"] and not {"fastbert", "early-exit"} & set(data["tags"])
    for part in (
        "`org/small` of 1 layer",
        "`org/large` of 4 layers, which a text can also leave early",
        "`exit_policy=margin`",
        'pipeline("fast-text-classification", model="org/cascade")',
        "A call without `speed` uses 0.8. Labels: LABEL_0, LABEL_1, LABEL_2.",
        "Nothing was measured for this card. `sweep_speeds` of",
        "li-etal-2021-cascadebert-accelerating",
    ):
        assert part in card.text
    assert card.text.count("leave early") == 1
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == data
    for text in (card.text, write_model_card(tmp_path, tiny_cascade(), SPEEDS).text):
        for part in ("FastBERT", "liu-etal-2020", "exit after every layer", "exit_type", "max_layers"):
            assert part not in text


def test_the_card_of_one_model_speaks_of_no_members(tmp_path):
    text = write_model_card(tmp_path, tiny_model(), SPEEDS).text
    assert not re.search("cascade|member", text, re.IGNORECASE)


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (("org/small", "org/large"), None, ["org/small", "org/large"]),
        (("org/one", "org/one"), None, "org/one"),
        (("", "org/large"), None, "org/large"),
        (("FOLDER", "org/large"), None, "org/large"),
        (("", ""), None, None),
        (("", ""), ["org/a", "org/b"], ["org/a", "org/b"]),
        (("org/small", "org/large"), "org/b", "org/b"),
    ],
)
def test_base_models_of_a_cascade_are_those_with_a_name_on_the_hub(tmp_path, names, given, expected):
    cascade = tiny_cascade(*(str(tmp_path) if name == "FOLDER" else name for name in names))
    card = write_model_card(tmp_path, cascade, base_model=given)
    assert card.data.to_dict().get("base_model") == expected
    assert ("a roberta encoder" in card.text) == (names[0] in ("", "FOLDER"))
    assert str(tmp_path) not in card.text


def test_the_plot_of_a_cascade_has_room_for_texts_that_ran_through_every_member(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("fastbert_hf.evaluation.figures.save_png", lambda figure, path: figures.append(figure))
    slowest = {"speed": 0.01, "accuracy": 0.9, "agreement": 1.0, "mean_exit_layer": 5.0}
    write_model_card(tmp_path, tiny_cascade(), [SPEEDS[0], slowest, SPEEDS[1]])
    left, right = figures[0].axes[0].get_xlim()
    assert left < 1 and right > 5


def test_a_row_without_its_layers_is_refused():
    with pytest.raises(
        ValueError, match=r"lacks mean_exit_layer: it has speed, accuracy\. Give a table of sweep_speeds"
    ):
        Measured([{"speed": 0, "accuracy": 1.0}])


def test_the_trainer_writes_what_it_measured(trainer, tmp_path):
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card(language="en", dataset="org/data", finetuned_from="org/backbone")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    header, _, *lines = table_of(card)[:5]
    assert header == ["speed", "accuracy", "agreement", "layers", "fewer layers"]
    # Full depth beside the speeds that were asked for.
    assert [line[0] for line in lines] == ["0", "0.5", "0.9"]
    for line in lines[1:]:
        speed = line[0]
        layers = metrics[f"eval_mean_exit_layer_speed_{speed}"]
        assert line[1:] == [
            f"{metrics[f'eval_accuracy_speed_{speed}']:.1%}",
            f"{metrics[f'eval_agreement_speed_{speed}']:.1%}",
            f"{layers:.4g}",
            f"{4 / layers:.2f}x",
        ]
    predictions = trainer.predict(trainer.eval_dataset)
    full = (predictions.predictions[:, -1].argmax(-1) == predictions.label_ids).mean()
    assert lines[0][1] == f"{full:.1%}"
    for part in (
        "| seed | 7 |",
        "| temperature | 2.0 |",
        "| training_steps | 2 |",
        "Measured on 24 texts of org/data",
    ):
        assert part in card.text
    assert card.data.base_model == "org/backbone" and card.data.datasets == ["org/data"]
    assert (tmp_path / "run" / "speed_accuracy.png").exists()


@pytest.mark.parametrize("limits", [{"min_exit_layer": 3}, {"max_layers": 2}])
def test_the_trainer_measures_within_the_limits_of_the_config(trainer, tmp_path, limits):
    for name, value in limits.items():
        setattr(trainer.model.config, name, value)
    trainer.evaluate()
    trainer.create_model_card()
    rows = [dict(row) for row in trainer.eval_dataset]
    record = record_exits(trainer.model, rows, DataCollatorWithPadding(tiny_tokenizer()), progress=False)
    _, _, *lines = table_of(ModelCard.load(tmp_path / "run" / "README.md"))[:5]
    for line in lines:
        layers = replay_at_speed(record, trainer.model.config, float(line[0])).exit_layer.double().mean().item()
        assert line[3:] == [f"{layers:.4g}", f"{4 / layers:.2f}x"]
        assert limits.get("min_exit_layer", 1) <= layers <= limits.get("max_layers", 4)


def test_training_again_forgets_what_was_measured(trainer, tmp_path):
    trainer.evaluate()
    assert trainer.model.measured.rows == 24
    trainer.train()
    trainer.create_model_card()
    assert "Nothing was measured" in (tmp_path / "run" / "README.md").read_text()


def test_only_evaluations_are_in_the_card(trainer):
    trainer.train()
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset[:3])
    assert (trainer.model.measured.rows, trainer.model.measured.split) == (24, None)
    trainer.evaluate({"first": trainer.eval_dataset, "second": trainer.eval_dataset[:5]})
    assert (trainer.model.measured.rows, trainer.model.measured.split) == (5, "second")


@pytest.mark.parametrize("best", [False, True])
def test_the_best_checkpoint_is_not_given_the_numbers_of_the_last(tmp_path, best):
    steps = {name: "steps" for name in ("eval_strategy", "save_strategy")} | {"eval_steps": 1, "save_steps": 1}
    trainer = trainer_in(tmp_path, load_best_model_at_end=best, **steps)
    trainer.train()
    assert (trainer.model.measured is None) == best


def test_a_metric_cannot_take_the_place_of_the_speed(trainer):
    trainer.metrics_at_speed = lambda prediction: {"speed": 3, "mean_exit_layer": 9.0, "accuracy": np.float32(0.5)}
    trainer.evaluate()
    row = trainer.model.measured.speeds[-1]
    assert row["speed"] == 0.9 and row["mean_exit_layer"] <= 4 and row["accuracy"] == 0.5


def test_settings_are_those_of_a_training_that_was(trainer, tmp_path):
    trainer.evaluate()
    trainer.create_model_card()
    assert "## Training" not in (tmp_path / "run" / "README.md").read_text()
    own = torch.optim.SGD(trainer.model.students.parameters(), lr=0.5)
    other = SelfDistillationTrainer(
        trainer.model,
        trainer.args,
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
        optimizers=(own, None),
    )
    other.train()
    other.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "## Training" in text and "adamw" not in text and "| learning_rate |" not in text


def test_data_sets_are_named_as_the_hub_does_and_the_model_by_its_id(trainer, tmp_path):
    trainer.args.hub_model_id = "org/name"
    trainer.evaluate()
    trainer.create_model_card("en", tags="one", dataset="Nice Name", dataset_tags="a/b")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.datasets == ["a/b"] and card.data.language == "en"
    assert {"one", "generated_from_trainer"} <= set(card.data.tags)
    assert 'model="org/name"' in card.text


def test_a_backbone_on_disk_is_not_named(trainer, tmp_path):
    trainer.model.config.text_config._name_or_path = str(tmp_path)
    trainer.create_model_card()
    text = (tmp_path / "run" / "README.md").read_text()
    assert "base_model" not in text and str(tmp_path) not in text
    trainer.model.config.text_config._name_or_path = "google-bert/bert-base-uncased"
    trainer.create_model_card()
    assert ModelCard.load(tmp_path / "run" / "README.md").data.base_model == "google-bert/bert-base-uncased"


def test_stage_one_with_the_stock_trainer_still_writes_its_own_card(tmp_path):
    trainer = Trainer(tiny_model(), args=SelfDistillationArguments(str(tmp_path), use_cpu=True))
    trainer.create_model_card()
    assert "generated_from_trainer" in ModelCard.load(tmp_path / "README.md").data.tags


def test_an_encoder_without_exits_has_no_such_card(tmp_path):
    with pytest.raises(TypeError, match="describes a classifier with its exits, got FastBertModel"):
        write_model_card(tmp_path / "card", tiny_model().fastbert)
    assert not (tmp_path / "card").exists()
