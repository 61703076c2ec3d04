"""QuotingEnv: accounting, conservation, the takers' law, fair values, seats, and what the policies see."""

import re

import numpy as np
import pytest
import torch
from common import MODELS, calls, model_called, quoted
from scipy.stats import kstest, poisson

from envs import AgainstRivals, QuotingEnv
from envs.baselines import makers
from envs.market import black_scholes, dynamics, quoting
from envs.market.fair import heston_call
from envs.market.hedging import Option
from envs.market.moves import StepMoves

F64 = torch.float64
ALL = (*MODELS, "marlvol")


def make(num_envs=64, model=None, **settings) -> QuotingEnv:
    """Twelve steps; by default in half-daily heston, with options that expire after 24 steps."""
    return QuotingEnv(num_envs, model, **{"num_steps": 12, **settings})


def random_actions(env: QuotingEnv, generator) -> torch.Tensor:
    """Asks and bids of their own for every option."""
    shape = (env.num_envs, env.num_makers)
    options = (*shape, env.num_options)
    half_spread = 2.0 * torch.rand(options, generator=generator, dtype=env.dtype)
    up = torch.randn(options, generator=generator, dtype=env.dtype)
    target, band = torch.randn((2, *shape), generator=generator, dtype=env.dtype)
    return env.to_action(ask=half_spread + up, bid=half_spread - up, target=target, band=band)


def fixed_quotes(env: QuotingEnv, half_spread=1.0, skew=0.0, target=0.0, band=0.0) -> torch.Tensor:
    """All options quoted alike; the numbers may differ between makers."""
    shape = (env.num_envs, env.num_makers)
    numbers = (torch.as_tensor(x, dtype=env.dtype).expand(shape) for x in (half_spread, skew, target, band))
    half_spread, skew, target, band = numbers
    ask = (half_spread + skew)[..., None].expand(*shape, env.num_options)
    return env.to_action(ask=ask, bid=ask - 2.0 * skew[..., None], target=target, band=band)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("num_makers", [1, 2, 3])
def test_wealth_is_cash_and_marked_positions_whatever_the_actions(name, num_makers):
    env = make(16, model_called(name), options=quoted(16, 24), num_makers=num_makers, dtype=F64)
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


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("rows", "copies"), [(7, 1), (64, 4), (300, 2)])
def test_drawing_episodes_ahead_changes_no_number(name, rows, copies, monkeypatch):
    """Nor does stopping between them, as a checkpoint of the generator's state does, nor another number of copies."""
    env, alone, resumed = (make(rows, model_called(name)) for _ in range(3))
    for other in (env, alone):
        other.generator.manual_seed(5)
    for episode in range(5):
        options = {"copies": copies if episode != 1 else 1}
        env.reset(options=options)
        with monkeypatch.context() as patch:
            patch.setattr("envs.market.env.ROWS_AHEAD", 0)
            alone.reset(options=options)
        others = [alone]
        if episode > 2:
            resumed.reset(options=options)
            others.append(resumed)
        for other in others:
            for table in quoting.TABLES:
                assert torch.equal(getattr(env, table), getattr(other, table)), (episode, table)
        assert torch.equal(env.generator.get_state(), alone.generator.get_state())
        if episode == 2:
            resumed.generator.set_state(env.generator.get_state())


