"""Checkpoints that answer without the package: the code of `fastbert_hf/modeling/` beside the weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .. import modeling
from ..modeling.cascade_inputs import check_tokenizer
from ..modeling.pretrained_fastbert import FastBertPreTrainedModel
from .model_card import write_model_card


MODELING_FILES = sorted(path for path in Path(modeling.__file__).parent.glob("*.py") if path.name != "__init__.py")
# Where Transformers finds the classes; the installed config drops both on load, as it needs neither.
PIPELINE = {
    "fast-text-classification": {
        "impl": "pipeline_fastbert.FastTextClassificationPipeline",
        "pt": ["AutoModelForSequenceClassification"],
        "type": "text",
    }
}
AUTO_MAPS = {
    "fastbert": {
        "AutoConfig": "configuration_fastbert.FastBertConfig",
        "AutoModel": "modeling_fastbert.FastBertModel",
        "AutoModelForSequenceClassification": "modeling_fastbert.FastBertForSequenceClassification",
    },
    "fastbert_cascade": {
        "AutoConfig": "configuration_cascade.CascadeConfig",
        "AutoModel": "modeling_cascade.CascadeForSequenceClassification",
        "AutoModelForSequenceClassification": "modeling_cascade.CascadeForSequenceClassification",
    },
}


def save_with_code(
    model: FastBertPreTrainedModel,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """
    Saves a model with the code that it needs, so that it also loads where this package is not installed, by those who
    say `trust_remote_code=True`. With the package installed the same folder loads as any other, with the installed
    classes, and nothing in it is run.

    Args:
        model ([`FastBertForSequenceClassification`] or another model of this package): The model.
        folder (`str` or `PathLike`): Where to save. A model card that is there already stays.
        tokenizer (*optional*): Saved beside it; the pipeline needs one.
        max_shard_size (`int` or `str`): As in `PreTrainedModel.save_pretrained`.

    Example:

    ```python
    >>> save_with_code(model, "outputs/shared", tokenizer=tokenizer)  # or model.push_to_hub(..., with_code=True)
    >>> # elsewhere, without fastbert_hf
    >>> classifier = pipeline(model="outputs/shared", trust_remote_code=True, speed=0.5)
    ```
    """
    folder = Path(folder)
    if not isinstance(model, FastBertPreTrainedModel):
        raise TypeError(
            f"save_with_code saves FastBERT models, got {type(model).__name__}. Wrap a stock classifier first: "
            "FastBertForSequenceClassification.from_classifier(name); for an adapter give model.merge_and_unload()."
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
    """Puts the code into the folder of a saved model, and into its config where it is. The config comes last."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for path in MODELING_FILES:
        # A cascade needs all of them, a single model only its own.
        if "cascade" in config["model_type"] or "cascade" not in path.name:
            shutil.copyfile(path, folder / path.name)
    part = folder / "config.json.part"
    config.update(auto_map=AUTO_MAPS[config["model_type"]], custom_pipelines=PIPELINE)
    part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, folder / "config.json")
