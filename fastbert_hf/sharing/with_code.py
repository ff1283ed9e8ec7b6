"""Checkpoints that answer without the package: the code of `fastbert_hf/modeling/` beside the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.dynamic_module_utils import get_relative_import_files

from .. import modeling
from ..files import write_whole
from ..modeling.pretrained_fastbert import FastBertPreTrainedModel
from ..modeling.processing_cascade import CascadeProcessor, check_tokenizer
from .model_card import write_model_card


# By the task of a model, where Transformers finds the classes; the installed config drops both on load, as it needs
# neither.
PIPELINES = {
    "text-classification": {
        "fast-text-classification": {
            "impl": "pipeline_fastbert.FastTextClassificationPipeline",
            "pt": ["AutoModelForSequenceClassification"],
            "type": "text",
        }
    },
    "token-classification": {
        "fast-token-classification": {
            "impl": "pipeline_token_classification.FastTokenClassificationPipeline",
            "pt": ["AutoModelForTokenClassification"],
            "type": "text",
        }
    },
    "question-answering": {
        "fast-question-answering": {
            "impl": "pipeline_question_answering.FastQuestionAnsweringPipeline",
            "pt": ["AutoModelForQuestionAnswering"],
            "type": "text",
        }
    },
}
ENCODER = {"AutoConfig": "configuration_fastbert.FastBertConfig", "AutoModel": "modeling_fastbert.FastBertModel"}
AUTO_MAPS = {
    ("fastbert", "text-classification"): {
        **ENCODER,
        "AutoModelForSequenceClassification": "modeling_fastbert.FastBertForSequenceClassification",
    },
    ("fastbert", "token-classification"): {
        **ENCODER,
        "AutoModelForTokenClassification": "modeling_fastbert.FastBertForTokenClassification",
    },
    ("fastbert", "question-answering"): {
        **ENCODER,
        "AutoModelForQuestionAnswering": "modeling_fastbert.FastBertForQuestionAnswering",
    },
    ("fastbert_cascade", "text-classification"): {
        "AutoConfig": "configuration_cascade.CascadeConfig",
        "AutoModel": "modeling_cascade.CascadeForSequenceClassification",
        "AutoModelForSequenceClassification": "modeling_cascade.CascadeForSequenceClassification",
    },
}


def save_with_code(
    model: FastBertPreTrainedModel,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """
    Save a model with the code that it needs, so that it also loads where this package is not installed, by those who
    say `trust_remote_code=True`. With the package installed the same folder loads as any other, with the installed
    classes, and nothing in it is run.

    Args:
        model ([`FastBertForSequenceClassification`] or another model of this package): The model.
        folder (`str` or `PathLike`): Where to save. A model card that is there already stays.
        tokenizer (`PreTrainedTokenizerBase` or [`CascadeProcessor`], *optional*):
            Saved beside it; the pipeline needs one.
        max_shard_size (`int` or `str`): As in `PreTrainedModel.save_pretrained`.

    Example:

    ```python
    >>> save_with_code(model, "outputs/shared", tokenizer=tokenizer)  # or model.push_to_hub(..., with_code=True)
    >>> # elsewhere, without fastbert_hf
    >>> classifier = pipeline("fast-text-classification", model="outputs/shared", trust_remote_code=True)
    ```
    """
    folder = Path(folder)
    if not isinstance(model, FastBertPreTrainedModel):
        raise TypeError(
            f"save_with_code saves FastBERT models, got {type(model).__name__}. Wrap a stock classifier first: "
            "FastBertForSequenceClassification.from_classifier(name); for an adapter give model.merge_and_unload()."
        )
    if model.engine_name != "torch":
        raise ValueError(
            f"code beside graphs would not run them: save this {type(model).__name__} with "
            "model.save_pretrained(folder), or the model that it was made of with its code."
        )
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file: give a folder, as in save_with_code(model, 'outputs/shared').")
    check_tokenizer(model, tokenizer)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_code(folder)
    if (hasattr(model, "exits") or hasattr(model, "members")) and not (folder / "README.md").exists():
        write_model_card(folder, model)


def write_code(folder: Path) -> None:
    """Put the code into the folder of a saved model, and into its config where that is. The config comes last."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    task = config.get("task", "text-classification")
    auto_map, pipelines = AUTO_MAPS[config["model_type"], task], PIPELINES[task]
    for path in code_of([*auto_map.values(), *(pipeline["impl"] for pipeline in pipelines.values())]):
        shutil.copyfile(path, folder / path.name)
    config.update(auto_map=auto_map, custom_pipelines=pipelines)
    write_whole(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def code_of(classes: Iterable[str]) -> set[Path]:
    """
    Return the files that classes need: their own, and what these import of each other.

    Args:
        classes (iterable of `str`): As `auto_map` names them, `"modeling_fastbert.FastBertModel"`.
    """
    code = Path(modeling.__file__).parent
    files = {code / f"{name.partition('.')[0]}.py" for name in classes}
    return files | {Path(needed) for file in files for needed in get_relative_import_files(file)}
