from __future__ import annotations

import gzip
import importlib
import json
import sys

import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fastbert_hf.data import check_rows, dataset_of, encode, hold_out, label_names, load_hub_rows, load_rows, sample

from .common import tiny_tokenizer


LABEL2ID = {"no": 0, "yes": 1}


def rows_of(**columns) -> Dataset:
    return Dataset.from_dict(columns)


def classes(values: list[int], names: tuple[str, ...] = ("no", "yes")) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"text": ["word7"] * len(values), "label": values}, features=features)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.json", "rows.jsonl", "rows.csv.gz", "rows.tsv.gz"])
def test_every_kind_of_file_is_read_as_it_is(tmp_path, name):
    # "NA" is a word and a lone quotation mark a character, which CSV has to write in its own way.
    rows = [{"text": '"fine, film', "label": "yes"}, {"text": "NA", "label": "no"}]
    if ".json" in name:
        content = "".join(json.dumps(row) + "\n" for row in rows)
    elif ".tsv" in name:
        content = "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows)
    else:
        content = 'text,label\n"""fine, film",yes\nNA,no\n'
    opened = gzip.open(tmp_path / name, "wt") if name.endswith(".gz") else (tmp_path / name).open("w")
    with opened as file:
        file.write(content)
    assert load_rows(tmp_path / name).to_list() == rows


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("no.csv", None, FileNotFoundError, "there is no file .*no.csv"),
        ("rows.csv", "", ValueError, "rows.csv is empty: give a file with a header and rows"),
        ("rows.csv", "text,label\n", ValueError, "rows.csv has no rows below its header"),
        ("rows.txt", "text", ValueError, r"rows.txt ends with '.txt': give .csv, .tsv, .json or .jsonl"),
        ("rows", "text", ValueError, "rows ends with 'nothing'"),
        ("rows.json", "{", ValueError, "rows.json cannot be read as json: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message) as raised:
        load_rows(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
        ({"text": text, "label": label} for text, label in ("ax", "by")),
        pd.DataFrame({"text": ["a", "b"], "label": ["x", "y"]}, index=[7, 3]),
        rows_of(text=["a", "b"], label=["x", "y"]),
    ],
    ids=lambda rows: type(rows).__name__,
)
def test_rows_of_every_kind_become_a_data_set(rows):
    assert dataset_of(rows)[:] == {"text": ["a", "b"], "label": ["x", "y"]}


def test_a_file_and_a_list_of_texts_become_a_data_set_and_one_stays_as_it_is(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,0\n")
    assert dataset_of(tmp_path / "rows.csv")[:] == {"text": ["a"], "label": [0]}
    assert dataset_of(["a", "b"])[:] == {"text": ["a", "b"]}
    assert dataset_of(pd.Series(["a", "b"], index=[4, 2]))[:] == {"text": ["a", "b"]}
    rows = rows_of(text=["a"])
    assert dataset_of(rows) is rows


@pytest.mark.parametrize("kind", [list, pd.DataFrame])
def test_a_column_of_texts_and_numbers_is_refused(kind):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": 1}]
    with pytest.raises(ValueError, match=r"make no table \(.*give the values of each column one type, as in"):
        dataset_of(kind(rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (DatasetDict(train=rows_of(text=["a"])), r"got DatasetDict of 'train'.*splits\[\"train\"\]"),
        ({"text": ["a"]}, "must be a data set, a list of rows or the path of a file, got dict of 'text'"),
        (3, "got int"),
        (["a", 3], r"row 1 must be a text or a dict, got 3"),
    ],
)
def test_what_is_no_rows_is_refused(rows, message):
    with pytest.raises(TypeError, match=message):
        dataset_of(rows)


def test_a_data_set_gives_its_training_and_validation_rows(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    train, validation = load_hub_rows(str(tmp_path))
    assert train["text"][:] == ["a", "b"] and validation is None
    (tmp_path / "test.csv").write_text("text,label\nc,0\n")
    assert load_hub_rows(str(tmp_path))[1]["text"][:] == ["c"]
    (tmp_path / "validation.csv").write_text("text,label\nd,0\n")
    assert load_hub_rows(str(tmp_path))[1]["text"][:] == ["d"]
    (tmp_path / "train.csv").unlink()
    with pytest.raises(ValueError, match="has no split 'train', only "):
        load_hub_rows(str(tmp_path))
    with pytest.raises(ValueError, match="the data set nobody/has-this cannot be loaded: "):
        load_hub_rows("nobody/has-this")


def test_a_tenth_is_held_out_by_chance():
    rows = rows_of(text=[str(number) for number in range(40)])
    train, validation = hold_out(rows, seed=1)
    assert len(validation) == 4 and sorted([*train["text"], *validation["text"]]) == sorted(rows["text"])
    assert hold_out(rows, seed=2)[1]["text"][:] != validation["text"][:]
    with pytest.raises(ValueError, match="19 training rows are too few to hold out a tenth of them: give validation"):
        hold_out(rows.select(range(19)))


def test_a_sample_has_random_rows_and_no_more_than_there_are():
    rows = rows_of(text=[str(number) for number in range(40)])
    few = sample(rows, 5, seed=1)["text"][:]
    assert len(set(few)) == 5 and few != rows["text"][:5]
    assert sample(rows, 5, seed=2)["text"][:] != few
    assert sample(rows, None) is rows and sample(rows, 40) is rows


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ({"text": []}, {}, "the training data has no rows"),
        ({"body": ["a"]}, {}, "the training data has no column 'text', only body: correct text_column"),
        ({"text": ["a"]}, {"text_pair_column": "b"}, "no column 'b', only text: correct text_pair_column"),
        ({"text": ["a"]}, {"label_column": "gold"}, "no column 'gold', only text: correct label_column"),
        (
            {"text": ["a", " ", None]},
            {},
            r"2 rows of the training data have no text in 'text' \(the first is row 1, counted from 0\): remove them",
        ),
        ({"text": ["a"], "b": [""]}, {"text_pair_column": "b"}, "1 rows of the training data have no text in 'b'"),
        (
            {"text": [["a", "b"]]},
            {},
            r"data has several values in 'text' \(\['a', 'b'\]\), not one text: join them, or correct text_column",
        ),
    ],
)
def test_bad_rows_are_named(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        check_rows(rows_of(**rows), **columns)


def test_labels_are_checked_only_where_they_are_needed():
    check_rows(rows_of(text=["a"]), "unlabeled")
    with pytest.raises(ValueError, match="the validation data has no column 'label'"):
        check_rows(rows_of(text=["a"]), "validation", label_column="label")


def test_labels_are_named_by_the_data_set_or_by_their_values():
    assert label_names(classes([1, 0], ("zebra", "ant"))) == ["zebra", "ant"]
    assert label_names(rows_of(label=["yes", "no", "yes"])) == ["no", "yes"]
    assert label_names(rows_of(gold=[10, 9]), "gold") == ["9", "10"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["yes", ""], "rows without a label in 'label': remove them"),
        ([1, None], "rows without a label in 'label': remove them"),
        ([0.5, 1.0], "fractions: give classes, or learn the numbers themselves"),
        (["yes", "yes"], r"the training data has 1 label \('yes'\): give rows of at least two"),
    ],
)
def test_bad_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        label_names(rows_of(label=labels))


