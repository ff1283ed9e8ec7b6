"""The tokenizers of a cascade: one for all members or one for each, found, saved, loaded, and never mixed up."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, pipeline

from fastbert_hf import (
    CascadeForSequenceClassification,
    CascadeProcessor,
    FastBertForSequenceClassification,
    save_with_code,
)

from ..common import (
    VOCAB_SIZE,
    assert_close,
    other_tokenizer,
    ragged_batch,
    stock,
    tiny_model,
    tiny_texts,
    tiny_tokenizer,
)


SPEEDS = (0.0, 0.5, 0.85, 1.0)


def vocabularies(processor: CascadeProcessor) -> list[dict[str, int]]:
    return [tokenizer.get_vocab() for tokenizer in processor.tokenizers]


@pytest.fixture(scope="module")
def processor() -> CascadeProcessor:
    return CascadeProcessor([tiny_tokenizer(), other_tokenizer()])


@pytest.fixture(scope="module")
def mixed(processor) -> CascadeForSequenceClassification:
    """A cascade whose members read their own tokens."""
    members = [stock("distilbert", 1, 4), stock("roberta", 3, 5)]
    return CascadeForSequenceClassification.from_members(members, tokenizers=processor.tokenizers)


@pytest.fixture
def saved(mixed, processor, tmp_path):
    mixed.save_pretrained(tmp_path / "mixed")
    processor.save_pretrained(tmp_path / "mixed")
    return tmp_path / "mixed"


def test_every_member_reads_its_own_tokenizer(mixed, processor):
    assert mixed.config.own_tokenizers and processor.own_tokenizers
    texts, pairs = tiny_texts(20), tiny_texts(20, seed=9)
    inputs = [tokenizer(texts, pairs, padding=True, return_tensors="pt") for tokenizer in processor.tokenizers]
    # RoBERTa pads with 1, which its positions skip.
    inputs[1]["input_ids"] = inputs[1]["input_ids"].masked_fill(inputs[1]["attention_mask"] == 0, 1)
    with torch.no_grad():
        small, large = (member(**own) for member, own in zip(mixed.members, inputs, strict=True))
        for speed in SPEEDS:
            output = mixed(member_inputs=inputs, speed=speed)
            goes_on = ~(small.uncertainty < speed)
            assert output.exit_member.tolist() == (1 + goes_on.int()).tolist()
            assert_close(output.logits, torch.where(goes_on[:, None], large.logits, small.logits))
            answers = list(mixed.predict(processor(texts, pairs), speed=speed))
            assert [answer.exit_member for answer in answers] == output.exit_member.tolist()
            assert_close(torch.stack([answer.logits for answer in answers]), output.logits)


def test_they_are_saved_beside_the_cascade_and_found_by_the_pipeline(mixed, processor, saved):
    assert AutoTokenizer.from_pretrained(saved).get_vocab() == tiny_tokenizer().get_vocab()
    assert (saved / "member_2" / "tokenizer.json").exists()
    assert vocabularies(CascadeProcessor.from_pretrained(saved)) == vocabularies(processor)
    texts, pairs = tiny_texts(20), tiny_texts(20, seed=9)
    expected = list(mixed.predict(processor(texts, pairs), speed=0.85))
    asked = [{"text": text, "text_pair": pair} for text, pair in zip(texts, pairs, strict=True)]
    by_path = pipeline("fast-text-classification", model=str(saved))
    given = pipeline("fast-text-classification", model=mixed, tokenizer=processor)
    for classifier in (by_path, given):
        answers = classifier(asked, speed=0.85)
        assert [answer["exit_member"] for answer in answers] == [answer.exit_member for answer in expected]
        scores = [answer.logits.softmax(-1).max().item() for answer in expected]
        assert [answer["score"] for answer in answers] == pytest.approx(scores, abs=1e-5)
    assert {answer["exit_member"] for answer in answers} == {1, 2}
    given.save_pretrained(saved / "again")
    assert vocabularies(CascadeProcessor.from_pretrained(saved / "again")) == vocabularies(processor)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """Classifiers as they lie on a disk, two with one tokenizer and one with another."""
    folder, found = tmp_path_factory.mktemp("members"), {}
    for name, model, tokenizer in (
        ("small", stock(num_layers=1), tiny_tokenizer()),
        ("large", tiny_model("bert"), tiny_tokenizer()),
        ("other", stock(num_layers=3), other_tokenizer()),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        found[name] = folder / name
    return found


def test_members_by_name_bring_their_tokenizers(folders):
    same = [folders["small"], folders["large"]]
    cascade, processor = (part.from_members(same) for part in (CascadeForSequenceClassification, CascadeProcessor))
    assert not cascade.config.own_tokenizers and len(processor.tokenizers) == 1
    own = [str(folders["small"]), str(folders["other"])]
    own_cascade, own_processor = (
        part.from_members(own) for part in (CascadeForSequenceClassification, CascadeProcessor)
    )
    assert own_cascade.config.own_tokenizers
    assert vocabularies(own_processor) == [tiny_tokenizer().get_vocab(), other_tokenizer().get_vocab()]
    # The members' own models stay as they were.
    assert AutoConfig.from_pretrained(folders["large"]).exit_policy == "entropy"
    assert [member.config.min_exit_layer for member in cascade.members] == [1, None]


def test_loaded_members_bring_none():
    assert CascadeProcessor.from_members([stock(num_layers=1), stock()]) is None


def test_tokenizers_that_cannot_be_told():
    members = [stock("bert", 1, 1), stock("electra", 2, 2), stock("bert", 4, 3)]
    for part in (CascadeForSequenceClassification, CascadeProcessor):
        with pytest.raises(ValueError, match=r"vocabularies of \[100, 107\] tokens: give tokenizers"):
            part.from_members([members[0], stock(num_layers=3, vocab_size=VOCAB_SIZE + 7)])
        with pytest.raises(ValueError, match="tokenizers is a list of one for each of the 3 members"):
            part.from_members(members, tokenizers=[tiny_tokenizer()] * 2)
        with pytest.raises(ValueError, match="not known, and the others differ"):
            part.from_members(members, tokenizers=[tiny_tokenizer(), None, other_tokenizer()])
        with pytest.raises(ValueError, match="tokenizers is a list of one for each of the 3 members"):
            part.from_members(members, tokenizers=tiny_tokenizer())
    for given in (tiny_tokenizer(), []):
        with pytest.raises(ValueError, match="tokenizers is a list, of one for all members or one for each"):
            CascadeProcessor(given)


def test_tokenizers_of_old_checkpoints_are_found(folders, tmp_path):
    stock(num_layers=1).save_pretrained(tmp_path)
    words = sorted(other_tokenizer().get_vocab().items(), key=lambda word: word[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), BertTokenizer)
    processor = CascadeProcessor.from_members([tmp_path, folders["large"]])
    expected = [tokenizer("word7 word9")["input_ids"] for tokenizer in (other_tokenizer(), tiny_tokenizer())]
    assert [part["input_ids"] for part in processor(["word7 word9"])[0]] == expected


def test_a_tokenizer_that_is_not_given_is_that_of_the_folder(tmp_path):
    stock(num_layers=1).save_pretrained(tmp_path)
    other_tokenizer().save_pretrained(tmp_path)
    processor = CascadeProcessor.from_members([tmp_path, stock(num_layers=3)], [None, tiny_tokenizer()])
    assert vocabularies(processor) == [other_tokenizer().get_vocab(), tiny_tokenizer().get_vocab()]


def limited(folder, limit: int, num_layers: int):
    """A classifier on the disk that reads at most `limit` tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = limit
    stock(num_layers=num_layers, seed=num_layers, max_position_embeddings=limit).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("limits", [(32, 64), (64, 32)])
