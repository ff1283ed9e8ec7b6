"""The code of README.md runs as it is printed, from the first block to the last."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from transformers import AutoModel, PreTrainedModel

from .common import (
    NUM_LAYERS,
    read_operators_once,
    spread_out,
    stock,
    tiny_text_config,
    tiny_texts,
    tiny_tokenizer,
)
from .hub_server import HubServer, run_with_hub


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Where each block begins, in lines of README.md, and its code.
BLOCKS = [
    (README[: found.start(1)].count("\n") + 1, found[1])
    for found in re.finditer(r"^```python\n(.*?)^```", README, re.M | re.S)
]
LABELS = {0: "negative", 1: "positive"}


def make_stand_ins(folder: Path) -> None:
    """What the code of README.md takes to be there: repositories, which are folders here, and the reader's files."""

    def save(model: PreTrainedModel, name: str) -> None:
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)

    names = {"num_labels": 2, "id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}
    save(spread_out(AutoModel.from_config(tiny_text_config("bert"))), "bert-base-uncased")
    save(stock(num_layers=NUM_LAYERS, seed=1, **names), "org/my-finetuned-bert")
    save(stock(num_layers=1, seed=2, **names), "org/small-classifier")
    save(stock(num_layers=NUM_LAYERS, seed=3, **names), "org/large-classifier")
    texts = tiny_texts(240)  # half of them are about the fewest that a certificate for 0.02 needs
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    words = {"tokens": texts[0].split(), "label": ["B-THING", *["O"] * (len(texts[0].split()) - 1)]}
    for name in ("conll.jsonl", "dev.jsonl"):
        (folder / name).write_text("\n".join([json.dumps(words)] * 8) + "\n")
    for name in ("train.csv", "dev.csv"):
        rows = [f"{text},{LABELS[number % 2]}" for number, text in enumerate(texts[:60])]
        (folder / name).write_text("\n".join(["text,label", *rows]) + "\n")


def run_blocks(folder: str) -> list[int]:
    """Run every block, one after the other, in a folder. Returns the lines of README.md where they begin."""
    os.chdir(folder)
    read_operators_once()
    names: dict = {"__name__": "__main__"}
    for line, code in BLOCKS:
        # A traceback names the lines of README.md.
        exec(compile("\n" * (line - 1) + code, "README.md", "exec"), names)
    return [line for line, _ in BLOCKS]


def test_every_block_of_code_runs_as_it_is_printed(tmp_path):
    folder = tmp_path / "reader"
    make_stand_ins(folder)
    with HubServer() as hub:
        assert run_with_hub(hub, tmp_path / "home", run_blocks, folder) == [line for line, _ in BLOCKS]
    assert len(BLOCKS) >= 8
    assert "org/fastbert-chnsenticorp" in hub.repositories