@pytest.mark.parametrize("label", [[1], ["yes", "no"], {"yes": 1}])
def test_several_labels_for_a_text_are_refused(label):
    rows = rows_of(text=["word7"], label=[label])
    with pytest.raises(ValueError, match=r"the training data has several values in 'label'.*give one label for each"):
        label_names(rows)
    with pytest.raises(ValueError, match="the validation data has several values in 'label'"):
        encode(rows, tiny_tokenizer(), LABEL2ID, "validation")


def test_numbers_are_texts_too():
    rows = rows_of(text=[12, 7])
    assert (
        encode(rows, tiny_tokenizer())["input_ids"][:]
        == encode(rows_of(text=["12", "7"]), tiny_tokenizer())["input_ids"][:]
    )


def test_texts_and_labels_become_ids():
    rows = rows_of(text=["word7", "word8 word9"], label=["yes", "no"], kind=["x", "y"])
    encoded = encode(rows, tiny_tokenizer(), LABEL2ID)
    assert encoded["input_ids"][:] == [[2, 7, 3], [2, 8, 9, 3]] and encoded["labels"][:] == [1, 0]
    assert "kind" not in encoded.column_names and "text" not in encoded.column_names
    assert "labels" not in encode(rows, tiny_tokenizer()).column_names
    assert encode(rows, tiny_tokenizer(), max_length=3)["input_ids"][1] == [2, 8, 3]


def test_pairs_and_other_columns_are_encoded():
    rows = rows_of(a=["word7"], b=["word9"], gold=[1])
    encoded = encode(rows, tiny_tokenizer(), LABEL2ID, text_column="a", text_pair_column="b", label_column="gold")
    assert encoded["input_ids"][:] == [[2, 7, 3, 9, 3]] and encoded["token_type_ids"][:] == [[0, 0, 0, 1, 1]]
    assert encoded["labels"][:] == [1]


@pytest.mark.parametrize("labels", [["1", "0"], [1, 0]])
def test_labels_may_be_ids_of_the_model(labels):
    assert encode(rows_of(text=["word7"] * 2, label=labels), tiny_tokenizer(), LABEL2ID)["labels"][:] == [1, 0]


def test_names_win_over_ids():
    rows = rows_of(text=["word7"] * 2, label=["1", "0"])
    assert encode(rows, tiny_tokenizer(), {"1": 0, "0": 1})["labels"][:] == [0, 1]
    # The names of the data set, not its ids, say which label of the model it is.
    assert encode(classes([0, 1], ("yes", "no")), tiny_tokenizer(), LABEL2ID)["labels"][:] == [1, 0]


def test_rows_with_an_unknown_label_are_named():
    message = (
        r"1 rows of the training data have the label '-1', which the model does not learn \(it knows 'no', 'yes'\): "
        "add training rows with it, or remove these"
    )
    with pytest.raises(ValueError, match=message):
        encode(classes([1, -1]), tiny_tokenizer(), LABEL2ID)
    rows = rows_of(text=["word7"] * 3, label=["yes", "perhaps", "perhaps"])
    with pytest.raises(ValueError, match="2 rows of the validation data have the label 'perhaps'"):
        encode(rows, tiny_tokenizer(), LABEL2ID, "validation")


def test_without_its_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "fastbert_hf.data")
    with pytest.raises(ImportError, match=r'fastbert_hf.data needs its extra: pip install "fastbert-hf\[data\]"'):
        importlib.import_module("fastbert_hf.data")
