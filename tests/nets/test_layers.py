"""Layers and their initialization."""

from __future__ import annotations

import pytest
import torch as th
import torch.nn.functional as F

from sb3_dreamer.nets import layers
from sb3_dreamer.nets.layers import (
    BlockLinear,
    Dense,
    Linear,
    RMSNorm,
    fast_bfloat16,
    fast_tanh,
    norm_silu,
    to_autocast_dtype,
)


def test_rms_norm_makes_the_root_mean_square_one() -> None:
    y = RMSNorm(4)(th.tensor([[2.0, -2.0, 2.0, -2.0]]))
    assert th.allclose(y, th.tensor([[1.0, -1.0, 1.0, -1.0]]), atol=1e-4)


def test_a_layer_of_scale_zero_predicts_exactly_zero() -> None:
    assert th.equal(Linear(5, 3, scale=0.0)(th.randn(2, 5)), th.zeros(2, 3))


def test_weights_have_unit_variance_over_fan_in_and_no_tails() -> None:
    th.manual_seed(0)
    weight = Linear(400, 500).weight.detach()
    assert float(weight.std()) == pytest.approx(1 / 20, rel=0.02)
    assert float(weight.abs().max()) <= 2 * 1.1368 / 20 + 1e-6


def test_weights_of_blocks_have_it_over_the_inputs_of_the_whole_layer() -> None:
    th.manual_seed(0)
    assert float(BlockLinear(400, 800, blocks=4).weight.detach().std()) == pytest.approx(1 / 20, rel=0.02)


@pytest.mark.parametrize(("inputs", "outputs"), [(30, 8), (8, 30)])
def test_blocks_that_do_not_divide_a_layer_are_refused(inputs: int, outputs: int) -> None:
    with pytest.raises(ValueError, match=rf"blocks=4 do not divide a layer of {inputs} inputs and {outputs} outputs"):
        BlockLinear(inputs, outputs, blocks=4)


def test_a_torch_that_does_not_tell_of_bfloat16_computes_in_float32(monkeypatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(th.cpu, name, raising=False)
    assert not fast_bfloat16(th.device("cpu"))


def test_a_block_of_the_output_reads_its_own_block_of_the_input_only() -> None:
    layer = BlockLinear(8, 12, blocks=4)
    x = th.randn(3, 8, requires_grad=True)
    layer(x)[:, 3:6].sum().backward()  # block 1 of the output
    assert x.grad is not None
    touched = x.grad.abs().sum(0) > 0
    assert touched.tolist() == [False, False, True, True, False, False, False, False]


def test_a_block_linear_map_is_the_block_diagonal_matrix() -> None:
    layer = BlockLinear(6, 4, blocks=2)
    x = th.randn(5, 6)
    dense = th.block_diag(*layer.weight)
    assert th.allclose(layer(x), x @ dense + layer.bias, atol=1e-6)
    assert th.allclose(layer.by_block(x).transpose(0, 1).flatten(1), layer(x))


def test_fast_tanh_is_tanh() -> None:
    x = th.linspace(-12, 12, 1001)
    assert th.allclose(fast_tanh(x), th.tanh(x), atol=3e-7)


def test_norms_compute_in_float32_inside_autocast() -> None:
    layer, x = Dense(8, 8), th.randn(2, 8)
    with th.autocast("cpu", th.bfloat16):
        assert to_autocast_dtype(x).dtype == th.bfloat16
        assert layer(x).dtype == th.float32
    assert to_autocast_dtype(x) is x


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_the_norm_has_the_values_and_gradients_of_torch(shape: tuple[int, ...]) -> None:
    x = th.randn(shape, dtype=th.float64, requires_grad=True)
    gain = th.rand(4, dtype=th.float64).add(0.5).requires_grad_()
    expected = F.silu(F.rms_norm(x, (4,), gain, RMSNorm.eps))
    with th.inference_mode():
        assert th.allclose(norm_silu(x, gain), expected)
    assert th.allclose(norm_silu(x, gain), expected)
    assert th.autograd.gradcheck(norm_silu, (x, gain))


def test_the_norm_of_zeros_is_zero_and_its_gradient_finite() -> None:
    x = th.zeros(1, 4, requires_grad=True)
    y = norm_silu(x, th.ones(4))
    y.sum().backward()
    assert th.equal(y, th.zeros(1, 4))
    assert th.allclose(x.grad, th.full((1, 4), 0.5 / RMSNorm.eps**0.5))


def test_where_torch_cannot_compile_for_the_gpu_it_is_said_once_and_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_compiler(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(th, "compile", no_compiler)
    layers.can_compile.cache_clear()
    with pytest.warns(UserWarning, match="does not work here.*no C compiler"):
        assert layers.compile_on_cuda(th.device("cuda"))(abs) is abs
    assert layers.compile_on_cuda(th.device("cuda"))(abs) is abs
    layers.can_compile.cache_clear()
