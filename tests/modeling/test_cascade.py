"""A cascade against a naive loop over its members, text by text; what it runs, saves, loads and refuses."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import fastbert_hf  # noqa: F401
from fastbert_hf import CascadeConfig, CascadeForSequenceClassification, FastBertForSequenceClassification
from fastbert_hf.modeling.exit_policies import exit_uncertainties

from ..common import (
    FAMILIES,
    VOCAB_SIZE,
    assert_close,
    ragged_batch,
    spread_out,
    tiny_model,
    tiny_rows,
    tiny_text_config,
    tiny_texts,
    tiny_tokenizer,
)


SPEEDS = (0.0, 0.2, 0.5, 0.7, 0.85, 0.95, 1.0)


def stock(family: str = "bert", num_layers: int = 2, seed: int = 0, num_labels: int = 3, **fields) -> PreTrainedModel:
    """A fine-tuned stock classifier, as far as a test can tell."""
    config = tiny_text_config(family, num_layers)
    config.num_labels = num_labels
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    return spread_out(AutoModelForSequenceClassification.from_config(config), seed)


@pytest.fixture(scope="module")
def members() -> list[PreTrainedModel]:
    return [stock("bert", 1, 1), stock("electra", 2, 2), stock("bert", 4, 3)]


@pytest.fixture(scope="module")
def cascade(members) -> CascadeForSequenceClassification:
    return CascadeForSequenceClassification.from_members(members, tokenizers=[tiny_tokenizer()] * 3)


@pytest.fixture(scope="module")
def of_fastbert() -> CascadeForSequenceClassification:
    """Members in which a text can leave early, too."""
    small = tiny_model("bert", 1)
    del small.fastbert.backbone.encoder.layer[2:], small.exits[1:3]
    small.config.text_config.num_hidden_layers = 2
    return CascadeForSequenceClassification.from_members([small, tiny_model("bert", 2)], exit_policy="entropy")


def in_members(cascade: CascadeForSequenceClassification, inputs: dict, speed: float) -> tuple:
    """One text, `[1, length]`, through the exits of the members: its logits, layers, member and uncertainty."""
    first, layers = len(cascade.members) if speed == 0 else 1, 0
    for number, member in enumerate(cascade.members[first - 1 :], start=first):
        exit_logits = member(**inputs, output_exit_logits=True).exit_logits
        uncertainties = exit_uncertainties(exit_logits, cascade.config.exit_policy)[0]
        for depth in range(member.config.min_exit_layer or 1, len(member.exits) + 1):
            is_end = number == len(cascade.members) and depth == len(member.exits)
            if uncertainties[depth - 1] < speed or is_end:
                return exit_logits[0, depth - 1], layers + depth, number, uncertainties[depth - 1]
        layers += len(member.exits)
    raise AssertionError("no member answered")


def naive(cascade: CascadeForSequenceClassification, batch: dict, speeds: list[float]) -> list[tuple]:
    answers = []
    with torch.no_grad():
        for row, speed in enumerate(speeds):
            mask = batch["attention_mask"][row].bool()
            answers.append(
                in_members(cascade, {name: column[row : row + 1, mask] for name, column in batch.items()}, speed)
            )
    return answers


def assert_answers(output, expected: list[tuple]) -> None:
    assert output.exit_member.tolist() == [member for _, _, member, _ in expected]
    assert output.exit_layer.tolist() == [layers for _, layers, _, _ in expected]
    assert_close(output.logits, torch.stack([logits for logits, _, _, _ in expected]))
    assert_close(output.uncertainty, torch.stack([uncertainty for _, _, _, uncertainty in expected]))


def tokens_seen(cascade: CascadeForSequenceClassification):
    """Hooks that count the tokens that enter each layer of each member."""
    counts = [[0] * len(member.fastbert.layers()) for member in cascade.members]
    hooks = []
    for index, member in enumerate(cascade.members):
        for depth, layer in enumerate(member.fastbert.layers()):

            def count(module, arguments, index=index, depth=depth):
                counts[index][depth] += arguments[0].shape[1]

            hooks.append(layer.register_forward_pre_hook(count))
    return counts, hooks


@pytest.mark.parametrize("policy", ["confidence", "entropy", "margin"])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_answers_equal_a_naive_loop_over_the_members(members, policy, batch_size):
    cascade = CascadeForSequenceClassification.from_members(members, exit_policy=policy)
    lengths = tuple(torch.randint(1, 30, (batch_size,), generator=torch.Generator().manual_seed(3)).tolist())
    batch = ragged_batch(lengths, pairs=True)
    reached = set()
    for speed in SPEEDS:
        with torch.no_grad():
            output = cascade(**batch, speed=speed)
        assert_answers(output, naive(cascade, batch, [speed] * batch_size))
        reached |= set(output.exit_member.tolist())
    assert batch_size < 64 or reached == {1, 2, 3}


def test_a_text_can_leave_inside_a_member(of_fastbert):
    batch = ragged_batch(tuple(range(1, 33)))
    reached = set()
    for speed in SPEEDS:
        with torch.no_grad():
            output = of_fastbert(**batch, speed=speed)
        assert_answers(output, naive(of_fastbert, batch, [speed] * 32))
        reached |= set(zip(output.exit_member.tolist(), output.exit_layer.tolist(), strict=True))
    assert {(1, 1), (1, 2), (2, 5)} <= reached  # and after the third layer of the second member


def test_every_row_has_its_own_speed(cascade):
    batch = ragged_batch(tuple(range(3, 24)))
    speeds = [SPEEDS[row % len(SPEEDS)] for row in range(21)]
    with torch.no_grad():
        output = cascade(**batch, speed=speeds)
    assert_answers(output, naive(cascade, batch, speeds))
    assert {row for row, member in enumerate(output.exit_member.tolist()) if member < 3}
    at_zero = [row for row, speed in enumerate(speeds) if speed == 0]
    assert output.exit_layer[at_zero].tolist() == [4] * len(at_zero)


@pytest.mark.parametrize("way", ["forward", "predict", "pipeline"])
def test_no_member_runs_on_a_text_that_an_earlier_one_answered(cascade, way):
    texts = tiny_texts(40)
    tokenizer = cascade.tokenizers[0]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    classifier = pipeline("fast-text-classification", model=cascade, tokenizer=tokenizer)
    for speed in SPEEDS:
        counts, hooks = tokens_seen(cascade)
        with torch.no_grad():
            if way == "forward":
                exits = cascade(
                    **tokenizer(texts, padding=True, return_tensors="pt"), speed=speed
                ).exit_member.tolist()
            elif way == "predict":
                exits = [answer.exit_member for answer in cascade.predict(cascade.encode(texts), speed=speed)]
            else:
                exits = [answer["exit_member"] for answer in classifier(texts, speed=speed)]
        for hook in hooks:
            hook.remove()
        for number, counted in enumerate(counts, start=1):
            is_asked = [member >= number and (speed > 0 or number == 3) for member in exits]
            asked = sum(length for length, is_it in zip(lengths, is_asked, strict=True) if is_it)
            assert counted == [asked] * len(counted)
    assert counts[0][0] == sum(lengths)


def test_speed_0_is_the_largest_member_alone_and_speed_1_the_smallest(cascade, members):
    batch = ragged_batch(pairs=True)
    with torch.no_grad():
        assert_close(cascade(**batch).logits, members[-1](**batch).logits)
        assert_close(cascade(**batch, speed=0).logits, members[-1](**batch).logits)
        output = cascade(**batch, speed=1)
        assert_close(output.logits, members[0](**batch).logits)
    assert output.exit_member.tolist() == [1] * 7
    assert output.exit_layer.tolist() == [1] * 7


@pytest.mark.parametrize("num_labels", [2, 3, 7])
def test_a_maximally_uncertain_member_never_answers(num_labels):
    small, large = stock(num_layers=1, num_labels=num_labels), stock(num_layers=2, num_labels=num_labels)
    small.classifier.weight.data.zero_()
    small.classifier.bias.data.fill_(0.3)
    cascade = CascadeForSequenceClassification.from_members([small, large])
    output = cascade(**ragged_batch(), speed=1)
    assert output.exit_member.tolist() == [2] * 7
    assert output.exit_layer.tolist() == [3] * 7


@pytest.mark.parametrize("num_labels", [2, 3, 7])
def test_speed_is_one_minus_the_threshold_of_the_paper(num_labels):
    small, large = (stock(num_layers=depth, seed=depth, num_labels=num_labels) for depth in (1, 3))
    cascade, batch = CascadeForSequenceClassification.from_members([small, large]), ragged_batch(tuple(range(2, 40)))
    with torch.no_grad():
        confidence = small(**batch).logits.softmax(-1).amax(-1)
        for speed in (0.1, 0.4, 0.8, 0.97):
            threshold = 1 - speed * (num_labels - 1) / num_labels
            assert (cascade(**batch, speed=speed).exit_member == 1).tolist() == (confidence > threshold).tolist()


@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 1}, {"batch_size": 5}, {"batch_tokens": 20}, {"regroup": False}]
)
@pytest.mark.parametrize("which", ["cascade", "of_fastbert"])
def test_predict_gives_the_answers_of_the_forward_in_order(which, settings, request):
    cascade = request.getfixturevalue(which)
    encoded = tiny_tokenizer()(tiny_texts(50))
    padded = tiny_tokenizer().pad(encoded, return_tensors="pt")
    speeds = [SPEEDS[row % len(SPEEDS)] for row in range(50)]
    with torch.no_grad():
        expected = cascade(**padded, speed=speeds)
    answers = list(cascade.predict(encoded, speed=speeds, **settings))
    assert [answer.exit_member for answer in answers] == expected.exit_member.tolist()
    assert [answer.exit_layer for answer in answers] == expected.exit_layer.tolist()
    assert_close(torch.stack([answer.logits for answer in answers]), expected.logits)
    assert_close(torch.tensor([answer.uncertainty for answer in answers]), expected.uncertainty)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_a_member(family):
    large = tiny_model(family, 5)
    cascade = CascadeForSequenceClassification.from_members([stock("bert", 1, 4), large])
    # The padding id of some families is the id of a word in others, so the texts are not padded.
    batch = ragged_batch((8, 8, 8, 8))
    with torch.no_grad():
        assert_close(cascade(**batch).logits, large(**batch).logits)
        assert_answers(cascade(**batch, speed=0.6), naive(cascade, batch, [0.6] * 4))


def test_save_and_reload(cascade, tmp_path):
    cascade.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors"}
    batch = ragged_batch(pairs=True)
    for load in (CascadeForSequenceClassification, AutoModelForSequenceClassification, AutoModel):
        loaded = load.from_pretrained(tmp_path)
        assert type(loaded) is CascadeForSequenceClassification
        assert not loaded.training
        weights = loaded.state_dict()
        assert all(torch.equal(weights.pop(name), value) for name, value in cascade.state_dict().items())
        assert not weights
        for speed in SPEEDS:
            before, after = cascade(**batch, speed=speed), loaded(**batch, speed=speed)
            assert_close(after.logits, before.logits, 1e-6)
            assert torch.equal(after.exit_member, before.exit_member)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CascadeConfig
    assert [member.num_hidden_layers for member in config.members] == [1, 2, 4]
    assert config.to_dict() == loaded.config.to_dict()
    loaded.save_pretrained(tmp_path / "again")
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert first == second
    assert (tmp_path / "again" / "tokenizer.json").exists()


def test_the_pipeline_loads_a_saved_cascade(cascade, tmp_path):
    cascade.save_pretrained(tmp_path)
    texts = tiny_texts(9)
    classifier = pipeline("fast-text-classification", model=str(tmp_path), speed=0.9)
    expected = list(cascade.predict(cascade.encode(texts), speed=0.9))
    answers = classifier(texts)
    assert [answer["exit_member"] for answer in answers] == [answer.exit_member for answer in expected]
    assert [answer["exit_layer"] for answer in answers] == [answer.exit_layer for answer in expected]
    assert [answer["label"] for answer in answers] == [f"LABEL_{answer.logits.argmax()}" for answer in expected]
    assert set(answers[0]) == {"label", "score", "exit_layer", "exit_member"}
    assert {answer["exit_member"] for answer in classifier(texts, speed=0)} == {3}
    # A call without a speed uses that of the config.
    assert pipeline("fast-text-classification", model=str(tmp_path))(texts) == classifier(texts, speed=0.5)
    assert len(classifier(texts, top_k=None)[0]) == 3
    pair = {"text": "word7 word8", "text_pair": "word9"}
    encoded = cascade.encode([pair["text"]], [pair["text_pair"]])
    assert 1 in encoded[0]["token_type_ids"]
    expected = next(cascade.predict(encoded, speed=0.7))
    assert classifier(pair, speed=0.7)["score"] == pytest.approx(expected.logits.softmax(-1).max().item(), abs=1e-6)


def test_the_stock_pipeline_and_trainer_use_the_last_member(cascade, members, tmp_path):
    texts = tiny_texts(4)
    stock_answers = pipeline("text-classification", model=cascade, tokenizer=tiny_tokenizer())(texts)
    of_member = pipeline("text-classification", model=members[-1], tokenizer=tiny_tokenizer())(texts)
    assert [answer["label"] for answer in stock_answers] == [answer["label"] for answer in of_member]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=5)
    rows = tiny_rows(12)
    prediction = Trainer(cascade, arguments).predict(rows)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "labels"}
    with torch.no_grad():
        logits = members[-1](**batch).logits
    assert_close(torch.from_numpy(prediction.predictions), logits)
    labels = torch.tensor([row["labels"] for row in rows])
    assert prediction.metrics["test_loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-5
    )


def other_tokenizer() -> BertTokenizer:
    """The words of `tiny_tokenizer` with other ids."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"word{index}" for index in reversed(range(len(special), VOCAB_SIZE))]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=64)


