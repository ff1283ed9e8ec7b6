"""Width times depth on sst2: exits on narrower backbones beside exits alone and narrower backbones alone."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import paper_runs
import torch
from frontier_times import take_times
from torch import nn
from width_runs import WidthRun, make_layer

from fastbert_hf import DEFAULT_MODEL_DIR, FastBertForSequenceClassification, load_operators, train
from fastbert_hf.commands.train_default_model import MARKUP, SENTENCE_END
from fastbert_hf.data import load_rows
from fastbert_hf.evaluation import record_exits, sweep_speeds
from fastbert_hf.evaluation.flops import executed_costs
from fastbert_hf.evaluation.speed_sweep import SPEEDS
from fastbert_hf.files import write_whole
from fastbert_hf.modeling.families import get_encoder_family
from fastbert_hf.modeling.feed_forward_settings import feed_forward_holders
from fastbert_hf.training import ExitTraining, FeedForwardConversion
from fastbert_hf.training.feed_forward_conversion import read_inputs, replace_each, tree_of


# What a token meets: the kind of layer, as in width_runs.py, and the share of the neurons. "dense" is the model that
# comes with the package, "1" the same with its exits trained on as the others' are.
MODELS: dict[str, tuple[str, float]] = {
    "dense": ("full", 1.0),
    "1": ("full", 1.0),
    "0.25": ("tree", 0.25),
    "0.125": ("tree", 0.125),
    "narrow-0.25": ("dense", 0.25),
    "narrow-0.125": ("dense", 0.125),
    "random-0.25": ("random", 0.25),
    "random-0.125": ("random", 0.125),
    "top_k-0.25": ("top_k", 0.25),
    "top_k-0.125": ("top_k", 0.125),
    "deleted": ("deleted", 0.0),
}
STEPS = 500  # what time allowed
# From trials on dev of sst2, and that of the package's own model.
CONVERSION_RATE, EXIT_RATE = 5e-5, 1e-3
LENGTHS = (40, 400)  # characters: whole sentences and long phrases, as dev and test have them
COLUMNS = ("speed", "accuracy", "agreement", "mean_exit_layer", "executed_flops")


@dataclass(frozen=True)
class ControlConversion(FeedForwardConversion):
    """
    Put random routing, or nothing, in place of the trees.

    Args:
        kind (`str`): `"random"` or `"deleted"`.
    """

    kind: str = "random"

    def make_trainer(self, output_dir, model, train_dataset, eval_dataset, tokenizer, **training_arguments):
        arguments = self.make_arguments(output_dir, eval_dataset is not None, **training_arguments)
        dense = copy.deepcopy(model)
        make = make_layer(WidthRun("sst2", self.kind, self.share), layer_steps=100)
        replace_each(model, make, read_inputs(model, train_dataset, seed=arguments.seed))
        neurons = model.config.text_config.intermediate_size
        model.config.feed_forward = {
            "random": {"form": "leaves", **tree_of(self.share, neurons)},
            "deleted": {"form": "neurons", "trees": 0, "bias": True},
        }[self.kind]
        rows = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": tokenizer}
        return self.trainer_class(model, arguments, teacher=dense, **rows)


class TopActivation(nn.Module):
    """
    The activation of a stock layer, of which each token keeps the k neurons that matter most to it: as `TopNeurons`
    of width_runs.py, and with the weights of the stock layer, so that the model is saved as one.
    """

    def __init__(self, activation: nn.Module, down: nn.Linear, k: int):
        super().__init__()
        self.activation, self.down, self.k = activation, [down], k  # in a list, as it is the layer's own

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        neurons = self.activation(tokens)
        sizes = neurons.detach().abs() * self.down[0].weight.detach().norm(dim=0)
        places = sizes.topk(self.k, -1).indices
        return torch.zeros_like(neurons).scatter(-1, places, neurons.gather(-1, places))


def keep_top(model: FastBertForSequenceClassification, share: float) -> FastBertForSequenceClassification:
    """Let every token of a dense model keep its own best neurons, in place."""
    parts = get_encoder_family(model.config.text_config).feed_forward
    for holders in feed_forward_holders(model.fastbert.backbone).values():
        for holder in holders:
            down = holder.get_submodule(parts.down)
            kept = TopActivation(holder.get_submodule(parts.activation), down, round(share * down.in_features))
            holder.set_submodule(parts.activation, kept)
    return model


@dataclass(frozen=True)
class TopConversion(FeedForwardConversion):
    """Teach a model, of which every token keeps its own best neurons, what it gave with all of them."""

    def make_trainer(self, output_dir, model, train_dataset, eval_dataset, tokenizer, **training_arguments):
        arguments = self.make_arguments(output_dir, eval_dataset is not None, **training_arguments)
        dense = copy.deepcopy(model)
        rows = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "processing_class": tokenizer}
        return self.trainer_class(keep_top(model, self.share), arguments, teacher=dense, **rows)


@dataclass(frozen=True)
class TopExitTraining(ExitTraining):
    """Teach the exits of such a model."""

    share: float = 0.25

    def make_trainer(self, output_dir, model, *arguments, **settings):
        return super().make_trainer(output_dir, keep_top(model, self.share), *arguments, **settings)


def stages_of(kind: str, share: float) -> list:
    """Return how a model of a kind is trained."""
    rates = {"learning_rate": CONVERSION_RATE, "num_train_epochs": 1, "share": share or 1.0}
    exits = {"learning_rate": EXIT_RATE, "num_train_epochs": 1}
    return {
        "full": lambda: [ExitTraining(**exits)],
        "tree": lambda: [FeedForwardConversion(**rates), ExitTraining(**exits)],
        "dense": lambda: [FeedForwardConversion(**rates, depth=0), ExitTraining(**exits)],
        "random": lambda: [ControlConversion(**rates), ExitTraining(**exits)],
        "deleted": lambda: [ControlConversion(**rates, kind="deleted"), ExitTraining(**exits)],
        "top_k": lambda: [TopConversion(**rates), TopExitTraining(**exits, share=share)],
    }[kind]()


def model_of(name: str, data_dir: Path, work_dir: Path) -> FastBertForSequenceClassification:
    """Return a model with its exits, trained unless it is there."""
    folder, (kind, share) = work_dir / f"frontier-{name}", MODELS[name]
    if name == "dense":
        folder = DEFAULT_MODEL_DIR
    elif not (folder / "config.json").exists():
        settings = {"max_steps": STEPS, "per_device_train_batch_size": 32, "seed": 1, "weight_decay": 0.01}
        arguments = {"output_dir": folder, "report_to": "none", "use_cpu": True, **settings}
        train(DEFAULT_MODEL_DIR, texts_to_learn_from(data_dir), stages=stages_of(kind, share), **arguments)
    model = FastBertForSequenceClassification.from_pretrained(folder).eval()
    return keep_top(model, share) if kind == "top_k" else model


def texts_to_learn_from(data_dir: Path) -> list[str]:
    """Return the longer phrases of sst2, and as many sentences of film reviews, as the package's model learnt from."""
    phrases = paper_runs.load_splits(data_dir / "en" / "sst2")["train"]["text_a"]
    reviews = load_rows(data_dir / "en" / "imdb" / "train.tsv.gz")["text_a"]
    sentences = [sentence for review in reviews for sentence in SENTENCE_END.split(MARKUP.sub(" ", review))]
    longer = [[text for text in texts if LENGTHS[0] <= len(text) <= LENGTHS[1]] for texts in (phrases, sentences)]
    for texts in longer:
        random.Random(1).shuffle(texts)
    return [*longer[0], *longer[1][: len(longer[0])]]


