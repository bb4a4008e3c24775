"""Our numbers against those of the official JAX implementation, see ``tests/data/README.md``.

Every test gives both sides the same weights and inputs. Where the algorithm samples, both take the same choice: the
most likely latent, and an action half a standard deviation above the mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_dreamer import dreamer
from sb3_dreamer.behavior.actor_critic import Actor, Critic, actor_loss, advantages, critic_loss, replay_critic_loss
from sb3_dreamer.behavior.imagination import ReturnScale, imagine, lambda_returns
from sb3_dreamer.nets import layers
from sb3_dreamer.nets.distributions import BoundedNormal, OneHotCategoricals
from sb3_dreamer.nets.optim import LaProp
from sb3_dreamer.types import Batch, Dream, Size, Spec
from sb3_dreamer.world_model import WorldModel, rssm, scan
from sb3_dreamer.world_model.decoders import ImageDecoder
from sb3_dreamer.world_model.encoders import ImageEncoder
from sb3_dreamer.world_model.rssm import State
from tests.deterministic import most_likely
from tests.episode_starts import reset_where_first

SIZE = Size(deter=32, hidden=8, classes=5, units=8, depth=2, stoch=4, blocks=4)
IMAGE_SIZE = Size(deter=32, hidden=8, classes=5, units=8, depth=2, stoch=4, blocks=8)
GAMMA = 1 - 1 / 333
LAMBDA = 0.95
ENTROPY = 3e-4

# The latents lie class by class here, latent by latent there: z here is z there at these places.
LATENTS = th.arange(SIZE.stoch * SIZE.classes).view(SIZE.stoch, SIZE.classes).t().flatten()
FEATURES = th.cat([th.arange(SIZE.deter), SIZE.deter + LATENTS])
DECODED = th.cat([LATENTS.numel() + th.arange(SIZE.deter), LATENTS])  # the decoder reads (z, h) there

Table = Mapping[str, th.Tensor]
Order = th.Tensor | slice
ALL = slice(None)


def load() -> dict[str, th.Tensor]:
    with np.load(Path(__file__).parent / "data" / "parity_jax.npz") as file:
        return {name: th.from_numpy(file[name].copy()) for name in file.files}


JAX = load()


def given(name: str) -> th.Tensor:
    return JAX[f"in/{name}"]


def expected(name: str) -> th.Tensor:
    return JAX[f"out/{name}"]


def assert_same(ours: th.Tensor, name: str) -> None:
    assert_equal(ours, expected(name))


def assert_equal(ours: th.Tensor, theirs: th.Tensor) -> None:
    th.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=1e-5)


# -- weights: from the names and layouts of the JAX arrays to ours -----------------------------------------------------


def below(prefix: str) -> dict[str, th.Tensor]:
    return {name.removeprefix(prefix): value for name, value in JAX.items() if name.startswith(prefix)}


def linear(jax: Table, name: str, inputs: Order = ALL, outputs: Order = ALL) -> dict[str, th.Tensor]:
    return {"weight": jax[f"{name}/kernel"][inputs].T[outputs], "bias": jax[f"{name}/bias"][outputs]}


def dense(jax: Table, name: str, norm: str, inputs: Order = ALL) -> dict[str, th.Tensor]:
    return nest({"linear": linear(jax, name, inputs), "norm": {"weight": jax[f"{norm}/scale"]}})


def mlp(jax: Table, name: str, layers: int, inputs: Order = FEATURES) -> dict[str, th.Tensor]:
    orders = [inputs] + [ALL] * (layers - 1)
    return nest({f"{i}": dense(jax, f"{name}/linear{i}", f"{name}/norm{i}", o) for i, o in enumerate(orders)})


def conv(jax: Table, name: str) -> dict[str, th.Tensor]:
    return {"weight": jax[f"{name}/kernel"].permute(3, 2, 0, 1), "bias": jax[f"{name}/bias"]}


def nest(parts: Mapping[str, Table]) -> dict[str, th.Tensor]:
    return {f"{outer}.{inner}": value for outer, part in parts.items() for inner, value in part.items()}


def sequence(jax: Table) -> dict[str, th.Tensor]:
    """The hidden layer is one block-linear kernel there; here the parts that all blocks share are split off."""
    kernel, own = jax["dyn/dynhid0/kernel"], SIZE.deter // SIZE.blocks
    shared = kernel[:, own:].transpose(0, 1).flatten(1)  # (G, 3 hidden, o) -> (3 hidden, G * o)
    return {
        **nest({"from_deter": dense(jax, "dyn/dynin0", "dyn/dynin0norm")}),
        **nest({"from_stoch": dense(jax, "dyn/dynin1", "dyn/dynin1norm", LATENTS)}),
        **nest({"from_action": dense(jax, "dyn/dynin2", "dyn/dynin2norm")}),
        "hidden_own": kernel[:, :own],
        "hidden_shared": shared[: 2 * SIZE.hidden],
        "hidden_action.weight": shared[2 * SIZE.hidden :].t(),
        "hidden_action.bias": jax["dyn/dynhid0/bias"],
        "hidden_norm.weight": jax["dyn/dynhid0norm/scale"],
        "gates.weight": jax["dyn/dyngru/kernel"],
        "gates.bias": jax["dyn/dyngru/bias"],
    }


def world_model_table(jax: Table) -> dict[str, th.Tensor]:
    return nest(
        {
            "encoder.mlp": nest({f"{i}": dense(jax, f"enc/mlp{i}", f"enc/mlp{i}norm") for i in range(3)}),
            "rssm.sequence": sequence(jax),
            "rssm.posterior": dense(jax, "dyn/obs0", "dyn/obs0norm"),
            "rssm.posterior_logits": linear(jax, "dyn/obslogit", outputs=LATENTS),
            "rssm.prior": nest({f"{i}": dense(jax, f"dyn/prior{i}", f"dyn/prior{i}norm") for i in range(2)}),
            "rssm.prior_logits": linear(jax, "dyn/priorlogit", outputs=LATENTS),
            "decoder.mlp": mlp(jax, "dec/mlp", 3, DECODED),
            "decoder.out": linear(jax, "dec/vec/vector/pred"),
            "reward_head": head(jax, "rew", 1),
            "continue_head.0": mlp(jax, "con/mlp", 1),
            "continue_head.1": linear(jax, "con/head/logit"),
        }
    )


def head(jax: Table, name: str, layers: int) -> dict[str, th.Tensor]:
    return nest({"mlp": mlp(jax, f"{name}/mlp", layers), "out": linear(jax, f"{name}/head/logits")})


def actor_table(jax: Table) -> dict[str, th.Tensor]:
    mean, std = linear(jax, "pol/head/action/mean"), linear(jax, "pol/head/action/stddev")
    return nest({"mlp": mlp(jax, "pol/mlp", 3), "out": {k: th.cat([mean[k], std[k]]) for k in mean}})


def image_encoder_table(jax: Table) -> dict[str, th.Tensor]:
    stages = {f"stages.{i}.0": conv(jax, f"img_enc/cnn{i}") for i in range(4)}
    norms = {f"stages.{i}.2": {"weight": jax[f"img_enc/cnn{i}norm/scale"]} for i in range(4)}
    return nest(stages | norms)


def image_decoder_table(jax: Table) -> dict[str, th.Tensor]:
    """The first map is filled channels last there (each block its own channels), channels first here."""
    block_map, whole_map = (8, 4, 4, 1), (4, 4, 8)
    by_block = jax["img_dec/sp0/kernel"].unflatten(-1, block_map[1:]).movedim(-1, -3).flatten(-3)
    stoch = linear(jax, "img_dec/sp2")
    stages = {f"stages.{i}.0": conv(jax, f"img_dec/conv{2 - i}") for i in range(3)}
    norms = {f"stages.{i}.1": {"weight": jax[f"img_dec/conv{2 - i}norm/scale"]} for i in range(3)}
    return {
        "from_deter.weight": by_block,
        "from_deter.bias": jax["img_dec/sp0/bias"].view(block_map).movedim(-1, 1).flatten(),
        **nest({"from_stoch.0": dense(jax, "img_dec/sp1", "img_dec/sp1norm", LATENTS)}),
        **{f"from_stoch.1.{k}": v.unflatten(0, whole_map).movedim(2, 0).flatten(0, 2) for k, v in stoch.items()},
        "norm.weight": jax["img_dec/spnorm/scale"],
        **nest(stages | norms | {"out": conv(jax, "img_dec/imgout")}),
    }


# -- both sides with the same weights and inputs -----------------------------------------------------------------------


@pytest.fixture
def world_model() -> WorldModel:
    model = WorldModel({"obs": Spec("vector", (5,))}, Spec("vector", (2,)), SIZE, gamma=GAMMA, normalize_obs=False)
    identity = {f"normalizer.{name}": value for name, value in model.normalizer.state_dict().items()}
    model.load_state_dict(identity | world_model_table(below("params/")))
    return model


@pytest.fixture
def actor(world_model: WorldModel) -> Actor:
    actor = Actor(world_model.feature_width, Spec("vector", (2,)), SIZE)
    actor.load_state_dict(actor_table(below("params/")))
    return actor


@pytest.fixture
def critic(world_model: WorldModel) -> Critic:
    critic = Critic(world_model.feature_width, SIZE)
    jax = below("params/")
    critic.load_state_dict(nest({"fast": head(jax, "val", 3), "slow": head(jax, "slowval", 3)}))
    return critic


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rssm, "sample_onehot", lambda probs, dim: most_likely(probs))
    monkeypatch.setattr(scan, "draw", lambda logits, limit: most_likely(logits).flatten(1))
    monkeypatch.setattr(BoundedNormal, "sample", lambda self: self.mean + given("normal_shift") * self.std)


def state(deter: str, stoch: str, table: Callable[[str], th.Tensor] = given) -> State:
    return State.from_parts(table(deter), table(stoch).flatten(-2)[..., LATENTS])


def by_latent(x: th.Tensor) -> th.Tensor:
    """(..., K, S) or (..., K * S) here to (..., S, K) there."""
    return x.reshape(*x.shape[: x.ndim - (2 if x.shape[-2:] == (5, 4) else 1)], 5, 4).transpose(-2, -1)


def observed() -> State:
    return state("obs_deter", "obs_stoch", expected)


def batch(model: WorldModel) -> Batch:
    is_first = given("is_first")
    return Batch(
        obs={"obs": given("obs")},
        prev_action=given("prevact") * ~is_first[..., None],
        reward=given("reward"),
        is_first=is_first,
        is_terminal=given("is_terminal"),
        is_last=given("is_last"),
        start=model.rssm.latents(state("start_deter", "start_stoch")),
        index=np.zeros((3, 2), int),
    )


def dream(model: WorldModel) -> Dream:
    features = state("imag_deter", "imag_stoch").features
    return Dream(
        features=features,
        action=given("imag_action")[:, :-1],
        reward=model.predict_reward(features).detach(),
        discount=model.predict_discount(features).detach(),
    )


def rows(dream: Dream) -> list[Dream]:
    parts = zip(*(x.split(1) for x in (dream.features, dream.action, dream.reward, dream.discount)), strict=True)
    return [Dream(*part) for part in parts]


def assert_same_gradients(module: nn.Module, table: Table) -> None:
    ours = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert ours.keys() == table.keys()
    for name, gradient in ours.items():
        assert gradient is not None, name
        th.testing.assert_close(gradient, table[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# -- world model -------------------------------------------------------------------------------------------------------


def test_embeddings_match_the_jax_reference(world_model: WorldModel):
    assert_same(world_model.encoder({"obs": given("obs")}), "tokens")


def test_recurrent_step_matches_the_jax_reference_also_for_large_actions(world_model: WorldModel):
    assert given("core_action").abs().max() > 1
    before, sequence = state("core_deter", "core_stoch"), world_model.rssm.sequence
    assert_same(sequence.step(before.deter, before.stoch, sequence.drive(given("core_action"))), "core_deter")


def test_prior_logits_match_the_jax_reference(world_model: WorldModel):
    model = world_model.rssm
    assert_same(by_latent(model.prior_logits(model.prior(given("core_deter")))), "core_prior")


def test_posterior_logits_match_the_jax_reference(world_model: WorldModel):
    model = world_model.rssm
    inputs = th.cat([given("core_deter"), expected("tokens")[:, 0]], -1)
    assert_same(by_latent(model.posterior_logits(model.posterior(inputs))), "core_post")


def test_filtering_with_resets_inside_the_sequence_matches_the_jax_reference(world_model: WorldModel):
    assert given("is_first")[:, 1:].any()
    states, post = world_model.observe(batch(world_model))
    assert_same(states.deter, "obs_deter")
    assert_same(by_latent(states.stoch), "obs_stoch")
    assert_equal(by_latent(post), rssm.unimix_probs(expected("obs_logit")))


def test_single_filtering_step_matches_the_jax_reference(world_model: WorldModel):
    data, states = batch(world_model), [world_model.rssm.restore(batch(world_model).start)]
    embed = world_model.encoder(data.obs)
    for t in range(6):
        state, prev_action = reset_where_first(
            world_model.rssm, states[-1], given("prevact")[:, t], data.is_first[:, t]
        )
        states.append(world_model.rssm.observe_step(state, embed[:, t], prev_action))
    assert_same(th.stack([s.deter for s in states[1:]], 1), "obs_deter")
    assert_same(by_latent(th.stack([s.stoch for s in states[1:]], 1)), "obs_stoch")


def test_prior_over_a_sequence_matches_the_jax_reference(world_model: WorldModel):
    prior = world_model.rssm.prior_probs(expected("obs_deter"))
    assert_equal(by_latent(prior), rssm.unimix_probs(expected("obs_prior")))


@pytest.mark.parametrize(("free_nats", "suffix"), [(1.0, ""), (0.0, "_free0")])
def test_kl_losses_match_the_jax_reference(
    world_model: WorldModel, monkeypatch: pytest.MonkeyPatch, free_nats: float, suffix: str
):
    monkeypatch.setattr(rssm, "FREE_NATS", free_nats)
    losses, info = world_model.rssm.kl_loss(observed(), rssm.unimix_probs(expected("obs_logit")).transpose(-2, -1))
    assert_same(losses["dyn"], f"dyn{suffix}")
    assert_same(losses["rep"], f"rep{suffix}")
    assert_same(info["prior_entropy"], "dyn_ent")
    assert_same(info["posterior_entropy"], "rep_ent")


def test_decoder_matches_the_jax_reference(world_model: WorldModel):
    features = observed().features
    assert_same(world_model.decoder(features)["obs"], "dec_pred")
    assert_same(world_model.decoder.loss(features, {"obs": given("obs")}), "dec_loss")


def test_reward_head_matches_the_jax_reference(world_model: WorldModel):
    features = observed().features
    logits = world_model.reward_head(features)
    assert_same(world_model.predict_reward(features), "rew_pred")
    assert_same(world_model.reward_head.loss(logits, given("reward")), "rew_loss")


def test_two_hot_loss_matches_the_jax_reference_far_outside_and_between_the_bins(world_model: WorldModel):
    logits = world_model.reward_head(observed().features)
    assert_same(world_model.reward_head.loss(logits, given("reward_wide")), "rew_loss_wide")


def test_continue_head_matches_the_jax_reference(world_model: WorldModel):
    features = observed().features
    assert_same(world_model.predict_discount(features), "con_prob")
    assert_same(world_model.continue_loss(features, given("is_terminal")), "con_loss")


def test_world_model_loss_and_its_gradients_match_the_jax_reference(world_model: WorldModel):
    losses, _, _ = world_model.loss(batch(world_model))
    loss = world_model_total(losses)
    loss.backward()
    assert_same(loss, "wm_loss")
    assert_same_gradients(world_model, world_model_table(below("grad/wm/")))


def world_model_total(losses: Table) -> th.Tensor:
    scales = {"reconstruction": 1.0, "reward": 1.0, "continue": 1.0, "dyn": 1.0, "rep": 0.1}
    assert losses.keys() == scales.keys()
    return th.stack([scale * losses[name].mean() for name, scale in scales.items()]).sum()


# -- images ------------------------------------------------------------------------------------------------------------


def test_image_encoder_matches_the_jax_reference():
    encoder = ImageEncoder(Spec("image", (3, 64, 64)), IMAGE_SIZE.depth)
    encoder.load_state_dict(image_encoder_table(below("params/")))
    ours = encoder(given("image")[0].movedim(-1, -3)).unflatten(-1, (8, 4, 4))
    assert_same(ours.movedim(-3, -1).flatten(1)[None], "img_tokens")


def test_image_decoder_matches_the_jax_reference():
    decoder = ImageDecoder(Spec("image", (3, 64, 64)), IMAGE_SIZE)
    decoder.load_state_dict(image_decoder_table(below("params/")))
    image = decoder(state("image_deter", "image_stoch").features[0])
    assert_same(image.mean((-2, -1))[None], "img_pred_mean")
    assert_same(image[..., :6, :6].movedim(-3, -1)[None], "img_pred_corner")
    target = given("image")[0].movedim(-1, -3) / 255
    assert_same((image - target).square().sum((-3, -2, -1))[None], "img_loss")


# -- behavior ---------------------------------------------------------------------------------------------------------


def test_continuous_policy_matches_the_jax_reference(actor: Actor):
    policy = actor(observed().features)
    assert isinstance(policy, BoundedNormal)
    assert_same(policy.mean, "policy_mean")
    assert_same(policy.std, "policy_std")
    assert_same(policy.log_prob(given("policy_action")), "policy_logp")
    assert_same(policy.entropy(), "policy_entropy")


def test_discrete_policy_matches_the_jax_reference():
    policy = OneHotCategoricals(given("disc_policy_logits"), (3,))
    assert_same(policy.log_prob(given("disc_policy_action")), "disc_policy_logp")
    assert_same(policy.entropy(), "disc_policy_entropy")


def test_critic_matches_the_jax_reference(critic: Critic):
    features = observed().features
    logits = critic(features)
    assert_same(critic.value(features), "val_pred")
    assert_same(critic.fast.loss(logits, given("value_target")), "val_loss")
    slow = critic.slow.mean(critic.slow(features))
    assert_same(slow, "slowval_pred")
    assert_same(critic.fast.loss(logits, slow), "val_loss_slow")


def test_lambda_returns_of_replayed_sequences_match_the_jax_reference():
    discount = (1 - given("lambda_term")) * GAMMA
    args = given("lambda_rew"), discount, given("lambda_boot"), LAMBDA, given("lambda_last").bool()
    assert_same(lambda_returns(*args), "lambda_return")


def test_lambda_returns_of_dreams_match_the_jax_reference():
    args = given("lambda_rew"), 1 - given("lambda_term_soft"), given("lambda_val"), LAMBDA
    assert_same(lambda_returns(*args), "lambda_return_soft")


def dreamt_returns(critic: Critic, dream: Dream) -> tuple[th.Tensor, th.Tensor]:
    values = critic.value(dream.features).detach()
    return lambda_returns(dream.reward, dream.discount, values, LAMBDA), values


def return_scale(name: str) -> ReturnScale:
    scale = ReturnScale()
    scale.low.copy_(given(f"{name}_lo"))
    scale.high.copy_(given(f"{name}_hi"))
    return scale


@pytest.mark.parametrize("name", ["imag0", "imag1"])
def test_return_scale_matches_the_jax_reference(name: str):
    scale = return_scale(name)
    assert_same(scale.update(expected("imag1_ret")), f"{name}_scale")
    assert_same(scale.low, f"{name}_lo")
    assert_same(scale.high, f"{name}_hi")


def test_what_a_dream_is_worth_matches_the_jax_reference(world_model: WorldModel, critic: Critic):
    data = dream(world_model)
    returns, values = dreamt_returns(critic, data)
    assert_same(data.reward, "imag1_rew")
    assert_same(data.discount, "imag1_con")
    assert_same(values, "imag1_val")
    assert_same(returns, "imag1_ret")


@pytest.mark.parametrize("name", ["imag0", "imag1"])
def test_actor_loss_of_each_trajectory_matches_the_jax_reference(
    world_model: WorldModel, actor: Actor, critic: Critic, name: str
):
    losses = []
    for one in rows(dream(world_model)):
        returns, values = dreamt_returns(critic, one)
        loss, _ = actor_loss(
            actor, one, advantages(one, returns, values, expected(f"{name}_scale"), center=False), ENTROPY
        )
        losses.append(loss)
    assert_equal(th.stack(losses), expected(f"{name}_policy_loss").mean(1))


def test_critic_loss_of_each_trajectory_matches_the_jax_reference(world_model: WorldModel, critic: Critic):
    losses = []
    for one in rows(dream(world_model)):
        returns, _ = dreamt_returns(critic, one)
        losses.append(critic_loss(critic, one, critic(one.features), returns))
    assert_equal(th.stack(losses), expected("imag1_value_loss").mean(1))


def test_gradients_of_actor_and_critic_match_the_jax_reference(world_model: WorldModel, actor: Actor, critic: Critic):
    data = dream(world_model)
    returns, values = dreamt_returns(critic, data)
    loss, _ = actor_loss(actor, data, advantages(data, returns, values, expected("imag1_scale"), center=False), ENTROPY)
    (loss + critic_loss(critic, data, critic(data.features), returns)).backward()
    assert_same_gradients(actor, actor_table(below("grad/imag1/")))
    assert_same_gradients(critic.fast, head(below("grad/imag1/"), "val", 3))


def replayed_returns(bootstrap: th.Tensor) -> th.Tensor:
    discount = (~given("is_terminal")) * GAMMA
    return lambda_returns(given("reward"), discount, bootstrap, LAMBDA, given("is_last"))


def test_replay_critic_loss_of_each_sequence_matches_the_jax_reference(critic: Critic):
    features, returns = observed().features, replayed_returns(given("repl_boot"))
    assert_same(returns, "repl_ret")
    parts = zip(*(x.split(1) for x in (features, critic(features), returns, given("is_last"))), strict=True)
    losses = th.stack([replay_critic_loss(critic, *part) for part in parts])
    assert_equal(losses, expected("repl_loss").mean(1))


def test_replay_critic_loss_shapes_critic_and_features_as_in_the_jax_reference(critic: Critic):
    features = observed().features.requires_grad_()
    returns = replayed_returns(given("repl_boot"))
    replay_critic_loss(critic, features, critic(features), returns, given("is_last")).backward()
    jax = below("grad/repl/")
    assert_same_gradients(critic.fast, head(jax, "val", 3))
    assert features.grad is not None
    assert_equal(features.grad, state("feature_deter", "feature_stoch", jax.__getitem__).features)


# -- the whole update --------------------------------------------------------------------------------------------------


def test_whole_training_loss_and_its_gradients_match_the_jax_reference(
    world_model: WorldModel, actor: Actor, critic: Critic
):
    data, scale = batch(world_model), return_scale("total")
    losses, states, _ = world_model.loss(data)
    dreams = imagine(world_model, actor, states.detach().flatten(), horizon=4)
    returns, values = dreamt_returns(critic, dreams)
    advantage = advantages(dreams, returns, values, scale.update(returns), center=False)
    policy_loss, _ = actor_loss(actor, dreams, advantage, ENTROPY)
    value_loss = critic_loss(critic, dreams, critic(dreams.features), returns)
    replayed = replayed_returns(returns[:, 0].view(3, 6))
    replay_loss = replay_critic_loss(critic, states.features, critic(states.features), replayed, data.is_last)
    total = world_model_total(losses) + policy_loss + value_loss + 0.3 * replay_loss
    total.backward()
    for value, name in [(policy_loss, "policy"), (value_loss, "value"), (replay_loss, "repval"), (total, "loss")]:
        assert_same(value, f"total_{name}")
    assert_same(scale.low, "total_lo")
    assert_same(scale.high, "total_hi")
    jax = below("grad/total/")
    assert_same_gradients(world_model, world_model_table(jax))
    assert_same_gradients(actor, actor_table(jax))
    assert_same_gradients(critic.fast, head(jax, "val", 3))


class Still(gym.Env[np.ndarray, np.ndarray]):
    observation_space = spaces.Box(-np.inf, np.inf, (5,))
    action_space = spaces.Box(-1, 1, (2,))


def test_update_of_the_algorithm_computes_the_gradients_of_the_jax_reference(
    world_model: WorldModel, actor: Actor, critic: Critic, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(layers, "fast_bfloat16", lambda device: False)
    model = dreamer.Dreamer(
        "MlpPolicy",
        Still(),
        buffer_size=100,
        batch_size=3,
        batch_length=6,
        imagination_starts=None,
        imagination_horizon=4,
        gamma=GAMMA,
        center_advantage=False,
        policy_kwargs=dict(normalize_obs=False, **asdict(SIZE)),
        device="cpu",
    )
    policy = model.policy
    for ours, module in [(policy.world_model, world_model), (policy.actor, actor), (policy.critic, critic)]:
        ours.load_state_dict(module.state_dict())
    policy.return_scale = return_scale("total")
    _, metrics = model.update(batch(world_model))
    assert_same(metrics["actor_loss"], "total_policy")
    assert_same(metrics["critic_loss"], "total_value")
    assert_same(metrics["replay_critic_loss"], "total_repval")
    jax = below("grad/total/")
    assert_same_gradients(policy.world_model, world_model_table(jax))
    assert_same_gradients(policy.actor, actor_table(jax))
    assert_same_gradients(policy.critic.fast, head(jax, "val", 3))


# -- optimizer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "lr", "warmup_steps"), [("opt", 4e-5, 1000), ("opt_fast", 0.1, 2)])
def test_optimiser_steps_match_the_jax_reference(name: str, lr: float, warmup_steps: int):
    tensors = ["matrix", "vector", "zero"]
    params = [nn.Parameter(given(f"opt_{t}").double()) for t in tensors]  # the first steps are lost in float32
    optimizer = LaProp(params, lr=lr, warmup_steps=warmup_steps)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        for p, tensor in zip(params, tensors, strict=True):
            p.grad = given(f"opt_grad_{tensor}")[step].double()
        optimizer.step()
        rate = lr * min(1.0, step / warmup_steps)  # nothing moves at the first step
        for p, old, tensor in zip(params, before, tensors, strict=True):
            update = expected(f"{name}_update_{tensor}")[step].double()
            assert_equal((p.detach() - old) / (rate or lr), update / (rate or lr))
            assert_equal(p.float(), expected(f"{name}_{tensor}")[step])
