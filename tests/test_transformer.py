"""``rssm_type="transformer"``: one computation for whole sequences and single steps, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_dreamer import Dreamer
from sb3_dreamer.types import SIZES, Batch, Size, Spec
from sb3_dreamer.world_model import WorldModel, rssm, transformer
from sb3_dreamer.world_model.rssm import RSSM, State
from sb3_dreamer.world_model.transformer import Transformer
from tests.deterministic import most_likely
from tests.episode_starts import reset_where_first

SIZE = SIZES["debug"]
E, A, WINDOW = 6, 2, Transformer.window
EXACT = dict(rtol=0.0, atol=1e-5)


@pytest.fixture
def model() -> RSSM:
    th.manual_seed(0)
    return RSSM(E, A, SIZE, "transformer")


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rssm, transformer):
        monkeypatch.setattr(module, "sample_onehot", lambda probs, dim: most_likely(probs))


def entries(n: int, length: int, starts: dict[int, list[int]] | None = None) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Embeddings, previous actions and is_first; ``starts``: row -> where episodes begin."""
    random = th.Generator().manual_seed(1)
    is_first = th.zeros(n, length, dtype=th.bool)
    for row, places in (starts or {}).items():
        is_first[row, places] = True
    action = th.randn(n, length, A, generator=random) * ~is_first[..., None]
    return th.randn(n, length, E, generator=random), action, is_first


def step_through(model: RSSM, data: tuple[th.Tensor, ...], between: Callable[[State], State] = lambda s: s) -> State:
    """The same entries one at a time, stacked (B, T)."""
    state, states = model.initial(len(data[0])), []
    for embed, action, is_first in zip(*(x.unbind(1) for x in data), strict=True):
        state, action = reset_where_first(model, state, action, is_first)
        state = between(model.observe_step(state, embed, action))
        states.append(state)
    return State.from_parts(th.stack([s.deter for s in states], 1), th.stack([s.stoch for s in states], 1))


AGES = {0: [0], 1: [3, 90], 2: [0, 1, 2, 70, 71], 3: [140]}  # row 4 goes on from an episode that began before


# -- one computation ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("grad", [False, True])
def test_single_steps_equal_the_parallel_pass_for_members_of_different_age_also_after_the_window_slides(
    model: RSSM, grad: bool
):
    data = entries(5, 2 * WINDOW + 30, AGES)
    with th.set_grad_enabled(grad):
        whole, _ = model.observe(*data, model.initial(5))
        single = step_through(model, data)
    th.testing.assert_close(single.deter, whole.deter, **EXACT)
    th.testing.assert_close(single.stoch, whole.stoch, **EXACT)


@pytest.mark.usefixtures("deterministic")
def test_packing_and_unpacking_between_steps_changes_nothing(model: RSSM):
    data = entries(5, 2 * WINDOW + 30, AGES)
    with th.no_grad():
        plain = step_through(model, data)
        packed = step_through(model, data, between=lambda state: model.unpack(model.pack(state)))
    th.testing.assert_close(packed.deter, plain.deter, **EXACT)


@pytest.mark.usefixtures("deterministic")
def test_a_sequence_cut_in_two_equals_the_whole(model: RSSM):
    data = entries(5, WINDOW + 40, AGES | {3: [17]})
    whole, _ = model.observe(*data, model.initial(5))
    first, _ = model.observe(*(x[:, :50] for x in data), model.initial(5))
    second, _ = model.observe(*(x[:, 50:] for x in data), first[:, -1])
    th.testing.assert_close(second.deter, whole.deter[:, 50:], **EXACT)


@pytest.mark.usefixtures("deterministic")
def test_gradients_through_single_steps_equal_those_of_the_parallel_pass(model: RSSM):
    model.double()
    embed, action, is_first = entries(2, 12, {0: [0, 5]})
    data = embed.double(), action.double(), is_first
    weights = th.randn(2, 12, SIZE.deter, dtype=th.double)
    gradients = []
    for states in (model.observe(*data, model.initial(2))[0], step_through(model, data)):
        layers = model.sequence.stack.parameters()
        gradients.append(th.autograd.grad((states.deter * weights).sum(), list(layers)))
    for parallel, single in zip(*gradients, strict=True):
        th.testing.assert_close(single, parallel, rtol=0.0, atol=1e-10)
        assert parallel.abs().max() > 1e-4