@pytest.fixture(scope="module")
def mixed() -> CascadeForSequenceClassification:
    tokenizers = [tiny_tokenizer(), other_tokenizer()]
    return CascadeForSequenceClassification.from_members(
        [stock("distilbert", 1, 4), stock("roberta", 3, 5)], tokenizers=tokenizers
    )


def test_every_member_reads_its_own_tokenizer(mixed, tmp_path):
    assert mixed.config.own_tokenizers
    texts, pairs = tiny_texts(20), tiny_texts(20, seed=9)
    inputs = [tokenizer(texts, pairs, padding=True, return_tensors="pt") for tokenizer in mixed.tokenizers]
    # RoBERTa pads with 1, which its positions skip.
    inputs[1]["input_ids"] = inputs[1]["input_ids"].masked_fill(inputs[1]["attention_mask"] == 0, 1)
    with torch.no_grad():
        small, large = (member(**own) for member, own in zip(mixed.members, inputs, strict=True))
        for speed in SPEEDS:
            output = mixed(member_inputs=inputs, speed=speed)
            goes_on = ~(small.uncertainty < speed)
            assert output.exit_member.tolist() == (1 + goes_on.int()).tolist()
            assert_close(output.logits, torch.where(goes_on[:, None], large.logits, small.logits))
            answers = list(mixed.predict(mixed.encode(texts, pairs), speed=speed))
            assert [answer.exit_member for answer in answers] == output.exit_member.tolist()
            assert_close(torch.stack([answer.logits for answer in answers]), output.logits)
    mixed.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tiny_tokenizer().get_vocab()
    assert (tmp_path / "member_2" / "tokenizer.json").exists()
    loaded = CascadeForSequenceClassification.from_pretrained(tmp_path)
    assert [tokenizer.get_vocab() for tokenizer in loaded.tokenizers] == [
        tokenizer.get_vocab() for tokenizer in mixed.tokenizers
    ]
    classifier = pipeline("fast-text-classification", model=str(tmp_path))
    asked = [{"text": text, "text_pair": pair} for text, pair in zip(texts, pairs, strict=True)]
    expected = list(mixed.predict(mixed.encode(texts, pairs), speed=0.85))
    answers = classifier(asked, speed=0.85)
    assert [answer["exit_member"] for answer in answers] == [answer.exit_member for answer in expected]
    scores = [answer.logits.softmax(-1).max().item() for answer in expected]
    np.testing.assert_allclose([answer["score"] for answer in answers], scores, atol=1e-6)
    assert {answer["exit_member"] for answer in answers} == {1, 2}


