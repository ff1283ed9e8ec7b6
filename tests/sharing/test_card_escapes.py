"""Cards of checkpoints and data sets whose names and labels are markup."""

from __future__ import annotations

import ast
import re

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from fastbert_hf import CascadeForSequenceClassification, Measured, write_model_card

from ..common import tiny_model


SPEEDS = [
    {"speed": 0, "accuracy": 0.9, "mean_exit_layer": 4.0},
    {"speed": 0.5, "accuracy": 0.875, "mean_exit_layer": 1.6},
]
NASTY = "x`\n\n# Owned\n\n<img src=x>\x1b[31m\u202e [y](http://z) --- \n---\n**b** | c"
RENDER = MarkdownIt("commonmark", {"html": True}).enable("table")


def elements(text: str) -> list[str]:
    """Tags that a rendered text opens, without what stands inside code."""
    return re.findall(r"<(\w+)", RENDER.render(text))


def assert_as_plain_as(card: ModelCard, plain: ModelCard) -> None:
    """The same headings, tables, code blocks and links, no more."""
    assert elements(card.text) == elements(plain.text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", card.content)
    assert card.data.to_dict().keys() == plain.data.to_dict().keys()


@pytest.mark.parametrize("name", [NASTY, "<img src=x>", "org/name\n# Owned", "no such name", "/home/someone/model", 3])
def test_a_backbone_that_the_hub_cannot_have_is_not_named(tmp_path, name):
    model = tiny_model()
    plain = write_model_card(tmp_path, model)
    model.config.text_config._name_or_path = name
    assert write_model_card(tmp_path, model).content == plain.content


def test_members_that_the_hub_cannot_have_are_not_named(tmp_path):
    cascade = CascadeForSequenceClassification.from_members([tiny_model(), tiny_model(seed=1)])
    plain = write_model_card(tmp_path, cascade)
    cascade.config.members[0].text_config._name_or_path = NASTY
    assert write_model_card(tmp_path, cascade).content == plain.content


def test_labels_are_no_markup(tmp_path):
    plain = write_model_card(tmp_path, tiny_model())
    labels = {0: "<script>alert(1)</script>", 1: NASTY, 2: "# Owned"}
    card = write_model_card(tmp_path, tiny_model(id2label=labels))
    assert_as_plain_as(card, plain)
    assert "Labels: &lt;script&gt;alert(1)&lt;/script&gt;, x" in card.text


@pytest.mark.parametrize(
    "given", [{"model_name": NASTY}, {"datasets": NASTY}, {"base_model": NASTY}, {"training": {NASTY: NASTY}}]
)
def test_names_and_settings_are_no_markup(tmp_path, given):
    ((argument, _),) = given.items()
    harmless = {"training": {"a": "b"}}.get(argument, "name")
    plain = write_model_card(tmp_path, tiny_model(), SPEEDS, **{argument: harmless})
    card = write_model_card(tmp_path, tiny_model(), SPEEDS, **given)
    if argument == "base_model":  # in code only where it is a name
        plain.text = plain.text.replace("`name`", "name")
    assert_as_plain_as(card, plain)
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == card.data.to_dict()


def test_data_sets_that_were_measured_on_are_no_markup(tmp_path):
    plain, card = (
        write_model_card(tmp_path, tiny_model(), Measured(SPEEDS, rows=3, dataset=name, split=name))
        for name in ("name", NASTY)
    )
    assert_as_plain_as(card, plain)
    assert "&lt;img src=x&gt;" in card.text


@pytest.mark.parametrize("given", ["repo_id", "example"])
def test_code_of_a_card_holds_a_text_as_it_is(tmp_path, given):
    plain = write_model_card(tmp_path, tiny_model())
    card = write_model_card(tmp_path, tiny_model(), model_name=plain.data.model_name, **{given: NASTY})
    assert_as_plain_as(card, plain)
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    *_, build, call = ast.parse(code).body
    held = build.value.keywords[0].value if given == "repo_id" else call.value.args[0]
    assert held.value == NASTY
