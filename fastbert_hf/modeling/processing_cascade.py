"""CascadeProcessor: the tokenizers of a cascade's members, one for all of them or one for each."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .encoded_texts import rows_of
from .families import max_text_tokens
from .stock_checkpoints import DOWNLOAD_ARGUMENTS


# A folder with any of these has a tokenizer; old ones lack tokenizer_config.json.
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
MEMBER_FOLDER = "member_{}"


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
        encoded = [rows_of(tokenizer(texts, text_pairs, **kwargs)) for tokenizer in self.tokenizers]
        return list(zip(*encoded, strict=True)) if self.own_tokenizers else list(encoded[0])

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Save the tokenizer of the first member, or of all, in the folder, and the others in `member_2`, ..."""
        for number, tokenizer in enumerate(self.tokenizers, start=1):
            folder = os.path.join(save_directory, MEMBER_FOLDER.format(number))
            tokenizer.save_pretrained(save_directory if number == 1 else folder)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **kwargs) -> CascadeProcessor:
        """
        Load the tokenizers that were saved with a cascade.

        Args:
            name_or_path (`str` or `PathLike`): A folder, or the id of a repository.
            kwargs: Those arguments of `from_pretrained` that say where files are (`revision`, `token`, ...).
        """
        inside, tokenizers = kwargs.pop("subfolder", None) or "", []
        # Without a config of theirs AutoTokenizer would read the cascade's, and ask whether to run the code beside it.
        arguments = {**kwargs, "config": PreTrainedConfig(), "trust_remote_code": False}
        while tokenizer := load_tokenizer(
            name_or_path,
            os.path.join(inside, MEMBER_FOLDER.format(len(tokenizers) + 1)) if tokenizers else inside,
            **arguments,
        ):
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


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | CascadeProcessor | None) -> None:
    """Raise where one tokenizer is to be saved beside a cascade whose members each have their own."""
    if not getattr(model.config, "own_tokenizers", False) or tokenizer is None:
        return
    if len(getattr(tokenizer, "tokenizers", ())) != len(model.config.members):
        raise ValueError(
            "every member of this cascade has its own tokenizer, and one for all would take the place of the first "
            "one's: give tokenizer=CascadeProcessor.from_members([small, large])."
        )


__all__ = ["CascadeProcessor"]
