"""A cascade against a naive loop over its members, text by text; what it runs, saves, loads and refuses."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from fastbert_hf import (
    CascadeConfig,
    CascadeForSequenceClassification,
    CascadeProcessor,
    FastBertForSequenceClassification,
)
from fastbert_hf.modeling.exit_policies import ExitPolicy

from ..common import (
    FAMILIES,
    assert_close,
    assert_same_weights,
    ragged_batch,
    stock,
    tiny_model,
    tiny_rows,
    tiny_texts,
    tiny_tokenizer,
)


SPEEDS = (0.0, 0.2, 0.5, 0.7, 0.85, 0.95, 1.0)


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


@torch.no_grad()
def said_by_members(cascade: CascadeForSequenceClassification, batch: dict) -> list[list[torch.Tensor]]:
    """What every exit of every member says of each text by itself, `[L, num_labels]`."""
    said = []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        text = {name: column[row : row + 1, mask] for name, column in batch.items()}
        said.append([member(**text, output_exit_logits=True).exit_logits[0] for member in cascade.members])
    return said


def naive_answer(cascade: CascadeForSequenceClassification, said: list[torch.Tensor], speed: float) -> tuple:
    """One text through the exits of the members: its logits, layers, member and uncertainty."""
    policy, layers = ExitPolicy.of(cascade.config), 0
    for number, (member, exit_logits) in enumerate(zip(cascade.members, said, strict=True), start=1):
        is_last = number == len(said)
        if speed == 0 and not is_last:
            continue
        uncertainties, _ = policy.uncertainty(exit_logits)
        for depth in range(member.config.min_exit_layer or 1, len(exit_logits) + 1):
            if uncertainties[depth - 1] < speed or (is_last and depth == len(exit_logits)):
                return exit_logits[depth - 1], layers + depth, number, uncertainties[depth - 1]
        layers += len(exit_logits)
    raise AssertionError("no member answered")


def naive(cascade: CascadeForSequenceClassification, batch: dict, speeds: list[float]) -> list[tuple]:
    said = said_by_members(cascade, batch)
    return [naive_answer(cascade, row, speed) for row, speed in zip(said, speeds, strict=True)]


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


@pytest.mark.parametrize(
    ("policy", "batch_size"), [("confidence", 1), ("confidence", 40), ("entropy", 40), ("margin", 7)]
)
def test_answers_equal_a_naive_loop_over_the_members(members, policy, batch_size):
    cascade = CascadeForSequenceClassification.from_members(members, exit_policy=policy)
    lengths = tuple(torch.randint(1, 30, (batch_size,), generator=torch.Generator().manual_seed(3)).tolist())
    batch = ragged_batch(lengths, pairs=True)
    said, reached = said_by_members(cascade, batch), set()
    for speed in SPEEDS:
        with torch.no_grad():
            output = cascade(**batch, speed=speed)
        assert_answers(output, [naive_answer(cascade, row, speed) for row in said])
        reached |= set(output.exit_member.tolist())
    assert batch_size < 40 or reached == {1, 2, 3}


def test_a_text_can_leave_inside_a_member(of_fastbert):
    batch = ragged_batch(tuple(range(1, 33)))
    said, reached = said_by_members(of_fastbert, batch), set()
    for speed in SPEEDS:
        with torch.no_grad():
            output = of_fastbert(**batch, speed=speed)
        assert_answers(output, [naive_answer(of_fastbert, row, speed) for row in said])
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
    tokenizer = tiny_tokenizer()
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    classifier = pipeline("fast-text-classification", model=cascade, tokenizer=tokenizer)
    for speed in (0, 0.7, 0.95, 1):
        counts, hooks = tokens_seen(cascade)
        with torch.no_grad():
            if way == "forward":
                exits = cascade(
                    **tokenizer(texts, padding=True, return_tensors="pt"), speed=speed
                ).exit_member.tolist()
            elif way == "predict":
                exits = [answer.exit_member for answer in cascade.predict(tokenizer(texts), speed=speed)]
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


@pytest.mark.parametrize("num_labels", [2, 7])
def test_a_maximally_uncertain_member_never_answers(num_labels):
    small, large = stock(num_layers=1, num_labels=num_labels), stock(num_layers=2, num_labels=num_labels)
    small.classifier.weight.data.zero_()
    small.classifier.bias.data.fill_(0.3)
    cascade = CascadeForSequenceClassification.from_members([small, large])
    output = cascade(**ragged_batch(), speed=1)
    assert output.exit_member.tolist() == [2] * 7
    assert output.exit_layer.tolist() == [3] * 7


@pytest.mark.parametrize("num_labels", [2, 7])
def test_speed_is_one_minus_the_threshold_of_the_paper(num_labels):
    small, large = (stock(num_layers=depth, seed=depth, num_labels=num_labels) for depth in (1, 3))
    cascade, batch = CascadeForSequenceClassification.from_members([small, large]), ragged_batch(tuple(range(2, 40)))
    with torch.no_grad():
        confidence = small(**batch).logits.softmax(-1).amax(-1)
        for speed in (0.1, 0.4, 0.8, 0.97):
            threshold = 1 - speed * (num_labels - 1) / num_labels
            assert (cascade(**batch, speed=speed).exit_member == 1).tolist() == (confidence > threshold).tolist()


@pytest.mark.parametrize(
    "settings", [{}, {"batch_size": 1}, {"batch_size": 5}, {"batch_tokens": 20}, {"rebatch": False}]
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


@pytest.fixture(scope="module")
def saved(cascade, tmp_path_factory):
    """The cascade with its tokenizer."""
    folder = tmp_path_factory.mktemp("cascade")
    cascade.save_pretrained(folder)
    CascadeProcessor([tiny_tokenizer()]).save_pretrained(folder)
    return folder


def test_save_and_reload(cascade, saved, tmp_path):
    assert {path.name for path in saved.glob("*.safetensors")} == {"model.safetensors"}
    batch = ragged_batch(pairs=True)
    for load in (CascadeForSequenceClassification, AutoModelForSequenceClassification, AutoModel):
        loaded = load.from_pretrained(saved)
        assert type(loaded) is CascadeForSequenceClassification
        assert not loaded.training
        assert_same_weights(loaded, cascade)
    for speed in SPEEDS:
        before, after = cascade(**batch, speed=speed), loaded(**batch, speed=speed)
        assert_close(after.logits, before.logits, 1e-5)
        assert torch.equal(after.exit_member, before.exit_member)
    config = AutoConfig.from_pretrained(saved)
    assert type(config) is CascadeConfig
    assert [member.num_hidden_layers for member in config.members] == [1, 2, 4]
    assert config.to_dict() == loaded.config.to_dict()
    loaded.save_pretrained(tmp_path)
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (saved, tmp_path))
    assert first == second


def test_the_pipeline_loads_a_saved_cascade(cascade, saved):
    texts, tokenizer = tiny_texts(9), tiny_tokenizer()
    classifier = pipeline("fast-text-classification", model=str(saved), speed=0.9)
    expected = list(cascade.predict(tokenizer(texts), speed=0.9))
    answers = classifier(texts)
    assert [answer["exit_member"] for answer in answers] == [answer.exit_member for answer in expected]
    assert [answer["exit_layer"] for answer in answers] == [answer.exit_layer for answer in expected]
    assert [answer["label"] for answer in answers] == [f"LABEL_{answer.logits.argmax()}" for answer in expected]
    assert set(answers[0]) == {"label", "score", "exit_layer", "exit_member"}
    assert {answer["exit_member"] for answer in classifier(texts, speed=0)} == {3}
    # A call without a speed uses that of the config.
    assert pipeline("fast-text-classification", model=str(saved))(texts) == classifier(texts, speed=0.5)
    assert len(classifier(texts, top_k=None)[0]) == 3
    encoded = tokenizer(["word7 word8"], ["word9"])
    assert 1 in encoded["token_type_ids"][0]
    (expected,) = cascade.predict(encoded, speed=0.7)
    answer = classifier({"text": "word7 word8", "text_pair": "word9"}, speed=0.7)
    assert answer["score"] == pytest.approx(expected.logits.softmax(-1).max().item(), abs=1e-6)


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


def test_loaded_members_are_left_alone(members):
    small, large = stock(num_layers=1), tiny_model("bert", exit_policy="margin")
    before = {name: value.clone() for name, value in [*small.state_dict().items(), *large.state_dict().items()]}
    cascade = CascadeForSequenceClassification.from_members([small, large])
    for parameter in cascade.parameters():
        parameter.data.zero_()
    after = {**small.state_dict(), **large.state_dict()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert large.config.exit_policy == "margin"


def test_the_policy_of_the_cascade_is_that_of_its_members(saved):
    for load in (
        lambda: CascadeForSequenceClassification.from_pretrained(saved, exit_policy="margin"),
        lambda: CascadeForSequenceClassification(AutoConfig.from_pretrained(saved, exit_policy="margin")),
    ):
        model = load()
        assert [member.config.exit_policy for member in model.members] == ["margin"] * 3
        model.config.exit_policy = "entropy"
        assert [member.config.exit_policy for member in model.members] == ["entropy"] * 3
        with pytest.raises(ValueError, match="'patience' is not for a cascade"):
            model.config.exit_policy = "patience"
    batch = ragged_batch()
    changed = CascadeForSequenceClassification.from_pretrained(saved, exit_policy="margin")
    with torch.no_grad():
        assert_answers(changed(**batch, speed=0.7), naive(changed, batch, [0.7] * 7))


def test_threads_use_one_cascade_at_different_speeds(cascade):
    encoded = tiny_tokenizer()(tiny_texts(30))
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


def test_attention_and_dtype_reach_the_members(saved):
    batch = ragged_batch()
    eager = CascadeForSequenceClassification.from_pretrained(saved, attn_implementation="eager")
    assert [member.config._attn_implementation for member in eager.members] == ["eager"] * 3
    eager.set_attn_implementation("sdpa")
    assert [member.config._attn_implementation for member in eager.members] == ["sdpa"] * 3
    half = CascadeForSequenceClassification.from_pretrained(saved, dtype=torch.bfloat16)
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


def test_wrong_calls_say_what_to_call(cascade):
    batch = ragged_batch()
    with pytest.raises(ValueError, match="speed must be a number"):
        cascade(**batch, speed=2)
    with pytest.raises(ValueError, match="got 2 speeds for a batch of 7 rows"):
        cascade(**batch, speed=[0.1, 0.2])
    batch["attention_mask"][5] = 0
    with pytest.raises(ValueError, match=r"rows \[5\] hold padding only"):  # where a member runs on some rows, too
        cascade(**batch, speed=[0, 0, 0, 0.5, 0, 0.5, 0])
    with pytest.raises(ValueError, match="that it shares: give input_ids"):
        cascade(member_inputs=[batch] * 3)
    with pytest.raises(ValueError, match="text 1 has 70 tokens, but this model reads at most 64"):
        list(cascade.predict([{"input_ids": [2, 3]}, {"input_ids": [2] * 70}]))
    classifier = pipeline("fast-text-classification", model=cascade, tokenizer=tiny_tokenizer())
    for name in ("max_layers", "min_exit_layer"):
        with pytest.raises(ValueError, match=f"{name}=2 is not for a cascade"):
            classifier("word7", **{name: 2})
    cascade.train()
    with pytest.raises(ValueError, match=r"model\.eval"):
        cascade.predict({"input_ids": [[2, 3]]})
    cascade.eval()
