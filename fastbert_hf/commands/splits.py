"""The rows that a command trains and evaluates on: loaded, checked and encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .options import DataOptions, one_line_errors


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data import Splits


def load_splits(options: DataOptions, seed: int, train_has_labels: bool = True) -> Splits:
    """
    Read and check the rows that the options name, or end the program with what is wrong with them.

    Args:
        options ([`DataOptions`]): Checked with [`check_data_options`].
        seed (`int`): Of the choice of rows, where a part of them is taken.
        train_has_labels (`bool`): Whether the training rows need labels.
    """
    from ..data import Splits, check_rows, hold_out, load_hub_rows, load_rows, sample

    columns = {**options.columns(), "task": options.task_name()}
    without_labels = {**columns, "label_column": None}
    with one_line_errors():
        validation = None
        if options.dataset_name:
            train, validation = load_hub_rows(options.dataset_name, options.dataset_config_name)
        else:
            train = load_rows(options.train_file)
        if options.validation_file:
            validation = load_rows(options.validation_file)
        unlabeled = load_rows(options.unlabeled_file) if options.unlabeled_file else None
        # Before rows are held out or left out, so that the numbers in messages are those of the file.
        needs_labels = train_has_labels or validation is None
        check_rows(train, "training", **(columns if needs_labels else without_labels))
        if validation is not None:
            check_rows(validation, "validation", **columns)
        if unlabeled is not None:
            check_rows(unlabeled, "unlabeled", **without_labels)
        if validation is None:
            print("No validation rows were given: a tenth of the training rows stands in for them.")
            train, validation = hold_out(train, seed)
        train = sample(train, options.max_train_samples, seed)
        validation = sample(validation, options.max_eval_samples, seed)
    return Splits(train, validation, unlabeled)


def encode_splits(
    splits: Splits,
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    label2id: dict[str, int],
    train_has_labels: bool = True,
) -> Splits:
    """
    Turn the texts of all rows into token ids, or end the program with what is wrong with a label.

    Args:
        splits ([`Splits`]): From [`load_splits`].
        options ([`DataOptions`]): The columns and the greatest length.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        label2id (`dict`): The id of each label.
        train_has_labels (`bool`): Whether the labels of the training rows are encoded, too.
    """
    with one_line_errors():
        return splits.encoded(
            tokenizer, label2id, train_has_labels, **options.columns(), max_length=options.max_length
        )