def test_members_by_name_bring_their_tokenizers(tmp_path):
    for name, model, tokenizer in (
        ("small", stock(num_layers=1), tiny_tokenizer()),
        ("large", tiny_model("bert"), tiny_tokenizer()),
        ("other", stock(num_layers=3), other_tokenizer()),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    same = CascadeForSequenceClassification.from_members([tmp_path / "small", tmp_path / "large"])
    assert not same.config.own_tokenizers and len(same.tokenizers) == 1
    own = CascadeForSequenceClassification.from_members([str(tmp_path / "small"), str(tmp_path / "other")])
    assert own.config.own_tokenizers and len(own.tokenizers) == 2
    # The members' own models stay as they were.
    assert AutoConfig.from_pretrained(tmp_path / "large").exit_policy == "entropy"
    assert [member.config.min_exit_layer for member in same.members] == [1, None]


def test_loaded_members_are_left_alone(members):
    small, large = stock(num_layers=1), tiny_model("bert", exit_policy="margin")
    before = {name: value.clone() for name, value in [*small.state_dict().items(), *large.state_dict().items()]}
    cascade = CascadeForSequenceClassification.from_members([small, large])
    for parameter in cascade.parameters():
        parameter.data.zero_()
    after = {**small.state_dict(), **large.state_dict()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert large.config.exit_policy == "margin"


def test_the_policy_of_the_cascade_is_that_of_its_members(cascade, tmp_path):
    cascade.save_pretrained(tmp_path)
    for load in (
        lambda: CascadeForSequenceClassification.from_pretrained(tmp_path, exit_policy="margin"),
        lambda: CascadeForSequenceClassification(AutoConfig.from_pretrained(tmp_path, exit_policy="margin")),
    ):
        model = load()
        assert [member.config.exit_policy for member in model.members] == ["margin"] * 3
        model.config.exit_policy = "entropy"
        assert [member.config.exit_policy for member in model.members] == ["entropy"] * 3
        with pytest.raises(ValueError, match="'patience' is not for a cascade"):
            model.config.exit_policy = "patience"
    batch = ragged_batch()
    changed = CascadeForSequenceClassification.from_pretrained(tmp_path, exit_policy="margin")
    with torch.no_grad():
        assert_answers(changed(**batch, speed=0.7), naive(changed, batch, [0.7] * 7))


def test_threads_use_one_cascade_at_different_speeds(cascade):
    encoded = cascade.encode(tiny_texts(30))
    expected = {speed: [answer.exit_layer for answer in cascade.predict(encoded, speed=speed)] for speed in SPEEDS}
    found = {}

    def work(speed):
        found[speed] = [answer.exit_layer for answer in cascade.predict(encoded, speed=speed)]

    threads = [threading.Thread(target=work, args=(speed,)) for speed in SPEEDS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_attention_and_dtype_reach_the_members(cascade, tmp_path):
    cascade.save_pretrained(tmp_path)
    batch = ragged_batch()
    eager = CascadeForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert [member.config._attn_implementation for member in eager.members] == ["eager"] * 3
    eager.set_attn_implementation("sdpa")
    assert [member.config._attn_implementation for member in eager.members] == ["sdpa"] * 3
    half = CascadeForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    output = half(**batch, speed=0.5)
    assert output.uncertainty.dtype == torch.float32
    assert_close(output.logits.float(), naive_logits(half, batch), 0.1)


def naive_logits(cascade, batch):
    return torch.stack([answer[0] for answer in naive(cascade, batch, [0.5] * len(batch["input_ids"]))]).float()


@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_member_whose_logits_are_not_finite_is_an_error(members, member):
    cascade = CascadeForSequenceClassification.from_members(members)
    cascade.members[member].teacher.out_proj.bias.data[0] = float("nan")
    batch = ragged_batch()
    speed = (1.0, 0.5, 0.0)[member]
    with pytest.raises(ValueError, match=r"logits of rows .* are not finite"):
        cascade(**batch, speed=speed)
    with pytest.raises(ValueError, match="logits of text 0 are not finite"):
        list(cascade.predict({"input_ids": [[2, 7, 3]]}, speed=speed if member != 1 else 1e-6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: [stock(num_layers=3), stock(num_layers=2)],
            "member 2 has .* weights in its layers.*change their order",
        ),
        (lambda: [stock(num_layers=1), stock(num_layers=2, num_labels=4)], "member 2 has the labels"),
        (lambda: [stock()], "at least two members"),
        (lambda: stock(), "at least two members"),
        (lambda: "org/one-model", "at least two members"),
        (lambda: [stock(), tiny_model().fastbert], "FastBertModel has no exits"),
        (lambda: [stock(), stock().bert], "BertModel is not a sequence classifier"),
        (lambda: [stock(), CascadeForSequenceClassification.from_members([stock(), stock()])], "cannot be a member"),
    ],
)
def test_members_that_make_no_cascade(make, message):
    with pytest.raises(ValueError, match=message):
        CascadeForSequenceClassification.from_members(make())


def test_exits_that_were_never_trained_do_not_answer(members):
    fine_tuned = FastBertForSequenceClassification.from_classifier(stock(num_layers=3))
    with pytest.raises(ValueError, match=r"after layers \[1, 2\] of a member were never trained.*min_exit_layer = 3"):
        CascadeForSequenceClassification.from_members([stock(num_layers=1), fine_tuned])
    fine_tuned.config.min_exit_layer = 3
    cascade = CascadeForSequenceClassification.from_members([stock(num_layers=1), fine_tuned])
    assert set(cascade(**ragged_batch(), speed=0.7).exit_layer.tolist()) <= {1, 4}


def test_labels_in_another_order_are_an_error():
    small, large = stock(num_layers=1), stock(num_layers=2)
    large.config.id2label = {0: "LABEL_1", 1: "LABEL_0", 2: "LABEL_2"}
    with pytest.raises(ValueError, match="same labels in the same order"):
        CascadeForSequenceClassification.from_members([small, large])


def test_tokenizers_that_cannot_be_told(members):
    config = tiny_text_config("bert", 3)
    config.vocab_size, config.num_labels = VOCAB_SIZE + 7, 3
    larger = spread_out(AutoModelForSequenceClassification.from_config(config))
    with pytest.raises(ValueError, match=r"vocabularies of \[100, 107\] tokens: give tokenizers"):
        CascadeForSequenceClassification.from_members([members[0], larger])
    with pytest.raises(ValueError, match="got 2 tokenizers for 3 members"):
        CascadeForSequenceClassification.from_members(members, tokenizers=[tiny_tokenizer()] * 2)
    with pytest.raises(ValueError, match="not known, and the others differ"):
        CascadeForSequenceClassification.from_members(members, tokenizers=[tiny_tokenizer(), None, other_tokenizer()])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exit_policy": "patience"}, "'patience' is not for a cascade; choose one of confidence, entropy, margin"),
        ({"speed": 1.5}, "speed must be a number"),
        ({"speed": -0.1}, "speed must be a number"),
    ],
)
def test_settings_that_no_cascade_has(members, fields, message):
    with pytest.raises(ValueError, match=message):
        CascadeForSequenceClassification.from_members(members, **fields)


