"""`push_to_hub` of models and pipelines: as in Transformers, with a card of their own and, on request, their code."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from ..modeling.processing_cascade import CascadeProcessor, check_tokenizer
from .model_card import as_list, write_model_card
from .with_code import write_code


def push_to_hub(
    self,
    repo_id: str,
    *,
    with_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: str | list[str] | None = None,
) -> CommitInfo:
    """
    Upload the model to the Hub in one commit, with a model card: the one that the repository has already, else one of
    what [`ExitTrainer`] measured when it last evaluated this model, else one without numbers.

    Args:
        repo_id (`str`): As in `from_pretrained`; the repository is made where there is none.
        with_code (`bool`): Whether to put the code beside the weights, as [`save_with_code`] does.
        tokenizer (`PreTrainedTokenizerBase` or [`CascadeProcessor`], *optional*):
            Uploaded, too; the pipeline needs one. A pipeline that is pushed brings its own.

        The other arguments are those of `PreTrainedModel.push_to_hub`.

    Returns:
        `huggingface_hub.CommitInfo`
    """
    model = getattr(self, "model", self)
    tokenizer = tokenizer or getattr(self, "tokenizer", None)
    check_tokenizer(model, tokenizer)
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if with_code:
            write_code(Path(folder))
        card = card_on_hub(repo_id, revision, token)
        if card is None:
            write_model_card(folder, model, repo_id=repo_id, tags=tags or ())
        elif tags:
            card.data.tags = list(dict.fromkeys([*as_list(card.data.tags), *as_list(tags)]))
            card.save(Path(folder, "README.md"))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            token=token,
            revision=revision,
            create_pr=create_pr,
        )


def card_on_hub(repo_id: str, revision: str | None, token: bool | str | None) -> ModelCard | None:
    """Return the card that the repository has, `None` where there is none."""
    try:
        return ModelCard.load(hf_hub_download(repo_id, "README.md", revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return None
