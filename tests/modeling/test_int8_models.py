"""Models with int8 layers: loaded, saved, asked in every way, and trained on; what is refused."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, pipeline

from fastbert_hf import (
    CascadeForSequenceClassification,
    FastBertForSequenceClassification,
    FastBertInt8Config,
    SelfDistillationArguments,
    SelfDistillationTrainer,
    calibrate,
)
from fastbert_hf.evaluation import executed_flops
from fastbert_hf.modeling.int8_layers import Int8Embedding, Int8Linear
from fastbert_hf.modeling.int8_products import exact_levels
from fastbert_hf.modeling.teacher_digest import teacher_digest
from fastbert_hf.training import convert_feed_forward

from ..common import FAMILIES, ragged_batch, tiny_model, tiny_text_config, tiny_texts, tiny_tokenizer


SPEEDS = (0.0, 0.3, 0.9)


@pytest.fixture(scope="module")
def texts() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 40, (30,), generator=generator).tolist()
    return [{"input_ids": torch.randint(5, 100, (length,), generator=generator).tolist()} for length in lengths]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    tiny_model(distilled_for=None).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(folder, *kept: str, **arguments) -> FastBertForSequenceClassification:
    settings = FastBertInt8Config(modules_to_not_convert=list(kept))
    return AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=settings, **arguments).eval()


def logits_of(model, rows: list, speed: float = 0.0) -> torch.Tensor:
    return torch.stack([answer.logits for answer in model.predict(rows, speed=speed)])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_alone_as_in_a_batch_and_comes_back(family, texts, tmp_path):
    model = tiny_model(family)
    plain = logits_of(model, texts)
    model.save_pretrained(tmp_path / "float")
    quantised = load(tmp_path / "float")
    linears = [part for part in quantised.fastbert.modules() if isinstance(part, torch.nn.Linear)]
    assert linears and all(isinstance(part, Int8Linear) for part in linears)
    assert isinstance(quantised.fastbert.backbone.get_input_embeddings(), Int8Embedding)
    assert not any(isinstance(part, Int8Linear) for part in quantised.exits.modules())
    for speed in SPEEDS:
        together = list(quantised.predict(texts, speed=speed))
        for row, answer in zip(texts, together, strict=True):
            (alone,) = quantised.predict([row], speed=speed)
            assert alone.exit_layer == answer.exit_layer
            torch.testing.assert_close(alone.logits, answer.logits, rtol=1e-5, atol=1e-5)
    assert (logits_of(quantised, texts) - plain).abs().max() < 0.25 * plain.std()
    # Converted in place it is the same, to the bit, and so it is when it comes back.
    model.use_int8_layers()
    quantised.save_pretrained(tmp_path / "int8")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    for other in (model, again):
        assert torch.equal(logits_of(other, texts, 0.3), logits_of(quantised, texts, 0.3))
    weights = load_file(tmp_path / "int8" / "model.safetensors")
    rounded = {name for name, weight in weights.items() if weight.dtype is torch.int8}
    assert rounded == {name.removesuffix("_scale") for name in weights if name.endswith("weight_scale")} != set()


def test_padded_batches_and_pipelines_agree_with_packed_ones(saved):
    model, batch = load(saved), ragged_batch()
    padded = model(**batch, speed=0.3)
    pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    rows = [{"input_ids": ids[mask].tolist()} for ids, mask in pairs]
    torch.testing.assert_close(padded.logits, logits_of(model, rows, 0.3), rtol=1e-4, atol=1e-4)
    classifier = pipeline("fast-text-classification", model=model, tokenizer=tiny_tokenizer())
    together = classifier(tiny_texts(5), speed=0.3)
    for text, answer in zip(tiny_texts(5), together, strict=True):
        (alone,) = classifier([text], speed=0.3)
        assert alone == {**answer, "score": pytest.approx(answer["score"], abs=1e-5)}


def test_a_quarter_of_the_size(saved, tmp_path):
    load(saved).fastbert.save_pretrained(tmp_path)
    whole = sum(weight.nbytes for name, weight in load_file(saved / "model.safetensors").items() if "fastbert" in name)
    small = sum(weight.nbytes for weight in load_file(tmp_path / "model.safetensors").values())
    assert small < 0.5 * whole  # of 32 numbers a row, whose scale weighs as much as four of them
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "fastbert_int8", "modules_to_not_convert": []}


def test_modules_that_stay_in_float(saved):
    model = load(saved, "layer.1", "output.dense", "word_embeddings")
    kinds = {name: type(part) for name, part in model.named_modules()}
    prefix = "fastbert.backbone.encoder.layer"
    assert kinds[f"{prefix}.0.attention.self.query"] is Int8Linear
    assert kinds[f"{prefix}.1.attention.self.query"] is torch.nn.Linear
    assert kinds[f"{prefix}.0.output.dense"] is kinds[f"{prefix}.0.attention.output.dense"] is torch.nn.Linear
    assert kinds["fastbert.backbone.embeddings.word_embeddings"] is torch.nn.Embedding


def test_bad_settings_are_refused(saved, tmp_path):
    for wrong in ({"modules_to_not_convert": "layer.1"}, {"modules_to_not_convert": [3]}, {"bits": 4}):
        with pytest.raises(ValueError, match="Example: FastBertInt8Config"):
            FastBertInt8Config(**wrong)
    stock = BertForSequenceClassification(tiny_text_config("bert"))
    stock.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"not for BertForSequenceClassification.*from_classifier"):
        AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "stock", quantization_config=FastBertInt8Config()
        )
    model = load(saved)
    with pytest.raises(ValueError, match="quantised already"):
        model.use_int8_layers()
    members = [tiny_model(), load(saved)]
    with pytest.raises(ValueError, match=r"cascade\.use_int8_layers"):
        CascadeForSequenceClassification.from_members(members)


QUERY = "fastbert.backbone.encoder.layer.0.attention.self.query"
WORDS = "fastbert.backbone.embeddings.word_embeddings"


def with_settings(**settings):
    def change(config: dict, weights: dict) -> None:
        config["quantization_config"] |= settings

    return change


def without_settings(config: dict, weights: dict) -> None:
    del config["quantization_config"]


def without_scales(config: dict, weights: dict) -> None:
    without_settings(config, weights)
    for name in [name for name in weights if name.endswith("weight_scale")]:
        del weights[name]


def with_weight(name: str, change):
    def replace(config: dict, weights: dict) -> None:
        weights[name] = change(weights[name])

    return replace


def without_weight(name: str):
    def remove(config: dict, weights: dict) -> None:
        del weights[name]

    return remove


BROKEN = {
    "a name too long": (with_settings(modules_to_not_convert=["x" * 1000]), "must be a list of names"),
    "no list": (with_settings(modules_to_not_convert={"a": 1}), "must be a list of names"),
    "another setting": (with_settings(bits=4), "has no 'bits'"),
    "no settings": (without_settings, "also hold .*weight_scale"),
    "no settings and no scales": (without_scales, "in I8, where F64"),
    "other settings": (with_settings(modules_to_not_convert=["query"]), "also hold .*weight_scale"),
    "words in float": (with_settings(modules_to_not_convert=["word_embeddings"]), "also hold .*weight_scale"),
    "a weight in float": (with_weight(f"{QUERY}.weight", torch.Tensor.float), "in F32, where I8"),
    "a weight in bytes": (with_weight(f"{QUERY}.weight", lambda own: own.to(torch.uint8)), "in U8, where I8"),
    "a scale in whole numbers": (with_weight(f"{QUERY}.weight_scale", torch.Tensor.int), "in I32, where F32"),
    "a scale of 0": (with_weight(f"{WORDS}.weight_scale", lambda own: own * 0), "scale is not above 0"),
    "a scale below 0": (with_weight(f"{QUERY}.weight_scale", torch.neg), "scale is not above 0"),
    "a weight too short": (with_weight(f"{QUERY}.weight", lambda own: own[:-1].clone()), r"of shape \[31, 32\]"),
    "no weight": (without_weight(f"{QUERY}.weight"), r"lack backbone\.encoder\.layer\.0\.attention\.self\.query"),
    "no scale": (without_weight(f"{WORDS}.weight_scale"), "lack backbone.embeddings.word_embeddings.weight_scale"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_int8_checkpoints_are_refused(case, saved, tmp_path):
    load(saved).save_pretrained(tmp_path)
    change, message = BROKEN[case]
    config, weights = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    change(config, weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_int8_weights_do_not_learn_and_the_rest_does(saved, tmp_path):
    model = load(saved)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(**ragged_batch()).logits.square().sum().backward()
    optimizer.step()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert f"{QUERY}.bias" in changed
    assert not any(f"{name}_scale" in before or name.endswith("weight_scale") for name in changed)


def test_casts_keep_the_scales(texts):
    model = tiny_model()
    expected = logits_of(copy.deepcopy(model), texts)
    model.use_int8_layers()
    scales = {name: own.clone() for name, own in model.state_dict().items() if name.endswith("weight_scale")}
    model.bfloat16()
    assert model.dtype is torch.bfloat16
    assert (logits_of(model, texts).float() - expected).abs().max() < 0.3 * expected.std()
    model.float()
    assert scales and all(torch.equal(model.state_dict()[name], own) for name, own in scales.items())
    half = tiny_model().bfloat16()
    half.use_int8_layers()
    assert (logits_of(half, texts).float() - expected).abs().max() < 0.3 * expected.std()


def test_what_could_not_come_back_is_not_saved(saved, tmp_path):
    cascade = CascadeForSequenceClassification.from_members([tiny_model(seed=1), tiny_model(seed=2)])
    cascade.members[1].use_int8_layers()
    with pytest.raises(ValueError, match="convert what you save as a whole"):
        cascade.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised already"):
        cascade.use_int8_layers()
    whole = CascadeForSequenceClassification.from_members([tiny_model(seed=1), tiny_model(seed=2)])
    whole.use_int8_layers()
    with pytest.raises(ValueError, match="convert what you save as a whole"):
        whole.members[0].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="give the one in float32"):
        FastBertForSequenceClassification.from_backbone(load(saved).fastbert.backbone, num_labels=2)
    with pytest.raises(ValueError, match="convert it before"):
        convert_feed_forward(load(saved), [{"input_ids": [2, 3]}], progress=False)
    assert not list(tmp_path.iterdir())


def test_a_model_with_adapters_is_not_rounded():
    model = tiny_model()
    model.config.distilled_for = teacher_digest(model)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"])).get_base_model()
    with pytest.raises(ValueError, match="has adapters"):
        model.use_int8_layers()


def test_students_of_another_teacher_stay_refused(texts):
    model = tiny_model()
    model.config.distilled_for = teacher_digest(model)
    with torch.no_grad():
        model.teacher.out_proj.weight += 1
    model.eval()
    model.use_int8_layers()
    assert not model.config.distilled_for.startswith("int8")
    fresh = tiny_model()
    fresh.config.distilled_for = teacher_digest(fresh)
    fresh.use_int8_layers()
    assert fresh.config.distilled_for == teacher_digest(fresh)
    logits_of(fresh, texts, 0.5)
    with torch.no_grad():
        fresh.teacher.out_proj.weight += 1
    with pytest.raises(ValueError, match="was trained after the students"):
        logits_of(fresh.eval(), texts, 0.5)


def test_cascades_are_quantised_as_a_whole(texts, tmp_path):
    members = [tiny_model(seed=1), tiny_model(seed=2)]
    members[1].config.distilled_for = teacher_digest(members[1])
    cascade = CascadeForSequenceClassification.from_members(members)
    cascade.save_pretrained(tmp_path / "float")
    replaced = cascade.use_int8_layers()
    assert {name.split(".")[1] for name in replaced} == {"0", "1"}
    cascade.save_pretrained(tmp_path / "int8")
    for other in (AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8"), load(tmp_path / "float")):
        for speed in SPEEDS:
            assert torch.equal(logits_of(other, texts, speed), logits_of(cascade, texts, speed))
        assert [member.config.distilled_for for member in other.members] == [None, teacher_digest(other.members[1])]


def test_students_of_the_float_model_still_answer_and_are_not_certified_for_int8(tmp_path, texts):
    model = tiny_model()
    model.config.distilled_for = teacher_digest(model)
    rows = [{**row, "labels": number % 3} for number, row in enumerate(texts * 10)]
    calibrate(model, rows, progress=False)
    model.save_pretrained(tmp_path)
    quantised = load(tmp_path)
    assert teacher_digest(quantised).startswith("int8:")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits_of(quantised, texts, 0.5)
    with pytest.raises(ValueError, match="weights"):
        list(quantised.predict(texts, max_disagreement=0.9))
    assert quantised.config.distilled_for == teacher_digest(quantised)


def test_exits_learn_on_the_quantised_backbone(saved, texts, tmp_path):
    model = load(saved)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    arguments = SelfDistillationArguments(
        tmp_path, max_steps=4, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    SelfDistillationTrainer(model, arguments, train_dataset=texts, processing_class=tiny_tokenizer()).train()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("exits.") for name in changed)
    assert model.config.distilled_for == teacher_digest(model)
    model.save_pretrained(tmp_path / "int8")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")
    assert torch.equal(logits_of(again, texts, 0.5), logits_of(model, texts, 0.5))


def test_adapters_learn_beside_int8_layers(saved, texts):
    model = load(saved)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False))
    outputs = adapted(**ragged_batch(), labels=torch.zeros(len(ragged_batch()["input_ids"]), dtype=torch.long))
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if "lora_A" in name}
    assert gradients and all(gradient.any() for gradient in gradients.values())


@pytest.mark.skipif(exact_levels() is None, reason="needs oneDNN")
def test_products_are_charged_as_they_were(saved):
    # So many tokens that products need no more rows than there are.
    model, batch = load(saved, attn_implementation="eager"), ragged_batch((4, 1, 7, 4))
    lengths = batch["attention_mask"].sum(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch, speed=0.0)
    depth = torch.full_like(lengths, 4)
    assert counter.get_total_flops() == executed_flops(model, depth, lengths, students=False).sum()


def test_half_precision_around_int8(saved, texts):
    model = load(saved, dtype=torch.bfloat16)
    query = model.fastbert.backbone.encoder.layer[0].attention.self.query
    assert query.weight.dtype is torch.int8 and model.teacher.out_proj.weight.dtype is torch.bfloat16
    expected = logits_of(load(saved), texts).float()
    assert (logits_of(model, texts).float() - expected).abs().max() < 0.3 * expected.std()
