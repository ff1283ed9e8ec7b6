"""FastBERT for Hugging Face Transformers. Importing the package registers its models and its pipeline."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .engines.exported_models import FastBertOnnx, FastBertOpenVino
from .modeling.configuration_cascade import CascadeConfig
from .modeling.configuration_fastbert import FastBertConfig
from .modeling.int8_quantizer import FastBertInt8Config
from .modeling.modeling_cascade import CascadeForSequenceClassification
from .modeling.modeling_fastbert import (
    FastBertForQuestionAnswering,
    FastBertForSequenceClassification,
    FastBertForTokenClassification,
    FastBertModel,
)
from .modeling.pipeline_fastbert import FastTextClassificationPipeline
from .modeling.pipeline_question_answering import FastQuestionAnsweringPipeline
from .modeling.pipeline_token_classification import FastTokenClassificationPipeline
from .modeling.processing_cascade import CascadeProcessor
from .sharing import Measured, push_to_hub, save_with_code, write_model_card
from .version import __version__


if TYPE_CHECKING:
    from .calibration import calibrate
    from .engines.exporter import export
    from .evaluation.speed_choice import choose_speed
    from .operators import load_operators
    from .training import SelfDistillationArguments, SelfDistillationTrainer, train

# English sentiment, made by examples/train_default_model.py: what the pipeline answers with when it is given no model.
DEFAULT_MODEL_DIR = Path(__file__).parent / "default_model"

AutoConfig.register("fastbert", FastBertConfig)
AutoModel.register(FastBertConfig, FastBertModel)
AutoModelForSequenceClassification.register(FastBertConfig, FastBertForSequenceClassification)
AutoModelForTokenClassification.register(FastBertConfig, FastBertForTokenClassification)
AutoModelForQuestionAnswering.register(FastBertConfig, FastBertForQuestionAnswering)
AutoConfig.register("fastbert_cascade", CascadeConfig)
# A cascade has no encoder of its own below its classifiers.
AutoModel.register(CascadeConfig, CascadeForSequenceClassification)
AutoModelForSequenceClassification.register(CascadeConfig, CascadeForSequenceClassification)
for exported in (FastBertOnnx, FastBertOpenVino):
    AutoConfig.register(exported.config_class.model_type, exported.config_class)
    AutoModel.register(exported.config_class, exported)
    AutoModelForSequenceClassification.register(exported.config_class, exported)
PIPELINE_REGISTRY.register_pipeline(
    "fast-text-classification",
    pipeline_class=FastTextClassificationPipeline,
    pt_model=AutoModelForSequenceClassification,
    default=(str(DEFAULT_MODEL_DIR), "main"),
    type="text",
)
PIPELINE_REGISTRY.register_pipeline(
    "fast-token-classification",
    pipeline_class=FastTokenClassificationPipeline,
    pt_model=AutoModelForTokenClassification,
    type="text",
)
PIPELINE_REGISTRY.register_pipeline(
    "fast-question-answering",
    pipeline_class=FastQuestionAnsweringPipeline,
    pt_model=AutoModelForQuestionAnswering,
    type="text",
)
# With this mark every saved pipeline would point to custom code, and refuse to load without trust_remote_code.
for registered in (FastTextClassificationPipeline, FastTokenClassificationPipeline, FastQuestionAnsweringPipeline):
    del registered._registered_impl
del registered
# The code that travels with weights keeps the stock push; the package adds a model card and, on request, that code.
for pushed in (
    FastBertForSequenceClassification,
    FastBertForTokenClassification,
    FastBertForQuestionAnswering,
    CascadeForSequenceClassification,
    FastTextClassificationPipeline,
    FastTokenClassificationPipeline,
    FastQuestionAnsweringPipeline,
):
    pushed.push_to_hub = push_to_hub
del push_to_hub, pushed, exported


def _certify(model, *arguments, **named):
    """Find the greatest speed at which no more than a given share of the answers differs: [`calibration.certify`]."""
    return import_module(".calibration", __name__).certify(model, *arguments, **named)


def _drift(pipeline, *arguments, **named):
    """Tell whether the texts answered so far are unlike those of the certificate: [`calibration.drift`]."""
    return import_module(".calibration", __name__).drift(pipeline, *arguments, **named)


# What code beside weights cannot do alone.
for certified in (
    FastBertForSequenceClassification,
    FastBertForTokenClassification,
    FastBertForQuestionAnswering,
    CascadeForSequenceClassification,
):
    certified.certify = _certify
del certified
FastTextClassificationPipeline.drift = FastTokenClassificationPipeline.drift = _drift


# Loaded when they are asked for. Who only serves a model does not pay for the Trainer: its import takes about 90 MiB
# and a second.
_LATER = {
    "SelfDistillationArguments": "training",
    "SelfDistillationTrainer": "training",
    "calibrate": "calibration",
    "choose_speed": "evaluation.speed_choice",
    "export": "engines.exporter",
    "load_operators": "operators",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


__all__ = [
    "DEFAULT_MODEL_DIR",
    "CascadeConfig",
    "CascadeForSequenceClassification",
    "CascadeProcessor",
    "FastBertConfig",
    "FastBertForQuestionAnswering",
    "FastBertForSequenceClassification",
    "FastBertForTokenClassification",
    "FastBertInt8Config",
    "FastBertModel",
    "FastBertOnnx",
    "FastBertOpenVino",
    "FastQuestionAnsweringPipeline",
    "FastTextClassificationPipeline",
    "FastTokenClassificationPipeline",
    "Measured",
    "SelfDistillationArguments",
    "SelfDistillationTrainer",
    "__version__",
    "calibrate",
    "choose_speed",
    "export",
    "load_operators",
    "save_with_code",
    "train",
    "write_model_card",
]
