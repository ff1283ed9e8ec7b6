"""Weights of stock checkpoints: what is lacking is refused, what is not needed is not reported, all else is."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from fastbert_hf import CascadeForSequenceClassification, FastBertForSequenceClassification
from fastbert_hf.modeling.stock_checkpoints import held_reports

from ..common import FAMILIES, stock, tiny_stock_model, tiny_text_config


REPORT = "LOAD REPORT"


def from_backbone(folder: Path) -> FastBertForSequenceClassification:
    return FastBertForSequenceClassification.from_backbone(folder, num_labels=3)


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_poolers_and_heads_that_are_not_needed_are_not_reported(tmp_path, caplog, family):
    stock(family).save_pretrained(tmp_path / "classifier")
    tiny_stock_model(family).save_pretrained(tmp_path / "encoder")
    sources = ["classifier", "encoder"]
    if family != "data2vec-text":  # another such head would show nothing new
        AutoModelForMaskedLM.from_config(tiny_text_config(family)).save_pretrained(tmp_path / "pretrained")
        sources.append("pretrained")
    for source in sources:
        from_backbone(tmp_path / source)
    if family != "modernbert":
        FastBertForSequenceClassification.from_classifier(tmp_path / "classifier")
    assert REPORT not in caplog.text


def test_members_are_loaded_without_a_report(tmp_path, caplog):
    stock("roberta").save_pretrained(tmp_path)
    CascadeForSequenceClassification.from_members([tmp_path, tmp_path])
    assert REPORT not in caplog.text


def test_what_an_encoder_holds_too_much_is_still_reported(tmp_path, caplog):
    tiny_stock_model().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: {**weights, "encoder.layer.4.output.dense.weight": torch.zeros(3)})
    from_backbone(tmp_path)
    assert caplog.text.count(REPORT) == 1
    assert "encoder.layer.4.output.dense.weight" in caplog.text


@pytest.mark.parametrize("lost", ["word_embeddings.weight", "intermediate.dense.weight", "layer.1."])
@pytest.mark.parametrize("wrap", [from_backbone, FastBertForSequenceClassification.from_classifier])
def test_encoder_that_lacks_weights_is_refused(tmp_path, wrap, lost):
    stock().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: {name: value for name, value in weights.items() if lost not in name})
    with pytest.raises(ValueError, match=rf"lacks weights of the encoder that its config describes: .*{lost}"):
        wrap(tmp_path)


def test_reports_are_held_for_one_thread_and_shown_in_the_end(caplog):
    logger = logging.getLogger("transformers.modeling_utils")
    with held_reports() as reports:
        other_thread = threading.Thread(target=logger.warning, args=(f"other {REPORT}",))
        other_thread.start()
        other_thread.join()
        logger.warning(f"own {REPORT}")
        logger.warning("something else")
        assert [record.getMessage() for record in caplog.records] == [f"other {REPORT}", "something else"]
        assert len(reports) == 1
    assert caplog.records[-1].getMessage() == f"own {REPORT}"
    with pytest.raises(ValueError), held_reports() as reports:
        logger.warning(f"lost {REPORT}")
        raise ValueError
    assert caplog.records[-1].getMessage() == f"lost {REPORT}"
    with held_reports() as reports:
        logger.warning(f"unneeded {REPORT}")
        reports.clear()
    assert caplog.records[-1].getMessage() == f"lost {REPORT}"
    assert not logger.filters
