"""The reader that is written beside the graphs answers as the pipeline does, without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from transformers import BertTokenizer, pipeline

from fastbert_hf import calibrate, export

from ..common import random_gates, tiny_model, tiny_texts, tiny_tokenizer


pytestmark = pytest.mark.usefixtures("quick_export")

# As in an environment that has these three packages alone.
WITHOUT_TORCH = """
import json, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "fastbert_hf", "onnx", "onnxscript", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Nothing())
sys.path.insert(0, sys.argv[1])
from fastbert_reader import Reader
given = json.loads(sys.stdin.read())
readers = {folder: Reader(folder, num_threads=1) for folder, *_ in given}
answers = [readers[folder](texts, **arguments) for folder, texts, arguments in given]
print(json.dumps(answers))
"""


def test_the_reader_answers_the_same_without_torch(tmp_path):
    texts, tokenizer = tiny_texts(150), tiny_tokenizer()
    pairs = [{"text": one, "text_pair": other} for one, other in zip(texts[:20], texts[20:40], strict=True)]
    pairs[3]["text_pair"] = ""
    model = tiny_model(exit_policy="learned", gates=random_gates(3, 4), id2label={0: "a", 1: "b", 2: "ü"})
    calibrate(model, texts, tokenizer, exit_policy="margin", linear=True, progress=False)
    learned = export(model, tmp_path / "all", tokenizer=tokenizer, layers_per_stage=3, progress=False)
    named = {"model_max_length": 10, "truncation_side": "left", "model_input_names": ["input_ids"]}
    cutting = BertTokenizer(vocab=tokenizer.get_vocab(), **named)
    # The reader sees of the exits what they say, so those of these two may be the ones that are made fastest.
    linear = {"exit_type": "linear", "teacher_exit_type": "linear"}
    roberta = export(tiny_model("roberta", **linear), tmp_path / "roberta", tokenizer=cutting, progress=False)
    long = [" ".join(texts[:9]), {"text": " ".join(texts[:9]), "text_pair": "word7 word8"}]
    int8 = export(tiny_model(**linear), tmp_path / "int8", quantize="int8", tokenizer=tokenizer, progress=False)
    policies = {}
    for policy in ("entropy", "confidence", "margin", "patience", "learned"):
        policies[policy] = shutil.copytree(learned, tmp_path / policy)
        config = json.loads((learned / "config.json").read_text())
        config.update(exit_policy=policy, calibration=None, certification=None, patience=2, gates=random_gates(3, 4))
        (policies[policy] / "config.json").write_text(json.dumps(config))
    given = [(folder, texts, {"speed": 0.6}) for folder in policies.values()]
    given += [(learned, texts, arguments) for arguments in ({}, {"speed": 0.3}, {"speedup": 1.2}, {"speed": 0.0})]
    given += [(policies["entropy"], texts, {"speed": 0.5, "min_exit_layer": 2, "max_layers": 3})]
    given += [(int8, texts, {"speed": 0.5}), (learned, pairs, {"speed": 0.5})]
    given += [(roberta, texts, {"speed": 0.5}), (roberta, pairs, {"speed": 0.5})]
    given += [(roberta, [own], {"speed": 0.5, "truncation": True}) for own in long]
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(learned)],
        input=json.dumps(given, default=str),
        capture_output=True,
        text=True,
        check=True,
    )
    classifiers = {folder: pipeline("fast-text-classification", model=str(folder)) for folder, *_ in given}
    for (folder, rows, arguments), found in zip(given, json.loads(finished.stdout), strict=True):
        wanted = classifiers[folder](rows, **arguments)
        assert [(answer["label"], answer["exit_layer"]) for answer in found] == [
            (answer["label"], answer["exit_layer"]) for answer in wanted
        ]
        assert [answer["score"] for answer in found] == pytest.approx([own["score"] for own in wanted], abs=1e-6)
