"""
What the weights of a checkpoint are, by the headers of their files, held against the model that its config describes.

The numbers inside the weights are not read: a model whose logits are not finite refuses to answer.
"""

from __future__ import annotations

import math
import re

from transformers import PreTrainedConfig

from .checkpoint_checks import estimated_parameters


# What a config may ask for beyond twice what its weights hold: the exits of a checkpoint that brings none.
SPARE_PARAMETERS = 10_000_000
IS_EXIT = re.compile(r"(exits|shared_pooler)\.").match
# What checkpoints may hold beside: a stock pooler that no exit reads, and ids that are counted anew.
HARMLESS = r"backbone\.(pooler\.(dense\.)?(weight|bias)|embeddings\.(position_ids|token_type_ids))$"
FLOATS = ("F64", "F32", "F16", "BF16")
IS_HARMLESS = re.compile(rf"(members\.\d+\.)?(fastbert\.)?{HARMLESS}").match


def check_total_size(shapes: dict[str, tuple[int, ...]], config: PreTrainedConfig, is_quantised: bool) -> None:
    """Raise unless weights of these shapes could be those of the model, so that a small file builds no huge one."""
    members = getattr(config, "members", None) or [config]
    parameters = sum(estimated_parameters({**own.to_dict(), "num_labels": own.num_labels}) for own in members)
    # Quantised weights are packed, up to eight into one number.
    held = sum(map(math.prod, shapes.values())) * (8 if is_quantised else 1)
    layers = sum(own.num_hidden_layers for own in members)  # each has tensors of its own, or its exit has
    if parameters > 2 * held + SPARE_PARAMETERS * len(members) or layers > len(shapes):
        raise ValueError(
            f"the config describes a model of {layers} layers and about {parameters:,} parameters, but the weights "
            f"hold {held:,} in {len(shapes)} tensors: load the config that was saved with them."
        )


def check_weights(
    shapes: dict[str, tuple[int, ...]],
    wanted: dict[str, tuple[int, ...]],
    prefix: str,
    needs_exits: bool = True,
    check_shapes: bool = True,
    is_quantised: bool = False,
) -> None:
    """
    Raise a `ValueError` unless a file holds every weight that the model wants, in its shape, and no others.

    Args:
        shapes (`dict`): Those of the tensors in the file, by their names.
        wanted (`dict`): Those of the model's.
        prefix (`str`): What stands before the names of an encoder inside a classifier.
        needs_exits (`bool`): Whether a classifier must not be built on an encoder alone, with all its exits new.
        check_shapes (`bool`): Whether shapes matter, not names alone.
        is_quantised (`bool`): Whether a module may hold its weight in parts and shapes of its own.
    """
    found = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    wanted = {name.removeprefix(prefix): shape for name, shape in wanted.items()}
    faults = [f"hold {name} twice" for name in found if name in shapes and f"{prefix}{name}" in shapes]
    # An encoder needs no exits.
    if not any(map(IS_EXIT, wanted)) or not (needs_exits or any(map(IS_EXIT, found))):
        found, wanted = ({name: shape for name, shape in of.items() if not IS_EXIT(name)} for of in (found, wanted))
    if is_quantised:
        found, wanted = without_packed(found, wanted)
    faults += [f"lack {name}" for name in wanted if name not in found]
    faults += [f"also hold {name}" for name in found if name not in wanted and not IS_HARMLESS(name)]
    if check_shapes:
        faults += [
            f"hold {name} of shape {list(found[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if found.get(name, shape) != shape
        ]
    if faults:
        listed = ", ".join(faults[:3])[:400] + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise ValueError(
            f"the weights are not those of the model that the config describes: they {listed}. Load the config that "
            "was saved with them; ignore_mismatched_sizes=True makes what differs in shape, such as exits, anew."
        )


def check_dtypes(dtypes: dict[str, str]) -> None:
    """
    Raise a `ValueError` unless weights are numbers in floating point, or int8 with float32 scales beside them.

    Args:
        dtypes (`dict`): Those of the tensors in a file, by their names, as safetensors calls them.
    """
    for name, dtype in dtypes.items():
        is_scaled = f"{name}_scale" in dtypes
        wanted = ("I8",) if is_scaled else ("F32",) if name.endswith(".weight_scale") else FLOATS
        if dtype not in wanted and not IS_HARMLESS(name):
            raise ValueError(
                f"the weights hold {name} in {dtype}, where {' or '.join(wanted)} was expected: save the checkpoint "
                "again with model.save_pretrained(folder)."
            )


def without_packed(
    found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """
    Leave out the modules whose weight a quantiser has packed: `query.weight` is then `query._weight_qdata` and
    `query._weight_scale` (torchao), or has another shape and `query.weight.absmax` beside it (bitsandbytes).
    """
    modules = {name.rpartition(".")[0] for name in wanted}

    def module_of(name: str) -> str | None:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name or None

    packed = {module_of(name) for name in found if name not in wanted} - {None}
    parts = [{name: shape for name, shape in of.items() if module_of(name) not in packed} for of in (found, wanted)]
    return parts[0], parts[1]