@pytest.mark.parametrize("name", ["heston", "merton"])
@pytest.mark.parametrize("num_makers", [2, 3])
@pytest.mark.parametrize(("toxic_share", "informed_share"), [(0.0, 0.0), (0.0, 0.2), (0.0, 1.0), (0.3, 0.2)])
def test_an_episode_settled_at_once_is_the_steps_one_by_one(name, num_makers, toxic_share, informed_share, monkeypatch):
    monkeypatch.setattr(quoting, "ROWS_AT_ONCE", 5 * 16)  # five steps at a time, of twelve
    shares = {"toxic_share": toxic_share, "informed_share": informed_share}
    env = make(16, model_called(name), num_makers=num_makers, options=quoted(16, 24, dt=1 / 504), **shares)
    env.reset(seed=0)
    generator = torch.Generator().manual_seed(1)
    actions = [random_actions(env, generator) for _ in range(env.num_steps)]
    observations, rewards, _, _, infos = zip(*(env.step(action) for action in actions), strict=True)
    accounts = env.cash, env.wealth
    env.replay()
    for action, seen in zip(actions, observations, strict=True):
        torch.testing.assert_close(env.advance(action), seen, rtol=0, atol=0)
    at_once, info = env.settle()
    assert at_once.shape == (env.num_steps, 16, num_makers)
    torch.testing.assert_close(at_once, torch.stack(rewards), rtol=1e-6, atol=1e-6)
    assert info.keys() == infos[0].keys()
    for label, values in info.items():
        torch.testing.assert_close(values, torch.stack([x[label] for x in infos]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((env.cash, env.wealth), accounts, rtol=1e-5, atol=1e-4)
    last, _ = env.settle(3)
    torch.testing.assert_close(last, at_once[-3:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("informed_share", [0.0, 0.4, 1.0])
def test_wealth_against_an_account_kept_by_hand(informed_share):
    """Every trade at its price, from the definition: ask = reference + vega · ask edge, bid = reference − vega · bid
    edge, on puts and calls of two expiries; what is earned is that price less the fair value, in Heston's closed form.
    """
    options = [Option(94.0, 16, False), Option(100.0, 16, True), Option(97.0, 24, True), Option(105.0, 24, False)]
    env = make(16, options=options, informed_share=informed_share, dtype=F64)
    env.reset(seed=3)
    generator = torch.Generator().manual_seed(0)
    strike, expiry = (torch.tensor([option[i] for option in options], dtype=F64) for i in (0, 1))
    is_call = torch.tensor([option.is_call for option in options])
    cash = torch.zeros(16, 2, dtype=F64)
    for t in range(env.num_steps):
        actions, holding, before = random_actions(env, generator), env.holding, env.position
        spot, steps_left = env.spot[t][:, None], expiry - t
        volatility = env.dynamics.expected_average_variance(env.variance[t][:, None], steps_left).sqrt()
        tau = steps_left * env.dynamics.dt
        reference = black_scholes.price(spot, strike, tau, volatility, is_call)
        vega = 0.01 * black_scholes.vega(spot, strike, tau, volatility)
        fair = heston_call(spot, strike, tau, env.variance[t][:, None], env.dynamics)
        fair = fair - torch.where(is_call, 0.0, spot - strike)  # put–call parity
        ask = reference[:, None] + vega[:, None] * actions[..., :4]
        bid = reference[:, None] - vega[:, None] * actions[..., 4:8]
        fills = fills_of(env, actions)
        cash += (fills[:, :, 0] * ask - fills[:, :, 1] * bid).sum(-1)
        earned = (fills[:, :, 0] * (ask - fair[:, None]) + fills[:, :, 1] * (fair[:, None] - bid)).sum(-1)
        _, _, _, _, info = env.step(actions)
        torch.testing.assert_close(env.mark[t], fair, rtol=0, atol=2e-3)
        torch.testing.assert_close(info["income"], earned, rtol=0, atol=1e-2)
        torch.testing.assert_close(env.position - before, fills[:, :, 1] - fills[:, :, 0])
        if t < env.num_steps - 1:
            traded = env.holding - holding
            cash -= traded * spot + env.cost_rate * traded.abs() * spot
            inside = (info["net_delta"] - actions[..., 8]).abs() <= actions[..., 9].clamp(min=0) + 1e-12
            assert inside.all()
            torch.testing.assert_close(env.cash, cash)
            worth = (env.position * env.mark[t + 1][:, None]).sum(-1)
            torch.testing.assert_close(env.wealth, cash + env.holding * env.spot[t + 1][:, None] + worth)


def quotes_of(env, actions):
    """Edges (makers, 2, options, n) of the actions, from where they stand, and what takers make of them."""
    edges = torch.stack(actions[..., : 2 * env.num_options].split(env.num_options, -1), -2).movedim(0, -1)
    return edges, env.choice_probabilities(edges)


def fills_of(env, actions):
    """Fills (n, makers, 2, options) of the actions."""
    return env._fills(*quotes_of(env, actions)).movedim(-1, 0)


# Sums over 16 episodes of seed 7 with `common_quotes`, as they were when a maker had one half-spread and one skew:
# rewards, cash at the end, positions of each maker, and the first eight columns of the observation, of all makers
BEFORE = {
    ("gbm", 2): (
        [-18.97089, -3.73635043], [-15.57572733, 174.82180664], [[6, -4, 19, 18, 12], [3, -10, -2, 3, 4]],
        [176.0, 100.68952962, 37.45556964, 0.0, 10.6421552, 4.61499779, 0.0, -5.29050083],
    ),
    ("gbm", 3): (
        [-16.01189809, -7.0676018, -26.12732278], [-77.29806435, 198.46193527, 82.30212576],
        [[8, 1, 12, 16, 8], [-3, -16, 4, 5, 7], [2, 3, -2, 1, 1]],
        [264.0, 151.03429443, 56.18335446, 0.0, 8.37230532, 78.32733446, 0.0, -6.89345796],
    ),
    ("garch", 2): (
        [-90.95049943, -63.28402754], [-35.47176003, 149.64145234], [[6, -4, 19, 18, 12], [3, -10, -2, 3, 4]],
        [176.0, 100.68952962, 86.08009992, -43.78191696, 10.70618117, 5.44020568, 14.89265376, -5.29050083],
    ),
    ("garch", 3): (
        [-77.91814872, -73.16553515, -19.80737774], [-100.68953921, 195.75252637, 59.81589181],
        [[8, 1, 12, 16, 8], [-3, -16, 4, 5, 7], [2, 3, -2, 1, 1]],
        [264.0, 151.03429443, 129.12014988, -65.67287544, 8.63806301, 79.29082276, 13.08637473, -6.89345796],
    ),
    ("heston", 2): (
        [-27.39402979, 0.15004032], [-222.72459586, 90.42648363], [[5, 7, 5, 1, -6], [-9, -16, 4, 0, 8]],
        [176.0, 100.68952962, 70.96831591, -7.49047192, -17.99286342, 35.14273085, -18.81457059, 3.26412008],
    ),
    ("heston", 3): (
        [-20.77120601, 1.65742227, -31.61708919], [-209.45340573, 80.13233055, -66.23430222],
        [[4, 6, 5, 6, -6], [-6, -5, 1, -15, 7], [4, -10, 7, 11, 0]],
        [264.0, 151.03429443, 106.45247386, -11.23570787, -15.13507199, 130.81066527, -15.99974461, 2.41954637],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "num_makers"), BEFORE)
def test_one_half_spread_and_skew_for_all_options_is_a_special_case(name, num_makers):
    """Calls marked at the reference price, quoted alike, for takers who know no better: the numbers of before."""
    settings = {"fair_marks": False, "informed_share": 0.0, "dtype": F64}
    env = make(16, MODELS[name], options=calls(24), num_makers=num_makers, **settings)
    env.reset(seed=7)
    maker = torch.arange(num_makers, dtype=F64)
    rewards = seen = 0.0
    for t in range(env.num_steps):
        skew = 0.1 * (maker - 0.5) * (t % 3 - 1)
        action = fixed_quotes(env, 0.7 + 0.2 * maker + 0.02 * t, skew, 0.3 * maker - 0.1, 0.1 * maker)
        observation, reward, *_ = env.step(action)
        rewards, seen = rewards + reward.sum(0), seen + observation[..., :8].sum((0, 1))
        assert torch.equal(observation[..., env.columns["positions"]], env.position)
    found = (rewards, env.cash.sum(0), env.position.sum(0), seen)
    for now, before in zip(found, BEFORE[name, num_makers], strict=True):
        torch.testing.assert_close(now, torch.tensor(before, dtype=F64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("toxic_share", "informed_share"), [(0.0, 0.0), (0.0, 0.3), (0.0, 1.0), (0.5, 0.25), (1.0, 0.0)]
)
def test_every_taker_trades_with_one_maker_or_walks_away(toxic_share, informed_share):
    shares = {"toxic_share": toxic_share, "informed_share": informed_share}
    env = make(256, options=quoted(16, 24, dt=1 / 504), num_makers=3, **shares)
    env.reset(seed=0)
    generator = torch.Generator().manual_seed(1)
    net = torch.zeros(256, env.num_options)
    for t in range(env.num_steps):
        actions = random_actions(env, generator)
        arrived = (env.marks[t] < 1).sum(-1)
        fills = fills_of(env, actions)
        assert (fills >= 0).all()
        assert (fills == fills.round()).all()
        walked, first = 0.0, 0.0  # of each kind, the marks beyond the last maker's interval
        kinds = [share for share in (*shares.values(), 1.0 - sum(shares.values())) if share > 0]
        for share, probabilities in zip(kinds, quotes_of(env, actions)[1], strict=True):
            last = first + share * probabilities.sum(0).movedim(-1, 0)[..., None]
            walked = walked + ((env.marks[t] < first + share) & (env.marks[t] >= last)).sum(-1)
            first += share
        assert first == 1.0
        assert torch.equal(fills.sum(1) + walked, arrived.to(fills))
        net += fills.sum(1)[:, 1] - fills.sum(1)[:, 0]
        env.step(actions)
    assert torch.equal(env.position.sum(1), net)  # the makers hold what the takers do not


def test_takers_choose_by_logit():
    """The informed on edges over the fair value, the others over the reference price: by maker, side and option."""
    env = make(20_000, num_makers=3, num_steps=2, options=quoted(24, dt=1 / 504), flow_sd=0.0, informed_share=0.4)
    env.reset(seed=0)
    asks = np.array([[0.9, 0.7, 1.6, -0.4, 1.0], [0.7, 2.0, 0.8, -1.5, -2.0], [1.6, 2.5, 0.1, 0.0, -3.0]])
    bids = np.array([[0.5, 0.0, 1.2, 1.9, 3.0], [1.3, -1.0, 0.8, 2.5, 2.5], [1.6, 0.3, 0.7, 0.5, 4.0]])
    actions = fixed_quotes(env)
    actions[..., :5], actions[..., 5:10] = (torch.from_numpy(x).float() for x in (asks, bids))
    fills = fills_of(env, actions)
    _, (probabilities, _) = quotes_of(env, actions)
    marks = env.marks[0, :, None]
    best_first = actions[..., :10].unflatten(-1, (2, 5)).argsort(1)
    probabilities = probabilities.movedim(-1, 0)
    ends = 0.4 * probabilities.gather(1, best_first).cumsum(1)[..., None]  # the first marks are the informed's
    served = (marks < ends).sum(-1).diff(dim=1, prepend=torch.zeros(20_000, 1, 2, 5, dtype=torch.long))
    by_informed = torch.zeros_like(served).scatter(1, best_first, served)
    smile = heston_call(100.0, env.strike, 24 / 504, 0.04, env.dynamics)  # and put–call parity: the same premium
    reference = black_scholes.price(100.0, env.strike.double(), 24 / 504, 0.2)
    gap = ((smile - reference) / (0.01 * black_scholes.vega(100.0, env.strike.double(), 24 / 504, 0.2))).numpy()
    assert gap[0] > 0.3
    assert gap[-1] < -0.3
    for kind, share, count in (("informed", 0.4, by_informed), ("others", 0.6, fills - by_informed)):
        over = gap if kind == "informed" else 0.0
        for side, quoted_edges, sign in ((0, asks, 1.0), (1, bids, -1.0)):
            weights = np.exp(-2.0 * (quoted_edges - sign * over - 1.0))
            shares = weights / (1.0 + weights.sum(0))
            expected = 20_000 * 0.5 * share * shares
            found = count[:, :, side].sum(0).numpy()
            assert (np.abs(found - expected) < 4 * expected**0.5 + 2e-3 * expected).all(), (kind, side)
    # each a Poisson process thinned by the choice
    weights, informed = (np.exp(-2.0 * (asks[:, 0] - x - 1.0)) for x in (0.0, gap[0]))
    mean = 0.5 * (0.6 * weights[0] / (1 + weights.sum()) + 0.4 * informed[0] / (1 + informed.sum()))
    counts = fills[:, 0, 0, 0]
    assert abs(counts.var().item() - mean) < 0.02
    assert abs((counts == 0).double().mean().item() - poisson.pmf(0, mean)) < 0.01


def test_informed_takers_see_edges_over_the_fair_value_and_nothing_else():
    """Where all are informed, edges over the fair value do what edges over the reference do where nobody is."""
    quotes = torch.Generator().manual_seed(1)
    knowing, others, flat = (
        make(256, num_makers=3, options=quoted(16, 24, dt=1 / 504), dtype=F64, **settings)
        for settings in ({"informed_share": 1.0}, {"informed_share": 0.0}, {"informed_share": 0.5, "fair_marks": False})
    )
    for env in (knowing, others, flat):
        env.reset(seed=4)
    for t in range(others.num_steps):
        actions = random_actions(others, quotes)
        shifted = actions.clone()
        shifted[..., : 2 * others.num_options] += knowing.gap[t].flatten(1)[:, None]
        for env in (knowing, others, flat):
            env.step(shifted if env is knowing else actions)
        assert torch.equal(knowing.fills, others.fills)
        assert (flat.gap == 0).all()  # the fair value is the reference price
    torch.testing.assert_close(others.mark - others.reference, others.premium[:, :, 0])
    assert torch.equal(flat.mark, flat.reference)
    assert torch.equal(flat.spot, others.spot)


def test_toxic_takers_know_the_next_variance():
    """Where all are toxic, edges over what options are worth at the next variance do what edges over the reference do
    where nobody knows a thing; where the variance never moves, they are informed takers."""
    quotes = torch.Generator().manual_seed(1)
    settings = {"num_makers": 3, "options": quoted(16, 24, dt=1 / 504), "dtype": F64}
    knowing, others = (
        make(256, **settings, **shares)
        for shares in ({"toxic_share": 1.0, "informed_share": 0.0}, {"informed_share": 0.0})
    )
    for env in (knowing, others):
        env.reset(seed=4)
    now, later = others.variance[:-1].T, others.variance[1:].T
    spot, steps = others.spot[:-1].T, torch.arange(others.num_steps)
    for t in range(others.num_steps):
        left = (16 - t) / 504, (24 - t) / 504
        actions = random_actions(others, quotes)
        noticed = []
        for variance in (now[:, t], later[:, t]):
            at = (steps[t], spot[:, t] / 100.0, variance)
            volatility = others.reference_volatility(*at)
            tau = torch.tensor(left, dtype=F64).repeat_interleave(5)
            price = black_scholes.price(spot[:, t, None], others.strike, tau, volatility, others.is_call)
            noticed.append(price + others.premium_at(*at)[..., 0])
        more = (noticed[1] - noticed[0]) / others.vega[t].clamp(min=1e-3)
        shifted = actions.clone()
        shifted[..., : 2 * others.num_options] += (others.gap[t] + torch.stack((more, -more), 1)).flatten(1)[:, None]
        for env in (knowing, others):
            env.step(shifted if env is knowing else actions)
        assert torch.equal(knowing.fills, others.fills)
        assert more.abs().max() > 0.3
    kinds = ({"toxic_share": 1.0, "informed_share": 0.0}, {"informed_share": 1.0})
    flat = [make(64, MODELS["gbm"], **shares) for shares in kinds]
    for env in flat:
        env.reset(seed=4)
        for _ in range(env.num_steps):
            env.step(fixed_quotes(env))
    assert torch.equal(flat[0].position, flat[1].position)


def test_toxic_takers_cost_a_maker_what_the_next_variance_makes_of_their_options():
    """The wealth of a hedged book is a martingale, unless some takers know where the variance goes."""
    lost = {}
    for share in (0.0, 0.5):
        env = make(20_000, num_steps=6, options=quoted(120, dt=1 / 504), toxic_share=share, informed_share=0.0)
        env.reset(seed=1)
        own = makers.glft(env, 1.5, 0.8)
        observation, _ = env.replay()
        change, foreseen = 0.0, 0.0
        for t in range(env.num_steps):
            observation, _, _, _, info = env.step(torch.stack([own(observation[:, i]) for i in range(2)], 1))
            change = change + info["wealth_change"]
            if share:
                worth = env._foreseen()[t, :, 0] * env.vega[t]
                foreseen = foreseen + ((env.fills[:, :, 1] - env.fills[:, :, 0]) * worth[:, None]).sum(-1)
        lost[share] = change.mean(0)
        if share:
            off = change - foreseen
            assert (foreseen.mean(0) < -0.05).all()
            # They know of the spot, too, as it moves with the variance; the makers' hedge takes most of that away
            assert (off.mean(0).abs() < 4 * off.std(0) / 20_000**0.5 + 0.1 * foreseen.mean(0).abs()).all()
        else:
            assert (change.mean(0).abs() < 4 * change.std(0) / 20_000**0.5).all()
    assert (lost[0.5] < lost[0.0] - 0.05).all()


def test_the_best_price_takes_all_as_the_choice_sharpens():
    env = make(2000, choice_sensitivity=1e5, fair_marks=False)
    env.reset(seed=0)
    arrived = (env.marks[0] < 1).sum((-1, -2, -3))
    _, _, _, _, info = env.step(fixed_quotes(env, torch.tensor([0.8, 0.81])))
    assert torch.equal(info["fills"][:, 0], arrived.to(info["fills"]))
    assert (info["fills"][:, 1] == 0).all()
    _, _, _, _, info = env.step(fixed_quotes(env, 1.01))  # worse than walking away
    assert (info["fills"] == 0).all()


def test_takers_arrive_as_a_cox_process():
    env = make(4000, num_steps=20, fair_marks=False)
    env.reset(seed=5)
    flow = env.intensity / 0.5 - 1.0  # (steps, n, 2): + f for buyers, − f for sellers
    torch.testing.assert_close(flow[..., 0], -flow[..., 1])
    f = flow[..., 0]
    assert f.abs().max() <= quoting.MAX_FLOW + 1e-6
    assert abs(f.mean().item()) < 0.02
    clipped_sd = np.random.default_rng(0).normal(0, 0.5, 10**6).clip(-0.9, 0.9).std()
    assert f.std().item() == pytest.approx(clipped_sd, rel=0.03)
    small = make(4000, num_steps=20, fair_marks=False, flow_sd=0.1)  # hardly ever cut
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


@pytest.mark.parametrize("name", ALL)
def test_seeds_and_batches(name):
    results = {}
    for label, num_envs, seed in (("a", 5, 0), ("b", 5, 0), ("more", 40, 0), ("other", 5, 1)):
        env = make(num_envs, model_called(name), options=quoted(16, 24))
        observation, _ = env.reset(seed=seed)
        seen = [observation[:5]]
        for _ in range(env.num_steps):
            actions = fixed_quotes(env, torch.tensor([0.8, 0.9]))
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
    market = [x.clone() for x in (env.marks, env.intensity, env.spot, env.variance)]
    for _ in range(env.num_steps):
        env.step(fixed_quotes(env, 0.5))
    env.reset(seed=0)
    for other in (env, make(64, informed_share=0.7), make(64, fair_marks=False)):
        other.reset(seed=0)
        same = zip(market, (other.marks, other.intensity, other.spot, other.variance), strict=True)
        assert all(torch.equal(x, y) for x, y in same)


@pytest.mark.parametrize("num_makers", [2, 3])
def test_swapping_policies_swaps_results_path_by_path(num_makers):
    env = make(64, num_makers=num_makers, options=quoted(16, 24, dt=1 / 504), dtype=F64)
    tilt = torch.linspace(0.3, -0.4, env.num_options, dtype=F64)
    glft = makers.glft(env, 1.5, 0.8)
    policies = [
        makers.with_the_smile(env, makers.avellaneda_stoikov(env, 0.2, 1.0), StepMoves(env), 0.5, 0.1),
        lambda observation: tilted(env, glft(observation), tilt), makers.constant_spread(env, 1.1),
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


def tilted(env, action, tilt):
    """The quotes of an action, moved up by a tilt for each option."""
    numbers = env.by_name(action)
    return env.to_action(**{**numbers, "ask": numbers["ask"] + tilt, "bid": numbers["bid"] - tilt})


def test_seats_are_alike_in_distribution_when_all_quote_the_same():
    env = make(4000)
    env.reset(seed=0)
    fills = 0.0
    for _ in range(env.num_steps):
        _, _, _, _, info = env.step(fixed_quotes(env))
        fills = fills + info["fills"]
    difference = (fills[:, 0] - fills[:, 1]).double()
    assert abs(difference.mean()) < 4 * difference.std() / 4000**0.5


@pytest.mark.parametrize(("name", "toxic_share"), [*((name, 0.0) for name in MODELS), ("heston", 0.5), ("garch", 0.5)])
def test_the_noise_has_mean_zero_whatever_is_held_and_explains_most_of_the_variance(name, toxic_share):
    env = make(20_000, MODELS[name], toxic_share=toxic_share)
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
    if name != "merton" and toxic_share == 0:  # where jumps, far from first order, are what the variance is made of
        assert (rest.var(0) < 0.55 * raw.var(0)).all()
    play(*(lambda observation, up=up: tilted(env, rival(observation), up) for up in (0.5, -0.5)))  # long, short


def test_what_is_observed():
    env = make(8, num_makers=3, privileged=True, dtype=F64)
    observation, _ = env.reset(seed=0)
    assert observation.shape == (8, 3, 8 + 20 + 5 + 2 * 6)
    assert (observation[..., 8:28] == env.reference_edge).all()  # before any quote
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
            asks, bids = actions[:, other, :5], actions[:, other, 5:10]
            torch.testing.assert_close(state.rivals[:, i], torch.stack((asks, bids), 1))
            torch.testing.assert_close(seen[:, 8 + 10 * i : 13 + 10 * i], asks)
            torch.testing.assert_close(seen[:, 33 + i], vega[:, other])
            torch.testing.assert_close(seen[:, 35 + 5 * i : 40 + 5 * i], env.position[:, other])
    # the vega risk is what one standard deviation of the volatility's own move is worth in a step
    v = env.variance[4]
    slope = -np.expm1(-4.0 * 20 * env.dynamics.dt) / (4.0 * 20 * env.dynamics.dt) / (2 * env.volatility[4])
    sd = 100 * slope * 0.5 * v.sqrt() * (1 - 0.7**2) ** 0.5 * env.dynamics.dt**0.5
    torch.testing.assert_close(observation[:, 0, 6], vega[:, 0] * sd, rtol=2e-2, atol=1e-6)
    public = make(8, num_makers=3, dtype=F64)
    assert public.reset(seed=0)[0].shape == (8, 3, 33)


@pytest.mark.parametrize("name", ALL)
def test_an_observation_tells_vegas_and_fair_values(name):
    """What a maker who knows the model computes from what it sees, on several expiries: what the market has."""
    env = make(32, model_called(name), options=quoted(16, 24), dtype=F64)
    env.reset(seed=1)
    for t in range(6):
        env.step(fixed_quotes(env))
        state = env.decode(env.observe()[:, 0])
        torch.testing.assert_close(env.vegas_at(state), env.vega[t + 1].clamp(min=quoting.MIN_VEGA), rtol=1e-6, atol=0)
        torch.testing.assert_close(env.gap_at(state), env.gap[t + 1, :, 0], rtol=1e-6, atol=1e-6)
    assert torch.equal(env.gap[:, :, 0], -env.gap[:, :, 1])
    torch.testing.assert_close(env.gap[0, 0, 0] * env.vega[0, 0], env.mark[0, 0] - env.reference[0, 0])
    sizes = {"gbm": 0.0, "merton": 0.05}
    assert (env.gap[0].abs().amax() > sizes.get(name, 0.3)) != (name == "gbm")
    assert env.middle == 7  # at the money, of the later expiry
    torch.testing.assert_close(state.time_to_expiry, torch.full_like(state.spot, (24 - 6) * env.dynamics.dt))


# FAIR VALUES


@pytest.mark.parametrize("name", ALL)
def test_marks_are_martingales(name):
    """Every option on average keeps its value along the paths: expiries and strikes, puts and calls, several times."""
    model = model_called(name)
    n = 2**14
    options = quoted(16, 24, moneyness=(-1.0, 0.0, 1.0))
    env = make(n, model, options=options, arrival_rate=1e-6, flow_sd=0.0, dtype=F64)  # nobody comes
    env.reset(seed=3)
    for t in (1, 2, 5, 9, 12):
        change = env.mark[t] - env.mark[0]
        assert (change.mean(0).abs() < 4 * change.std(0) / n**0.5 + 1e-3).all(), t
    if name not in ("gbm", "merton"):  # the reference price of most options is no martingale
        change = env.reference[12] - env.reference[0]
        assert (change.mean(0).abs() > 4 * change.std(0) / n**0.5 + 1e-3).any()


@pytest.mark.parametrize("name", ALL)
def test_nothing_looks_ahead(name):
    """Another future changes no price, no Greek and no observation up to now."""
    env = make(8, model_called(name), options=quoted(16, 24), dtype=F64)
    env.reset(seed=2)
    stored = ("mark", "reference", "delta", "vega", "gap", "fair_delta", "fair_slope", "volatility")
    before = {name: getattr(env, name).clone() for name in stored}
    seen = [block[:6].clone() for block in env.blocks if isinstance(block, torch.Tensor)]
    spot, variance = env.spot.T.clone(), env.variance.T.clone()
    spot[:, 6:] *= 1.2
    variance[:, 6:] *= 0.5
    env.set_market(spot, variance, env.intensity.transpose(0, 1), env.marks.transpose(0, 1))
    for label, values in before.items():
        assert torch.equal(values[:6], getattr(env, label)[:6]), label
        constant = name in ("gbm", "merton", "marlvol")  # volatility, or fair values in a variance of their own
        assert constant or not torch.equal(values[6:], getattr(env, label)[6:]), label
    now = [block[:6] for block in env.blocks if isinstance(block, torch.Tensor)]
    assert all(torch.equal(x, y) for x, y in zip(seen, now, strict=True))


def test_puts_and_calls_are_worth_the_same_premium():
    """Put–call parity of reference prices and fair values; deltas differ by one, vegas are alike."""
    strikes = [92.0, 100.0, 107.0]
    both = [make(16, options=[Option(k, 24, is_call) for k in strikes], dtype=F64) for is_call in (True, False)]
    for env in both:
        env.reset(seed=0)
    call, put = both
    for name in ("mark", "reference"):
        forward = call.spot[..., None] - call.strike
        torch.testing.assert_close(getattr(call, name) - getattr(put, name), forward, rtol=0, atol=1e-10)
    torch.testing.assert_close(call.delta - put.delta, torch.ones_like(call.delta))
    torch.testing.assert_close(call.fair_delta - put.fair_delta, torch.ones_like(call.delta))
    for name in ("vega", "gap", "fair_slope"):
        torch.testing.assert_close(getattr(call, name), getattr(put, name))


def test_order_flow_is_a_moving_average_of_signed_trades():
    env = make(16)
    env.reset(seed=0)
    flow = torch.zeros(16)
    for _ in range(5):
        fills = fills_of(env, fixed_quotes(env)).sum(1)
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
    market = make(32, num_makers=3, options=quoted(16, 24, dt=1 / 504))
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
    assert state.rivals.shape == (3, 1, 2, 5)


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
        ({"informed_share": 1.5}, "informed_share is 1.5 (at least 0, at most 1)"),
        ({"informed_share": float("nan")}, "informed_share is nan"),
        ({"informed_share": 0.5, "toxic_share": 0.6}, "toxic_share is 0.6 (at least 0, at most 0.5)"),
        ({"toxic_share": -0.1}, "toxic_share is -0.1"),
        ({"options": [(100.0, 11)]}, "expiry is 11 (whole steps, at least num_steps = 12)"),
        ({"options": [(100.0, 24.5)]}, "expiry is 24.5 (whole steps"),
        ({"options": []}, "options are none or not in the order of their expiry and strike"),
        ({"options": [(100.0, 24), (95.0, 24)]}, "not in the order of their expiry and strike"),
        ({"options": [(100.0, 24), (105.0, 16)]}, "not in the order of their expiry and strike"),
        ({"options": [(100.0, 24), (100.0, 24, False)]}, "not in the order of their expiry and strike"),
        ({"options": [(-5.0, 24)]}, "strike is -5.0 (more than 0)"),
        ({"options": [(float("nan"), 24)]}, "strike is nan (more than 0)"),
        ({"flow_half_life": 0.0}, "flow_half_life is 0.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(2, **settings)


@pytest.mark.parametrize(
    ("moneyness", "expiries", "message"),
    [
        ((), (24,), "moneyness are none (one or more, increasing)"),
        ((0.0, 0.0), (24,), "moneyness are 0, 0 (one or more, increasing)"),
        ((0.5, -0.5), (24,), "moneyness are 0.5, -0.5 (one or more"),
        ((0.0,), (), "expiries are none (one or more, increasing)"),
        ((0.0,), (24, 12), "expiries are 24, 12 (one or more, increasing)"),
    ],
)
def test_bad_grids_of_options(moneyness, expiries, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        quoting.moneyness_grid(moneyness, expiries, 1 / 252)


def test_options_beyond_the_smile_of_a_model():
    with pytest.raises(ValueError, match=re.escape("expiry is 60 (whole steps, at least num_steps = 12, at most 51,")):
        make(2, model_called("marlvol"), options=quoted(24, 60))


def test_bad_actions():
    env = make(4)
    env.reset(seed=0)
    actions = fixed_quotes(env)
    actions[2, 1, 6] = torch.nan
    with pytest.raises(quoting.BadQuote, match="bid 1 of maker 1 is not finite at step 0"):
        env.step(actions)
    actions = fixed_quotes(env)
    actions[3, 0, 11] = torch.inf
    with pytest.raises(quoting.BadQuote, match="band of maker 0 is not finite"):
        env.step(actions)
    actions = fixed_quotes(env)
    actions[1, 0, 3] = -1.25  # the ask of one option; all others are sound
    crossed = r"ask \+ bid of option 3 at step 0 are -0.25 \(0 or more, or the quotes cross\)"
    with pytest.raises(quoting.BadQuote, match=crossed):
        env.step(actions)
    with pytest.raises(ValueError, match=r"shape \(4, 12\)"):
        env.step(actions[:, 0])
    with pytest.raises(ValueError, match=r"shape \(4, 12\)"):
        env.advance(actions[:, 0])
    assert env.t == 0  # nothing happened
    env.step(fixed_quotes(env, 0.0, 3.0))  # a spread of zero does not cross, whatever the skew
    with pytest.raises(quoting.BadQuote, match="of option 3 at step 1"):
        env.step(actions)
    for _ in range(2):  # an episode's quotes are looked at when it is settled
        env.advance(actions)
    with pytest.raises(quoting.BadQuote, match="of option 3 at step 1"):
        env.settle()
    with pytest.raises(ValueError, match="1 rivals"):
        AgainstRivals(make(4, num_makers=3), [makers.constant_spread(env, 1.0)])
    with pytest.raises(RuntimeError, match="call reset"):
        make(4).step(actions)


def test_quotes_that_cross_can_be_moved_to_the_middle():
    env = make(16, num_makers=3)
    env.reset(seed=0)
    wild = 20.0 * torch.rand(16, 3, env.action_size, generator=torch.Generator().manual_seed(0)) - 10.0
    before, after = env.by_name(wild), env.by_name(env.uncrossed(wild))
    crossed = before["ask"] + before["bid"] < 0
    assert 0.4 < crossed.float().mean() < 0.6
    for name in ("ask", "bid"):
        assert torch.equal(after[name][~crossed], before[name][~crossed])
    for name in ("target", "band"):
        assert torch.equal(after[name], before[name])
    spread = after["ask"] + after["bid"]
    assert spread.min() >= 0
    assert spread[crossed].max() < 1e-5
    middles = [x["ask"] - x["bid"] for x in (before, after)]
    torch.testing.assert_close(*middles, rtol=1e-5, atol=1e-5)
    env.step(env.uncrossed(wild))
    actions = fixed_quotes(env, -0.4 * quoting.ROUNDING, 2.0)  # what rounding makes of a spread of zero
    env.step(actions)
    with pytest.raises(quoting.BadQuote, match="or the quotes cross"):
        env.step(fixed_quotes(env, -quoting.ROUNDING))


def test_default_market_is_model_b():
    env = QuotingEnv(1)
    assert isinstance(env.dynamics, dynamics.Heston)
    assert env.dynamics == dynamics.Heston(0.04, 0.04, 4.0, 0.5, -0.7, 1 / 504)
    root = 0.2 * (120 / 504) ** 0.5
    torch.testing.assert_close(env.strike, 100 * torch.exp(torch.tensor([-1, -0.5, 0, 0.5, 1]) * root))
    assert [option.expiry for option in env.options] == [120] * 5
    assert [option.is_call for option in env.options] == [False, False, True, True, True]  # out of the money
    settings = (env.num_makers, env.num_steps, env.arrival_rate, env.choice_sensitivity)
    assert settings == (2, 60, 0.5, 2.0)
    assert (env.reference_edge, env.cost_rate, env.risk_aversion) == (1.0, 5e-4, 1.0)
    assert (env.informed_share, env.fair_marks) == (0.2, True)
    env.reset(seed=0)
    fair_values = torch.tensor([2.40, 0.78, -0.81, -2.38, -3.42])  # vol points over the reference price
    torch.testing.assert_close(env.gap[0, 0, 0], fair_values, rtol=0, atol=0.01)


def test_copies_of_a_market():
    env = QuotingEnv(12, num_steps=5)
    env.reset(seed=3, options={"copies": 4})
    for stored in (env.spot, env.variance, env.marks, env.intensity):  # time first
        groups = stored.unflatten(1, (3, 4))
        assert torch.equal(groups, groups[:, :, :1].expand_as(groups))
        assert not torch.equal(groups[:, 0], groups[:, 1])
    single = QuotingEnv(3, num_steps=5)
    single.reset(seed=3)
    assert torch.equal(env.spot[:, ::4], single.spot)
    for copies in (0, 5):
        with pytest.raises(ValueError, match="must divide num_envs = 12"):
            env.reset(options={"copies": copies})