def sweep(name: str, data_dir: Path, work_dir: Path) -> dict:
    """Return what every speed gives and costs on dev and test."""
    model, splits = model_of(name, data_dir, work_dir), paper_runs.load_splits(data_dir / "en" / "sst2")
    kind, share = MODELS[name]
    tables = {}
    for part in ("dev", "test"):
        rows = splits[part].rename_columns({"text_a": "text"})
        record = record_exits(model, rows, tokenizer=tokenizer(), progress=False)
        if kind == "top_k":  # charged as if they had been known: as a dense layer of as many neurons
            narrow = model_of(f"narrow-{share:g}", data_dir, work_dir)
            lengths = torch.tensor([len(ids) for ids in tokenizer()(list(rows["text"]))["input_ids"]])
            layer_flops, exit_flops = executed_costs(narrow, lengths)
            record = replace(record, layer_flops=layer_flops, exit_flops=exit_flops)
        table = sweep_speeds(model, record, SPEEDS)
        tables[part] = {column: table[column].round(5).tolist() for column in COLUMNS}
    return {"model": name, "steps": STEPS, **tables}


def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEFAULT_MODEL_DIR)


def run_all(data_dir: Path, work_dir: Path, results_dir: Path) -> None:
    """Do what is not done. Times are taken anew where they lack a model."""
    results = {}
    for name in MODELS:
        path = results_dir / f"frontier-{name}.json"
        if not path.exists():
            print(f"\n{path.stem}", flush=True)
            results_dir.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(sweep(name, data_dir, work_dir)) + "\n")
        results[name] = json.loads(path.read_text())
    path = results_dir / "times.json"
    timed = {row["model"] for row in json.loads(path.read_text())["rows"]} if path.exists() else set()
    timed_models = [name for name, (kind, _) in MODELS.items() if kind != "top_k"]  # which computes all neurons
    if timed != set(timed_models):
        load_operators()
        models = {name: model_of(name, data_dir, work_dir) for name in timed_models}
        texts = list(paper_runs.load_splits(data_dir / "en" / "sst2")["test"]["text_a"])
        rows = [{"input_ids": ids} for ids in tokenizer()(texts)["input_ids"]]
        write_whole(path, json.dumps(take_times(models, results, "dense", rows), indent=1) + "\n")
