"""QuotingEnv: accounting, conservation, the takers' law, seats, and what the policies see."""

import re

import numpy as np
import pytest
import torch
from common import MODELS
from scipy.stats import kstest, poisson

from envs import AgainstRivals, QuotingEnv
from envs.baselines import makers
from envs.market import black_scholes, dynamics, quoting

F64 = torch.float64


def make(num_envs=64, model=None, **settings) -> QuotingEnv:
    settings = {"num_steps": 12, "expiry": 24, **settings}
    return QuotingEnv(num_envs, model, **settings)


def random_actions(env: QuotingEnv, generator) -> torch.Tensor:
    shape = (env.num_envs, env.num_makers)
    spread = 2.0 * torch.rand(shape, generator=generator, dtype=env.dtype)
    rest = torch.randn((*shape, 3), generator=generator, dtype=env.dtype)
    return torch.cat((spread[..., None], rest), -1)


def fixed_quotes(env: QuotingEnv, half_spread=1.0, skew=0.0, target=0.0, band=0.0) -> torch.Tensor:
    action = torch.tensor([half_spread, skew, target, band], dtype=env.dtype)
    return action.expand(env.num_envs, env.num_makers, 4).clone()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_makers", [1, 2, 3])
def test_wealth_is_cash_and_marked_positions_whatever_the_actions(name, num_makers):
    env = make(16, MODELS[name], num_makers=num_makers, dtype=F64)
    env.reset(seed=0)
    generator = torch.Generator().manual_seed(1)
    wealth, total = torch.zeros(16, num_makers, dtype=F64), 0.0
    for t in range(env.num_steps):
        _, reward, terminated, truncated, info = env.step(random_actions(env, generator))
        earned = info["income"] + info["wealth_change"] - info["cost"]
        torch.testing.assert_close(env.wealth - wealth, earned, rtol=0, atol=1e-9)
        expected = earned - 0.5 * env.risk_aversion * info["wealth_change"] ** 2
        torch.testing.assert_close(reward, expected, rtol=1e-12, atol=1e-9)
        wealth, total = env.wealth, total + earned
        assert terminated.all() == (t == env.num_steps - 1)
        assert not truncated.any()
    assert (env.holding == 0).all()  # unwound
    torch.testing.assert_close(env.wealth, total, rtol=0, atol=1e-8)


def test_wealth_against_an_account_kept_by_hand():
    """Every trade at its price, from the definition: ask = mark + vega · (h + s), bid = mark − vega · (h − s)."""
    env = make(32, dtype=F64)
    env.reset(seed=3)
    generator = torch.Generator().manual_seed(0)
    cash = torch.zeros(32, 2, dtype=F64)
    for t in range(env.num_steps):
        actions, holding = random_actions(env, generator), env.holding
        before, spot = env.position, env.spot[t]
        fills = env._fills(*quotes_of(env, actions))
        vega = 0.01 * black_scholes.vega(
            spot[:, None], env.strike, (24 - t) * env.dynamics.dt, env.volatility[t][:, None]
        )
        ask = env.mark[t][:, None] + vega[:, None] * (actions[..., 0] + actions[..., 1])[..., None]
        bid = env.mark[t][:, None] - vega[:, None] * (actions[..., 0] - actions[..., 1])[..., None]
        cash += (fills[:, :, 0] * ask - fills[:, :, 1] * bid).sum(-1)
        _, _, _, _, info = env.step(actions)
        torch.testing.assert_close(env.position - before, fills[:, :, 1] - fills[:, :, 0])
        if t < env.num_steps - 1:
            traded = env.holding - holding
            cash -= traded * spot[:, None] + env.cost_rate * traded.abs() * spot[:, None]
            inside = (info["net_delta"] - actions[..., 2]).abs() <= actions[..., 3].clamp(min=0) + 1e-12
            assert inside.all()
            torch.testing.assert_close(env.cash, cash)


def quotes_of(env, actions):
    edges = torch.stack((actions[..., 0] + actions[..., 1], actions[..., 0] - actions[..., 1]), -1)
    return edges, env.choice_probabilities(edges)


