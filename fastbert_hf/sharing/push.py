"""`push_to_hub` of models and pipelines: as in Transformers, with a card of their own and, on request, their code."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedTokenizerBase

from .model_card import write_model_card
from .with_code import write_code


def push_to_hub(
    self,
    repo_id: str,
    *,
    with_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """
    Uploads the model to the Hub in one commit, with a model card: of what was measured since it was loaded or trained,
    else the one that the repository has, else one without numbers.

    Args:
        repo_id (`str`): As in `from_pretrained`; the repository is made where there is none.
        with_code (`bool`): Whether to put the code beside the weights, as [`save_with_code`] does.
        tokenizer (*optional*): Uploaded, too. A pipeline brings its own.

        The other arguments are those of `PreTrainedModel.push_to_hub`.

    Returns:
        `huggingface_hub.CommitInfo`
    """
    model = getattr(self, "model", self)
    tokenizer = tokenizer or getattr(self, "tokenizer", None)
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if with_code:
            write_code(Path(folder))
        card = None if getattr(model, "measured", None) else card_on_hub(repo_id, token)
        if card is None:
            write_model_card(folder, model, repo_id=repo_id, tags=tags or ())
        else:
            card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *(tags or ())])) or None
            card.save(Path(folder, "README.md"))
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def card_on_hub(repo_id: str, token: bool | str | None) -> ModelCard | None:
    """The card that the repository has."""
    try:
        return ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        return None
