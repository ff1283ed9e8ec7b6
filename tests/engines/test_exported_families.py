"""Every family and every kind of exit answers from its graphs as it does in PyTorch."""

from __future__ import annotations

import pytest
import torch

from fastbert_hf import export
from fastbert_hf.engines.exported_models import EXPORTED_MODELS

from ..common import assert_close, pad_token_id_of, ragged_batch, tiny_model, tiny_tokenizer


pytestmark = pytest.mark.usefixtures("quick_export")

# Those whose layers or embeddings differ from the others'; xlm-roberta, camembert and data2vec-text are roberta's.
FAMILIES = ("bert", "ernie", "roberta", "electra", "distilbert", "albert", "modernbert")


def exported(model, folder, backend: str = "onnx", **settings):
    export(model, folder, backend=backend, tokenizer=tiny_tokenizer(), progress=False, **settings)
    return EXPORTED_MODELS[backend].from_pretrained(folder, num_threads=1)


def assert_same_answers(found, model, batch: dict[str, torch.Tensor]) -> None:
    for speed in (0.0, 0.78, [0.0, 0.7, 0.9, 0.5, 1.0, 0.75, 0.8]):
        one, other = found(**batch, speed=speed), model(**batch, speed=speed)
        assert torch.equal(one.exit_layer, other.exit_layer)
        assert_close(one.logits, other.logits, 1e-4)
    one, other = (own(**batch, output_exit_logits=True).exit_logits for own in (found, model))
    assert_close(one, other, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_from_its_graphs(family, tmp_path):
    # Attention exits of one family: their graphs take the longest to make.
    model = tiny_model(family, exit_type="attention" if family == "bert" else "linear")
    found = exported(model, tmp_path / "onnx")
    # Padding ids inside of texts have no position in roberta's family.
    batch = ragged_batch(pad_token_id=pad_token_id_of(family), pairs=family not in ("distilbert", "modernbert"))
    batch["input_ids"][5, 7] = pad_token_id_of(family)
    assert_same_answers(found, model, batch)
    left = ragged_batch(pad_token_id=pad_token_id_of(family), padding_side="left")
    assert_same_answers(found, model, left)


def test_other_exits_answer_from_their_graphs(tmp_path):
    # Those of the families above are "attention".
    model = tiny_model(exit_type="linear_mean", share_exit_pooler=True, teacher_exit_type="linear")
    found = exported(model, tmp_path / "onnx", layers_per_stage=2)
    assert_same_answers(found, model, ragged_batch())