def test_every_taker_trades_with_one_maker_or_walks_away():
    env = make(256, num_makers=3)
    env.reset(seed=0)
    generator = torch.Generator().manual_seed(1)
    net = torch.zeros(256, env.num_options)
    for t in range(env.num_steps):
        actions = random_actions(env, generator)
        arrived = (env.marks[t] < 1).sum(-1)
        edges, probabilities = quotes_of(env, actions)
        fills = env._fills(edges, probabilities)
        assert (fills >= 0).all()
        assert (fills == fills.round()).all()
        walked = (env.marks[t] < 1) & (env.marks[t] >= probabilities.sum(1)[..., None, None])
        assert torch.equal(fills.sum(1) + walked.sum(-1), arrived.to(fills))
        net += fills.sum(1)[:, 1] - fills.sum(1)[:, 0]
        env.step(actions)
    assert torch.equal(env.position.sum(1), net)  # the makers hold what the takers do not


def test_takers_choose_by_logit():
    env = make(20_000, num_makers=3, num_steps=2, expiry=4, flow_sd=0.0)
    env.reset(seed=0)
    actions = fixed_quotes(env)
    actions[..., 0] = torch.tensor([0.7, 1.0, 1.6])
    actions[..., 1] = torch.tensor([0.2, -0.3, 0.0])
    edges = np.array([[0.9, 0.5], [0.7, 1.3], [1.6, 1.6]])
    weights = np.exp(-2.0 * (edges - 1.0))
    shares = weights / (1.0 + weights.sum(0))
    fills = env._fills(*quotes_of(env, actions))
    takers = 20_000 * env.num_options * 0.5
    for maker in range(3):
        for side in (0, 1):
            expected = takers * shares[maker, side]
            assert abs(fills[:, maker, side].sum().item() - expected) < 4 * expected**0.5
    # each a Poisson process thinned by the choice
    counts = fills[:, 0, 0].flatten()
    mean = 0.5 * shares[0, 0]
    assert abs(counts.var().item() - mean) < 0.02
    assert abs((counts == 0).double().mean().item() - poisson.pmf(0, mean)) < 0.01


def test_the_best_price_takes_all_as_the_choice_sharpens():
    env = make(2000, choice_sensitivity=1e5)
    env.reset(seed=0)
    actions = fixed_quotes(env, 0.8)
    actions[:, 1, 0] = 0.81
    arrived = (env.marks[0] < 1).sum((-1, -2, -3))
    _, _, _, _, info = env.step(actions)
    assert torch.equal(info["fills"][:, 0], arrived.to(info["fills"]))
    assert (info["fills"][:, 1] == 0).all()
    _, _, _, _, info = env.step(fixed_quotes(env, 1.01))  # worse than walking away
    assert (info["fills"] == 0).all()


