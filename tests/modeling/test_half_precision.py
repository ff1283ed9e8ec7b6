"""Models that were saved in half precision: as they were where that is fast, in float32 where it is emulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from fastbert_hf import FastBertForSequenceClassification
from fastbert_hf.modeling.engine import beats_float32

from ..common import tiny_model


LOAD = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification
import fastbert_hf
from fastbert_hf.modeling.engine import beats_float32
given = {} if sys.argv[2] == "nothing" else {"dtype": sys.argv[2]}
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], **given)
dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
finite = bool(model(torch.tensor([[2, 7, 9, 3]])).logits.isfinite().all())
model.save_pretrained(sys.argv[3])
saved = json.load(open(sys.argv[3] + "/config.json"))["dtype"]
print(json.dumps({"dtypes": dtypes, "saved": saved, "finite": finite, "is_fast": beats_float32(torch.bfloat16)}))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    tiny_model().bfloat16().save_pretrained(folder)
    return folder


def loaded(folder, dtype: str, output_dir, isa: str) -> tuple[dict, str]:
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", LOAD, str(folder), dtype, str(output_dir)]
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=environment)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(finished.stdout.splitlines()[-1]), finished.stderr


def test_where_half_precision_is_emulated_it_is_loaded_in_float32(saved, tmp_path):
    found, messages = loaded(saved, "nothing", tmp_path, "AVX2")
    expected = {"dtypes": ["torch.float32"], "saved": "float32", "finite": True, "is_fast": False}
    assert found == expected and "dtype=torch.bfloat16" in messages


def test_what_is_asked_for_is_done(saved, tmp_path):
    found, messages = loaded(saved, "bfloat16", tmp_path, "AVX2")
    assert found["dtypes"] == ["torch.bfloat16"] and found["saved"] == "bfloat16"
    assert "slower than in float32" not in messages


def test_where_it_is_fast_it_stays(saved):
    model = FastBertForSequenceClassification.from_pretrained(saved)
    assert model.dtype is (torch.bfloat16 if beats_float32(torch.bfloat16) else torch.float32)