def test_members_that_read_texts_of_other_lengths_cut_their_own(tmp_path, limits):
    folders = [limited(tmp_path / f"{layers}", limit, layers) for layers, limit in zip((1, 3), limits, strict=True)]
    cascade, processor = (part.from_members(folders) for part in (CascadeForSequenceClassification, CascadeProcessor))
    classifier = pipeline("fast-text-classification", model=cascade, tokenizer=processor)
    text = " ".join(f"word{5 + index}" for index in range(50))
    for speed, folder in ((0, folders[1]), (1, folders[0])):
        alone = pipeline("text-classification", model=str(folder))(text, truncation=True)[0]
        answer = classifier(text, truncation=True, speed=speed)[0]
        assert answer["label"] == alone["label"] and answer["score"] == pytest.approx(alone["score"], abs=1e-5)


def test_one_tokenizer_does_not_take_the_place_of_several(mixed, processor, saved, tmp_path):
    message = "every member of this cascade has its own tokenizer, and one for all would take the place"
    for call in (
        lambda: save_with_code(mixed, tmp_path / "code", tokenizer=other_tokenizer()),
        lambda: mixed.push_to_hub("org/name", tokenizer=other_tokenizer()),
        lambda: pipeline("fast-text-classification", model=mixed, tokenizer=CascadeProcessor([tiny_tokenizer()])),
        lambda: pipeline("fast-text-classification", model=mixed, tokenizer=other_tokenizer()),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "code").exists()
    save_with_code(mixed, tmp_path / "code", tokenizer=processor)
    assert vocabularies(CascadeProcessor.from_pretrained(tmp_path / "code")) == vocabularies(processor)
    for path in (saved / "member_2").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=message):
        pipeline("fast-text-classification", model=str(saved))
    for path in saved.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(OSError, match=r"has no tokenizer: save those of the members there.*save_pretrained\(folder\)"):
        CascadeProcessor.from_pretrained(saved)


