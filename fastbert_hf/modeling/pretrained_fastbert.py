"""FastBertPreTrainedModel: how the FastBERT models are loaded, and their attention settings."""

from __future__ import annotations

import copy
import os
from typing import Any, Self

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import logging
from transformers.utils.hub import resolve_revision

from .adapter_checks import base_of_adapter
from .checkpoint_checks import explained
from .checkpoint_files import find_weights, read_headers
from .configuration_fastbert import FastBertConfig
from .engine import beats_float32
from .int8_layers import has_int8_layers, int8_scales, put_int8_layers
from .int8_quantizer import METHOD, FastBertInt8Config
from .packed_attention import ATTENTION_KERNELS
from .stock_checkpoints import DOWNLOAD_ARGUMENTS
from .teacher_digest import teacher_digest, tells_of_training
from .weight_checks import HARMLESS, IS_EXIT, check_dtypes, check_total_size, check_weights


logger = logging.get_logger(__name__)


class FastBertPreTrainedModel(PreTrainedModel):
    """Loading and attention settings that the FastBERT models share."""

    config_class = FastBertConfig
    base_model_prefix = "fastbert"
    engine_name = "torch"  # what runs the layers, by which certificates know it
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    # The forward takes no loss keywords, so gradient accumulation averages the micro-batches.
    accepts_loss_kwargs = False
    # Of int8 weights, in whatever dtype the rest is.
    _keep_in_fp32_modules_strict = frozenset({"weight_scale"})
    # A stock pooler and the like, which no exit reads: Transformers need not report them.
    _keys_to_ignore_on_load_unexpected = [HARMLESS]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Self:
        """
        Load a model as [`PreTrainedModel.from_pretrained`] does, from safetensors only. The config and the headers of
        the weights are checked before the model is built, so that a broken or hostile checkpoint costs one error.

        A model that was saved in half precision is loaded in float32 where the processor is slower in half precision,
        which is measured, unless `dtype` says what it shall be; `"auto"` keeps it as it was saved.

        Args:
            pretrained_model_name_or_path (`str` or `PathLike`):
                A folder, or the id of a repository: a model, or a LoRA adapter that names its base.
            kwargs: As in Transformers, without `use_safetensors=False`.

        Returns:
            The model, and with `output_loading_info=True` a dict beside it, as in Transformers.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError(
                "FastBERT checkpoints are safetensors only, as a .bin can run code when it is opened: leave out "
                "use_safetensors=False."
            )
        is_adapter, wants_info = False, kwargs.pop("output_loading_info", False)
        if pretrained_model_name_or_path is None:
            if kwargs.get("state_dict") is not None and isinstance(kwargs.get("config"), PreTrainedConfig):
                shapes = {name: tuple(weight.shape) for name, weight in kwargs["state_dict"].items()}
                cls._check_weights(shapes, kwargs["config"], kwargs)
        elif not kwargs.get("gguf_file"):
            kwargs, is_adapter = cls._check_checkpoint(pretrained_model_name_or_path, kwargs)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        # The headers tell nothing of names that a key_mapping changes, of weights inside of quantised modules and of
        # adapters.
        missing = sorted(name for name in info["missing_keys"] if is_adapter or not IS_EXIT(name))
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no weights for {', '.join(missing[:3])}"
                f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}: save the checkpoint again."
            )
        if any(bool((scale <= 0).any()) for scale in int8_scales(model)):
            raise ValueError(
                f"{pretrained_model_name_or_path} has int8 weights whose scale is not above 0: save the checkpoint "
                "again."
            )
        if has_int8_layers(model) and not model.hf_quantizer.pre_quantized:
            for part in taught_parts(model):
                part.config.distilled_for = teacher_digest(part)  # which it will not have once it is trained on
        if kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
            use_faster_dtype(model)
        # Loading puts new parameters in place of the frozen ones.
        for module in model.modules():
            if hasattr(module, "_freeze_students"):
                module._freeze_students()
        return (model, info) if wants_info else model

    @classmethod
    def _check_checkpoint(cls, name_or_path: str | os.PathLike, kwargs: dict) -> tuple[dict, bool]:
        """
        Check the files that `from_pretrained` is about to load; return its keywords for these very files, and whether
        an adapter is among them.
        """
        download = {name: kwargs[name] for name in DOWNLOAD_ARGUMENTS if name in kwargs}
        base, is_adapter = base_of_adapter(name_or_path, kwargs.get("adapter_kwargs") or {}, **download)
        if base == name_or_path:
            places = {name: download.get(name) for name in ("token", "cache_dir")}
            offline = bool(download.get("local_files_only"))
            revision = resolve_revision(base, download.get("revision"), local_files_only=offline, **places)
            download["revision"] = kwargs["revision"] = revision
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            names = {*cls.config_class.__dataclass_fields__, "num_labels"} - {"dtype"}
            fields = {name: value for name, value in kwargs.items() if name in names}
            config = cls.config_class.from_pretrained(config or base, **download, **fields)
        weights_name = getattr(config, "transformers_weights", None)
        files = find_weights(base, weights_name, kwargs.get("variant"), **download)
        headers = read_headers(files)
        cls._check_weights({name: shape for name, (shape, _) in headers.items()}, config, kwargs)
        if settings_of_quantiser(config).get("quant_method") == METHOD or not is_quantised_config(config):
            check_dtypes({name: dtype for name, (_, dtype) in headers.items()})
        # The files were just downloaded.
        return {**kwargs, "force_download": False}, is_adapter

    @classmethod
    def _check_weights(cls, shapes: dict[str, tuple[int, ...]], config: PreTrainedConfig, kwargs: dict) -> None:
        """Raise unless weights of these shapes are those of the model that `from_pretrained` is about to build."""
        is_quantised = is_quantised_config(config)
        check_total_size(shapes, config, is_quantised)
        with torch.device("meta"), explained("the model that the config describes cannot be built"):
            model = cls(copy.deepcopy(config))
        if is_quantised and settings_of_quantiser(config)["quant_method"] == METHOD:
            settings = FastBertInt8Config(**settings_of_quantiser(config))
            put_int8_layers(model, settings.modules_to_not_convert)
            is_quantised = False  # all that is saved is known
        if kwargs.get("key_mapping"):
            return
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        check_weights(
            shapes,
            wanted,
            prefix=f"{FastBertPreTrainedModel.base_model_prefix}.",
            # Saved as an encoder, a checkpoint is one; a classifier without its exits has lost them.
            needs_exits=cls.__name__ in (config.architectures or ()),
            check_shapes=not kwargs.get("ignore_mismatched_sizes"),
            is_quantised=is_quantised,
        )

    def use_int8_layers(self, modules_to_not_convert: list[str] | None = None) -> list[str]:
        """
        Put int8 layers in place of the linear layers and the word embeddings of the backbone, in place, as
        `quantization_config=FastBertInt8Config(...)` does when a model is loaded.

        Args:
            modules_to_not_convert (`list[str]`, *optional*): As in [`FastBertInt8Config`].

        Returns:
            `list` of `str`: The names of what was replaced.
        """
        settings = FastBertInt8Config(modules_to_not_convert)
        if is_quantised_config(self.config) or has_int8_layers(self):
            raise ValueError("the model is quantised already: load the one in float32.")
        taught = taught_parts(self)
        digests = [teacher_digest(part) for part in taught]
        replaced = self._put_int8_layers(settings.modules_to_not_convert)
        self.config.quantization_config = settings
        for part, digest in zip(taught, digests, strict=True):
            if digest is not None and not tells_of_training(digest, part.config.distilled_for):
                part.config.distilled_for = teacher_digest(part)
            part.train(part.training)  # forgets the digest
        return replaced

    def _put_int8_layers(self, modules_to_not_convert: list[str]) -> list[str]:
        return put_int8_layers(self, modules_to_not_convert)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any):
        """Save the model as [`PreTrainedModel.save_pretrained`] does, unless it could not be loaded again."""
        if has_int8_layers(self) and settings_of_quantiser(self.config).get("quant_method") != METHOD:
            raise ValueError(
                "a part of the model has int8 layers, or it is a part of a model that has, which its config does not "
                "say: convert what you save as a whole, with use_int8_layers()."
            )
        return super().save_pretrained(save_directory, *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        requested_attention = requested_attention or next(iter(ATTENTION_KERNELS))
        if requested_attention not in ATTENTION_KERNELS:
            raise ValueError(
                f"attn_implementation={requested_attention!r} is not available inside packed batches; "
                f"choose one of {', '.join(ATTENTION_KERNELS)}."
            )
        return requested_attention

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False):
        """
        Choose the kernel that attends inside each text, `"sdpa"` or `"eager"`. The backbone itself keeps the packed
        attention: with a stock one the texts of a batch would read each other.
        """
        if isinstance(attn_implementation, dict):
            given = attn_implementation
            attn_implementation = given.get("", given.get("text_config", self.config._attn_implementation))
        self.config._attn_implementation_internal = self.get_correct_attn_implementation(attn_implementation)


def taught_parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """Return the model, or the members of a cascade, whose students know their teacher."""
    return [
        part
        for part in model.modules()
        if getattr(part, "teacher", None) is not None and part.config.distilled_for is not None
    ]


def use_faster_dtype(model: PreTrainedModel) -> None:
    """Turn a model in half precision into float32, in place, where that is faster on its processor."""
    dtype, devices = model.dtype, {parameter.device.type for parameter in model.parameters()}
    is_foreign = getattr(model, "is_quantized", False) and not has_int8_layers(model)
    if dtype not in (torch.float16, torch.bfloat16) or is_foreign or devices != {"cpu"} or beats_float32(dtype):
        return
    logger.warning_once(
        f"The model was saved in {dtype}, in which this processor is slower than in float32, so it is loaded in "
        f"float32. To keep it as it is: from_pretrained(..., dtype={dtype})"
    )
    torch.nn.Module.float(model)  # Transformers' own refuses int8 weights, which are not touched
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config.dtype = torch.float32


def settings_of_quantiser(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what a config, or the backbone's, says of packed weights; nothing where they are not."""
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    return settings.to_dict() if hasattr(settings, "to_dict") else settings or {}


def is_quantised_config(config: PreTrainedConfig) -> bool:
    """Tell whether weights are packed in a way that Transformers knows, by the config or the backbone's."""
    settings = settings_of_quantiser(config)
    return bool(settings) and AutoHfQuantizer.supports_quant_method(settings)


__all__ = ["FastBertPreTrainedModel"]
