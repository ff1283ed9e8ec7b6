"""What the members of a cascade must have in common, and bring along: dtype, labels, tokenizers, lengths."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer, pipeline

from fastbert_hf import CascadeForSequenceClassification, FastBertForSequenceClassification, save_with_code

from ..common import assert_close, tiny_model, tiny_texts, tiny_tokenizer
from .test_cascade import other_tokenizer, stock


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


@pytest.fixture
def mixed() -> CascadeForSequenceClassification:
    tokenizers = [tiny_tokenizer(), other_tokenizer()]
    return CascadeForSequenceClassification.from_members([stock(num_layers=1), stock(num_layers=3)], tokenizers)


def dtypes(model) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("large", ["large", "half"])
def test_members_from_a_disk_answer_in_every_dtype(folders, batch, tmp_path, saved, loaded, large):
    made = CascadeForSequenceClassification.from_members([folders["small"], folders[large]], dtype=saved)
    assert dtypes(made) == {saved}
    made.save_pretrained(tmp_path)
    asked = {} if loaded is None else {"dtype": loaded}
    cascade = CascadeForSequenceClassification.from_pretrained(tmp_path, **asked)
    assert dtypes(cascade) == {loaded or saved}
    with torch.no_grad():
        for speed in (0, 0.6, 1):
            output, expected = cascade(**batch, speed=speed), made(**batch, speed=speed)
            assert output.logits.dtype == (loaded or saved)
            if loaded in (None, saved):
                assert output.exit_member.tolist() == expected.exit_member.tolist()
                assert_close(output.logits.float(), expected.logits.float())
    built = AutoModelForSequenceClassification.from_config(cascade.config, dtype=torch.bfloat16)
    assert dtypes(built) == {torch.bfloat16}


def test_members_of_several_dtypes_need_one(folders):
    with pytest.raises(ValueError, match=r"float32, torch.bfloat16, but a cascade is saved in one dtype: choose it"):
        CascadeForSequenceClassification.from_members([folders["small"], folders["half"]])
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
    again = CascadeForSequenceClassification.from_pretrained(tmp_path / "after")
    for config in (again.config, *again.config.members):
        assert config.id2label == NAMES and config.label2id == labels["label2id"]
    assert pipeline("fast-text-classification", model=str(tmp_path / "after"))("word7")[0]["label"] in NAMES.values()


def test_another_tokenizer_does_not_take_the_place_of_the_first_members(mixed, tmp_path):
    with pytest.raises(ValueError, match="the one given is not that of the first: leave tokenizer out"):
        save_with_code(mixed, tmp_path / "code", tokenizer=other_tokenizer())
    assert not (tmp_path / "code").exists()
    with pytest.raises(ValueError, match="the one given is not that of the first"):
        mixed.push_to_hub("org/name", tokenizer=other_tokenizer())
    save_with_code(mixed, tmp_path / "code", tokenizer=tiny_tokenizer())
    classifier = pipeline("fast-text-classification", model=mixed, tokenizer=other_tokenizer())
    classifier.save_pretrained(tmp_path / "pipeline")
    texts = tiny_texts(5)
    for folder in ("code", "pipeline"):
        again = pipeline("fast-text-classification", model=str(tmp_path / folder))
        assert again(texts, speed=0.8) == classifier(texts, speed=0.8)


def test_tokenizers_of_old_checkpoints_are_found(folders, tmp_path):
    stock(num_layers=1).save_pretrained(tmp_path)
    words = sorted(other_tokenizer().get_vocab().items(), key=lambda word: word[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), BertTokenizer)
    cascade = CascadeForSequenceClassification.from_members([tmp_path, folders["large"]])
    expected = [tokenizer("word7 word9")["input_ids"] for tokenizer in (other_tokenizer(), tiny_tokenizer())]
    assert [part["input_ids"] for part in cascade.encode(["word7 word9"])[0]] == expected


def test_a_tokenizer_that_is_not_given_is_that_of_the_folder(folders, tmp_path):
    stock(num_layers=1).save_pretrained(tmp_path)
    other_tokenizer().save_pretrained(tmp_path)
    members, tokenizers = [tmp_path, stock(num_layers=3)], [None, tiny_tokenizer()]
    cascade = CascadeForSequenceClassification.from_members(members, tokenizers)
    assert cascade.tokenizers[0].get_vocab() == other_tokenizer().get_vocab() and cascade.config.own_tokenizers


def limited(folder, limit: int, num_layers: int):
    model = stock(num_layers=num_layers, seed=num_layers, max_position_embeddings=limit)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = limit
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("limits", [(32, 64), (64, 32)])
def test_members_that_read_texts_of_other_lengths_cut_their_own(tmp_path, limits):
    folders = [limited(tmp_path / f"{layers}", limit, layers) for layers, limit in zip((1, 3), limits, strict=True)]
    CascadeForSequenceClassification.from_members(folders).save_pretrained(tmp_path / "cascade")
    classifier = pipeline("fast-text-classification", model=str(tmp_path / "cascade"))
    text = " ".join(f"word{5 + index}" for index in range(50))
    for speed, folder in ((0, folders[1]), (1, folders[0])):
        alone = pipeline("text-classification", model=str(folder))(text, truncation=True)[0]
        answer = classifier(text, truncation=True, speed=speed)[0]
        assert answer["label"] == alone["label"] and answer["score"] == pytest.approx(alone["score"], abs=1e-5)


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


def test_what_stands_in_for_nothing_is_taken_for_nothing(mixed, batch):
    expected = mixed(member_inputs=[batch] * 2, output_hidden_states=False, output_attentions=False)
    given = {**batch, "token_type_ids": None}
    assert_close(mixed(member_inputs=[given] * 2).logits, expected.logits)


def test_wrong_members_and_calls_say_what_to_do(folders, mixed, batch, tmp_path):
    two = [folders["small"], folders["large"]]
    from_members = CascadeForSequenceClassification.from_members
    with pytest.raises(ValueError, match="tokenizers is a list, one for each member"):
        from_members(two, tokenizers=tiny_tokenizer())
    with pytest.raises(
        TypeError, match="a member is a folder, the id of a repository or a loaded model, got NoneType"
    ):
        from_members([None, folders["large"]])
    cascade = from_members(two)
    with pytest.raises(ValueError, match="the batch has no rows"):
        cascade(**{name: values[:0] for name, values in batch.items()})
    with pytest.raises(ValueError, match=r"no hidden states .*cascade\.members\[0\]"):
        cascade(**batch, output_hidden_states=True)
    with pytest.raises(ValueError, match=r"the inputs of a member are input_ids.*, not labels: leave them out"):
        mixed(member_inputs=[{**batch, "labels": torch.zeros(6)}] * 2)
    cascade.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="problem_type='multi_label_classification' is not supported"):
        CascadeForSequenceClassification.from_pretrained(tmp_path, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="not of a FastBERT model: load it with Cascade"):
        FastBertForSequenceClassification.from_pretrained(tmp_path)


def test_own_tokenizers_that_are_not_known_are_not_lost_in_silence(mixed, tmp_path):
    built = AutoModelForSequenceClassification.from_config(mixed.config).eval()
    with pytest.raises(ValueError, match=r"or set cascade\.tokenizers to a list of 2"):
        built.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the cascade does not know its tokenizers"):
        pipeline("fast-text-classification", model=built, tokenizer=tiny_tokenizer())
    built.tokenizers = mixed.tokenizers
    built.save_pretrained(tmp_path)
    assert len(CascadeForSequenceClassification.from_pretrained(tmp_path).tokenizers) == 2