def test_wrong_calls_say_what_to_call(mixed, processor):
    batch = ragged_batch()
    with pytest.raises(ValueError, match="of its own: give member_inputs alone"):
        mixed(**batch)
    with pytest.raises(ValueError, match="each of the 2 members needs input_ids"):
        mixed(member_inputs=[batch])
    with pytest.raises(ValueError, match=r"equally many rows, got \[2, 7\]"):
        mixed(member_inputs=[batch, ragged_batch((3, 4))])
    with pytest.raises(ValueError, match=r"the inputs of a member are input_ids.*, not labels: leave them out"):
        mixed(member_inputs=[{**batch, "labels": torch.zeros(7)}] * 2)
    with pytest.raises(ValueError, match="give what its CascadeProcessor returns"):
        list(mixed.predict(tiny_tokenizer()(["word7"])))
    with pytest.raises(ValueError, match="text 1 must be what each of the 2 tokenizers"):
        list(mixed.predict([*processor(["word7"]), tiny_tokenizer()("word8")]))


def test_what_stands_in_for_nothing_is_taken_for_nothing(mixed):
    batch = ragged_batch()
    expected = mixed(member_inputs=[batch] * 2, output_hidden_states=False, output_attentions=False)
    given = {**batch, "token_type_ids": None}
    assert_close(mixed(member_inputs=[given] * 2).logits, expected.logits)


# Cascades that know their tokenizers


def test_a_cascade_that_knows_its_tokenizers_needs_no_others(folders, mixed, saved):
    names, texts = [folders["small"], folders["other"]], tiny_texts(12)
    by_name = CascadeForSequenceClassification.from_members(names)
    assert vocabularies(by_name.processor) == vocabularies(CascadeProcessor.from_members(names))
    one = CascadeForSequenceClassification.from_members([folders["small"], folders["large"]])
    loaded = CascadeForSequenceClassification.from_pretrained(saved)
    for cascade, tokenizer in (
        (by_name, CascadeProcessor.from_members(names)),
        (mixed, mixed.processor),
        (loaded, mixed.processor),
        (one, tiny_tokenizer()),
    ):
        expected = pipeline("fast-text-classification", model=cascade, tokenizer=tokenizer)(texts, speed=0.85)
        assert pipeline("fast-text-classification", model=cascade)(texts, speed=0.85) == expected
    assert vocabularies(CascadeProcessor(copy.deepcopy(by_name).processor.tokenizers)) == vocabularies(
        by_name.processor
    )


def test_a_model_that_knows_no_tokenizer_says_so(folders):
    for model in (CascadeForSequenceClassification.from_members([stock(num_layers=1), stock()]), tiny_model()):
        with pytest.raises(
            ValueError, match=r"the tokenizer of this .* is not known, as it was not loaded.*: give it"
        ):
            pipeline("fast-text-classification", model=model)
    model = FastBertForSequenceClassification.from_pretrained(folders["large"])
    assert len(pipeline("fast-text-classification", model=model)(["word7"])) == 1


