import numpy as np
import pytest
import torch
from common import MODELS, book_env
from scipy.stats import kstest

from envs import HedgingEnv
from envs.baselines import hedgers
from envs.benchmark import contest
from envs.market import black_scholes, dynamics, hedging

F64 = torch.float64


def random_actions(env, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = 0.3 * env.book_scale
    return [torch.randn(env.num_envs, 2, generator=generator, dtype=env.dtype) * scale for _ in range(env.num_steps)]


def play(env, actions):
    """Rewards, infos and final observation of one episode."""
    env.replay()
    steps = [env.step(action) for action in actions]
    return torch.stack([s[1] for s in steps]), [s[4] for s in steps], steps


@pytest.mark.parametrize("name", MODELS)
def test_wealth_is_cash_plus_marked_positions(name):
    """Whatever the actions: the sum of ΔW − cost is the final cash, recomputed here from the trades alone."""
    env = HedgingEnv(500, MODELS[name], dtype=F64)
    env.reset(seed=0)
    actions = random_actions(env)
    cash, holding = env.mark[0, :, 0].clone(), torch.zeros(500, dtype=F64)  # the call is sold at its mark
    total = torch.zeros(500, dtype=F64)
    env.replay()
    torch.testing.assert_close(env.wealth, torch.zeros(500, dtype=F64))
    for t, action in enumerate(actions):
        centre, half_width = -env.delta[t] + action[:, 0], action[:, 1].clamp(min=0)
        target = torch.minimum(torch.maximum(holding, centre - half_width), centre + half_width)
        cash -= (target - holding) * env.spot[t] + env.cost_rate * (target - holding).abs() * env.spot[t]
        holding = target
        _, _, terminated, _, info = env.step(action)
        total += info["wealth_change"] - info["cost"]
        if not terminated.all():
            marked = cash + holding * env.spot[t + 1] - env.mark[t + 1, :, 0]
            torch.testing.assert_close(env.wealth, marked, atol=1e-9, rtol=0)
        else:
            cash += holding * env.spot[t + 1] - env.cost_rate * holding.abs() * env.spot[t + 1]
            cash -= (env.spot[t + 1] - 100).clamp(min=0)  # settled at the payoff
        if not terminated.all():
            torch.testing.assert_close(env.wealth, total, atol=1e-9, rtol=0)
    torch.testing.assert_close(env.cash, cash, atol=1e-9, rtol=0)
    torch.testing.assert_close(total, cash, atol=1e-9, rtol=0)
    assert (env.holding == 0).all()


@pytest.mark.parametrize("make_env", [HedgingEnv, book_env])
def test_settling_the_episode_is_settling_every_step(make_env):
    """`advance` in a loop and one `settle` give what `step` gives, bitwise."""
    stepped, advanced = make_env(50, MODELS["heston"]), make_env(50, MODELS["heston"])
    stepped.reset(seed=2)
    advanced.reset(seed=2)
    actions = random_actions(stepped)
    rewards, infos, steps = play(stepped, actions)
    for t, action in enumerate(actions):
        assert torch.equal(advanced.advance(action), steps[t][0])
        if t == 9:  # on the way too
            reward, info = advanced.settle(4)
            assert torch.equal(reward, rewards[6:10])
            assert torch.equal(info["cost"][0], infos[6]["cost"])
    reward, info = advanced.settle()
    assert torch.equal(reward, rewards)
    assert info.keys() == infos[0].keys()
    for name, values in info.items():
        assert torch.equal(values, torch.stack([info[name] for info in infos])), name
    assert torch.equal(advanced.cash, stepped.cash)
    with pytest.raises(RuntimeError, match="reset"):
        advanced.advance(actions[0])


def test_reward_is_kolm_ritter():
    env = HedgingEnv(200, risk_aversion=3.0, cost_rate=2e-3, dtype=F64)
    env.reset(seed=0)
    rewards, infos, _ = play(env, random_actions(env))
    for reward, info in zip(rewards, infos, strict=True):
        change = info["wealth_change"]
        torch.testing.assert_close(reward, change - info["cost"] - 1.5 * change**2)


def test_opening_and_unwinding_are_charged():
    env = HedgingEnv(50, cost_rate=0.01, num_steps=2, dtype=F64)
    env.reset(seed=0)
    hold_one = [torch.stack((1 + env.delta[t], torch.zeros(50, dtype=F64)), -1) for t in (0, 1)]
    _, infos, _ = play(env, hold_one)
    torch.testing.assert_close(infos[0]["cost"], torch.full((50,), 1.0, dtype=F64))
    torch.testing.assert_close(infos[1]["cost"], 0.01 * env.spot[2])
    torch.testing.assert_close(infos[1]["turnover"], torch.ones(50, dtype=F64))


def test_band_moves_to_the_nearest_edge():
    env = HedgingEnv(3, dtype=F64)
    env.reset(seed=0)
    centre = -env.delta[0]
    env.holding = torch.stack((centre[0] - 0.2, centre[1] + 0.01, centre[2] + 0.3))
    env.step(torch.tensor([[0.0, 0.05]] * 3, dtype=F64))
    after = torch.stack((centre[0] - 0.05, centre[1] + 0.01, centre[2] + 0.05))
    torch.testing.assert_close(env.holding, after)


def test_same_seed_same_market_and_zero_is_a_seed():
    env = HedgingEnv(20)
    first, _ = env.reset(seed=0)
    spot = env.spot.clone()
    for action in random_actions(env):
        env.step(action)
    env.reset()
    assert not torch.equal(env.spot, spot)  # without a seed the stream goes on
    again, _ = env.reset(seed=0)
    assert torch.equal(env.spot, spot)
    assert torch.equal(first, again)
    env.reset(seed=1)
    assert not torch.equal(env.spot, spot)


@pytest.mark.parametrize("make_env", [HedgingEnv, book_env])
@pytest.mark.parametrize("rows", [7, 64, 300])
@pytest.mark.parametrize("name", MODELS)
def test_drawing_episodes_ahead_changes_no_number(make_env, rows, name, monkeypatch):
    """Nor does stopping between them, which a checkpoint of the generator's state does."""
    env, alone, resumed = (make_env(rows, MODELS[name]) for _ in range(3))
    generators = [env.generator, alone.generator, resumed.generator]
    for generator in generators[:2]:
        generator.manual_seed(5)
    for episode in range(5):
        env.reset()
        with monkeypatch.context() as patch:
            patch.setattr("envs.market.env.ROWS_AHEAD", 0)
            alone.reset()
        others = [alone]
        if episode > 2:
            resumed.reset()
            others.append(resumed)
        for other in others:
            for tensor in ("spot", "variance", "order_size", "delta"):
                assert torch.equal(getattr(env, tensor), getattr(other, tensor)), (episode, tensor)
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        if episode == 2:
            resumed.generator.set_state(env.generator.get_state())
    env.generator.manual_seed(5)
    first, _ = env.reset()
    assert torch.equal(first, env.reset(seed=5)[0])


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_depend_on_other_rows(name):
    """Neither on how many there are, nor on what is done in them."""
    big, small = HedgingEnv(100, MODELS[name]), HedgingEnv(10, MODELS[name])
    big.reset(seed=0)
    small.reset(seed=0)
    actions = random_actions(big)
    rewards, _, steps = play(big, actions)
    few, _, few_steps = play(small, [action[:10] for action in actions])
    torch.testing.assert_close(rewards[:, :10], few, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(steps[-1][0][:10], few_steps[-1][0], rtol=1e-5, atol=1e-6)
    changed = [action.clone() for action in actions]
    for action in changed:
        action[10:] += 0.1
    others, _, _ = play(big, changed)
    assert torch.equal(others[:, :10], rewards[:, :10])
    assert not torch.equal(others[:, 10:], rewards[:, 10:])


def test_terminal_contract():
    env = HedgingEnv(4, num_steps=3)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(torch.zeros(4, 2))
    env.reset(seed=0)
    for t in range(3):
        observation, _, terminated, truncated, _ = env.step(torch.zeros(4, 2))
        assert terminated.all() == (t == 2)
        assert not truncated.any()
        assert observation.isfinite().all()
    with pytest.raises(RuntimeError, match="reset"):
        env.step(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"reset_mask": np.array([True, False, True, True])})


@pytest.mark.parametrize("make_env", [HedgingEnv, book_env])
@pytest.mark.parametrize("name", MODELS)
def test_decode_inverts_observe(name, make_env):
    env = make_env(100, MODELS[name], dtype=F64)
    env.reset(seed=0)
    for t, action in enumerate(random_actions(env)):
        state = env.decode(env.observe())
        assert (state.step == t).all()
        expected = (env.spot[t], env.variance[t], env.delta[t], env.gamma[t], env.holding, env.position[t])
        decoded = (state.spot, state.variance, state.delta, state.gamma, state.holding, state.position)
        for value, truth in zip(decoded, expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-10)
        steps_left = (env.expiry - t).clamp(min=0).expand(100, -1)
        torch.testing.assert_close(state.time_to_expiry, steps_left / 252)
        average = env.dynamics.expected_average_variance(env.variance[t][:, None], steps_left)
        torch.testing.assert_close(state.volatility, average.sqrt())
        env.step(action)


@pytest.mark.parametrize("make_env", [HedgingEnv, book_env])
def test_after_trade_is_what_step_does(make_env):
    env = make_env(200, MODELS["heston"], dtype=F64)
    observation, _ = env.reset(seed=0)
    for t, action in enumerate(random_actions(env)):
        after, cost = env.after_trade(observation, action)
        others = [i for i in range(observation.shape[1]) if i != env.columns["net delta"].start]
        assert torch.equal(after[:, others], observation[:, others])
        observation, _, _, _, info = env.step(action)
        torch.testing.assert_close(
            env.book_scale * env.column(after, "net delta"), info["net_delta"], rtol=0, atol=1e-9
        )
        if t < env.num_steps - 1:  # then the unwinding comes on top
            torch.testing.assert_close(cost, info["cost"], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_free_trading_loses_nothing_on_average_and_fine_hedging_replicates():
    """Zero cost: whatever is traded, the mean P&L is zero; and the hedging error falls like √Δt."""
    env = HedgingEnv(30_000, cost_rate=0.0, dtype=F64)
    env.reset(seed=0)
    _, infos, _ = play(env, random_actions(env))
    pnl = sum(info["wealth_change"] for info in infos)
    assert abs(pnl.mean()) < 4 * pnl.std() / len(pnl) ** 0.5
    spread = []
    for per_day in (1, 4, 16):
        fine = HedgingEnv(8_000, dynamics.GBM(dt=1 / 252 / per_day), 30 * per_day, cost_rate=0.0, dtype=F64)
        fine.reset(seed=0)
        spread.append(contest.play(fine, hedgers.black_scholes_delta(fine))["pnl"].std())
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.05)
    assert spread[1] / spread[2] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("make_env", [HedgingEnv, book_env])
def test_control_variates_are_the_delta_hedge(make_env):
    env = make_env(50, MODELS["heston"], dtype=F64)
    env.reset(seed=0)
    _, infos, _ = play(env, [torch.zeros(50, 2, dtype=F64)] * 30)
    opening = env.cost_rate * env.delta[0].abs() * 100.0
    for info in infos:
        torch.testing.assert_close(info["hedged_change"], info["wealth_change"], atol=1e-10, rtol=0)
    costs, hedged = (sum(info[name] for info in infos) for name in ("cost", "hedged_cost"))
    torch.testing.assert_close(costs, opening + hedged)


@pytest.mark.parametrize(
    "bad",
    [{"num_envs": 0}, {"num_steps": 0}, {"cost_rate": -1e-3}, {"risk_aversion": -1}, {"risk_aversion": float("nan")},
     {"spot": 0.0}, {"arrival_rate": -0.1}, {"mean_order_size": 0.5}, {"client_spread": -1.0}],
)  # fmt: skip
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        HedgingEnv(**bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [([(-100.0, 30)], "strike is -100"), ([(100.0, 0)], "expiry is 0"), ([(100.0, 31)], "expiry is 31"),
     ([(100.0, 2.5)], "expiry is 2.5"), ([(100.0, 20)], "last option is not num_steps"), ([], "last option")],
)  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HedgingEnv(options=options)


@pytest.mark.parametrize(
    ("strikes", "expiries", "message"),
    [([100, 95], [30], "strikes are 100, 95"), ([100, 100], [30], "strikes"), ([100], [30, 15], "expiries are 30, 15"),
     ([], [30], "strikes are none")],
)  # fmt: skip
def test_bad_grid(strikes, expiries, message):
    with pytest.raises(ValueError, match=message):
        hedging.option_grid(strikes, expiries)


@pytest.mark.parametrize("name", MODELS)
def test_wealth_of_a_book(name):
    """Whatever the actions: initial wealth + client spread + hedge P&L − costs, recomputed from orders and trades."""
    env = book_env(300, MODELS[name], dtype=F64)
    env.reset(seed=3)
    actions = random_actions(env)
    env.replay()
    cash, holding, position = (torch.zeros(300, dtype=F64) for _ in range(3))
    position = torch.zeros(300, 10, dtype=F64)
    total, spread, hedge_pnl, costs = (torch.zeros(300, dtype=F64) for _ in range(4))
    for t, action in enumerate(actions):
        tau = (env.expiry - t) / 252
        volatility = env.dynamics.expected_average_variance(env.variance[t][:, None], env.expiry - t).sqrt()
        live = tau > 0
        terms = (env.spot[t][:, None], env.strike, tau.clamp(min=0), volatility, env.is_call)
        mark, delta = black_scholes.price(*terms), black_scholes.delta(*terms)
        bought, sold = env.order_size[t].unbind(-1)
        assert (bought[:, ~live] == 0).all()
        assert (sold[:, ~live] == 0).all()
        cash += (bought * (mark + 0.05)).sum(-1) - (sold * (mark - 0.05)).sum(-1)
        spread += 0.05 * (bought + sold).sum(-1)
        position += sold - bought
        centre = action[:, 0] - (position * delta * live).sum(-1)
        half_width = action[:, 1].clamp(min=0)
        target = torch.minimum(torch.maximum(holding, centre - half_width), centre + half_width)
        cost = env.cost_rate * (target - holding).abs() * env.spot[t]
        cash -= (target - holding) * env.spot[t] + cost
        costs += cost
        holding = target
        _, _, terminated, _, info = env.step(action)
        expired = env.expiry == t + 1
        payoff = torch.where(env.is_call, env.spot[t + 1][:, None] - env.strike, env.strike - env.spot[t + 1][:, None])
        left = (env.expiry - t - 1).clamp(min=0)
        average = env.dynamics.expected_average_variance(env.variance[t + 1][:, None], left)
        later = black_scholes.price(env.spot[t + 1][:, None], env.strike, left / 252, average.sqrt(), env.is_call)
        hedge_pnl += holding * (env.spot[t + 1] - env.spot[t]) + (position * live * (later - mark)).sum(-1)
        cash += (position * payoff.clamp(min=0) * expired).sum(-1)  # settled in cash
        position = torch.where(expired, 0.0, position)
        total += info["wealth_change"] + info["income"] - info["cost"]
        if terminated.all():
            costs += env.cost_rate * holding.abs() * env.spot[t + 1]
            cash += holding * env.spot[t + 1] - env.cost_rate * holding.abs() * env.spot[t + 1]
            assert (position == 0).all()
            torch.testing.assert_close(env.cash, cash, atol=1e-9, rtol=0)
            torch.testing.assert_close(env.cash, spread + hedge_pnl - costs, atol=1e-9, rtol=0)
        else:  # marked before the orders of the next step, which change wealth by their spread alone
            marked = cash + holding * env.spot[t + 1] + (position * later).sum(-1)
            torch.testing.assert_close(env.wealth - env.income[t + 1], marked, atol=1e-9, rtol=0)
            torch.testing.assert_close(env.wealth - env.income[t + 1], total, atol=1e-9, rtol=0)
    torch.testing.assert_close(total, cash, atol=1e-9, rtol=0)


def test_orders_are_poisson():
    """Numbers in a step have the right distribution, variance = mean; gaps are exponential; all are independent."""
    env = book_env(20_000, arrival_rate=0.3)
    env.reset(seed=0)
    live = env.order_number[:15].double()  # (steps, n, options, sides): both expiries trade
    count = live.numel()
    assert abs(live.mean() - 0.3) < 4 * (0.3 / count) ** 0.5
    dispersion = live.var() / live.mean()
    assert abs(dispersion - 1) < 4 * (2 / count) ** 0.5
    for k in range(5):
        frequency, expected = (live == k).double().mean(), np.exp(-0.3) * 0.3**k / np.prod(range(1, k + 1), initial=1.0)
        assert abs(frequency - expected) < 4 * (expected / count) ** 0.5
    assert env.order_number[15:, :, :5].sum() == 0  # expired
    # Conditionally on its number, the arrivals of a Poisson process are uniform in the step. Spread so, the gaps
    # between those of one option and side over all rows and steps, laid end to end, are exponential.
    rng = np.random.default_rng(0)
    for option, side in ((0, 0), (3, 1), (9, 0)):
        numbers = env.order_number[:15, :, option, side].T.flatten().long().numpy()
        times = np.sort(np.repeat(np.arange(len(numbers)), numbers) + rng.random(numbers.sum()))
        gaps = np.diff(times)
        assert kstest(gaps, "expon", args=(0, 1 / 0.3)).pvalue > 1e-3
        assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 4 / len(gaps) ** 0.5
    # no two processes, and no two steps, move together
    flat = live[:, :, [0, 0, 3, 9], [0, 1, 1, 0]].reshape(-1, 4).T.numpy()
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 4 / flat.shape[1] ** 0.5
    series = live[:, :, 0, 0]
    assert abs(np.corrcoef(series[:-1].flatten(), series[1:].flatten())[0, 1]) < 4 / series[1:].numel() ** 0.5


def test_order_sizes_are_geometric():
    env = book_env(20_000, arrival_rate=0.2, mean_order_size=3.0)
    env.reset(seed=0)
    number, size = env.order_number[:15].double(), env.order_size[:15].double()
    assert (size >= number).all()
    single = size[number == 1]
    for k in (1, 2, 5):
        expected = (1 / 3) * (2 / 3) ** (k - 1)
        assert abs((single == k).double().mean() - expected) < 4 * (expected / len(single)) ** 0.5
    assert size.mean().item() == pytest.approx(0.6, rel=0.01)
    assert size.var().item() == pytest.approx(env.order_law.variance, rel=0.03)
    assert env.order_law.variance == pytest.approx(0.2 * (2 * 9 - 3))
    probabilities = env.order_law.size_probabilities()
    assert probabilities.sum() == pytest.approx(1, abs=1e-9)
    assert probabilities @ np.arange(len(probabilities)) == pytest.approx(0.6, rel=1e-6)


def test_orders_do_not_depend_on_the_policy_nor_the_number_of_rows():
    big, small = book_env(50), book_env(5)
    big.reset(seed=1)
    small.reset(seed=1)
    orders = big.order_size.clone()
    torch.testing.assert_close(orders[:, :5], small.order_size)
    torch.testing.assert_close(big.spot[:, :5], small.spot)
    play(big, random_actions(big))
    assert torch.equal(big.order_size, orders)
    # and the underlying is the one that a book without orders meets... of the same noise layout, whatever the rates
    other = book_env(50, arrival_rate=0.2)
    other.reset(seed=1)
    torch.testing.assert_close(other.spot, big.spot)


def test_every_policy_earns_the_same_spread():
    env = book_env(100)
    env.reset(seed=0)
    pnl = contest.play(env, hedgers.black_scholes_delta(env))["pnl"]
    without = book_env(100, client_spread=0.0)
    without.reset(seed=0)
    earned = 0.05 * env.order_size.sum((0, 2, 3))
    free = contest.play(without, hedgers.black_scholes_delta(without))["pnl"]
    np.testing.assert_allclose(pnl - free, earned, atol=1e-4)


def test_put_call_parity_of_a_book():
    """Long calls, short puts of the same strike: shares, so hedging once leaves nothing to chance."""
    env = HedgingEnv(200, options=[(100.0, 30, True), (100.0, 30, False)], initial_position=1.0, dtype=F64)
    env.reset(seed=0)
    torch.testing.assert_close(env.gamma[5], 2 * black_scholes.gamma(env.spot[5], 100.0, 25 / 252, 0.2))
    flow = torch.zeros(200, 30, 2, 2, dtype=F64)
    flow[:, 0, 1, 0] = 2.0  # clients buy two puts: short one
    env.set_market(env.spot.T, env.variance.T, (flow, flow))
    torch.testing.assert_close(env.delta[:-1], torch.ones(30, 200, dtype=F64))
    assert env.gamma.abs().max() < 1e-12
    assert env.hedged_change.abs().max() < 1e-10


def test_observation_of_a_book_is_well_scaled():
    for rate, size in ((0.02, 1.0), (0.1, 2.0), (2.0, 10.0)):
        env = book_env(1000, arrival_rate=rate, mean_order_size=size)
        env.reset(seed=0)
        policy = hedgers.black_scholes_delta(env)
        for _ in range(30):
            observation, *_ = env.step(policy(env.observe()))
            assert observation[:, 4:].abs().max() < 10
            assert observation.isfinite().all()
        assert env.position_features[-2].std() > 0.3
