"""torch.compile: the layers are compiled, each for any number of tokens; the answers stay what they are."""

from __future__ import annotations

from statistics import median

import pytest
import torch
from transformers import Trainer, TrainingArguments

from fastbert_hf import CascadeForSequenceClassification, FastBertConfig, FastBertForSequenceClassification
from fastbert_hf.modeling import engine
from fastbert_hf.modeling.compiled_layers import is_compiled, layers_of
from tests.common import (
    assert_close,
    changed_parameters,
    copied_state,
    ragged_batch,
    spread_out,
    stock,
    tiny_rows,
    tiny_text_config,
    training_settings,
    without_dropout,
)


pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
REFUSED = r"cannot compile this model as a whole.*model\.compile\(\)"


class Counted:
    """A backend that runs a graph as it is, and notes how many there are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two_layers(family: str = "bert") -> FastBertForSequenceClassification:
    config = FastBertConfig(text_config=tiny_text_config(family, 2), num_labels=3, exit_dropout=0)
    return without_dropout(spread_out(FastBertForSequenceClassification(config)))


def texts_of(*lengths: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(range(5, 5 + length))} for length in lengths]


def answers(model, lengths: tuple[int, ...], speed: float) -> list[tuple]:
    return [(answer.exit_layer, answer.logits) for answer in model.predict(texts_of(*lengths), speed=speed)]


def assert_same(actual: list[tuple], expected: list[tuple]) -> None:
    for (layer, logits), (expected_layer, expected_logits) in zip(actual, expected, strict=True):
        assert layer == expected_layer
        assert_close(logits, expected_logits)


def test_compiled_layers_give_the_same_answers_and_serve_all_lengths(monkeypatch):
    model, backend = two_layers("modernbert"), Counted()
    lengths = ((9, 3, 17), (5, 6), (20, 4, 7, 11, 2))
    speed = median(answer.uncertainty for answer in model.predict(texts_of(*sum(lengths, ())), max_layers=1))
    expected = [answers(model, some, speed) for some in lengths]
    assert {layer for some in expected for layer, _ in some} == {1, 2}
    model.compile(backend=backend)
    assert all(map(is_compiled, model.fastbert.layers()))
    # The compiler chooses how linear layers are computed.
    monkeypatch.setattr(engine, "faster_linears", None)
    graphs = []
    for some, said in zip(lengths, expected, strict=True):
        assert_same(answers(model, some, speed), said)
        graphs.append(backend.graphs)
    assert 0 < graphs[0] == graphs[-1]


def test_a_cascade_compiles_the_layers_of_all_members_once():
    cascade = CascadeForSequenceClassification.from_members([stock("bert", 1), stock("albert", 2)])
    layers = [layer for member in cascade.members for layer in member.fastbert.layers()]
    cascade.compile(backend="eager")
    assert all(map(is_compiled, layers))
    assert layers_of(cascade) == list(dict.fromkeys(layers))


def test_a_model_as_a_whole_is_compiled_by_its_layers_or_refused():
    model, batch, backend = two_layers(), ragged_batch(), Counted()
    compiled = torch.compile(model, backend="eager")

    @torch.compile(backend="eager")
    def highest(batch):
        return model(**batch).logits.amax(-1) + 1

    with torch.no_grad():
        expected = model(**batch).logits
        encoder = torch.compile(model.fastbert, backend="eager")
        for function in (lambda batch: compiled(**batch), lambda batch: encoder(**batch), highest):
            with pytest.raises(ValueError, match=REFUSED):
                function(batch)
        model.compile(backend=backend)
        assert_close(compiled(**batch).logits, expected)
        assert_close(highest(batch), expected.amax(-1) + 1)
    assert backend.graphs > 0


def test_the_stock_trainer_compiles_a_model_whose_layers_are_compiled(tmp_path, monkeypatch):
    for name in ("BACKEND", "MODE"):  # where TrainingArguments write it
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    settings = training_settings(tmp_path, max_steps=1, optim="sgd", learning_rate=0.1)
    compiling = {"torch_compile": True, "torch_compile_backend": "eager"}
    model, expected = two_layers(), two_layers()
    trainer = Trainer(model, TrainingArguments(**settings, **compiling), train_dataset=tiny_rows(8))
    with pytest.raises(ValueError, match=rf"{REFUSED}.*TrainingArguments\(torch_compile=True\)"):
        trainer.train()
    model.compile(backend="eager")
    trainer.train()
    before = copied_state(expected)
    Trainer(expected, TrainingArguments(**settings), train_dataset=tiny_rows(8)).train()
    for actual, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert_close(actual, wanted)
    assert len(changed_parameters(model, before)) > 20


def test_int8_layers_stay_out_of_the_graphs():
    model = two_layers().eval()
    model.use_int8_layers()
    expected = answers(model, (3, 17, 9), 0.3)
    backend = Counted()
    model.compile(backend=backend)
    for (depth, logits), (own_depth, own_logits) in zip(expected, answers(model, (3, 17, 9), 0.3), strict=True):
        assert depth == own_depth
        assert_close(own_logits, logits)
    assert backend.graphs > 1
