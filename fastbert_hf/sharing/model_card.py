"""Model cards that say what was measured, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..escapes import as_markdown, as_python, printable
from ..files import write_whole
from ..modeling.dials import greatest_speedup
from ..modeling.tasks import task_of
from .dial_tables import asked_rows


logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).parent / "model_card_template.md"
PLOT = "speed_accuracy.png"
# By the name of a task: what such a model is, and a text for the code blocks.
KINDS = {
    "single_label_classification": ("A text classifier", "I would go there again."),
    "multi_label_classification": (
        "A text classifier whose texts may have several labels",
        "I would go there again.",
    ),
    "regression": ("A regression on texts", "I would go there again."),
    "question_answering": ("A reader that finds answers in passages", "Who wrote it?"),
    "token_classification": ("A token classifier", "Ada Lovelace never lived in Turin."),
}
TAGS = ("fastbert", "early-exit", "adaptive-inference")
CASCADE_TAGS = ("cascadebert", "cascade", "adaptive-inference")
# Columns of a table of speeds that are not a metric of the task, in the order in which a card shows them.
COST_COLUMNS = {
    "speed": "speed",
    "agreement": "agreement",
    "mean_exit_layer": "layers",
    "layer_speed_up": "fewer layers",
    "executed_speed_up": "fewer FLOPs",
}
HIDDEN_COLUMNS = ("policy", "paper_flops", "paper_speed_up", "executed_flops")
SHARES = ("accuracy", "agreement", "f1", "macro_f1", "precision", "recall")


@dataclass
class Measured:
    """
    What a run measured of a model, for its card.

    Args:
        speeds (`list[dict[str, float]]`):
            A row for each speed: `speed`, `mean_exit_layer`, `agreement` and the metrics of the task, as in the table
            of [`sweep_speeds`].
        rows (`int`, *optional*): Number of texts.
        dataset (`str`, *optional*): Their data set, as the Hub calls it.
        split (`str`, *optional*): Which part of it.
        curve (`list[dict[str, float]]`, *optional*): More speeds, for the plot alone.
    """

    speeds: list[dict[str, float]]
    rows: int | None = None
    dataset: str | None = None
    split: str | None = None
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self):
        self.speeds, self.curve = as_rows(self.speeds), as_rows(self.curve)
        for row in (*self.speeds, *self.curve):
            missing = [name for name in ("speed", "mean_exit_layer") if name not in row]
            if missing:
                raise ValueError(
                    f"a row of speeds lacks {', '.join(missing)}: it has {', '.join(row)}. Give a table of "
                    "sweep_speeds(model, record)."
                )

    @property
    def metrics(self) -> list[str]:
        """Return the metrics of the task that every row has, the first one being that of the plot."""
        others = (*COST_COLUMNS, *HIDDEN_COLUMNS)
        return [
            name
            for name in self.speeds[0]
            if name not in others
            and not name.startswith(("exit_", "member_"))
            and all(name in row for row in self.speeds)
        ]


def as_rows(table: Any) -> list[dict[str, float]]:
    """Return a table of pandas or an iterable of rows as dicts of plain numbers, one for each speed."""
    rows = {}
    for row in table.to_dict("records") if hasattr(table, "to_dict") else table:
        # Metrics come as numbers of NumPy or PyTorch, too, which YAML cannot write; what is no number has no place.
        values = {name: value.item() if getattr(value, "ndim", None) == 0 else value for name, value in row.items()}
        values = {name: value for name, value in values.items() if type(value) in (int, float)}
        rows.setdefault(values.get("speed"), values)
    return list(rows.values())


def write_model_card(
    folder: str | os.PathLike,
    model: PreTrainedModel,
    measured: Measured | Any = None,
    *,
    model_name: str | None = None,
    repo_id: str | None = None,
    base_model: str | Sequence[str] | None = None,
    datasets: str | Sequence[str] | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    tags: str | Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
    notes: str | None = None,
    example: str | None = None,
) -> ModelCard:
    """
    Write `README.md` into the folder of a saved model, and where speeds were measured a plot of them (for which the
    extra `evaluation` must be installed).

    Args:
        folder (`str` or `PathLike`): Of the model. Code that [`save_with_code`] put there is mentioned.
        model ([`FastBertForSequenceClassification`] or [`CascadeForSequenceClassification`]): The model.
        measured ([`Measured`] or a table of [`sweep_speeds`], *optional*):
            Every number of the card that is not a setting. `model.measured` unless given, which [`ExitTrainer`] sets
            when it evaluates.
        model_name (`str`, *optional*): Title; the end of `repo_id` or the folder's name unless given.
        repo_id (`str`, *optional*):
            What `from_pretrained` is called with; the model's name unless given. Empty for the pipeline's default.
        base_model (`str` or sequence of `str`, *optional*):
            The pretrained encoder, or those of a cascade, as the Hub calls them; what the config names unless given.
        datasets, language, license, tags: Metadata of the Hub.
        training (mapping, *optional*): Settings, in the order in which they are listed.
        notes (`str`, *optional*): Markdown below the table.
        example (`str`, *optional*): A text for the code blocks.

    Returns:
        `huggingface_hub.ModelCard`
    """
    members = getattr(model, "members", None)
    if members is None and not hasattr(model, "exits"):
        raise TypeError(
            f"a model card describes a classifier with its exits, got {type(model).__name__}: give a "
            "FastBertForSequenceClassification or a CascadeForSequenceClassification."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    measured = getattr(model, "measured", None) if measured is None else measured
    if measured is not None and not isinstance(measured, Measured):
        measured = Measured(measured)
    if measured is not None and not measured.speeds:
        measured = None
    model_name = model_name or (repo_id or folder.resolve().name).rpartition("/")[-1]
    repo_id, config = model_name if repo_id is None else repo_id, model.config
    num_layers = (config if members is None else config.members[-1]).num_hidden_layers
    base_models = [printable(name) for name in as_list(base_model) if name] or backbones_on_hub(config)
    task, (kind, own_example) = getattr(config, "task", "text-classification"), KINDS[task_of(config).name]
    datasets = [*as_list(datasets), *filter(None, [measured and measured.dataset])]
    plot = measured is not None and write_plot(folder / PLOT, measured, config.num_hidden_layers)
    data = ModelCardData(
        model_name=printable(model_name),
        library_name="fastbert_hf",
        pipeline_tag=task,
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        datasets=list(dict.fromkeys(map(printable, datasets))) or None,
        metrics=(measured.metrics or None) if measured else None,
        language=language,
        license=license,
        tags=list(dict.fromkeys([*(TAGS if members is None else CASCADE_TAGS), *as_list(tags)])),
        eval_results=eval_results(measured, config.speed, task) if measured else None,
    )
    asked = asked_rows(model)
    units = [part["unit"] for part in (config.calibration, config.certification) if part is not None]
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=as_markdown(model_name),
        repo_id=as_python(repo_id) if repo_id else "",
        backbone=None if members is not None else describe_backbone(config, base_models),
        members=None if members is None else describe_members(config),
        num_layers=num_layers,
        config=config,
        greatest_speedup=None if config.calibration is None else greatest_speedup(config.calibration),
        asked=markdown_table(("ask for", "exits answer below", "cost"), asked) if asked else None,
        unit="layers" if "layers" in units else "executed FLOPs",
        example=as_python(own_example if example is None else example),
        task=task,
        kind=kind,
        labels=", ".join(map(as_markdown, config.id2label.values())),
        with_code=has_code(folder),
        measured_on=describe_data(measured) if measured else None,
        table=speed_table(measured) if measured else None,
        plot=PLOT if plot else None,
        plot_title=f"{as_markdown(title(measured.metrics[0]))} by layers executed" if plot else None,
        training=markdown_table(("setting", "value"), training.items()) if training else None,
        notes=notes,
    )
    write_whole(folder / "README.md", str(card))
    return card


def as_list(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def backbones_on_hub(config: PreTrainedConfig) -> list[str]:
    """Return the names of the pretrained encoders, but for those that are folders or nothing on the Hub is called."""
    names = [part.text_config._name_or_path for part in getattr(config, "members", None) or [config]]
    return list(dict.fromkeys(name for name in names if is_repo_id(name) and not os.path.exists(name)))


def is_repo_id(name: Any) -> bool:
    """Tell whether a repository on the Hub can have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str)