@pytest.mark.usefixtures("deterministic")
def test_products_in_bfloat16_leave_states_in_float32(model: RSSM):
    data = entries(2, 20)
    exact, _ = model.observe(*data, model.initial(2))
    with th.autocast("cpu", th.bfloat16):
        states, post = model.observe(*data, model.initial(2))
        after = model.imagine_step(states.detach().flatten(), th.zeros(40, A))
    assert {x.dtype for x in (states.deter, states.stoch, post, after.deter, after.stoch)} == {th.float32}
    assert (states.deter - exact.deter).abs().mean() < 0.02


# -- dreams ------------------------------------------------------------------------------------------------------------


def dream(model: RSSM, start: State, actions: th.Tensor) -> State:
    """(N, H+1) states from N starts under actions (N, H, A)."""
    states = [start]
    for action in actions.unbind(1):
        states.append(model.imagine_step(states[-1], action))
    return State.from_parts(th.stack([s.deter for s in states], 1), th.stack([s.stoch for s in states], 1))


def recomputed(model: RSSM, filtered: State, data: tuple[th.Tensor, ...], row: int, t: int, dreamt: State) -> th.Tensor:
    """h of one dream, from all tokens since the start of its episode at once."""
    _, prev_action, is_first = data
    begin = max([0, *is_first[row, : t + 1].nonzero().flatten().tolist()])
    stoch = th.cat([th.zeros(1, filtered.stoch.shape[-1]), filtered.stoch[row, begin : t + 1], dreamt.stoch[1:-1]])
    actions = th.cat([prev_action[row, begin : t + 1], dreamt.deter.new_tensor(ACTIONS[: len(dreamt.stoch) - 1])])
    age = th.arange(1, len(stoch) + 1)[None]
    h, _, _ = model.sequence.attend(stoch[None], actions[None], age, model.initial(1).context)
    return h[0, t - begin + 1 :]


ACTIONS = np.random.default_rng(0).normal(size=(40, A)).astype(np.float32).tolist()


@pytest.mark.usefixtures("deterministic")
@th.no_grad()
def test_dreams_from_any_state_of_the_training_pass_continue_its_context(model: RSSM):
    data = entries(3, 90, {0: [0], 1: [0, 40]})
    data[1][:, 0] = 0.0  # row 2 goes on from nothing
    states, _ = model.observe(*data, model.initial(3))
    chosen = [(0, 0), (0, 89), (1, 39), (1, 40), (2, 63), (2, 75)]
    starts = states.detach().flatten()[th.tensor([row * 90 + t for row, t in chosen])]
    dreamt = dream(model, starts, th.tensor(ACTIONS).expand(len(chosen), -1, -1))
    for i, (row, t) in enumerate(chosen):
        expected = recomputed(model, states, data, row, t, State.from_parts(dreamt.deter[i], dreamt.stoch[i]))
        th.testing.assert_close(dreamt.deter[i, 1:], expected, **EXACT)


@th.no_grad()
def test_dreams_that_branch_from_one_state_do_not_disturb_each_other(model: RSSM):
    start, _ = model.observe(*entries(3, 5), model.initial(3))
    here = model.imagine_step(start[:, -1], th.zeros(3, A))
    alone = dream(model, model.unpack(model.pack(here)), th.ones(3, 1, A)).deter
    left, right = (dream(model, here, th.full((3, 1, A), value)).deter for value in (-1.0, 1.0))
    th.testing.assert_close(right, alone, **EXACT)
    assert (left - right)[:, 1].abs().max() > 1e-3


