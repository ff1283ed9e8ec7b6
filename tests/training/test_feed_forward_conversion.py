"""Dense feed-forward layers that become fast ones: how tokens are split, what is kept, and what training repairs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from fastbert_hf import FastBertForSequenceClassification, train
from fastbert_hf.modeling.fast_feedforward import LeafTree
from fastbert_hf.modeling.feed_forward_settings import feed_forward_layers
from fastbert_hf.modeling.teacher_digest import teacher_digest
from fastbert_hf.training import (
    BackboneDistillationArguments,
    BackboneDistillationTrainer,
    ExitTraining,
    FeedForwardConversion,
    convert_feed_forward,
)
from fastbert_hf.training.feed_forward_conversion import DenseLayer, from_dense, ridge, split_tokens, tree_of

from ..common import (
    FAMILIES,
    VOCAB_SIZE,
    in_own_memory,
    ragged_batch,
    spread_out,
    tiny_model,
    tiny_text_config,
    tiny_tokenizer,
)


def rows(number: int = 150) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 20, (number,), generator=generator).tolist()
    return [{"input_ids": torch.randint(5, VOCAB_SIZE, (length,), generator=generator).tolist()} for length in lengths]


def dense_layer(gated: bool = False) -> DenseLayer:
    torch.manual_seed(0)
    up, down = nn.Linear(12, 80 if gated else 40), nn.Linear(40, 12)
    return DenseLayer(up, down, nn.GELU(), gated)


def clustered_tokens(number: int = 800) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    centres = 2 * torch.randn(8, 12, generator=generator)
    return centres[torch.arange(number) % 8] + 0.3 * torch.randn(number, 12, generator=generator)


def test_leaves_are_equally_full_and_hold_what_is_alike():
    tokens = clustered_tokens()
    weight, bias, leaf = split_tokens(tokens, depth=3)
    assert weight.shape == (7, 12) and bias.shape == (7,)
    assert leaf.bincount(minlength=8).tolist() == [100] * 8
    # Tokens of a leaf are nearer to each other than those of a random one.
    within = torch.stack([tokens[leaf == number].var(0).sum() for number in range(8)]).mean()
    assert within < 0.5 * tokens.var(0).sum()


@pytest.mark.parametrize("gated", [False, True])
def test_all_neurons_in_one_leaf_are_the_dense_layer(gated):
    dense, tokens = dense_layer(gated), clustered_tokens(4000)
    layer = from_dense(dense, tokens, depth=0, leaf_size=40)
    wanted = dense.outputs(tokens)
    assert (layer(tokens) - wanted).square().mean() < 2e-3 * wanted.var()


def test_a_fitted_layer_sends_tokens_where_they_were_fitted():
    dense, tokens = dense_layer(), clustered_tokens()
    layer = from_dense(dense, tokens, depth=3, leaf_size=4, master_size=3)
    assert torch.equal(layer.leaves_of(tokens), split_tokens(tokens, 3)[2])
    # Every leaf gives the mean of what is wanted of its tokens: its bias was fitted.
    wanted, given, leaf = dense.outputs(tokens), layer(tokens), layer.leaves_of(tokens)
    for number in range(8):
        torch.testing.assert_close(given[leaf == number].mean(0), wanted[leaf == number].mean(0), rtol=0, atol=1e-4)


def test_leaves_keep_more_than_one_layer_of_as_many_neurons():
    dense, tokens = dense_layer(), clustered_tokens()
    errors = {}
    for depth in (0, 3):
        layer = from_dense(dense, tokens[:600], depth, leaf_size=5)
        errors[depth] = (layer(tokens[600:]) - dense.outputs(tokens[600:])).square().mean().item()
    assert errors[3] < 0.7 * errors[0]


def test_ridge_finds_what_made_the_numbers():
    inputs = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) + 3
    weights, bias = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.arange(4.0)
    found, found_bias = ridge(inputs, inputs @ weights + bias)
    assert (inputs @ found + found_bias - inputs @ weights - bias).abs().max() < 0.2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted_and_saved(family, tmp_path):
    model = tiny_model(family)
    dense = copy.deepcopy(model)
    report = convert_feed_forward(model, rows(), share=0.25, depth=2, steps=5, progress=False)
    distinct = {id(layer) for layer in dense.fastbert.layers()}
    assert len(report) == len(feed_forward_layers(model.fastbert.backbone)) == len(distinct)
    assert all(0 < row["error"] < 1 and row["smallest_leaf"] > 0.1 and row["largest_leaf"] < 0.4 for row in report)
    assert model.config.feed_forward == {"form": "leaves", "depth": 2, "leaf_size": 16, "master_size": 0}
    batch = {"input_ids": torch.tensor([rows(1)[0]["input_ids"]])}
    output = model(**batch).logits
    assert not torch.equal(output, dense(**batch).logits)
    model.save_pretrained(tmp_path)
    again = FastBertForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(in_own_memory(again)(**batch).logits, output)


def test_some_layers_and_a_master():
    model = tiny_model()
    report = convert_feed_forward(
        model, rows(), share=0.5, depth=1, master_share=0.25, layers=[4, 2], steps=0, progress=False
    )
    assert [row["layer"] for row in report] == [2, 4] and model.config.feed_forward["layers"] == [2, 4]
    first, second, *_ = model.fastbert.layers()
    assert isinstance(second.intermediate, LeafTree) and not isinstance(first.intermediate, LeafTree)
    assert second.intermediate.leaf_size == 16 and second.intermediate.master_out.in_features == 16


def test_texts_do_and_students_are_stale_then():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config.distilled_for = teacher_digest(model)
    model(**ragged_batch(), speed=0.5)
    convert_feed_forward(model, ["a b c d e f", "f g h i j"] * 20, tokenizer, depth=1, steps=0, progress=False)
    with pytest.raises(ValueError, match="trained after the students"):
        model(**ragged_batch(), speed=0.5)


def test_distillation_repairs_what_conversion_lost(tmp_path):
    dense = tiny_model(seed=5)
    model = copy.deepcopy(dense)
    convert_feed_forward(model, rows(), share=0.25, depth=2, steps=20, progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = ragged_batch(seed=9)

    def distance() -> float:
        with torch.no_grad():
            return (model.eval()(**batch).logits - dense(**batch).logits).square().mean().item()

    lost = distance()
    args = BackboneDistillationArguments(
        str(tmp_path), num_train_epochs=6, learning_rate=2e-3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = BackboneDistillationTrainer(model, args, teacher=dense, train_dataset=rows())
    trainer.train()
    assert distance() < 0.7 * lost
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith("fastbert.backbone.encoder.layer.") for name in changed)
    assert not any("node_" in name for name in changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, r"share must be in \(0, 1\]"),
        ({"share": 0.2, "master_share": 0.3}, "master_share from 0 to share"),
        ({"depth": 21}, "from 0 to 20"),
        ({"depth": 12}, "at least 8192 tokens"),
        ({"layers": [5]}, "from 1 to 4"),
        ({"layers": []}, "from 1 to 4"),
    ],
)
def test_bad_arguments_change_nothing(arguments, message):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        convert_feed_forward(model, rows(), progress=False, **arguments)
    assert model.config.feed_forward is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_cannot_be_converted_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="there are no rows"):
        convert_feed_forward(model, [], progress=False)
    with pytest.raises(ValueError, match=r"model\.float\(\)"):
        convert_feed_forward(tiny_model().bfloat16(), rows(), progress=False)
    convert_feed_forward(model, rows(), depth=1, steps=0, progress=False)
    with pytest.raises(ValueError, match="converted already"):
        convert_feed_forward(model, rows(), progress=False)
    with pytest.raises(ValueError, match="teacher must have the layers"):
        BackboneDistillationTrainer(model, teacher=tiny_model(num_labels=5))


@pytest.mark.parametrize("neurons", [64, 1536, 3072])
def test_unless_told_otherwise_a_layer_holds_no_more_neurons_than_before(neurons):
    for share, depth in ((1.0, 0), (0.5, 1), (0.25, 2), (0.125, 3), (0.0625, 4)):
        tree = tree_of(share, neurons)
        assert tree["depth"] == depth and tree["leaf_size"] + tree["master_size"] == share * neurons
        assert 2**depth * tree["leaf_size"] + tree["master_size"] <= neurons
    # What is asked for is done.
    assert tree_of(0.25, neurons, depth=3) == {"depth": 3, "leaf_size": neurons // 4, "master_size": 0}
    half = {"depth": 2, "leaf_size": neurons // 8, "master_size": neurons // 8}
    assert tree_of(0.25, neurons, master_share=0.125) == half


def test_one_call_converts_distils_and_teaches_the_exits(tmp_path):
    classifier = tmp_path / "classifier"
    stock = AutoModelForSequenceClassification.from_config(tiny_text_config("bert"))
    spread_out(stock).save_pretrained(classifier)
    tiny_tokenizer().save_pretrained(classifier)
    texts = ["a b c d e f", "f g h i j", "c a d", "j i h g f e d c"] * 40
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "output_dir": tmp_path / "fast"}
    stages = [FeedForwardConversion(share=0.25, depth=1, num_train_epochs=1), ExitTraining(num_train_epochs=1)]
    trained = train(classifier, texts, stages=stages, **settings)
    assert trained.model.config.feed_forward == {"form": "leaves", "depth": 1, "leaf_size": 8, "master_size": 8}
    assert trained.model.config.distilled_for == teacher_digest(trained.model)
    answers = trained.pipeline()(texts[:4], speed=0.9)
    again = train(classifier, texts, stages=stages, **settings)  # finished
    assert again.pipeline()(texts[:4], speed=0.9) == answers
    with pytest.raises(ValueError, match="other settings"):
        train(classifier, texts, stages=[FeedForwardConversion(share=0.5), *stages[1:]], **settings)
