"""What the column of labels holds, by the task: one label, several, a number, or a tag for each word."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from datasets import Dataset


# Between the labels of a text, or the words of a text and their tags, where a file has them in one cell.
BETWEEN_LABELS, BETWEEN_WORDS = ",", " "


def names_of_several(rows: Dataset, label_column: str) -> list[str]:
    """Return the names of all labels that texts with several of them have, those of a `ClassLabel` or sorted."""
    return _class_names(rows, label_column) or sorted({name for cell in rows[label_column] for name in parts(cell)})


def vectors(rows: Dataset, label2id: dict[str, int], name: str, label_column: str) -> list[list[float]]:
    """Return a 1 for each label that a text has, and a 0 for the others."""
    class_names, found = _class_names(rows, label_column), []
    for place, cell in enumerate(rows[label_column]):
        own = [class_names[part] if class_names and isinstance(part, int) else str(part) for part in parts(cell)]
        _check_known(own, label2id, name, place)
        found.append([float(label in own) for label in label2id])
    return found


def no_names(rows: Dataset, label_column: str) -> list[str]:
    """Return the names of the numbers that are to be learnt: as many as a row has."""
    first = rows[0][label_column]
    outputs = len(first) if isinstance(first, Sequence) and not isinstance(first, str) else 1
    return [f"LABEL_{output}" for output in range(outputs)]


def numbers(rows: Dataset, label2id: dict[str, int], name: str, label_column: str) -> list[float | list[float]]:
    """Return the numbers of each row."""
    found = []
    for place, cell in enumerate(rows[label_column]):
        own = list(cell) if isinstance(cell, Sequence) and not isinstance(cell, str) else [cell]
        own = [_number(value) for value in own]
        if None in own or len(own) != len(label2id):
            raise ValueError(
                f"row {place} of the {name} data has {cell!r:.40} in {label_column!r}: a regression needs "
                f"{len(label2id)} finite number{'s' * (len(label2id) > 1)}"
            )
        found.append(own if len(own) > 1 else own[0])
    return found


def names_of_tags(rows: Dataset, label_column: str) -> list[str]:
    """Return the names of all tags, those of a `ClassLabel` or sorted."""
    return _class_names(rows, label_column) or sorted(
        {str(tag) for cell in rows[label_column] for tag in parts(cell, BETWEEN_WORDS)}
    )


def tags(rows: Dataset, label2id: dict[str, int], name: str, label_column: str) -> list[list[int]]:
    """Return the id of the tag of each word."""
    class_names, found = _class_names(rows, label_column), []
    for place, cell in enumerate(rows[label_column]):
        given = parts(cell, BETWEEN_WORDS)
        own = [class_names[part] if class_names and isinstance(part, int) else str(part) for part in given]
        _check_known(own, label2id, name, place)
        found.append([label2id[tag] for tag in own])
    return found


def ends(rows: Dataset, label_column: str) -> list[str]:
    """Return the names of what is found of an answer."""
    return ["start", "end"]


def answers(rows: Dataset, label2id: dict[str, int], name: str, label_column: str) -> list[Any]:
    """Return the answers of each row, as SQuAD has them."""
    return list(rows[label_column])


class LabelKind(NamedTuple):
    """How the labels of a task are read."""

    names: Callable[[Dataset, str], list[str]]
    ids: Callable[[Dataset, dict[str, int], str, str], list[Any]]
    reads: str = "texts"  # or "words", or "passages" with questions


# Those of one label for each text are read by `data` itself.
LABEL_KINDS = {
    "multi_label_classification": LabelKind(names_of_several, vectors),
    "regression": LabelKind(no_names, numbers),
    "token_classification": LabelKind(names_of_tags, tags, reads="words"),
    "question_answering": LabelKind(ends, answers, reads="passages"),
}


def parts(cell: Any, between: str = BETWEEN_LABELS) -> list[Any]:
    """Return what a cell holds: a list, or a string of them."""
    if cell is None:
        return []
    if isinstance(cell, str):
        return [part.strip() for part in cell.split(between) if part.strip()]
    return list(cell) if isinstance(cell, Iterable) else [cell]


def _class_names(rows: Dataset, label_column: str) -> list[str]:
    """Return the names of a column of lists of `ClassLabel`, none of any other."""
    feature = rows.features[label_column]
    return list(getattr(getattr(feature, "feature", None), "names", None) or [])


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, (Real, str)) and not isinstance(value, bool) else float("nan")
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def _check_known(labels: Sequence[str], label2id: dict[str, int], name: str, place: int) -> None:
    unknown = [label for label in labels if label not in label2id]
    if unknown:
        raise ValueError(
            f"row {place} of the {name} data has the label {unknown[0]!r}, which the model does not learn (it knows "
            f"{', '.join(map(repr, label2id))}): add training rows with it, or remove this row"
        )


def of_passages(columns: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of questions, passages and answers, which SQuAD calls so, unless others were named."""
    named = {
        "text_column": ("text", "question"),
        "text_pair_column": (None, "context"),
        "label_column": ("label", "answers"),
    }
    return {name: own if columns[name] == default else columns[name] for name, (default, own) in named.items()}