def test_takers_arrive_as_a_cox_process():
    env = make(4000, num_steps=20, expiry=40)
    env.reset(seed=5)
    flow = env.intensity / 0.5 - 1.0  # (steps, n, 2): + f for buyers, − f for sellers
    torch.testing.assert_close(flow[..., 0], -flow[..., 1])
    f = flow[..., 0]
    assert f.abs().max() <= quoting.MAX_FLOW + 1e-6
    assert abs(f.mean().item()) < 0.02
    clipped_sd = np.random.default_rng(0).normal(0, 0.5, 10**6).clip(-0.9, 0.9).std()
    assert f.std().item() == pytest.approx(clipped_sd, rel=0.03)
    small = make(4000, num_steps=20, expiry=40, flow_sd=0.1)  # hardly ever cut
    small.reset(seed=5)
    one, later = (small.intensity[t, :, 0] for t in (0, 8))
    assert np.corrcoef(one, later)[0, 1] == pytest.approx(0.5, abs=0.05)  # its half-life
    assert later.std().item() == pytest.approx(0.05, rel=0.05)
    arrived = (env.marks < 1).sum(-1).double()
    assert arrived.mean().item() == pytest.approx(0.5, rel=0.01)
    for side in (0, 1):
        counts, rate = arrived[:, :, side], env.intensity[..., side, None].double()
        z = ((counts - rate) / rate.sqrt()).mean()
        assert abs(z.item()) * counts.numel() ** 0.5 < 4
        assert (((counts - rate) ** 2 / rate).mean().item()) == pytest.approx(1.0, abs=0.02)
    marks = env.marks[env.marks < 1].double()
    assert kstest(marks[:: len(marks) // 2000], "uniform").pvalue > 1e-3
    assert env.max_takers == 8


@pytest.mark.parametrize("name", MODELS)
def test_seeds_and_batches(name):
    actions = None
    results = {}
    for label, num_envs, seed in (("a", 5, 0), ("b", 5, 0), ("more", 40, 0), ("other", 5, 1)):
        env = make(num_envs, MODELS[name])
        observation, _ = env.reset(seed=seed)
        seen = [observation[:5]]
        for _ in range(env.num_steps):
            actions = fixed_quotes(env, 0.9)
            actions[:, 0, 0] = 0.8
            actions[5:, 0, 0] = 0.1  # what other rows do changes nothing
            observation, reward, *_ = env.step(actions)
            seen += [observation[:5], reward[:5, :, None]]
        results[label] = torch.cat([x.flatten() for x in seen])
    assert torch.equal(results["a"], results["b"])
    torch.testing.assert_close(results["a"], results["more"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results["a"], results["other"])


def test_two_policies_meet_the_same_takers():
    env = make(64)
    env.reset(seed=0)
    marks, spot = env.marks.clone(), env.spot.clone()
    for _ in range(env.num_steps):
        env.step(fixed_quotes(env, 0.5))
    env.reset(seed=0)
    assert torch.equal(marks, env.marks)
    assert torch.equal(spot, env.spot)


@pytest.mark.parametrize("num_makers", [2, 3])
def test_swapping_policies_swaps_results_path_by_path(num_makers):
    env = make(64, num_makers=num_makers, dtype=F64)
    policies = [
        makers.avellaneda_stoikov(env, 0.2, 1.0), makers.glft(env, 1.5, 0.8), makers.constant_spread(env, 1.1),
    ][:num_makers]  # fmt: skip

    def play(order):
        observation, _ = env.reset(seed=0)
        total = 0.0
        for _ in range(env.num_steps):
            actions = torch.stack([policies[order[i]](observation[:, i]) for i in range(num_makers)], 1)
            observation, reward, *_ = env.step(actions)
            total = total + reward
        return total

    forward = play(list(range(num_makers)))
    backward = play(list(range(num_makers))[::-1])
    torch.testing.assert_close(forward, backward.flip(1), rtol=1e-9, atol=1e-9)


def test_seats_are_alike_in_distribution_when_all_quote_the_same():
    env = make(4000)
    env.reset(seed=0)
    fills = 0.0
    for _ in range(env.num_steps):
        _, _, _, _, info = env.step(fixed_quotes(env))
        fills = fills + info["fills"]
    difference = (fills[:, 0] - fills[:, 1]).double()
    assert abs(difference.mean()) < 4 * difference.std() / 4000**0.5


@pytest.mark.parametrize("name", MODELS)
def test_the_noise_has_mean_zero_whatever_is_held_and_explains_most_of_the_variance(name):
    env = make(20_000, MODELS[name])
    env.reset(seed=2)
    rival = makers.glft(env, 1.5, 0.8)
    own = makers.minimum_variance_band(env, rival, 0.2)

    def play(*policies):
        observation, _ = env.replay()
        noise = rest = raw = 0.0
        for _ in range(env.num_steps):
            actions = torch.stack([policy(observation[:, i]) for i, policy in enumerate(policies)], 1)
            observation, reward, _, _, info = env.step(actions)
            noise, raw = noise + info["noise"], raw + reward
            rest = rest + reward - info["noise"]
        assert (noise.mean(0).abs() < 4 * noise.std(0) / 20_000**0.5).all()
        return rest, raw

    rest, raw = play(own, rival)
    if name != "merton":  # where jumps, far from first order, are what the variance is made of
        assert (rest.var(0) < 0.55 * raw.var(0)).all()
    lean = torch.tensor([0.0, 0.5, 0.0, 0.0])
    play(lambda observation: rival(observation) + lean, lambda observation: rival(observation) - lean)  # long, short


def test_what_is_observed():
    env = make(8, num_makers=3, privileged=True, dtype=F64)
    observation, _ = env.reset(seed=0)
    assert observation.shape == (8, 3, 8 + 4 + 5 + 2 * 6)
    assert (observation[..., 8:12] == env.reference_edge).all()  # before any quote
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        actions = random_actions(env, generator)
        observation, *_ = env.step(actions)
    vega = (env.position * env.vega[4][:, None]).sum(-1)
    net_delta = env.holding + (env.position * env.delta[4][:, None]).sum(-1)
    for seat in range(3):
        seen = observation[:, seat]
        state = env.decode(seen)
        assert (state.step == 4).all()
        torch.testing.assert_close(state.spot, env.spot[4])
        torch.testing.assert_close(state.variance, env.variance[4])
        torch.testing.assert_close(state.volatility, env.volatility[4])
        torch.testing.assert_close(state.time_to_expiry, torch.full_like(state.spot, 20 * env.dynamics.dt))
        torch.testing.assert_close(state.vega, vega[:, seat])
        torch.testing.assert_close(state.net_delta, net_delta[:, seat])
        torch.testing.assert_close(state.position, env.position[:, seat])
        for i in (0, 1):
            other = (seat + 1 + i) % 3
            half_spread, skew = actions[:, other, 0], actions[:, other, 1]
            torch.testing.assert_close(state.rivals[:, i], torch.stack((half_spread + skew, half_spread - skew), -1))
            torch.testing.assert_close(seen[:, 17 + i], vega[:, other])
            torch.testing.assert_close(seen[:, 19 + 5 * i : 24 + 5 * i], env.position[:, other])
    # the vega risk is what one standard deviation of the volatility's own move is worth in a step
    v = env.variance[4]
    slope = -np.expm1(-4.0 * 20 * env.dynamics.dt) / (4.0 * 20 * env.dynamics.dt) / (2 * env.volatility[4])
    sd = 100 * slope * 0.5 * v.sqrt() * (1 - 0.7**2) ** 0.5 * env.dynamics.dt**0.5
    torch.testing.assert_close(observation[:, 0, 6], vega[:, 0] * sd, rtol=2e-2, atol=1e-6)
    public = make(8, num_makers=3, dtype=F64)
    assert public.reset(seed=0)[0].shape == (8, 3, 17)


def test_order_flow_is_a_moving_average_of_signed_trades():
    env = make(16)
    env.reset(seed=0)
    flow = torch.zeros(16)
    for _ in range(5):
        fills = env._fills(*quotes_of(env, fixed_quotes(env))).sum(1)
        signed = (fills[:, 0] - fills[:, 1]).sum(-1) / 5.0  # five options, half a taker on each side
        flow = 0.5 ** (1 / 8) * flow + (1 - 0.5 ** (1 / 8)) * signed
        observation, *_ = env.step(fixed_quotes(env))
        torch.testing.assert_close(observation[:, 0, 7], flow)
        torch.testing.assert_close(observation[:, 1, 7], flow)


def test_the_order_of_a_step_is_quote_fills_hedge_move():
    """The hedge knows the fills, and is done at the spot before the move; what is filled takes part in the move."""
    env = make(500, dtype=F64, cost_rate=0.0)
    env.reset(seed=0)
    _, _, _, _, info = env.step(fixed_quotes(env, 0.2))
    held = env.position * env.delta[0][:, None]
    torch.testing.assert_close(env.holding, -held.sum(-1))
    change = (env.position * (env.mark[1] - env.mark[0])[:, None]).sum(-1)
    torch.testing.assert_close(info["wealth_change"], change + env.holding * (env.spot[1] - env.spot[0])[:, None])
    torch.testing.assert_close(env.wealth, info["income"] + info["wealth_change"])


def test_against_rivals_is_the_market_from_one_seat():
    market = make(32, num_makers=3)
    rivals = [makers.avellaneda_stoikov(market, 0.2, 1.0), makers.constant_spread(market, 1.0)]
    own = makers.glft(market, 1.5, 0.8)
    for seat in range(3):
        env = AgainstRivals(market, rivals, seat)
        observation, _ = env.reset(seed=0)
        rewards = []
        for _ in range(env.num_steps):
            observation, reward, *_ = env.step(own(observation))
            rewards.append(reward)
        everyone = [None] * 3
        everyone[seat], everyone[(seat + 1) % 3], everyone[(seat + 2) % 3] = own, *rivals
        observation, _ = market.reset(seed=0)
        for t in range(env.num_steps):
            actions = torch.stack([policy(observation[:, i]) for i, policy in enumerate(everyone)], 1)
            observation, reward, *_ = market.step(actions)
            assert torch.equal(reward[:, seat], rewards[t])


def test_a_market_that_stands_still():
    market = make(4)
    env = AgainstRivals(market, [makers.avellaneda_stoikov(market, 0.2, 1.0)])
    still = env.standing_still(3, torch.tensor([0.02, 0.04, 0.08]))
    state = market.decode(still.observe_at(6, torch.tensor([-1.0, 0.0, 1.0])))
    torch.testing.assert_close(state.vega, torch.tensor([-1.0, 0.0, 1.0]))
    torch.testing.assert_close(state.net_delta, torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(state.spot, torch.full((3,), 100.0))
    torch.testing.assert_close(state.variance, torch.tensor([0.02, 0.04, 0.08]))
    assert (state.step == 6).all()
    alone = still.env.decode(still.env.observe()[:, 1])
    assert (alone.vega == 0).all()
    torch.testing.assert_close(state.rivals[:, 0, 0], state.rivals[:, 0, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choice_sensitivity": 0.0}, "choice_sensitivity is 0.0 (more than 0)"),
        ({"choice_sensitivity": float("nan")}, "choice_sensitivity is nan"),
        ({"arrival_rate": -1.0}, "arrival_rate is -1.0"),
        ({"num_makers": 0}, "num_makers is 0 (a whole number, at least 1)"),
        ({"num_makers": 2.5}, "num_makers is 2.5"),
        ({"cost_rate": -1e-3}, "cost_rate is -0.001"),
        ({"risk_aversion": -1.0}, "risk_aversion is -1.0"),
        ({"expiry": 11}, "expiry is 11 (whole steps, at least num_steps = 12)"),
        ({"moneyness": ()}, "moneyness is [] (one or more"),
        ({"moneyness": (0.0, float("nan"))}, "moneyness is [0.0, nan]"),
        ({"flow_half_life": 0.0}, "flow_half_life is 0.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(2, **settings)


def test_bad_actions():
    env = make(4)
    env.reset(seed=0)
    actions = fixed_quotes(env)
    actions[2, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="skew of maker 1 is not finite at step 0"):
        env.step(actions)
    actions = fixed_quotes(env)
    actions[3, 0, 3] = torch.inf
    with pytest.raises(ValueError, match="band of maker 0 is not finite"):
        env.step(actions)
    actions = fixed_quotes(env)
    actions[1, 0, 0] = -0.25
    with pytest.raises(ValueError, match=r"half_spread is -0.25 at step 0 \(0 or more, or the quotes cross\)"):
        env.step(actions)
    with pytest.raises(ValueError, match=r"shape \(4, 4\)"):
        env.step(actions[:, 0])
    assert env.t == 0  # nothing happened
    with pytest.raises(ValueError, match="1 rivals"):
        AgainstRivals(make(4, num_makers=3), [makers.constant_spread(env, 1.0)])
    with pytest.raises(RuntimeError, match="call reset"):
        make(4).step(actions)


def test_default_market_is_model_b():
    env = QuotingEnv(1)
    assert isinstance(env.dynamics, dynamics.Heston)
    assert env.dynamics == dynamics.Heston(0.04, 0.04, 4.0, 0.5, -0.7, 1 / 504)
    root = 0.2 * (120 / 504) ** 0.5
    torch.testing.assert_close(env.strike, 100 * torch.exp(torch.tensor([-1, -0.5, 0, 0.5, 1]) * root))
    settings = (env.num_makers, env.num_steps, env.expiry, env.arrival_rate, env.choice_sensitivity)
    assert settings == (2, 60, 120, 0.5, 2.0)
    assert (env.reference_edge, env.cost_rate, env.risk_aversion) == (1.0, 5e-4, 1.0)


def test_copies_of_a_market():
    env = QuotingEnv(12, num_steps=5, expiry=10)
    env.reset(seed=3, options={"copies": 4})
    for stored in (env.spot, env.variance, env.marks, env.intensity):  # time first
        groups = stored.unflatten(1, (3, 4))
        assert torch.equal(groups, groups[:, :, :1].expand_as(groups))
        assert not torch.equal(groups[:, 0], groups[:, 1])
    single = QuotingEnv(3, num_steps=5, expiry=10)
    single.reset(seed=3)
    assert torch.equal(env.spot[:, ::4], single.spot)
    for copies in (0, 5):
        with pytest.raises(ValueError, match="must divide num_envs = 12"):
            env.reset(options={"copies": copies})