def test_a_tokenizer_that_is_named_is_never_replaced_by_another(folders, mixed, saved, tmp_path):
    for model in (mixed, str(saved), FastBertForSequenceClassification.from_pretrained(folders["large"])):
        with pytest.raises((OSError, ValueError)) as caught:
            pipeline("fast-text-classification", model=model, tokenizer=str(tmp_path / "nothing"))
        assert "nothing" in str(caught.value)
    try:
        pipeline("text-classification", model=stock())
    except Exception:  # while an error of Transformers is handled, too
        model = FastBertForSequenceClassification.from_pretrained(folders["large"])
        named = pipeline("fast-text-classification", model=model, tokenizer=str(folders["other"]))
    assert named.tokenizer.get_vocab() == other_tokenizer().get_vocab()


def test_a_cascade_is_saved_with_the_tokenizers_that_it_knows(folders, tmp_path):
    """Also where others lie, which would be taken for its own."""
    other_tokenizer().save_pretrained(tmp_path)
    cascade = CascadeForSequenceClassification.from_members([folders["small"], folders["large"]])
    cascade.save_pretrained(tmp_path)
    classifier = pipeline("fast-text-classification", model=str(tmp_path))
    assert classifier.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    texts = tiny_texts(12)
    assert classifier(texts) == pipeline("fast-text-classification", model=cascade)(texts)


def test_tokenizers_of_an_earlier_cascade_are_not_taken_for_those_of_a_later_one(mixed, processor, tmp_path):
    three = CascadeProcessor([tiny_tokenizer(), other_tokenizer(), tiny_tokenizer()])
    three.save_pretrained(tmp_path)
    (tmp_path / "member_3" / "notes.txt").write_text("a file of somebody else")
    mixed.save_pretrained(tmp_path)
    assert vocabularies(CascadeProcessor.from_pretrained(tmp_path)) == vocabularies(processor)
    assert [path.name for path in (tmp_path / "member_3").iterdir()] == ["notes.txt"]
    assert len(pipeline("fast-text-classification", model=str(tmp_path))(["word7"])) == 1
    # One tokenizer for all takes the place of two, saved by a processor, or by itself.
    shared = CascadeForSequenceClassification.from_members([stock(num_layers=1), stock()])
    shared.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "member_2").exists()
    assert len(CascadeProcessor.from_pretrained(tmp_path).tokenizers) == 1
    CascadeProcessor([tiny_tokenizer()]).save_pretrained(tmp_path)
    assert not (tmp_path / "member_2").exists()


def test_a_cascade_that_knows_none_warns_where_another_checkpoint_has_one(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("fastbert_hf"), "propagate", True)
    cascade = CascadeForSequenceClassification.from_members([stock(num_layers=1), stock()])
    tiny_tokenizer().save_pretrained(tmp_path)
    for _ in range(2):  # its own tokenizer, as it may be saved first; and the same cascade again
        cascade.save_pretrained(tmp_path)
    assert "will be taken to read it" not in caplog.text
    tiny_model().save_pretrained(tmp_path)
    cascade.save_pretrained(tmp_path)
    assert "has the tokenizer of the model that was saved there before" in caplog.text
    (tmp_path / "config.json").write_text("{half of")
    cascade.save_pretrained(tmp_path)
    assert len(CascadeForSequenceClassification.from_pretrained(tmp_path).members) == 2


@pytest.mark.parametrize("field", ["min_exit_layer", "max_layers", "exit_type", "share_exit_pooler", "patience"])
def test_fields_of_the_members_are_set_in_the_members(folders, field):
    for members in ([folders["small"], folders["large"]], [stock(num_layers=1), tiny_model()]):
        with pytest.raises(
            ValueError, match=rf"{field}=2 is not for a cascade, .*: set it before, as in member\.config"
        ):
            CascadeForSequenceClassification.from_members(members, **{field: 2})


def test_unknown_arguments_are_refused(folders):
    for members in ([folders["small"], folders["large"]], [tiny_model(), tiny_model(seed=1)]):
        with pytest.raises(TypeError, match=r"unexpected revison: give tokenizers, .*from_pretrained \(.*revision"):
            CascadeForSequenceClassification.from_members(members, revison="main")
