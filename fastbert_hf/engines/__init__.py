"""Other engines that run a model: ONNX Runtime and OpenVINO, from the folder that `export` writes."""

from .exported_models import FastBertOnnx, FastBertOnnxConfig, FastBertOpenVino, FastBertOpenVinoConfig
from .exporter import export


__all__ = ["FastBertOnnx", "FastBertOnnxConfig", "FastBertOpenVino", "FastBertOpenVinoConfig", "export"]
