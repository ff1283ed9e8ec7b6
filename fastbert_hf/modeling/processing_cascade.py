"""CascadeProcessor: the tokenizers of a cascade's members, one for all of them or one for each."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file, logging

from .checkpoint_checks import read_config
from .encoded_texts import rows_of
from .families import max_text_tokens
from .stock_checkpoints import DOWNLOAD_ARGUMENTS
from .tokenization import call_tokenizer, check_vocabulary


logger = logging.get_logger(__name__)

# A folder with any of these has a tokenizer; old ones lack tokenizer_config.json.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# What else a tokenizer may have written.
BESIDE_THEM = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja")
# Without a config of its own AutoTokenizer would read the model's, and ask whether to run the code beside it.
ALONE = {"config": PreTrainedConfig(), "trust_remote_code": False}


class CascadeProcessor:
    """
    Encodes texts as the members of a cascade read them, and is saved beside it.

    Args:
        tokenizers (sequence of `PreTrainedTokenizerBase`): One for all members, or one for each.

    Example:

    ```python
    >>> processor = CascadeProcessor.from_members(["org/small-classifier", "org/large-classifier"])
    >>> answers = cascade.predict(processor(["first text", "second text"], truncation=True), speed=0.3)
    >>> processor.save_pretrained("outputs/cascade")
    ```
    """

    def __init__(self, tokenizers: Sequence[PreTrainedTokenizerBase]):
        if isinstance(tokenizers, PreTrainedTokenizerBase) or not tokenizers:
            raise ValueError("tokenizers is a list, of one for all members or one for each: CascadeProcessor([...])")
        self.tokenizers = list(tokenizers)

    @property
    def own_tokenizers(self) -> bool:
        """Whether every member has its own."""
        return len(self.tokenizers) > 1

    def __call__(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None, **kwargs) -> list[Any]:
        """
        Return what `predict` of the cascade takes: each text encoded by the tokenizer, or by that of every member.

        Args:
            texts (sequence of `str`): Texts, or the first ones of pairs.
            text_pairs (sequence of `str`, *optional*): The second ones.
            kwargs: Arguments of the tokenizers, such as `truncation=True`.
        """
        encoded = [rows_of(call_tokenizer(tokenizer, texts, text_pairs, **kwargs)) for tokenizer in self.tokenizers]
        return list(zip(*encoded, strict=True)) if self.own_tokenizers else list(encoded[0])

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """
        Save the tokenizer of the first member, or of all, in the folder, and the others in `member_2`, ... Those that
        a cascade of more members left there are removed.
        """
        for number, tokenizer in enumerate(self.tokenizers, start=1):
            tokenizer.save_pretrained(save_directory if number == 1 else member_folder(save_directory, number))
        number = len(self.tokenizers) + 1
        while os.path.isdir(folder := member_folder(save_directory, number)):
            for name in (*TOKENIZER_FILES, *BESIDE_THEM):
                Path(folder, name).unlink(missing_ok=True)
            if not os.listdir(folder):
                os.rmdir(folder)
            number += 1

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **kwargs) -> CascadeProcessor:
        """
        Load the tokenizers that were saved with a cascade.

        Args:
            name_or_path (`str` or `PathLike`): A folder, or the id of a repository.
            kwargs: Those arguments of `from_pretrained` that say where files are (`revision`, `token`, ...).
        """
        most = number_of_tokenizers(name_or_path, **kwargs)
        inside, tokenizers = kwargs.pop("subfolder", None) or "", []
        while len(tokenizers) != most:
            folder = member_folder(inside, len(tokenizers) + 1) if tokenizers else inside
            tokenizer = load_tokenizer(name_or_path, folder, **{**kwargs, **ALONE})
            if tokenizer is None:
                break
            tokenizers.append(tokenizer)
        if not tokenizers:
            raise OSError(
                f"{name_or_path} has no tokenizer: save those of the members there, as in "
                "CascadeProcessor.from_members([small, large]).save_pretrained(folder)."
            )
        return cls(tokenizers)

    @classmethod
    def from_members(
        cls,
        members: Sequence[str | os.PathLike | PreTrainedModel],
        tokenizers: Sequence[PreTrainedTokenizerBase | None] | None = None,
        **kwargs,
    ) -> CascadeProcessor | None:
        """
        Return the tokenizers of the members of a new cascade. One serves all where they differ in nothing, not even in
        the length at which they cut a text.

        Args:
            members (sequence): As [`CascadeForSequenceClassification.from_members`] takes them.
            tokenizers (sequence, *optional*):
                One for each member. Those of the members' own folders or repositories unless given; needed for loaded
                models that read different vocabularies.
            kwargs: As in [`from_pretrained`].

        Returns:
            [`CascadeProcessor`], or `None` where no tokenizer is known and one may serve all.
        """
        tokenizers = [None] * len(members) if tokenizers is None else tokenizers
        if isinstance(tokenizers, PreTrainedTokenizerBase) or len(tokenizers) != len(members):
            raise ValueError(
                f"tokenizers is a list of one for each of the {len(members)} members: from_members([small, large], "
                "tokenizers=[for_small, for_large])"
            )
        download = {name: value for name, value in kwargs.items() if name in DOWNLOAD_ARGUMENTS}
        tokenizers, configs = list(tokenizers), []
        for index, member in enumerate(members):
            if isinstance(member, PreTrainedModel):
                config = member.config
            else:
                config = AutoConfig.from_pretrained(member, **download)
                tokenizers[index] = tokenizers[index] or load_tokenizer(member, **kwargs)
            configs.append(getattr(config, "text_config", config))
        known = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
        # Where a text is cut decides what is read of it, too.
        limit = max(max_text_tokens(config) for config in configs)
        if len({(fingerprint(tokenizer), min(tokenizer.model_max_length, limit)) for tokenizer in known}) > 1:
            if len(known) < len(members):
                raise ValueError(
                    "some of the members' tokenizers are not known, and the others differ: give tokenizers=[...]."
                )
            return cls(tokenizers)
        sizes = [config.vocab_size for config in configs]
        if len(known) < len(members) and len(set(sizes)) > 1:
            raise ValueError(f"the members read vocabularies of {sizes} tokens: give tokenizers=[...], one for each.")
        return cls([min(known, key=lambda tokenizer: tokenizer.model_max_length)]) if known else None


def member_folder(folder: str | os.PathLike, number: int) -> str:
    """Return where the tokenizer of a member lies, from the second on."""
    return os.path.join(folder, f"member_{number}")


def number_of_tokenizers(name_or_path: str | os.PathLike, **kwargs) -> int | None:
    """Return how many tokenizers a saved cascade has by its config, `None` where no cascade is there."""
    download = {name: value for name, value in kwargs.items() if name in DOWNLOAD_ARGUMENTS}
    path = cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False, **download)
    if path is None:  # the tokenizers were saved by themselves
        return None
    config = read_config(path, lambda file: json.loads(Path(file).read_text(encoding="utf-8")))
    if config.get("model_type") != "fastbert_cascade":
        return None
    return len(config["members"]) if config.get("own_tokenizers") else 1


def warn_of_other_tokenizer(folder: str | os.PathLike, config: PreTrainedConfig) -> None:
    """Warn if a cascade that knows no tokenizer is about to be saved over another checkpoint with one."""
    path = Path(folder, "config.json")
    if not path.is_file() or not any(Path(folder, name).is_file() for name in TOKENIZER_FILES):
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["members"]
    except (ValueError, LookupError, TypeError):  # no cascade, or a broken file
        before = None
    if before != json.loads(config.to_json_string())["members"]:
        logger.warning(
            f"{folder} has the tokenizer of the model that was saved there before, and this cascade will be taken to "
            "read it: save its own there, too, as in tokenizer.save_pretrained(folder)."
        )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what decides which tokens a tokenizer makes of a text, and under which names."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        parts = json.loads(backend.to_str())
        # Set by the last call.
        parts.pop("truncation", None), parts.pop("padding", None)
    return json.dumps([parts, sorted(tokenizer.model_input_names)], sort_keys=True)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None) -> str | None:
    """Return a digest of what decides which tokens a tokenizer makes of a text."""
    if tokenizer is None:
        return None
    parts = [
        fingerprint(own) + str(getattr(own, "truncation_side", ""))
        for own in getattr(tokenizer, "tokenizers", [tokenizer])
    ]
    return sha256("".join(parts).encode()).hexdigest()[:16]


def load_tokenizer(
    name_or_path: str | os.PathLike, subfolder: str = "", config: PreTrainedConfig | None = None, **kwargs
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a folder or repository, `None` where it has none."""
    arguments = {name: value for name, value in kwargs.items() if name in (*DOWNLOAD_ARGUMENTS, "trust_remote_code")}
    arguments.update(subfolder=subfolder, force_download=False)
    download = {name: value for name, value in arguments.items() if name != "trust_remote_code"}
    found = (
        cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **download)
        for name in TOKENIZER_FILES
    )
    return AutoTokenizer.from_pretrained(name_or_path, config=config, **arguments) if any(found) else None


