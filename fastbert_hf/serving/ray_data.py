"""
Classify tables of any number of rows with Ray Data: [`FastTextScorer`] in a pipeline of your own, and the blocks of
the command `fastbert-hf score`.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from resource import RUSAGE_SELF, getrusage
from typing import TYPE_CHECKING, Any, NamedTuple

from .loading import load_pipeline
from .ray_cluster import start_ray


try:
    import pyarrow as pa

    from .row_blocks import RowBlock, RowPiece, UnreadableFile, UnreadRow, read_block
    from .row_files import RowFile
    from .scored_parts import PartFolder
except ImportError as error:
    raise ImportError('fastbert_hf.serving.ray_data needs its extra: pip install "fastbert-hf[ray]"') from error

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedConfig


# A block that ends its process so often will do so again: it needs more memory than there is.
MOST_TRIES = 3
# Bytes in which the system counts memory.
RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024
# What can be set in no other way, and before Ray is imported. It says nothing, and takes little memory for objects:
# what goes from process to process are names of blocks and counts.
RAY_ENVIRONMENT = {
    "RAY_LOG_TO_DRIVER": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(100 << 20),
}
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


class BlockOutcome(NamedTuple):
    """What became of a block. It alone goes back to who gave it out, whatever was in the block."""

    block: int
    pid: int
    rows: int = 0
    rejected: int = 0
    layers: int = 0
    memory: int = 0  # bytes that its process has held at most
    error: str = ""
    is_fatal: bool = False  # whether all other blocks would fail alike


class BlockScorer:
    """
    Read, answer and write blocks: an actor of `fastbert-hf score`.

    Args:
        output (`str`): Folder of a [`PartFolder`].
        columns (`pyarrow.Schema`): Columns to read.
        kept (`pyarrow.Schema`): Those of them that are written beside the answers.
        only_these (`bool`): As in [`read_block`].
        piece_rows (`int`): Rows that are held at a time.
        scorer (`dict`): Arguments of [`FastTextScorer`].
    """

    def __init__(
        self,
        output: str,
        columns: pa.Schema,
        kept: pa.Schema,
        only_these: bool,
        piece_rows: int,
        scorer: dict[str, Any],
    ):
        self.folder = PartFolder(output)
        self.columns, self.kept, self.only_these, self.piece_rows = columns, kept, only_these, piece_rows
        self.scorer_settings, self.scorer = scorer, None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """Return the [`BlockOutcome`] of a block, which comes as its number and as JSON."""
        (number,), (text,) = batch["number"].tolist(), batch["block"].tolist()
        block = json.loads(text)
        outcome = self.outcome(number, RowBlock(**{**block, "file": RowFile(**block["file"])}))
        return {name: [value] for name, value in outcome._asdict().items()}

    def outcome(self, number: int, block: RowBlock) -> BlockOutcome:
        """Score a block. What is wrong with its file concerns it alone; everything else would end the others, too."""
        outcome = BlockOutcome(number, os.getpid())
        try:
            self.count_try(block)
            if self.scorer is None:  # here, as what an actor raises at its start is told at length, and tried again
                self.scorer = FastTextScorer(**self.scorer_settings)
            try:
                counts = self.folder.write(block.name, self.schema(), block.file.path, self.scored(block))
                outcome = outcome._replace(**counts._asdict())
            except UnreadableFile as error:
                outcome = outcome._replace(error=str(error))
            self.folder.tries(block.name).unlink()
        except Exception as error:  # of the model, of the disk: the driver tells it
            kind = "" if isinstance(error, (ValueError, OSError, MemoryError)) else f"{type(error).__name__}: "
            outcome = outcome._replace(error=f"{kind}{error}".splitlines()[0], is_fatal=True)
        return outcome._replace(memory=getrusage(RUSAGE_SELF).ru_maxrss * RUSAGE_UNIT)

    def count_try(self, block: RowBlock) -> None:
        """Write down that a block is begun, and raise an error if that was so too often."""
        with open(self.folder.tries(block.name), "ab") as tries:
            tries.write(b".")
            if tries.tell() > MOST_TRIES:
                raise MemoryError(
                    f"the rows of {block.file.path} from {block.first_row} on ended their process {MOST_TRIES} times, "
                    "as rows do that need more memory than there is: give a smaller --block-rows and another folder"
                )

    def schema(self) -> pa.Schema:
        """Return the columns that are written."""
        config = self.scorer.pipeline.model.config
        return pa.schema([*self.kept, *answer_columns(config, self.scorer.prefix)])

    def scored(self, block: RowBlock) -> Iterator[tuple[pa.Table, list[UnreadRow], int]]:
        """Yield the pieces of a block as they are written: answered rows, other rows, and the sum of the layers."""
        for piece in read_block(block, self.columns, self.only_these, self.piece_rows):
            yield self.scored_piece(piece)

    def scored_piece(self, piece: RowPiece) -> tuple[pa.Table, list[UnreadRow], int]:
        """Return the answered rows of a piece, the other rows in their order, and the sum of the layers."""
        texts = values_of(piece.table[self.scorer.text_column])
        pair = self.scorer.text_pair_column
        answers = self.scorer.answers(texts, pair and values_of(piece.table[pair]))
        others = [
            UnreadRow(number, error, readable(text))
            for number, error, text in zip(piece.numbers, answers["error"].to_pylist(), texts, strict=True)
            if error is not None
        ]
        is_answered = answers["error"].is_null()
        answers = answers.drop_columns(["error"])
        columns = [*(piece.table[name] for name in self.kept.names), *answers.columns]
        table = pa.Table.from_arrays(columns, schema=self.schema()).filter(is_answered)
        return table, sorted(piece.unread + others), sum(table[f"{self.scorer.prefix}exit_layer"].to_pylist())


def readable(text: Any) -> str | None:
    """Return a text, or what stands in its place, as one that can be written."""
    return None if text is None else str(text).encode("utf-8", "backslashreplace").decode()


@contextmanager
def ray_running(num_cpus: int, threads: int, address: str | None = None) -> Iterator[None]:
    """
    Connect to Ray, or start it, so that it says nothing. Where it runs in this process already, it is left as it is.

    Args:
        num_cpus, address: As in [`start_ray`].
        threads (`int`): Cores that one of its machines must have.

    Raises:
        ValueError: If there is no such cluster, or none of its machines has so many cores.
    """
    was_running = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if not was_running:
        if address is not None:
            check_address(address)
        for name, value in RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with _no_stderr():  # where it would tell that it now tells less
            start_ray(num_cpus, address)
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        cores = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        if cores < threads:
            raise ValueError(f"no machine of this Ray cluster has {threads} cores, but {cores:g}: correct --threads")
        # There Ray prints of each process that has died how one might find out why.
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        if not was_running:
            ray.shutdown()


def check_address(address: str) -> None:
    """Raise a `ValueError` if nobody listens at `HOST:PORT`, where Ray would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(
            f"there is no Ray cluster at {address} ({error}): give HOST:PORT of one that runs, such as 127.0.0.1:6379"
        ) from error


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Let nothing of this process, its compiled parts included, reach the standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def score_blocks(blocks: Sequence[RowBlock], actors: int, threads: int, **settings: Any) -> Iterator[BlockOutcome]:
    """
    Yield the outcome of each block as it is finished.

    Args:
        blocks (`Sequence` of [`RowBlock`]): Those that are left.
        actors (`int`): Processes that each hold a model.
        threads (`int`): Cores of each.
        settings: Arguments of [`BlockScorer`].
    """
    import ray.data

    items = [{"number": number, "block": json.dumps(asdict(block))} for number, block in enumerate(blocks)]
    # One by one, so that whoever is free takes the next.
    outcomes = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        BlockScorer,
        fn_constructor_kwargs=settings,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(items)), max_tasks_in_flight_per_actor=2),
        num_cpus=threads,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    )
    for row in outcomes.iter_rows():
        yield BlockOutcome(**row)
