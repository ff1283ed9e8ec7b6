from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from matplotlib.figure import Figure

from fastbert_hf.evaluation import ExitRecord, exit_uncertainties, paper_flops, replay_at_speed, sweep_speeds
from fastbert_hf.evaluation.figures import (
    COLOURS,
    plot_accuracy_by_uncertainty,
    plot_exit_layers,
    plot_speeds,
    plot_trade_off,
    plot_training,
    plot_uncertainty_by_layer,
    save_figure,
    save_png,
)
from fastbert_hf.modeling.exit_policies import ExitPolicy

from ..common import NUM_LAYERS, tiny_model


def record(rows: int = 200, labels: bool = True) -> ExitRecord:
    generator = torch.Generator().manual_seed(0)
    exit_logits = torch.randn(rows, NUM_LAYERS, 3, generator=generator) * torch.linspace(1, 3, NUM_LAYERS)[:, None]
    gold = torch.randint(3, (rows,), generator=generator) if labels else None
    costs = torch.ones(rows, NUM_LAYERS, dtype=torch.long)
    return ExitRecord(exit_logits, costs, costs, gold)


CONFIG = tiny_model().config
SPEEDS = (0, 0.005, *(step / 20 for step in range(1, 21)))


def test_trade_off_draws_each_table_in_three_panels():
    model = tiny_model()
    table = sweep_speeds(model, record(), SPEEDS)
    figure = plot_trade_off({"one": table, "two": table.assign(accuracy=table["accuracy"] / 2)})
    panels = figure.axes
    assert len(panels) == 3
    for panel in panels:
        assert len(panel.lines) == 2
    for line, factor in zip(panels[0].lines, (1, 2), strict=True):
        assert list(line.get_ydata()) == pytest.approx(list(table["accuracy"] / factor))
        assert list(line.get_xdata()) == list(table["speed"])
    assert list(panels[1].lines[0].get_ydata()) == pytest.approx(list(table["paper_speed_up"]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    assert panels[1].get_ylim()[0] == 0


def test_trade_off_of_unlabeled_data_shows_the_agreement():
    with pytest.warns(UserWarning, match="no labels"):
        table = sweep_speeds(tiny_model(), record(labels=False), SPEEDS)
    assert plot_trade_off({"one": table}).axes[0].get_ylabel() == "Agreement"


@pytest.mark.parametrize("number", [0, len(COLOURS) + 1])
def test_trade_off_refuses_more_tables_than_colours(number):
    with pytest.raises(ValueError, match=f"give 1 to {len(COLOURS)} tables, got {number}"):
        plot_trade_off({str(index): None for index in range(number)})


def test_the_plot_of_a_card_marks_its_speeds_and_names_those_that_are_apart(tmp_path):
    table = sweep_speeds(tiny_model(), record(), SPEEDS).to_dict("records")
    marked = [row for row in table if row["speed"] in (0, 0.005, 0.5, 0.8, 1)]
    figure = plot_speeds(table, marked, "accuracy", NUM_LAYERS)
    line, *marks = figure.axes[0].lines
    assert list(line.get_xdata()) == sorted(row["mean_exit_layer"] for row in table)
    assert set(zip(line.get_xdata(), line.get_ydata(), strict=True)) == {
        (row["mean_exit_layer"], row["accuracy"]) for row in table
    }
    assert sorted((mark.get_xdata()[0], mark.get_ydata()[0]) for mark in marks) == sorted(
        (row["mean_exit_layer"], row["accuracy"]) for row in marked
    )
    places = [text.xy[0] for text in figure.axes[0].texts]
    assert len(places) >= 3 and min(later - earlier for earlier, later in pairwise(places)) > 0.2
    save_png(figure, tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_accuracy_by_uncertainty_counts_the_texts_of_each_interval():
    data = record(2000)
    axes = plot_accuracy_by_uncertainty(data, CONFIG).axes[0]
    uncertainty = exit_uncertainties(data, ExitPolicy.of(CONFIG))
    right = data.exit_logits.argmax(-1) == data.labels[:, None]
    drawn = [line for line in axes.lines if len(line.get_xdata())]
    for line, layer in zip(drawn, (1, 2, NUM_LAYERS), strict=True):
        for centre, accuracy in zip(line.get_xdata(), line.get_ydata(), strict=True):
            inside = (uncertainty[:, layer - 1] - centre).abs() <= 0.05
            assert accuracy == pytest.approx(right[inside, layer - 1].double().mean().item(), abs=1e-6)
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["student after layer 1", "student after layer 2", f"teacher (layer {NUM_LAYERS})"]


def test_accuracy_needs_labels():
    with pytest.raises(ValueError, match="accuracy needs labels"):
        plot_accuracy_by_uncertainty(record(labels=False), CONFIG)


LIMITS = [{}, {"min_exit_layer": 3}, {"max_layers": 2}, {"min_exit_layer": 2, "max_layers": 3}]


@pytest.mark.parametrize("policy", [None, "margin", "patience"])
@pytest.mark.parametrize("limits", LIMITS)
def test_exit_layers_draws_the_share_of_each_layer(limits, policy):
    data, speeds, config = record(), (0.3, 0.6), tiny_model(**limits).config
    axes = plot_exit_layers(data, config, speeds, policy).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    for index, speed in enumerate(speeds):
        exit_layer = replay_at_speed(data, config, speed, ExitPolicy.of(config, policy)).exit_layer
        expected = [(exit_layer == layer).double().mean().item() for layer in range(1, NUM_LAYERS + 1)]
        assert heights[index * NUM_LAYERS : (index + 1) * NUM_LAYERS] == pytest.approx(expected)


def test_no_text_is_drawn_where_the_pipeline_lets_none_leave():
    config = tiny_model(min_exit_layer=2, max_layers=3).config
    heights = [bar.get_height() for bar in plot_exit_layers(record(), config, (1.0,)).axes[0].patches]
    assert heights == [0, 1, 0, 0]
    heights = [bar.get_height() for bar in plot_exit_layers(record(), config, (0.0,)).axes[0].patches]
    assert heights == [0, 0, 1, 0]


def medians(panel) -> dict[int, float]:
    """The median of the box at each layer of Figure 6."""
    lines = [line for line in panel.lines if line.get_color() == COLOURS[1]]
    return {round(sum(line.get_xdata()) / 2): line.get_ydata()[0] for line in lines}


@pytest.mark.parametrize("limits", LIMITS)
def test_uncertainty_by_layer_shows_who_reaches_it(limits):
    data, config = record(), tiny_model(**limits).config
    panels = plot_uncertainty_by_layer(data, config, speeds=(0.0, 0.8, 1.0)).axes
    uncertainties = exit_uncertainties(data, ExitPolicy.of(config))
    first, last = limits.get("min_exit_layer", 1), limits.get("max_layers", NUM_LAYERS)
    # At speed 0 all texts reach every layer, and at speed 1 they leave at the first exit that may answer.
    exits = list(range(first, last + 1))
    assert [list(medians(panel)) for panel in panels] == [exits, exits, [first]]
    everywhere = uncertainties.quantile(0.5, dim=0).tolist()
    assert list(medians(panels[0]).values()) == pytest.approx(everywhere[first - 1 : last], abs=1e-6)
    stayed = (uncertainties[:, first - 1 : last - 1] >= 0.8).all(1)
    assert medians(panels[1])[last] == pytest.approx(uncertainties[stayed, last - 1].quantile(0.5).item(), abs=1e-6)


FINE_TUNING = [
    {"loss": 1.0, "epoch": 0.5},
    {"eval_accuracy": 0.7, "epoch": 1.0},
    {"eval_accuracy": 0.8, "epoch": 2.0},
    {"eval_accuracy": 0.8, "epoch": 2.0},  # evaluated once more
]
DISTILLATION = [{"eval_accuracy_speed_0.5": 0.78, "eval_mean_exit_layer_speed_0.5": 1.2, "epoch": 1.0}]


def test_training_draws_accuracy_and_flops_of_both_stages():
    model = tiny_model()
    top, bottom = plot_training(model, FINE_TUNING, DISTILLATION).axes
    assert list(top.lines[0].get_xdata()) == [1, 2, 3]
    assert list(top.lines[0].get_ydata()) == [0.7, 0.8, 0.78]
    flops = list(bottom.lines[0].get_ydata())
    assert flops[0] == flops[1] > flops[2] > 0
    assert bottom.get_ylim()[0] == 0


def test_training_counts_no_exit_that_may_not_answer():
    (_, bottom), (_, limited) = (
        plot_training(tiny_model(**limits), FINE_TUNING, DISTILLATION).axes for limits in ({}, {"min_exit_layer": 2})
    )
    skipped = paper_flops(tiny_model(), torch.tensor(2)) - paper_flops(tiny_model(), torch.tensor(2), students=False)
    change = [(a - b) * 1e9 for a, b in zip(bottom.lines[0].get_ydata(), limited.lines[0].get_ydata(), strict=True)]
    assert change == pytest.approx([0, 0, skipped.item()])


def test_training_without_an_evaluation_says_what_to_do():
    with pytest.raises(ValueError, match=r"train with eval_strategy='epoch' and eval_speeds that include 0.3"):
        plot_training(tiny_model(), FINE_TUNING, DISTILLATION, speed=0.3)


def test_training_has_no_cost_at_speed_0():
    with pytest.raises(ValueError, match="speed must be above 0"):
        plot_training(tiny_model(), FINE_TUNING, DISTILLATION, speed=0)


@pytest.mark.parametrize("plot", [plot_exit_layers, plot_uncertainty_by_layer])
@pytest.mark.parametrize("number", [0, len(COLOURS) + 1])
def test_more_speeds_than_colours_are_refused(plot, number):
    with pytest.raises(ValueError, match=f"give 1 to {len(COLOURS)} speeds, got {number}"):
        plot(record(), CONFIG, speeds=[0.5] * number)


def test_a_figure_is_saved_as_png_and_svg_and_nothing_else(tmp_path):
    written = save_figure(Figure(), tmp_path / "new" / "figure.one")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["figure.one.png", "figure.one.svg"]
    assert [path.suffix for path in written] == [".png", ".svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")


def test_the_same_figure_makes_the_same_file(tmp_path):
    first, second = (
        save_figure(plot_exit_layers(record(), CONFIG), tmp_path / name)[1].read_bytes()
        for name in ("first", "second")
    )
    assert first == second
