from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn

from sft.lora_linear import LoraLinear, fuse_lora


class Two(nn.Module):
    """Two layers, so that the first's input needs no gradient and the second's does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, bias=False, dtype=dtype)
        self.second = nn.Linear(8, 5, bias=True, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.first(x).tanh())
        return made


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model: Any = get_peft_model(
        Two(dtype), LoraConfig(r=3, lora_alpha=7, target_modules=["first", "second"], **options)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape) * 0.3
    return model


def results(model: Any, x: Tensor) -> list[Tensor]:
    output = model(x)
    output.float().square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(grad is not None for grad in grads)
    return [output.detach(), *grads]


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_output_and_gradients_are_pefts(options: dict[str, Any], dtype: torch.dtype, near: float) -> None:
    x = torch.randn(2, 4, 6, dtype=dtype, generator=torch.Generator().manual_seed(5))
    theirs = results(adapted(dtype, **options), x)
    model = adapted(dtype, **options)
    fuse_lora(model)
    assert [type(m) for m in model.modules() if isinstance(m, Linear)] == [LoraLinear] * 2
    for mine, their in zip(results(model, x), theirs, strict=True):
        assert mine.dtype == their.dtype
        assert (mine - their).norm() <= near * their.norm()


def test_the_derivative_is_the_functions_own() -> None:
    model = adapted(torch.float64)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    fuse_lora(model)
    layer = model.base_model.model.second
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weights = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *weights))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}])
def test_what_is_more_than_a_plain_adapter_is_computed_by_peft(options: dict[str, Any]) -> None:
    model = adapted(**options)
    fuse_lora(model)
    layer = model.base_model.model.second
    assert layer._plain() is None
    assert layer(torch.randn(2, 8)).shape == (2, 5)


def test_a_disabled_and_a_merged_adapter_are_pefts_matter() -> None:
    model = adapted()
    fuse_lora(model)
    x = torch.randn(2, 6)
    quick = model(x)
    with model.disable_adapter():
        assert not torch.allclose(model(x), quick)
    model.merge_adapter()
    torch.testing.assert_close(model(x), quick)
