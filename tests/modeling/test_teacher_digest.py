"""A digest of the teacher's weights: the same wherever they lie; students of another teacher are refused by it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from fastbert_hf import DEFAULT_MODEL_DIR, CascadeForSequenceClassification, FastBertForSequenceClassification
from fastbert_hf.modeling import teacher_digest as module
from fastbert_hf.modeling.teacher_digest import teacher_digest, tells_of_training
from tests.common import NUM_LAYERS, ragged_batch, tiny_model, training_settings

from .test_data_parallel import replica_of


TEXTS = {"input_ids": [[5, 6, 7], [8, 9]]}
REFUSED = r"was trained after the students.*SelfDistillationTrainer\(model.*speed=0.*\.config\.distilled_for = None"


def distilled(family: str = "bert", seed: int = 0, **config) -> FastBertForSequenceClassification:
    """A model whose students belong to its teacher, as its config says."""
    model = tiny_model(family, seed, **config)
    model.config.distilled_for = teacher_digest(model)
    return model


def train_on(model: FastBertForSequenceClassification) -> None:
    """One step of what is trained in stage 1, and ready to answer again."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    model.train()
    model(**ragged_batch(), labels=torch.zeros(7, dtype=torch.long)).loss.backward()
    optimizer.step()
    model.eval()


# The digest


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
def test_digest_outlives_save_and_load(tmp_path, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    loaded = [FastBertForSequenceClassification.from_pretrained(tmp_path / name) for name in ("whole", "sharded")]
    digests = {teacher_digest(one) for one in (model, copy.deepcopy(model), copy.deepcopy(model).double(), *loaded)}
    assert len(digests) == 1
    assert digests != {teacher_digest(tiny_model(family, seed=1))}


def test_digest_tells_of_every_parameter_of_backbone_and_teacher_and_of_no_other():
    model = distilled()
    for name, weight in model.named_parameters():
        before = weight.detach().clone()
        with torch.no_grad():
            weight += 1e-3
        is_learnt_from = name.startswith(("fastbert.", f"exits.{NUM_LAYERS - 1}."))
        assert (teacher_digest(model) != model.config.distilled_for) == is_learnt_from, name
        weight.data = before
    assert teacher_digest(model) == model.config.distilled_for


@pytest.mark.parametrize("teacher_exit_type", ["attention", "linear"])
def test_a_shared_pooler_counts_where_the_teacher_reads_it(teacher_exit_type):
    model = distilled(share_exit_pooler=True, teacher_exit_type=teacher_exit_type)
    with torch.no_grad():
        model.shared_pooler.exit_dense.bias += 1
    assert (teacher_digest(model) != model.config.distilled_for) == (teacher_exit_type == "attention")


def test_names_order_and_aliases_do_not_count():
    model = distilled()
    query, key = (getattr(model.fastbert.layers()[0].attention.self, name) for name in ("query", "key"))
    key.load_state_dict(query.state_dict())
    apart = teacher_digest(model)
    key.weight = query.weight
    assert teacher_digest(model) == apart != model.config.distilled_for
    embeddings = model.fastbert.backbone.embeddings
    embeddings.tokens = embeddings.word_embeddings
    del embeddings.word_embeddings
    assert teacher_digest(model) == apart


def test_digest_names_the_narrowest_dtype_that_holds_the_weights():
    model = tiny_model()
    rounded = copy.deepcopy(model).bfloat16()
    assert teacher_digest(model).startswith("float32:")
    assert teacher_digest(rounded).startswith("bfloat16:")
    assert teacher_digest(copy.deepcopy(rounded).float()) == teacher_digest(rounded)
    assert teacher_digest(copy.deepcopy(model).half()).startswith("float16:")
    with torch.no_grad():
        model.double().teacher.out_proj.weight.div_(3)
    assert teacher_digest(model).startswith("float64:")


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        ("float32:0", "float32:0", False),
        ("float32:1", "float32:0", True),
        ("bfloat16:1", "float32:0", False),  # rounded
        ("float16:1", "bfloat16:0", False),
        ("float32:1", "float64:0", False),
        ("bfloat16:1", "bfloat16:0", True),
        ("float32:1", "float16:0", True),  # no rounding gives more digits
        ("float64:1", "float32:0", True),
        ("float64:1", "other:0", False),
    ],
)
def test_weights_that_were_rounded_are_told_from_weights_that_were_trained(found, wanted, expected):
    assert tells_of_training(found, wanted) is expected


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_nothing_is_said_of_weights_that_are_elsewhere_or_not_all_there_is():
    def with_lora(model):
        return get_peft_model(model, LoraConfig(target_modules=["query"])).get_base_model()

    def quantized(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})

    def with_other_class(model):
        class Linear(nn.Linear):
            pass

        model.fastbert.layers()[0].intermediate.dense.__class__ = Linear
        return model

    def with_other_tensor(model):
        class Packed(nn.Parameter):
            pass

        model.teacher.out_proj.weight = Packed(model.teacher.out_proj.weight.detach())
        return model

    def elsewhere(model):
        return model.to("meta")

    for change in (with_lora, quantized, with_other_class, with_other_tensor, replica_of, elsewhere):
        assert teacher_digest(change(tiny_model())) is None


