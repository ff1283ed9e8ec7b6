"""What the members of a cascade have in common: dtype, attention, labels. Tokenizers: `test_processing_cascade.py`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from fastbert_hf import CascadeForSequenceClassification, FastBertForSequenceClassification
from fastbert_hf.modeling.engine import beats_float32

from ..common import assert_close, stock, tiny_model, tiny_texts, tiny_tokenizer


NAMES = {0: "bad", 1: "fair", 2: "good"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """Classifiers as they lie on a disk, whose configs know the dtype of the weights."""
    folder = tmp_path_factory.mktemp("members")
    models = {
        "small": stock(num_layers=1, seed=1),
        "large": stock(num_layers=4, seed=3),
        "half": tiny_model("bert", 3).to(torch.bfloat16),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.fixture(scope="module")
def batch() -> dict:
    return dict(tiny_tokenizer()(tiny_texts(6), padding=True, return_tensors="pt"))


def dtypes(model) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize(
    ("saved", "loaded", "large"),
    [
        (torch.float32, None, "large"),
        (torch.float32, torch.float16, "half"),
        (torch.float32, torch.bfloat16, "large"),
        (torch.bfloat16, None, "half"),
        (torch.bfloat16, torch.float32, "large"),
        (torch.bfloat16, torch.bfloat16, "half"),
    ],
)
def test_members_from_a_disk_answer_in_every_dtype(folders, batch, tmp_path, saved, loaded, large):
    made = CascadeForSequenceClassification.from_members([folders["small"], folders[large]], dtype=saved)
    assert dtypes(made) == {saved}
    made.save_pretrained(tmp_path)
    asked = {} if loaded is None else {"dtype": loaded}
    cascade = CascadeForSequenceClassification.from_pretrained(tmp_path, **asked)
    is_slow = loaded is None and saved is torch.bfloat16 and not beats_float32(saved)
    expected_dtype = torch.float32 if is_slow else loaded or saved
    assert dtypes(cascade) == {expected_dtype}
    with torch.no_grad():
        for speed in (0, 0.6, 1):
            output, expected = cascade(**batch, speed=speed), made(**batch, speed=speed)
            assert output.logits.dtype == expected_dtype
            if expected_dtype is saved:
                assert output.exit_member.tolist() == expected.exit_member.tolist()
                assert_close(output.logits.float(), expected.logits.float())
    built = AutoModelForSequenceClassification.from_config(cascade.config, dtype=torch.bfloat16)
    assert dtypes(built) == {torch.bfloat16}


def test_members_of_several_dtypes_need_one(folders):
    with pytest.raises(ValueError, match=r"float32, torch.bfloat16, but a cascade is saved in one dtype: choose it"):
        CascadeForSequenceClassification.from_members([folders["small"], tiny_model().bfloat16()])
    cascade = CascadeForSequenceClassification.from_members([stock(num_layers=1), tiny_model()], dtype="bfloat16")
    assert dtypes(cascade) == {torch.bfloat16} and cascade.config.dtype == torch.bfloat16


def test_an_attention_is_that_of_all_members(folders):
    members = [folders["small"], tiny_model()]
    cascade = CascadeForSequenceClassification.from_members(members, attn_implementation="eager")
    found = [cascade, *cascade.members]
    assert [model.config._attn_implementation for model in found] == ["eager"] * 3


@pytest.mark.parametrize("on_load", [True, False])
def test_renamed_labels_reach_the_members(folders, tmp_path, on_load):
    labels = {"id2label": NAMES, "label2id": {name: index for index, name in NAMES.items()}}
    cascade = CascadeForSequenceClassification.from_members([folders["small"], folders["large"]])
    if on_load:
        cascade.save_pretrained(tmp_path / "before")
        cascade = CascadeForSequenceClassification.from_pretrained(tmp_path / "before", **labels)
    else:
        cascade.config.id2label, cascade.config.label2id = labels["id2label"], labels["label2id"]
    cascade.save_pretrained(tmp_path / "after")
    tiny_tokenizer().save_pretrained(tmp_path / "after")
    again = CascadeForSequenceClassification.from_pretrained(tmp_path / "after")
    for config in (again.config, *again.config.members):
        assert config.id2label == NAMES and config.label2id == labels["label2id"]
    assert pipeline("fast-text-classification", model=str(tmp_path / "after"))("word7")[0]["label"] in NAMES.values()


def test_a_member_that_is_never_asked_may_be_too_short():
    members = [stock(num_layers=1, max_position_embeddings=32), stock(num_layers=3)]
    cascade = CascadeForSequenceClassification.from_members(members, [tiny_tokenizer()] * 2)
    assert not cascade.config.own_tokenizers
    long = tiny_tokenizer()([" ".join(["word7"] * 50)])
    [answer] = cascade.predict(long, speed=0)
    output = cascade(**{name: torch.tensor(values) for name, values in long.items()})
    assert answer.exit_member == output.exit_member.item() == 2
    assert_close(answer.logits, output.logits[0])
    with pytest.raises(ValueError, match="member 1: text 0 has 52 tokens, but this model reads at most 32"):
        list(cascade.predict(long, speed=0.5))


def test_predict_compares_as_forward_does(batch):
    cascade = CascadeForSequenceClassification.from_members([stock(num_layers=1), stock(num_layers=3)])
    row = {name: values[:1] for name, values in batch.items()}
    row = {name: values[:, : int(row["attention_mask"].sum())] for name, values in row.items()}
    with torch.no_grad():
        [answer] = cascade.predict({name: values.tolist() for name, values in row.items()}, speed=1)
        # Next to an uncertainty there are speeds that float32 cannot tell from it.
        for speed in (answer.uncertainty, answer.uncertainty + 1e-10, answer.uncertainty - 1e-10):
            [found] = cascade.predict({name: values.tolist() for name, values in row.items()}, speed=speed)
            assert found.exit_member == 2


def test_labels_may_be_probabilities(folders, batch):
    cascade = CascadeForSequenceClassification.from_members([folders["small"], folders["large"]])
    labels = torch.rand(6, 3).softmax(-1)
    assert_close(cascade(**batch, labels=labels).loss, cascade.members[1](**batch, labels=labels).loss)


def test_wrong_members_and_calls_say_what_to_do(folders, batch, tmp_path):
    two = [folders["small"], folders["large"]]
    from_members = CascadeForSequenceClassification.from_members
    with pytest.raises(
        TypeError, match="a member is a folder, the id of a repository or a loaded model, got NoneType"
    ):
        from_members([None, folders["large"]])
    cascade = from_members(two)
    with pytest.raises(ValueError, match="the batch has no rows"):
        cascade(**{name: values[:0] for name, values in batch.items()})
    with pytest.raises(ValueError, match=r"no hidden states .*cascade\.members\[0\]"):
        cascade(**batch, output_hidden_states=True)
    cascade.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="member 1 has problem_type=None, and the cascade 'multi_label"):
        CascadeForSequenceClassification.from_pretrained(tmp_path, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="not of a FastBERT model: load it with Cascade"):
        FastBertForSequenceClassification.from_pretrained(tmp_path)
