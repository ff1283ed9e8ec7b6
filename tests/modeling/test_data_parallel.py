"""Replicas, as `nn.DataParallel` makes one for each device: their parameters are plain tensors."""

from __future__ import annotations

import pytest
import torch

from tests.common import assert_close, ragged_batch, tiny_model


def replica_of(model: torch.nn.Module) -> torch.nn.Module:
    """What `torch.nn.parallel.replicate` gives to a device, without needing one."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.detach().clone().requires_grad_())
                replica._former_parameters[name] = parameter
        for name, buffer in module._buffers.items():
            setattr(replica, name, buffer)
    return replicas[model]


@pytest.mark.parametrize("arguments", [{}, {"speed": 0.7}, {"output_exit_logits": True}])
def test_replicas_answer_as_the_model(arguments):
    model, batch = tiny_model("bert"), ragged_batch()
    expected, output = model(**batch, **arguments), replica_of(model)(**batch, **arguments)
    assert torch.equal(output.exit_layer, expected.exit_layer)
    assert_close(output.logits, expected.logits)