# The check


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("learnt", ["nothing", "the teacher", "backbone", "backbone and students", "all"])
def test_students_are_refused_where_adapters_have_learnt_without_them(learnt):
    model, exits = distilled(), [f"exits.{index}" for index in range(4)]
    lora = get_peft_model(model, LoraConfig(target_modules=["query"], modules_to_save=exits)).eval()
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            in_backbone, in_teacher = ".lora_B." in name, ".exits.3.modules_to_save." in name
            in_students = ".modules_to_save." in name and not in_teacher
            parts = {"backbone": in_backbone, "teacher": in_teacher, "students": in_students}
            if any(part in learnt or learnt == "all" for part, is_here in parts.items() if is_here):
                weight.add_(0.1)
    if learnt in ("the teacher", "backbone"):
        with pytest.raises(ValueError, match=REFUSED):
            lora(**ragged_batch(), speed=0.7)
    else:
        lora(**ragged_batch(), speed=0.7)
    lora(**ragged_batch())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("change", ["training", "loading", "loading around it", "merging"])
def test_students_are_refused_once_the_teacher_has_changed(change):
    model = distilled()
    assert len(list(model.predict(TEXTS, speed=0.7))) == 2  # what it knows of the weights must not stay
    if change == "training":
        train_on(model)
    elif change == "merging":
        lora = get_peft_model(model, LoraConfig(target_modules=["query"], init_lora_weights=False)).eval()
        with pytest.raises(ValueError, match=REFUSED):
            lora(**ragged_batch(), speed=0.7)
        model = lora.merge_and_unload()
    else:
        other = tiny_model(seed=1)
        part = change == "loading around it"
        holder, given = (nn.ModuleList([model]), nn.ModuleList([other])) if part else (model, other)
        holder.load_state_dict(given.state_dict())
    calls = (
        lambda: model(**ragged_batch(), speed=0.7),
        lambda: model(**ragged_batch(), speed=[0.0] * 6 + [0.1]),
        lambda: model(**ragged_batch(), max_layers=2),
        lambda: list(model.predict(TEXTS, speed=0.7)),
        lambda: list(model.predict(TEXTS, max_layers=2)),
        lambda: list(model.predict(TEXTS, speed=iter([0.0, 0.1]))),
    )
    for call in calls:
        with pytest.raises(ValueError, match=REFUSED):
            call()
    # Where the teacher answers, nothing is asked of the students.
    model(**ragged_batch(), output_exit_logits=True)
    assert len(list(model.predict(TEXTS))) == 2
    assert model(**ragged_batch(), speed=0.7, min_exit_layer=NUM_LAYERS).exit_layer.tolist() == [NUM_LAYERS] * 7


def test_training_in_eval_mode_is_noticed_after_a_call():
    model = distilled()
    list(model.predict(TEXTS, speed=0.5))
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    model(**ragged_batch(), labels=torch.zeros(7, dtype=torch.long)).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match=REFUSED):
        list(model.predict(TEXTS, speed=0.5))


@pytest.mark.parametrize("digest", [lambda model: None, teacher_digest])
def test_students_of_a_trained_model_answer_again_once_the_config_lets_them(digest):
    model = distilled()
    train_on(model)
    with pytest.raises(ValueError, match=REFUSED):
        model(**ragged_batch(), speed=0.7)
    model.config.distilled_for = digest(model)
    assert model(**ragged_batch(), speed=0.7).exit_layer.min() < NUM_LAYERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_is_no_other_teacher(tmp_path, dtype):
    model = distilled().to(dtype)
    model.save_pretrained(tmp_path)
    again = FastBertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    for one in (model, again):
        assert one(**ragged_batch(), speed=0.7).exit_layer.min() < NUM_LAYERS
    train_on(again)
    with pytest.raises(ValueError, match=REFUSED):
        again(**ragged_batch(), speed=0.7)


def test_the_digest_is_made_at_the_first_call_that_may_ask_a_student_and_kept(monkeypatch):
    model, made = distilled(), []

    def counted(*args):
        made.append(1)
        return teacher_digest(*args)

    monkeypatch.setattr(module, "teacher_digest", counted)
    model(**ragged_batch())
    model(**ragged_batch(), output_exit_logits=True)
    assert made == []
    for _ in range(3):
        model(**ragged_batch(), speed=0.7)
        list(model.predict(TEXTS, speed=0.7))
    assert made == [1]


def test_members_of_a_cascade_are_checked_where_their_students_may_answer():
    small, large = distilled(), distilled(seed=1)
    train_on(small)
    cascade = CascadeForSequenceClassification.from_members([small, large])
    for call in (lambda: cascade(**ragged_batch(), speed=0.5), lambda: list(cascade.predict(TEXTS, speed=0.5))):
        with pytest.raises(ValueError, match=f"member 1: .*{REFUSED}"):
            call()
    cascade(**ragged_batch())
    cascade.config.members[0].min_exit_layer = NUM_LAYERS
    cascade(**ragged_batch(), speed=0.5)
    train_on(cascade.members[1])
    with pytest.raises(ValueError, match=f"member 2: .*{REFUSED}"):
        cascade(**ragged_batch(), speed=0.5)


def test_default_model_that_the_stock_trainer_fine_tunes_answers_with_its_teacher_alone(tmp_path):
    model = FastBertForSequenceClassification.from_pretrained(DEFAULT_MODEL_DIR)
    assert model.config.distilled_for == teacher_digest(model)
    rows = [{"input_ids": [101, number, 102], "labels": number % 2} for number in (2204, 2919)]
    settings = training_settings(tmp_path, max_steps=1, learning_rate=1e-5)
    Trainer(model, TrainingArguments(**settings), train_dataset=rows).train()
    model.save_pretrained(tmp_path)
    for tuned in (model.eval(), FastBertForSequenceClassification.from_pretrained(tmp_path)):
        assert len(list(tuned.predict({"input_ids": [[101, 2204, 102]]}))) == 1
        with pytest.raises(ValueError, match=REFUSED):
            list(tuned.predict({"input_ids": [[101, 2204, 102]]}, speed=0.5))
