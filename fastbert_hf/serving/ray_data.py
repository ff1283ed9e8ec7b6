"""Classify the texts of tables of any number of rows, in a pipeline of Ray Data."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .loading import load_pipeline


try:
    import pyarrow as pa
except ImportError as error:
    raise ImportError('fastbert_hf.serving.ray_data needs its extra: pip install "fastbert-hf[ray]"') from error

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig


# Of the pipeline, and no choice here: every row gets one answer.
OWN_SETTINGS = ("on_error", "top_k", "return_uncertainty", "progress_bar")


def answer_columns(config: PreTrainedConfig, prefix: str = "") -> pa.Schema:
    """Return the columns that a model adds to a table: what it answers, not why it does not."""
    columns = {"label": pa.string(), "score": pa.float64(), "exit_layer": pa.int64()}
    if hasattr(config, "members"):
        columns["exit_member"] = pa.int64()
    return pa.schema([(f"{prefix}{name}", kind) for name, kind in columns.items()])


class FastTextScorer:
    """
    Classify the texts of batches, for `ray.data.Dataset.map_batches`: one model for each actor, which reads and
    answers its texts in batches of its own, by their tokens.

    A batch keeps its columns, and gets `label`, `score`, `exit_layer` (of a cascade `exit_member`, too) and `error`.
    A text that cannot be answered ends nothing: its `error` says why, and the others are null, as `error` is where
    there is an answer.

    Args:
        model (`str` or `PathLike`, *optional*): A folder or a name on the Hub; the package's own model unless given.
        text_column (`str`): Column of the text.
        text_pair_column (`str`, *optional*): Column of the second text of a pair.
        prefix (`str`): Put before the names of the new columns.
        settings: Of [`load_pipeline`], such as `speed`, `speedup`, `max_disagreement`, `int8` or `truncate`.

    Example:

    ```python
    >>> import ray
    >>> from fastbert_hf.serving.ray_data import FastTextScorer

    >>> rows = ray.data.from_items([{"text": "A delight from start to finish."}, {"text": "Dull."}])
    >>> rows.map_batches(
    ...     FastTextScorer,
    ...     fn_constructor_kwargs={"speed": 0.5},
    ...     compute=ray.data.ActorPoolStrategy(size=2),
    ...     num_cpus=1,
    ...     batch_size=2048,
    ... ).take_all()
    [{'text': 'A delight from start to finish.', 'label': 'positive', 'score': 0.99, 'exit_layer': 1, ...
    ```
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        text_column: str = "text",
        text_pair_column: str | None = None,
        prefix: str = "",
        **settings: Any,
    ):
        refused = [name for name in OWN_SETTINGS if name in settings]
        if refused:
            raise ValueError(f"every row has one answer, or its error: leave out {', '.join(refused)}")
        # Ray tells an actor by this variable how many cores it has, and tokenizers would take all that there are.
        if "OMP_NUM_THREADS" in os.environ:
            os.environ.setdefault("RAYON_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
        self.text_column, self.text_pair_column, self.prefix = text_column, text_pair_column, prefix
        self.pipeline = load_pipeline(model, **settings)

    def __call__(self, batch: Mapping[str, np.ndarray] | pa.Table) -> dict[str, Any] | pa.Table:
        """
        Return a batch with its answers.

        Args:
            batch (`dict` of `numpy.ndarray`, or `pyarrow.Table`): Columns by their names, as Ray Data gives them.
        """
        names = batch.column_names if isinstance(batch, pa.Table) else list(batch)
        for name in filter(None, (self.text_column, self.text_pair_column)):
            if name not in names:
                argument = "text_column" if name == self.text_column else "text_pair_column"
                raise ValueError(f"the batch has no column {name!r}, only {', '.join(names)}: correct {argument}")
        texts = values_of(batch[self.text_column])
        answers = self.answers(texts, self.text_pair_column and values_of(batch[self.text_pair_column]))
        answers = answers.rename_columns([f"{self.prefix}{name}" for name in answers.column_names])
        check_free_names(names, answers.column_names, "prefix='predicted_'")
        if not isinstance(batch, pa.Table):
            # As arrays of Arrow, a column of nothing but null keeps its type.
            return {**batch, **{name: answers[name].combine_chunks() for name in answers.column_names}}
        for name in answers.column_names:
            batch = batch.append_column(name, answers[name])
        return batch

    def answers(self, texts: Sequence[Any], text_pairs: Sequence[Any] | None = None) -> pa.Table:
        """
        Return a table with an answer for each text, or the error of those that have none.

        Args:
            texts (`Sequence`): Strings, and whatever else was found in their place.
            text_pairs (`Sequence`, *optional*): The second text of each.
        """
        rows: list[dict[str, Any]] = []
        asked, places = [], []
        for place, text in enumerate(texts):
            fault = fault_of(text, "text")
            if text_pairs is not None:
                fault = fault or fault_of(text_pairs[place], "second text")
                text = {"text": text, "text_pair": text_pairs[place]}
            rows.append({"error": fault})
            if fault is None:
                asked.append(text)
                places.append(place)
        for place, answer in zip(places, self.pipeline(asked, on_error="return"), strict=True):
            rows[place] = answer
            if "error" in answer:
                rows[place] = {"error": without_position(answer["error"], answer["position"])}
        columns = answer_columns(self.pipeline.model.config).append(pa.field("error", pa.string()))
        return pa.Table.from_pylist(rows, schema=columns)


def values_of(column: Any) -> list[Any]:
    """Return the values of a column of NumPy or Arrow. Bytes that are no UTF-8 become halves of characters."""
    try:
        return column.tolist() if hasattr(column, "tolist") else column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]


def fault_of(value: Any, what: str) -> str | None:
    """Return what is wrong with something that should be a text, `None` if it is one."""
    if value is None or (isinstance(value, float) and value != value):  # what null is to NumPy
        return f"it has no {what}"
    return None if isinstance(value, str) else f"its {what} is no string, but {type(value).__name__} ({value!s:.40})"


def without_position(message: str, position: int) -> str:
    """Return what the pipeline says of a text, without its place in the call, which means nothing to who reads it."""
    message = re.sub(rf"^input {position}: ", "", message)
    return re.sub(rf"\b(input|text) {position}\b", "the text", message)


def check_free_names(own: Sequence[str], new: Sequence[str], how: str) -> None:
    """Raise a `ValueError` if a column would be there twice."""
    twice = [name for name in new if name in own]
    if twice:
        raise ValueError(
            f"there is a column {twice[0]!r} already, and the answers would have one, too: give theirs other names, "
            f"with {how}"
        )
