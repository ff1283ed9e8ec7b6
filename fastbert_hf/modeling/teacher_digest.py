"""Which teacher the students learnt from: a digest of its weights, and the check that these are still the same."""

from __future__ import annotations

import re
from hashlib import sha256

import torch
from torch import nn
from transformers import PreTrainedModel


# Values of each parameter that are looked at: training changes nearly all of them, and so few take milliseconds.
SAMPLE = 1024
# Where modules come from whose parameters are all that they compute with. Those of adapters, quantisers and sharding
# come from elsewhere.
PLAIN_MODULES = ("torch.nn.modules.", "transformers.models.", "transformers.activations")
PLAIN_MODULES += (f"{__name__.rpartition('.')[0]}.",)
# Of dtypes, by what a digest calls them, narrowest first. A model is in int8 if any of its weights are.
BITS = {"int8": 8, "bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}

# By the bytes of a value, as what its bits are added up.
BITS_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# In place of a digest, which adapters have not.
NEWER_ADAPTERS = "adapters that the students do not know"


def teacher_digest(model: PreTrainedModel) -> str | None:
    """
    Return a digest of the weights that the students learn from, those of the backbone and of the teacher, as
    `config.distilled_for` keeps it: `"float32:0123456789abcdef"`.

    Equal values give equal digests wherever they lie, whatever the parameters are called and whether some are the same
    tensor. The digest names the narrowest dtype that holds the values, so that a model in float32 and the same in
    float64 agree, and weights that were rounded to bfloat16 show it even if they are in float32 again.

    Args:
        model ([`FastBertForSequenceClassification`]): The model itself, not what wraps it.

    Returns:
        `str`, or `None` where the parameters do not tell what the model computes: it has adapters, is quantised, or
        its weights lie elsewhere.
    """
    parts = [model.fastbert, model.teacher]
    if model.teacher.pooler is None:
        parts.append(model.shared_pooler)
    return digest_of_modules(parts)


def digest_of_modules(parts: list[nn.Module], whole: bool = False) -> str | None:
    """
    Return a digest of the weights of some modules, as [`teacher_digest`] describes it. A `whole` one looks at every
    value, as it is stored, by its sum as a whole number, which no order of adding up changes.
    """
    if any(not type(module).__module__.startswith(PLAIN_MODULES) for part in parts for module in part.modules()):
        return None
    weights = [weight for part in parts for weight in weights_of(part)]
    is_here = (
        type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta and weight.numel() > 0
        for weight in weights
    )
    if not weights or not all(is_here):  # replicas of DataParallel have none
        return None
    samples = [weight.detach().flatten()[:: weight.numel() // SAMPLE | 1].cpu().double() for weight in weights]
    values = torch.cat(samples)
    floats = [name for name in BITS if getattr(torch, name).is_floating_point]
    holds = (name for name in floats if torch.equal(values.to(getattr(torch, name)).double(), values))
    dtype = next(holds, "float64")  # NaN equals nothing
    if any(weight.dtype is torch.int8 for weight in weights):
        dtype = "int8"
    # Neither names nor order count, which change between versions of Transformers.
    digests = sorted({sha256(sample.numpy().astype("<f8").tobytes()).digest() for sample in samples})
    if whole:
        sums = (
            weight.detach().view(BITS_AS_INTEGERS[weight.element_size()]).sum(dtype=torch.int64) for weight in weights
        )
        digests += sorted({str(int(total)).encode() for total in sums})
    return f"{dtype}:{sha256(b''.join(digests)).hexdigest()[:16]}"


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    """Return all that a module computes with: its parameters, and the int8 weights, which are buffers."""
    int8 = [part for part in module.modules() if hasattr(part, "weight_scale")]
    return [*module.parameters(), *(weight for part in int8 for weight in (part.weight, part.weight_scale))]


def is_digest(value: object) -> bool:
    """Tell whether this is written as a digest is."""
    return isinstance(value, str) and re.fullmatch(f"({'|'.join(BITS)}):[0-9a-f]{{16}}", value) is not None


def tells_of_training(found: str, wanted: str) -> bool:
    """Tell whether a digest differs from the one that was wanted, and not because weights were rounded."""
    (of_found, _, _), (of_wanted, _, _) = found.partition(":"), wanted.partition(":")
    was_rounded = of_found != of_wanted and BITS[of_found] <= BITS.get(of_wanted, 64)
    return found != wanted and not was_rounded


def has_newer_adapters(model: PreTrainedModel) -> bool:
    """Tell whether LoRA adapters change the backbone or the teacher, but not the students, which learnt before."""
    return any(map(is_adapted, (model.fastbert, model.teacher))) and not any(map(is_adapted, model.student_modules()))


def is_adapted(module: nn.Module) -> bool:
    """Tell whether LoRA matrices or the copies that PEFT trains in full make a module compute something else."""
    for part in module.modules():
        for copied in getattr(part, "modules_to_save", None) or ():
            pairs = zip(part.modules_to_save[copied].parameters(), part.original_module.parameters(), strict=True)
            if any(not torch.equal(*pair) for pair in pairs):
                return True
    # As it is made, the second matrix is zero.
    return any(bool(weight.any()) for name, weight in module.named_parameters() if ".lora_B." in f".{name}")


def version_of(weight: torch.Tensor) -> int:
    """Return how often a weight was changed in place; 0 where that is not counted."""
    return 0 if weight.is_inference() else weight._version


class ChecksStudents:
    """
    Part of a model with students: refuses their answers once the teacher that they learnt from has changed.

    The digest is made at the first call that may ask a student, and made anew after `train()`, `eval()`, loading, and
    a loss with gradients.
    """

    _teacher_digest: str | None = None
    _weights_digest: tuple[tuple, dict[bool, str]] | None = None

    def weights_digest(self, whole: bool = False) -> str:
        """
        Return a digest of all weights, made as that of the teacher is; empty where there is none. It is made anew
        where a weight was changed in place or is another one.
        """
        weights = tuple((weight.data_ptr(), version_of(weight)) for weight in weights_of(self))
        known = self._weights_digest
        if known is None or known[0] != weights:
            known = self._weights_digest = (weights, {})
        if whole not in known[1]:
            parts = [self.fastbert, *self.exits, *filter(None, [self.shared_pooler])]
            known[1][whole] = digest_of_modules(parts, whole) or ""
        return known[1][whole]

    def checked_thresholds(self, thresholds: torch.Tensor) -> torch.Tensor:
        """
        Return the thresholds of a call, `[texts, L]`, as they are.

        Raises:
            ValueError: If a student may answer, and `config.distilled_for` says that it learnt from other weights.
        """
        wanted = self.config.distilled_for
        if wanted is None or not thresholds[:, :-1].any():
            return thresholds
        found = self._teacher_digest
        if found is None:
            found = teacher_digest(self) or (NEWER_ADAPTERS if has_newer_adapters(self) else "")
        if not self.training:
            self._teacher_digest = found
        if found == NEWER_ADAPTERS or (found and tells_of_training(found, wanted)):
            raise ValueError(
                "The backbone or the teacher of this model was trained after the students, which still answer as the "
                f"old one did (config.distilled_for={wanted!r}, now {found!r}). Distil again, with "
                "SelfDistillationTrainer(model, SelfDistillationArguments('outputs'), train_dataset=texts).train(); "
                "or let the teacher answer: speed=0. To use the students all the same: "
                "model.config.distilled_for = None"
            )
        return thresholds

    def train(self, mode: bool = True):  # also eval(), which those call who put adapters on a model
        self._teacher_digest = self._weights_digest = None
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):  # also as a part of another module
        self._teacher_digest = self._weights_digest = None
        return super()._load_from_state_dict(*args, **kwargs)
