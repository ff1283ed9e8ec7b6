"""Run the models behind "Length" in docs/results.md: which there are, how one is made, and what is kept of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from distilled_runs import SEED, Bench, finished, keep

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.evaluation import executed_flops
from fastbert_hf.modeling.engine import TorchEngine
from fastbert_hf.modeling.packed_batch import PackedBatch
from fastbert_hf.modeling.token_coarsening import Coarsening
from fastbert_hf.training import retention_schedule, search_retention


# The data set behind each name, and to how many tokens its texts are cut.
SETS = {
    "imdb-512": ("imdb", 512),
    "imdb-256": ("imdb", 256),
    "rte": ("rte", 128),
    "mnli_watson": ("mnli_watson", 128),
    "ag_news": ("ag_news", 128),
    "sst2": ("sst2", 128),
    "trec": ("trec", 128),
}
RATIOS = (1.5, 2.0, 3.0)
KINDS = ("drop", "mean", "truncate", "weighted", "searched", "first", "random")
# What is asked at every ratio; the others at 2x alone.
AT_EVERY_RATIO = KINDS[:3]
LEARNING_RATE = 1e-4  # of 5e-5 and 1e-4 on dev of imdb, 150 steps
STEPS = {"imdb-512": 300}
OTHER_STEPS = 200  # what time allowed
# The model that is kept for length times depth.
KEPT = "imdb-512-drop-2x"
BATCH_SIZE = {"imdb-512": 8, "imdb-256": 8}
OTHER_BATCH_SIZE = 16


@dataclass(frozen=True)
class LengthRun:
    """
    One way to make texts shorter, and the distillation after it.

    Args:
        set (`str`): A key of `SETS`.
        kind (`str`): One of `KINDS`, or `"full"` for the model that is made faster.
        ratio (`float`): How many times fewer FLOPs are executed than with all tokens, on dev at full depth.
    """

    set: str
    kind: str
    ratio: float = 0.0

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.set, self.kind, self.ratio and f"{self.ratio:g}x")))


@dataclass(frozen=True)
class ByRule(Coarsening):
    """
    A control: tokens are dropped by where they stand, whatever attention they received.

    Args:
        rule (`str`): `"first"` keeps the first tokens; `"random"` some that depend on the length of a text alone.
    """

    rule: str = "first"

    def shorten(self, depth: int, states: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, PackedBatch]:
        received = []
        for texts, length in batch.groups:
            if self.rule == "first":
                order = -torch.arange(length, dtype=torch.float32)
            else:
                order = torch.rand(length, generator=torch.Generator().manual_seed(SEED + 1000 * depth + length))
            received.append(order.expand(texts, length))
        return super().shorten(depth, states, replace(batch, received=received))


@dataclass(frozen=True)
class Truncation(Coarsening):
    """
    A control: texts are cut before the first layer. The last token, which ends a text, is kept.

    Args:
        most_tokens (`int`): To so many.
    """

    most_tokens: int = 512

    def units(self, depth: int, text_lengths: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return lengths.clamp(max=self.most_tokens)

    def cut(self, states: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, PackedBatch]:
        """Return the embeddings of the shorter texts, and their batch."""
        received = []
        for texts, length in batch.groups:
            order = -torch.arange(length, dtype=torch.float32)
            order[-1] = 1.0
            received.append(order.expand(texts, length))
        return self.shorten(0, states, replace(batch, received=received))


def make_shorter(
    model: FastBertForSequenceClassification, kind: str, dial: float, searched: dict | None = None
) -> int | None:
    """
    Set a model, in place, to read texts shorter in one of the ways, and return to how many tokens they are cut first,
    if they are.

    Args:
        model ([`FastBertForSequenceClassification`]): With no schedule of its own.
        kind (`str`): One of `KINDS`.
        dial (`float`): The target of the schedule; of a searched one what it keeps in the end; to how many tokens
            texts are cut.
        searched (`dict`, *optional*): From [`search_retention`].
    """
    if kind == "searched":
        shares = Coarsening.of({**searched, "merge": "drop"}, dial).retention
        shares = {depth: max(share, 1e-4) for depth, share in shares.items()}
        settings = {"layers": list(shares), "retention": list(shares.values())}
        model.config.coarsening = {**settings, "merge": "drop"}
        return None
    if kind == "truncate":
        truncation = Truncation({}, merge="drop", most_tokens=round(dial))
        answer_by(model, lambda engine: cut_first(engine, truncation))
        return round(dial)
    settings = {"merge": kind, "size_aware": False} if kind in ("mean", "weighted") else {"merge": "drop"}
    schedule = retention_schedule(model.config.num_hidden_layers, dial)
    model.config.coarsening = {**schedule, **settings}
    if kind in ("first", "random"):
        rule = ByRule(Coarsening.of(model.config.coarsening).retention, merge="drop", rule=kind)

        def follow_rule(engine: TorchEngine) -> None:
            engine.coarsening = rule

        answer_by(model, follow_rule)
    return None


def answer_by(model: FastBertForSequenceClassification, change: Callable[[TorchEngine], None]) -> None:
    """Let every engine of a model be changed before it is used."""
    engine_of = model.engine

    def engine(*args: Any, **kwargs: Any) -> TorchEngine:
        made = engine_of(*args, **kwargs)
        change(made)
        return made

    model.engine = engine


def cut_first(engine: TorchEngine, truncation: Truncation) -> None:
    """Let an engine cut texts once they are embedded."""
    embed = engine.embed

    def embed_and_cut(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, PackedBatch]:
        return truncation.cut(*embed(*args, **kwargs))

    engine.embed = embed_and_cut


def dial_of(
    model: FastBertForSequenceClassification,
    kind: str,
    ratio: float,
    lengths: torch.Tensor,
    searched: dict | None = None,
) -> float:
    """Return the dial with which texts of these lengths execute `ratio` times fewer FLOPs."""
    depth = torch.full_like(lengths, model.config.num_hidden_layers)

    def flops(dial: float | None) -> float:
        changed = copy.copy(model)
        changed.config = copy.deepcopy(model.config)
        most = None if dial is None else make_shorter(changed, kind, dial, searched)
        own = lengths if most is None else lengths.clamp(max=most)
        return executed_flops(changed, depth, own, students=False).double().mean().item()

    wanted = flops(None) / ratio
    low, high = (3.0, float(lengths.max())) if kind == "truncate" else (0.02, 1.0)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if flops(middle) > wanted else (middle, high)
    return low


class LengthBench(Bench):
    """A data set with its full model."""

    def __init__(self, name: str, data_dir: Path, work_dir: Path):
        set_name, max_length = SETS[name]
        longest = max(most for other, most in SETS.values() if other == set_name)
        super().__init__(set_name, data_dir, work_dir, max_length, longest)
        self.work_dir = work_dir
        self.lengths = torch.tensor([len(row) for row in self.splits["dev"]["input_ids"]])

    @cached_property
    def searched(self) -> dict:
        """Return what a search finds where every layer may make texts shorter."""
        layers = range(1, self.full.config.num_hidden_layers + 1)
        return search_retention(self.full, self.texts, self.tokenizer, layers=list(layers), seed=SEED, progress=False)

    def execute(self, run: LengthRun, parts: tuple[str, ...] = ("dev", "test"), **settings) -> dict:
        """Make texts shorter, distil, and return the numbers of a run."""
        used = {
            "steps": STEPS.get(run.set, OTHER_STEPS),
            "learning_rate": LEARNING_RATE,
            "batch_size": BATCH_SIZE.get(run.set, OTHER_BATCH_SIZE),
            "bf16": True,
            **settings,
        }
        result = {"run": asdict(run), "settings": {**used, "seed": SEED}, **self.about()}
        if run.kind == "full":
            del result["settings"]
            lengths = {part: [len(row) for row in self.splits[part]["input_ids"]] for part in parts}
            result["tokens"] = {part: sum(own) / len(own) for part, own in lengths.items()}
            return result | {"distilled": {part: self.measure(self.full, part) for part in parts}}
        model = copy.deepcopy(self.full)
        searched = self.searched if run.kind == "searched" else None
        dial = dial_of(model, run.kind, run.ratio, self.lengths, searched)
        most_tokens = make_shorter(model, run.kind, dial, searched)
        result |= {"dial": dial, "coarsening": model.config.coarsening}
        result["converted"] = {"dev": self.measure(model, "dev", most_tokens)}
        result["log"] = self.distill(model, **used)
        if run.name == KEPT:
            model.save_pretrained(self.work_dir / run.name)
        result["distilled"] = {part: self.measure(model, part, most_tokens) for part in parts}
        return result


def runs_of(name: str) -> list[LengthRun]:
    """Return the runs of a set, the most telling ones first."""
    runs = [LengthRun(name, kind, 2.0) for kind in KINDS]
    runs[3:3] = [LengthRun(name, kind, ratio) for ratio in (3.0, 1.5) for kind in AT_EVERY_RATIO]
    return [LengthRun(name, "full"), *runs]


def run_all(sets: Sequence[str], data_dir: Path, work_dir: Path, results_dir: Path) -> None:
    """Do every run of some sets, or of all, that is not finished."""
    for name in sets or SETS:
        runs = [run for run in runs_of(name) if finished(run.name, results_dir) is None]
        bench = LengthBench(name, data_dir, work_dir) if runs else None
        for number, run in enumerate(runs, start=1):
            print(f"\n{run.name} ({number} of {len(runs)})", flush=True)
            keep(bench.execute(run), run.name, results_dir)