def describe_backbone(config: PreTrainedConfig, names: list[str]) -> str:
    if not names:
        return f"a {config.text_config.model_type} encoder"
    return f"`{names[0]}`" if is_repo_id(names[0]) else as_markdown(names[0])


def describe_members(config: PreTrainedConfig) -> str:
    parts = []
    for member in config.members:
        number = member.num_hidden_layers
        layers = "1 layer" if number == 1 else f"{number} layers"
        leaves = "" if member.min_exit_layer == number else ", which a text can also leave early"
        parts.append(f"{describe_backbone(member, backbones_on_hub(member))} of {layers}{leaves}")
    return "; then ".join(parts)


def has_code(folder: Path) -> bool:
    """Tell whether the model in a folder brings its code."""
    config = folder / "config.json"
    return config.exists() and "auto_map" in json.loads(config.read_text(encoding="utf-8"))


def describe_data(measured: Measured) -> str:
    rows = f"{measured.rows:,} texts" if measured.rows else "texts"
    where = " ".join(filter(None, [measured.dataset, measured.split and f"({measured.split})"]))
    return f"Measured on {rows}{f' of {as_markdown(where)}' if where else ''}, from one full-depth pass."


def speed_table(measured: Measured) -> str:
    """Return the measured rows as Markdown."""
    columns = {"speed": "speed", **{name: title(name) for name in measured.metrics}}
    columns.update(
        {name: header for name, header in COST_COLUMNS.items() if any(name in row for row in measured.speeds)}
    )
    rows = [[cell(name, row[name]) if name in row else "" for name in columns] for row in measured.speeds]
    return markdown_table(columns.values(), rows)


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(as_markdown(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def cell(name: str, value: float) -> str:
    if name in SHARES and 0 <= value <= 1:
        return f"{value:.1%}"
    if name.endswith("speed_up"):
        return f"{value:.2f}x"
    return f"{value:g}" if name == "speed" else f"{value:.4g}"


def title(name: str) -> str:
    return {"f1": "F1", "macro_f1": "macro F1", "r2": "R²", "matthews_correlation": "Matthews correlation"}.get(
        name, name.replace("_", " ")
    )


def eval_results(measured: Measured, default_speed: float, task: str) -> list[EvalResult] | None:
    """Return the metrics at full depth and at the default speed, for the card's `model-index`."""
    dataset = printable(measured.dataset or "unknown")
    shown = [row for row in measured.speeds if row["speed"] in (0, default_speed)]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=measured.split and printable(measured.split),
            metric_type=name,
            metric_name=f"{title(name)} at speed {row['speed']:g}",
            metric_value=row[name],
        )
        for row in shown
        for name in measured.metrics
        if name in row
    ]
    return results or None


def write_plot(path: Path, measured: Measured, num_layers: int) -> bool:
    """Draw the first metric over the layers executed, and return whether that was possible."""
    rows = measured.curve or measured.speeds
    if len(rows) < 2 or not measured.metrics or any(measured.metrics[0] not in row for row in rows):
        return False
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "pandas", "sklearn")):
        logger.warning('the card has no plot: it needs an extra, pip install "fastbert-hf[evaluation]".')
        return False
    from ..evaluation.figures import plot_speeds, save_png

    save_png(plot_speeds(rows, measured.speeds, measured.metrics[0], num_layers), path)
    return True