def test_wrong_calls_say_what_to_call(cascade, mixed, tmp_path):
    batch = ragged_batch()
    with pytest.raises(ValueError, match="speed must be a number"):
        cascade(**batch, speed=2)
    with pytest.raises(ValueError, match="got 2 speeds for a batch of 7 rows"):
        cascade(**batch, speed=[0.1, 0.2])
    with pytest.raises(ValueError, match="that it shares: give input_ids"):
        cascade(member_inputs=[batch] * 3)
    with pytest.raises(ValueError, match="of its own: give member_inputs alone"):
        mixed(**batch)
    with pytest.raises(ValueError, match="each of the 2 members needs input_ids"):
        mixed(member_inputs=[batch])
    with pytest.raises(ValueError, match=r"equally many rows, got \[2, 7\]"):
        mixed(member_inputs=[batch, ragged_batch((3, 4))])
    with pytest.raises(ValueError, match=r"give what cascade\.encode"):
        list(mixed.predict(tiny_tokenizer()(["word7"])))
    with pytest.raises(ValueError, match="text 1 must be what each of the 2 tokenizers"):
        list(mixed.predict([*mixed.encode(["word7"]), tiny_tokenizer()("word8")]))
    with pytest.raises(ValueError, match="text 1 has 70 tokens, but this model reads at most 64"):
        list(cascade.predict([{"input_ids": [2, 3]}, {"input_ids": [2] * 70}]))
    with pytest.raises(ValueError, match="does not know its tokenizer"):
        CascadeForSequenceClassification.from_members([stock(num_layers=1), stock()]).encode(["word7"])
    classifier = pipeline("fast-text-classification", model=cascade, tokenizer=tiny_tokenizer())
    for name in ("max_layers", "min_exit_layer"):
        with pytest.raises(ValueError, match=f"{name}=2 is not for a cascade"):
            classifier("word7", **{name: 2})
    with pytest.raises(ValueError, match=r"cascade\.push_to_hub"):
        cascade.save_pretrained(tmp_path, push_to_hub=True)
    cascade.train()
    with pytest.raises(ValueError, match=r"model\.eval"):
        cascade.predict({"input_ids": [[2, 3]]})
    cascade.eval()


