"""FastBERT for Hugging Face Transformers. Importing the package registers its models and its pipeline."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling.configuration_fastbert import FastBertConfig
from .modeling.modeling_fastbert import FastBertForSequenceClassification, FastBertModel
from .modeling.pipeline_fastbert import FastTextClassificationPipeline
from .training import SelfDistillationArguments, SelfDistillationTrainer
from .version import __version__


AutoConfig.register("fastbert", FastBertConfig)
AutoModel.register(FastBertConfig, FastBertModel)
AutoModelForSequenceClassification.register(FastBertConfig, FastBertForSequenceClassification)
PIPELINE_REGISTRY.register_pipeline(
    "fast-text-classification",
    pipeline_class=FastTextClassificationPipeline,
    pt_model=AutoModelForSequenceClassification,
    type="text",
)
# With this mark every saved pipeline would point to custom code, and refuse to load without trust_remote_code.
del FastTextClassificationPipeline._registered_impl

__all__ = [
    "FastBertConfig",
    "FastBertForSequenceClassification",
    "FastBertModel",
    "FastTextClassificationPipeline",
    "SelfDistillationArguments",
    "SelfDistillationTrainer",
    "__version__",
]
