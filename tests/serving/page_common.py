"""What the tests of the page share: models, settings as its sliders send them, and files as visitors give them."""

import csv
import json

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import pipeline

from fastbert_hf import CascadeForSequenceClassification
from fastbert_hf.serving.page import EXAMPLES
from fastbert_hf.serving.page_actions import NONE
from tests.common import tiny_model, tiny_tokenizer


TEXTS = [*EXAMPLES, "Fine.", "a " * 40, "What a waste.", "I would see it again, and again."]
ASKED = ({"speed": 0.0}, {"speed": 0.3}, {"speed": 1.0}, {"speedup": 2.5}, {"max_disagreement": 0.02})


def tiny_classifier(num_labels=3, **config):
    model = tiny_model("bert", num_labels=num_labels, **config)
    return pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer())


def tiny_cascade(num_labels=3, **of_first):
    first = tiny_model("bert", seed=1, num_labels=num_labels, **of_first)
    members = [first, tiny_model("bert", seed=2, num_labels=num_labels)]
    cascade = CascadeForSequenceClassification.from_members(members, tokenizers=[tiny_tokenizer()] * 2)
    return pipeline("fast-text-classification", model=cascade, tokenizer=tiny_tokenizer())


def assert_same_answers(found, expected):
    assert len(found) == len(expected)
    for own, other in zip(found, expected, strict=True):
        assert {**own, "score": None} == {**other, "score": None}
        assert own["score"] == pytest.approx(other["score"], abs=1e-5)


def sliders(actions, **asked):
    """Return what the page sends where a dial is set so: its title, and the values of all sliders."""
    ((name, value),) = asked.items()
    values = [value / dial.unit if dial.name == name else dial.value for dial in actions.dials]
    (title,) = (dial.title for dial in actions.dials if dial.name == name)
    return title, *values


def write_file(path, rows):
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            quoting = (
                {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if path.suffix == ".tsv" else {}
            )
            writer = csv.DictWriter(file, list(rows[0]), **quoting)
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(texts=TEXTS):
    return [{"id": str(place), "text": text, "label": "negative"} for place, text in enumerate(texts)]


def run_file(actions, visit, path, at, columns=("text", NONE, "label"), cut=True):
    *steps, shown = actions.run_file(visit, path, *columns, cut, *at)
    assert all("texts" in step for step in steps)
    return shown