def test_a_cascade_that_lost_a_tokenizer(mixed, tmp_path):
    mixed.save_pretrained(tmp_path)
    for path in (tmp_path / "member_2").iterdir():
        path.unlink()
    with pytest.raises(OSError, match="there is none in member_2"):
        CascadeForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(members={}), "members={}, but it must list the configs"),
        (lambda config: config.update(members=config["members"] * 20), "2 to 16"),
        (lambda config: config["members"].pop(), "must list|asks for 2 members.*hold 3"),
        (lambda config: config["members"].append(config["members"][0]), "asks for 4 members"),
        (lambda config: config["members"].__setitem__(1, "bert"), "member 2 of the cascade is 'bert'"),
        (
            lambda config: config["members"][0]["text_config"].update(num_hidden_layers=10**6),
            "member 1 of the cascade",
        ),
        (lambda config: config["members"][2]["text_config"].update(num_hidden_layers=5), "asks for 5 backbone layers"),
        (lambda config: config["members"][1].update(model_type="bert"), "config of a 'bert' checkpoint"),
        (lambda config: config["members"][1]["text_config"].update(model_type="gpt2"), "'gpt2'"),
        (lambda config: config.update(attn_implementation="org/kernel"), "attn_implementation='org/kernel'"),
        (lambda config: config.update(speed=float("nan")), "speed must be a number|must be finite"),
        (lambda config: config.update(architectures=["BertModel"]), r'\["CascadeForSequenceClassification"\]'),
        (
            lambda config: config["members"][0].update(id2label={"0": "a", "1": "b", "2": "c"}),
            "member 1 has the labels",
        ),
    ],
)
def test_a_config_that_cannot_be_trusted_costs_one_error(cascade, tmp_path, change, message):
    cascade.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        CascadeForSequenceClassification.from_pretrained(tmp_path)
