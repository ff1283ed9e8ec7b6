"""
What an adapter_config.json claims, checked before PEFT makes anything of it.

Where PEFT is installed, Transformers loads an adapter that it finds beside a model without being asked. Here one is
loaded only where the caller names it: a folder or repository that is an adapter and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    cached_file,
    is_peft_available,
)
from transformers.utils.peft_utils import find_adapter_config_file

from .checkpoint_checks import shortened
from .checkpoint_files import read_shapes


LARGEST_RANK = 1_024
LARGEST_ADAPTER_CONFIG = 1_000_000  # bytes
MOST_NAMES = 1_000
# Names of modules. PEFT takes anything else for a regular expression, and some of those run for minutes.
IS_PLAIN = re.compile(r"[\w.-]{1,200}").fullmatch
IS_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?").fullmatch
# Names that differ from module to module, and numbers for them.
PATTERNS = ("rank_pattern", "alpha_pattern")
# What says where the adapter is from, and changes nothing.
REMARKS = ("auto_mapping", "base_model_name_or_path", "peft_version", "revision")


def find_adapter(place: str | os.PathLike, **download) -> str | None:
    """Return the adapter_config.json of a folder or repository where Transformers would load it, else `None`."""
    if not is_peft_available() or os.path.isfile(place):
        return None
    return find_adapter_config_file(place, **download)


def base_of_adapter(
    name_or_path: str | os.PathLike, adapter_arguments: dict[str, Any], **download
) -> tuple[str | os.PathLike, bool]:
    """
    Return where the base of an adapter is, once the adapter is checked, or the place itself where none would be
    loaded; and whether there is one.

    Args:
        name_or_path (`str` or `PathLike`): What the caller of `from_pretrained` gives, or `AutoModel` makes of it.
        adapter_arguments (`dict`): The `adapter_kwargs` of `from_pretrained`.
        download: Says where files are.
    """
    # Auto classes go to the base themselves, and say where they found the adapter.
    place = adapter_arguments.get("_adapter_model_path") or name_or_path
    download |= {
        name: value for name, value in adapter_arguments.items() if name in ("token", "revision", "subfolder")
    }
    file = find_adapter(place, **download)
    if file is None:
        return name_or_path, False
    find_file = partial(cached_file, place, _raise_exceptions_for_missing_entries=False, **download)
    if find_file(CONFIG_NAME) is not None:
        raise ValueError(
            f"{place} holds a whole model and an {ADAPTER_CONFIG_NAME} beside it, which nobody asked for. Move the "
            "adapter (adapter_*) to a folder of its own, and load it by name: "
            "PeftModel.from_pretrained(FastBertForSequenceClassification.from_pretrained(model), adapter)"
        )
    try:
        base = check_adapter(file)
        if not os.path.isdir(place) and os.path.exists(base):
            raise ValueError(f"base_model_name_or_path={shortened(base)} is a place on this machine.")
        weights = find_file(ADAPTER_SAFE_WEIGHTS_NAME)
        if weights is None:
            raise ValueError(f"it has no {ADAPTER_SAFE_WEIGHTS_NAME}, and a .bin can run code when it is opened.")
    except ValueError as error:
        raise ValueError(
            f"{place} is an adapter that from_pretrained does not load: {error} If you trust it, load it with PEFT on "
            "the model that you know to be its base: PeftModel.from_pretrained(model, adapter)"
        ) from error
    read_shapes([weights])
    return (base if place == name_or_path else name_or_path), True


def check_adapter(file: str | os.PathLike) -> str:
    """Return the base model that an adapter_config.json names; raise a `ValueError` unless it is a plain LoRA."""
    size = os.path.getsize(file)
    if size > LARGEST_ADAPTER_CONFIG:
        raise ValueError(f"{ADAPTER_CONFIG_NAME} has {size:,} bytes, but at most {LARGEST_ADAPTER_CONFIG:,} are read.")
    try:
        adapter = json.loads(Path(file).read_text(encoding="utf-8"))
    except RecursionError:
        adapter = None
    if not isinstance(adapter, dict) or adapter.get("peft_type") != "LORA":
        raise ValueError(f"{ADAPTER_CONFIG_NAME} does not say peft_type='LORA'.")
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not (os.path.isdir(base) or IS_REPOSITORY(base)):
        raise ValueError(f"base_model_name_or_path={shortened(base)} is no folder and no repository.")
    for name, value in adapter.items():
        if name not in REMARKS and not is_plain_setting(name, value):
            raise ValueError(
                f"{shortened(name)}={shortened(value)} is none of the settings that are read here: numbers, and "
                f"up to {MOST_NAMES:,} names of modules (no patterns)."
            )
    for rank in (adapter.get("r"), *(adapter.get("rank_pattern") or {}).values()):
        if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
            raise ValueError(f"r={shortened(rank)} must be a whole number from 1 to {LARGEST_RANK:,}.")
    return base


def is_plain_setting(name: str, value: Any) -> bool:
    """Tell whether PEFT can read a setting in bounded time: a number, a name, or a short list of them."""
    if isinstance(value, dict):
        is_known = not value or name in PATTERNS
        return is_known and len(value) <= MOST_NAMES and all(map(is_plain, (*value, *value.values())))
    if isinstance(value, list):
        return len(value) <= MOST_NAMES and all(map(is_plain, value))
    return is_plain(value)


def is_plain(value: Any) -> bool:
    """Tell whether a value is a number, a switch, nothing, or the name of a module."""
    if isinstance(value, str):
        return IS_PLAIN(value) is not None
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))