@th.no_grad()
def test_only_the_states_that_are_dreamt_from_are_copied_and_the_cache_stays_bounded(model: RSSM):
    states, _ = model.observe(*entries(4, 50), model.initial(4))
    memory = states.context.memories[0]
    starts = states.detach().flatten()[th.arange(7)]
    assert starts.context.memories[0].data.data_ptr() == memory.data.data_ptr()
    state = starts
    for _ in range(100):
        state = model.imagine_step(state, th.zeros(7, A))
        assert state.context.memories[0].data.shape[3] <= WINDOW - 1 + 1 + state.context.spare


# -- what attention reaches --------------------------------------------------------------------------------------------


def reach(model: RSSM, data: tuple[th.Tensor, ...], row: int, t: int) -> list[int]:
    """The entries whose actions h of (row, t) depends on."""
    action = data[1].clone().requires_grad_()
    states, _ = model.observe(data[0], action, data[2], model.initial(len(action)))
    (gradient,) = th.autograd.grad(states.deter[row, t].square().sum(), action)
    assert not gradient[[r for r in range(len(action)) if r != row]].any()
    return gradient[row].abs().sum(-1).nonzero().flatten().tolist()


def test_attention_never_crosses_the_start_of_an_episode_nor_looks_ahead(model: RSSM):
    data = entries(2, 30, {0: [0, 11, 20]})
    assert reach(model, data, 0, 10) == list(range(11))
    assert reach(model, data, 0, 11) == [11]
    assert reach(model, data, 0, 19) == list(range(11, 20))
    assert reach(model, data, 0, 29) == list(range(20, 30))
    assert reach(model, data, 1, 29) == list(range(30))


def test_each_layer_reaches_back_over_one_window(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Transformer, "window", 5)
    model, back = RSSM(E, A, SIZE, "transformer"), Transformer.layers * (5 - 1)
    assert reach(model, entries(1, 30), 0, 20) == list(range(20 - back, 21))


def test_the_posterior_reads_the_observation_alone_and_the_prior_the_past(model: RSSM):
    embed, action, is_first = entries(2, 10)
    embed[1] = embed[0]
    states, post = model.observe(embed, action, is_first, model.initial(2))
    th.testing.assert_close(post[1], post[0])
    assert (states.deter[1] - states.deter[0]).abs().max() > 0.01


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_zeros_are_the_state_before_an_episode(model: RSSM):
    embed, action, _ = (x[:, 0] for x in entries(2, 1))
    action = th.zeros_like(action)
    unpacked = model.unpack(th.zeros(2, model.packed_width)), model.restore(th.zeros(2, model.latent_width))
    for zeros in unpacked:
        from_zeros = model.observe_step(zeros, embed, action, sample=False)
        initial = model.observe_step(model.initial(2), embed, action, sample=False)
        th.testing.assert_close(from_zeros.deter, initial.deter, **EXACT)


def test_the_replay_keeps_one_number_for_each_latent(model: RSSM):
    states, _ = model.observe(*entries(3, 9), model.initial(3))
    assert model.latents(states).shape == (3, 9, SIZE.stoch)
    th.testing.assert_close(model.unpack(model.pack(states[:, -1])).features, states[:, -1].features)
    th.testing.assert_close(model.restore(model.latents(states)[:, -1]).stoch, states.stoch[:, -1].round())


def test_widths_that_do_not_divide_among_the_heads_are_refused():
    with pytest.raises(ValueError, match=r"hidden=9 and blocks=4 do not fit.*divisor"):
        RSSM(E, A, Size(deter=32, hidden=9, classes=4, units=16, depth=2, stoch=4, blocks=4), "transformer")


@pytest.mark.parametrize("size", ["size1m", "size12m"])
def test_it_has_about_as_many_weights_as_the_gru(size: str):
    count = {t: sum(p.numel() for p in RSSM(8, 6, SIZES[size], t).parameters()) for t in ("gru", "transformer")}
    assert 0.7 < count["transformer"] / count["gru"] < 1.4


# -- learning ----------------------------------------------------------------------------------------------------------


