"""Checkpoints that answer without the package: the code of `fastbert_hf/modeling/` beside the weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import modeling
from .model_card import write_model_card


MODELING_FILES = sorted(path for path in Path(modeling.__file__).parent.glob("*.py") if path.name != "__init__.py")
# Where Transformers finds the classes; the installed config drops both on load, as it needs neither.
CODE_FIELDS = {
    "auto_map": {
        "AutoConfig": "configuration_fastbert.FastBertConfig",
        "AutoModel": "modeling_fastbert.FastBertModel",
        "AutoModelForSequenceClassification": "modeling_fastbert.FastBertForSequenceClassification",
    },
    "custom_pipelines": {
        "fast-text-classification": {
            "impl": "pipeline_fastbert.FastTextClassificationPipeline",
            "pt": ["AutoModelForSequenceClassification"],
            "type": "text",
        }
    },
}


def save_with_code(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    **kwargs,
) -> None:
    """
    Saves a model with the code that it needs, so that it also loads where this package is not installed, by those who
    say `trust_remote_code=True`. With the package installed the same folder loads as any other, with the installed
    classes, and nothing in it is run.

    Args:
        model ([`FastBertForSequenceClassification`] or [`FastBertModel`]): The model.
        folder (`str` or `PathLike`): Where to save. A model card that is there already stays.
        tokenizer (*optional*): Saved beside it; the pipeline needs one.
        push_to_hub (`bool`): Whether to upload the folder, too.
        repo_id (`str`, *optional*): Where to; the folder's name unless given.
        kwargs: As in `PreTrainedModel.save_pretrained`, and with `push_to_hub=True` as in `push_to_hub`.

    Example:

    ```python
    >>> save_with_code(model, "outputs/shared", tokenizer=tokenizer)
    >>> # elsewhere, without fastbert_hf
    >>> classifier = pipeline(model="outputs/shared", trust_remote_code=True, speed=0.5)
    ```
    """
    folder = Path(folder)
    if getattr(getattr(model, "config", None), "model_type", None) != "fastbert":
        raise TypeError(
            f"save_with_code saves FastBERT models, got {type(model).__name__}. Wrap yours first: "
            "FastBertForSequenceClassification.from_classifier(name)"
        )
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file: give a folder, as in save_with_code(model, 'outputs/shared').")
    if push_to_hub:
        model.push_to_hub(repo_id or folder.name, with_code=True, tokenizer=tokenizer, **kwargs)
    model.save_pretrained(folder, max_shard_size=kwargs.get("max_shard_size", "50GB"))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_code(folder)
    if not (folder / "README.md").exists():
        write_model_card(folder, model)


def write_code(folder: Path) -> None:
    """Puts the code into the folder of a saved model, and into its config where it is. The config comes last."""
    for path in MODELING_FILES:
        shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    part = folder / "config.json.part"
    part.write_text(json.dumps({**config, **CODE_FIELDS}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, folder / "config.json")
