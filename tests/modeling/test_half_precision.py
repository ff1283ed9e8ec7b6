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

from ..common import IN_A_FORK, tiny_model


LOAD = """
import json
import torch
from transformers import AutoModelForSequenceClassification
import fastbert_hf
from fastbert_hf.modeling.engine import beats_float32

def load(folder, dtype, output_dir):
    os.makedirs(output_dir)
    os.dup2(os.open(output_dir + "/messages.txt", os.O_CREAT | os.O_WRONLY), 2)
    given = {} if dtype == "nothing" else {"dtype": dtype}
    model = AutoModelForSequenceClassification.from_pretrained(folder, **given)
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    finite = bool(model(torch.tensor([[2, 7, 9, 3]])).logits.isfinite().all())
    model.save_pretrained(output_dir)
    saved = json.load(open(output_dir + "/config.json"))["dtype"]
    print(json.dumps({"dtypes": dtypes, "saved": saved, "finite": finite, "is_fast": beats_float32(torch.bfloat16)}))

folder, output_dir, *dtypes = sys.argv[1:]
for dtype in dtypes:
    in_a_fork(load, folder, dtype, output_dir + "/" + dtype)
"""
GIVEN = ("nothing", "bfloat16")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    tiny_model().bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def on_avx2(saved, tmp_path_factory) -> dict[str, tuple[dict, str]]:
    """What became of the model where oneDNN has AVX2 alone, and what was said, by the dtype that was given."""
    output_dir = tmp_path_factory.mktemp("loaded")
    finished = subprocess.run(
        [sys.executable, "-c", IN_A_FORK + LOAD, str(saved), str(output_dir), *GIVEN],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    messages = [path.read_text() for path in (output_dir / dtype / "messages.txt" for dtype in GIVEN)]
    assert finished.returncode == 0, [finished.stderr[-3000:], *messages]
    found = map(json.loads, finished.stdout.splitlines())
    return dict(zip(GIVEN, zip(found, messages, strict=True), strict=True))


def test_where_half_precision_is_emulated_it_is_loaded_in_float32(on_avx2):
    found, messages = on_avx2["nothing"]
    expected = {"dtypes": ["torch.float32"], "saved": "float32", "finite": True, "is_fast": False}
    assert found == expected and "dtype=torch.bfloat16" in messages


def test_what_is_asked_for_is_done(on_avx2):
    found, messages = on_avx2["bfloat16"]
    assert found["dtypes"] == ["torch.bfloat16"] and found["saved"] == "bfloat16"
    assert "slower than in float32" not in messages


def test_where_it_is_fast_it_stays(saved):
    model = FastBertForSequenceClassification.from_pretrained(saved)
    assert model.dtype is (torch.bfloat16 if beats_float32(torch.bfloat16) else torch.float32)