def recall(n: int, wait: int, asked: int) -> Batch:
    """A cue of +10 or -10 is seen at the first entry alone; ``wait`` entries later its sign is the reward."""
    cue, length = th.where(th.arange(n) % 2 == 0, 1.0, -1.0), 1 + wait + asked
    obs, reward = th.zeros(n, length, 2), th.zeros(n, length)
    obs[:, 0, 0], obs[:, 1 + wait :, 1] = 10 * cue, 10.0
    reward[:, 1 + wait :] = cue[:, None]
    is_first, is_last = th.zeros(2, n, length, dtype=th.bool)
    is_first[:, 0], is_last[:, -1] = True, True
    return Batch(
        obs={"obs": obs},
        prev_action=th.zeros(n, length, A),
        reward=reward,
        is_first=is_first,
        is_terminal=th.zeros_like(is_last),
        is_last=is_last,
        start=th.zeros(n, SIZE.stoch),
        index=np.zeros((n, 2), np.int64),
    )


def learns_to_recall(seed: int) -> bool:
    """Whether 800 updates are enough to know the reward, within 0.1; without memory it is 1 off."""
    th.manual_seed(seed)
    model, batch = (
        WorldModel({"obs": Spec("vector", (2,))}, Spec("vector", (A,)), SIZE, "transformer", normalize_obs=False),
        recall(8, 30, 10),
    )
    optimizer = th.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(800):
        losses, states, _ = model.loss(batch)
        if (model.predict_reward(states.features) - batch.reward)[:, 32:].abs().mean() <= 0.1:
            return True
        optimizer.zero_grad()
        th.stack([x.mean() for x in losses.values()]).sum().backward()
        optimizer.step()
    return False


def test_the_world_model_learns_to_remember_a_cue_over_30_steps():
    # six seeds of eight do; which ones, depends on how a machine rounds
    assert any(learns_to_recall(seed) for seed in range(3))


# -- nothing else changes ----------------------------------------------------------------------------------------------


def dreamer(env: object = "Pendulum-v1", **settings: object) -> Dreamer:
    settings = dict(rssm_type="transformer", model_size="debug", batch_size=2, batch_length=8, seed=3) | settings
    settings = dict(learning_starts=20, train_ratio=4, imagination_starts=8, imagination_horizon=3) | settings
    return Dreamer("MlpPolicy", env, device="cpu", **settings)  # type: ignore[arg-type]


def test_learns_saves_loads_and_predicts_as_every_dreamer(tmp_path: Path):
    model = dreamer().learn(40)
    assert model._n_updates > 0
    model.save(tmp_path / "model")
    loaded = Dreamer.load(tmp_path / "model", device="cpu")
    obs, state, other = np.zeros((3, 3), np.float32), None, None
    for _ in range(3):
        action, state = model.predict(obs, state, deterministic=True)
        same, other = loaded.predict(obs, other, deterministic=True)
        np.testing.assert_array_equal(action, same)
    assert all(part.dtype == np.float32 and part.shape[0] == 3 for part in state)


def test_episode_start_resets_one_environment_and_leaves_the_others():
    policy = dreamer().policy
    random, state = np.random.default_rng(0), None
    for _ in range(5):
        _, state = policy.predict(random.normal(size=(2, 3)).astype(np.float32), state, deterministic=True)
    obs = random.normal(size=(2, 3)).astype(np.float32)
    _, fresh = policy.predict(obs, None, deterministic=True)
    _, going = policy.predict(obs, state, deterministic=True)
    _, mixed = policy.predict(obs, state, np.array([True, False]), deterministic=True)
    np.testing.assert_allclose(mixed[0][0], fresh[0][0], atol=1e-5)
    np.testing.assert_allclose(mixed[0][1], going[0][1], atol=1e-5)
    assert np.abs(fresh[0] - going[0]).max() > 1e-3


def test_same_seed_same_run_with_several_environments():
    def weights() -> th.Tensor:
        model = dreamer(make_vec_env("Pendulum-v1", n_envs=2, seed=5)).learn(48)
        return th.cat([p.detach().flatten() for p in model.policy.parameters()])

    assert th.equal(weights(), weights())
