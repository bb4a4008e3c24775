"""What each kind of observation costs when it is predicted wrongly, in literal numbers."""

from __future__ import annotations

import math

import pytest
import torch as th

from sb3_dreamer.types import SIZES, Spec
from sb3_dreamer.world_model.codes import CODES
from sb3_dreamer.world_model.decoders import Decoder

# A space, an observation of it, and the loss of a network that answers zero everywhere.
CASES = {
    "discrete": (Spec("discrete", (2,), (2, 4), (0, 0)), th.tensor([[1, 3]]), math.log(2) + math.log(4)),
    "binary": (Spec("binary", (3,)), th.tensor([[1, 0, 1]]), 3 * math.log(2)),
    "vector": (Spec("vector", (2,)), th.tensor([[math.e - 1, 1 - math.e]]), 2.0),
    "image": (Spec("image", (3, 2, 2)), th.full((1, 3, 2, 2), 255, dtype=th.uint8), 12.0),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_loss_is_the_sum_over_all_dimensions(kind: str) -> None:
    spec, raw, loss = CASES[kind]
    out = th.zeros(1, *spec.shape) if kind == "image" else th.zeros(1, spec.width)
    assert CODES[kind].loss(out, raw, spec).tolist() == pytest.approx([loss], rel=1e-5)


def test_the_loss_of_several_keys_is_the_sum_over_them() -> None:
    cases = {kind: case for kind, case in CASES.items() if kind != "image"}
    decoder = Decoder({kind: spec for kind, (spec, _, _) in cases.items()}, 6, SIZES["debug"])
    th.nn.init.zeros_(decoder.out.weight)
    loss = decoder.loss(th.randn(1, 6), {kind: raw for kind, (_, raw, _) in cases.items()})
    assert loss.tolist() == pytest.approx([sum(loss for _, _, loss in cases.values())], rel=1e-5)


def test_pixels_are_rounded() -> None:
    out = th.tensor([0.0, 99.6, 254.6]).view(1, 1, 1, 3) / 255
    assert CODES["image"].read(out, Spec("image", (1, 1, 3))).flatten().tolist() == [0, 100, 255]
