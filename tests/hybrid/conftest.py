import pytest

from sb3_dreamer import Dreamer
from tests.hybrid.agents import SMALL, pendulum


@pytest.fixture(scope="module")
def dreamer() -> Dreamer:
    """220 steps of two environments, a few updates; 4 whole episodes in each."""
    return Dreamer("MlpPolicy", pendulum(2), **SMALL).learn(440)
