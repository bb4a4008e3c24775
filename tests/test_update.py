"""One update: where its dreams begin, which returns the replayed states get, what it tells and leaves behind."""

from functools import partial

import pytest
import torch as th

from sb3_dreamer import Dreamer, dreamer
from sb3_dreamer.nets import layers


@pytest.fixture
def model(monkeypatch) -> Dreamer:
    """An agent with a replay of Pendulum whose updates move no weight."""
    monkeypatch.setattr(layers, "fast_bfloat16", lambda device: False)
    sizes = dict(model_size="debug", batch_size=2, batch_length=8, buffer_size=500, imagination_starts=2)
    model = Dreamer("MlpPolicy", "Pendulum-v1", learning_starts=1000, learning_rate=0.0, seed=0, device="cpu", **sizes)
    model.critic_ema_decay = 1.0
    return model.learn(60)


@pytest.fixture
def calls(monkeypatch) -> dict[str, list]:
    """Arguments and result of each call of these functions, in order."""
    calls: dict[str, list] = {name: [] for name in ("imagine", "lambda_returns", "replay_critic_loss")}
    originals = {name: getattr(dreamer, name) for name in calls}

    def noted(name, *args, **kwargs):
        calls[name].append((args, result := originals[name](*args, **kwargs)))
        return result

    for name in calls:
        monkeypatch.setattr(dreamer, name, partial(noted, name))
    return calls


def test_dreams_begin_at_the_drawn_states_and_there_replayed_returns_end_in_what_was_dreamed(
    model, calls, monkeypatch
) -> None:
    for head in (model.policy.world_model.reward_head, model.policy.critic.fast, model.policy.critic.slow):
        th.nn.init.normal_(head.out.weight)  # they predict zero otherwise
    drawn = th.tensor([9, 2])
    monkeypatch.setattr(dreamer, "draw_starts", lambda n_states, n, device: drawn)
    latents, metrics = model.update(model.replay_buffer.sample(2))
    (_, _, start, *_), dream = calls["imagine"][0]
    (_, dreamed), ((_, _, bootstrap, *_), replayed) = calls["lambda_returns"]
    features = calls["replay_critic_loss"][0][0][1].detach().flatten(0, 1)
    value = model.policy.critic.value
    th.testing.assert_close(start.features, features[drawn])
    th.testing.assert_close(bootstrap.flatten(), value(features).index_copy(0, drawn, dreamed[:, 0]))
    th.testing.assert_close(model.policy.world_model.rssm.restore(latents.flatten(0, 1)).features, features)
    told = [metrics[name] for name in ("imagined_reward", "value", "imagined_return", "replay_return")]
    means = [x.mean() for x in (dream.reward[:, 1:], value(dream.features), dreamed[:, 0], replayed)]
    th.testing.assert_close(th.stack(told), th.stack(means))


def test_an_update_learns_from_its_own_batch_alone(model) -> None:
    batch, gradients = model.replay_buffer.sample(2), []
    for _ in range(2):
        th.manual_seed(0)
        model.update(batch)
        gradients.append([p.grad.clone() for p in model.policy.actor.parameters()])
    th.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