def find_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | CascadeProcessor:
    """Return the tokenizer that lies where a model was loaded from, or those that a new cascade was made with."""
    processor, tokenizer, place = getattr(model, "processor", None), None, model.name_or_path
    revision = getattr(model.config, "_commit_hash", None)
    if processor is None and place and getattr(model.config, "own_tokenizers", False):
        processor = CascadeProcessor.from_pretrained(place, revision=revision)
    if processor is not None:
        return processor if processor.own_tokenizers else processor.tokenizers[0]
    if place:
        tokenizer = load_tokenizer(place, **ALONE, revision=revision)
    if tokenizer is None:
        where = f"there is none in {place}" if place else "it was not loaded from a folder or a repository"
        raise ValueError(
            f"the tokenizer of this {type(model).__name__} is not known, as {where}: give it, as in "
            'pipeline("fast-text-classification", model=model, tokenizer=tokenizer).'
        )
    return tokenizer


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None) -> None:
    """Raise a `ValueError` if a tokenizer cannot be that of a model, or is one where its members need several."""
    if tokenizer is None:
        return
    tokenizers = list(getattr(tokenizer, "tokenizers", [tokenizer]))
    members = getattr(model.config, "members", None) or [model.config]
    if getattr(model.config, "own_tokenizers", False) and not len(tokenizers) == len(members):
        raise ValueError(
            "every member of this cascade has its own tokenizer, and one for all would take the place of the first "
            "one's: give tokenizer=CascadeProcessor.from_members([small, large])."
        )
    if not getattr(model.config, "own_tokenizers", False) and len(tokenizers) > 1:
        raise ValueError(
            f"this model reads what one tokenizer makes of a text, not {len(tokenizers)}: give tokenizer=tokenizer."
        )
    for member, own in zip(members, tokenizers * (len(members) // len(tokenizers)), strict=True):
        check_vocabulary(own, member.text_config)


__all__ = ["CascadeProcessor"]
