"""What is observed and what an action consists of: one table each, from which everything else follows."""

import pytest
import torch
from common import book_env

from envs import AgainstRivals, HedgingEnv, QuotingEnv
from envs.baselines import hedgers, makers
from envs.benchmark.contest import play
from envs.market.dynamics import GBM
from envs.market.env import Part
from envs.market.moves import StepMoves
from envs.optimum.hedge import optimal_hedge
from envs.optimum.makers import BestResponse, MultiAsset, VegaProgramming

F64 = torch.float64


class Talkative(QuotingEnv):
    """Makers see the spot before everything else and their account in the middle, and have one more number between the
    asks and the bids."""

    def observation_parts(self):
        parts = super().observation_parts()
        spot = Part(1, lambda env: env.spot[env.t][:, None, None])
        account = Part(2, lambda env: torch.stack((env.cash, env.holding), -1))
        first = dict(list(parts.items())[:3])
        return {"spot": spot, **first, "account": account, **parts}

    def action_bounds(self):
        asks, *rest = super().action_bounds().items()
        return dict([asks, ("premium", (-5.0, 5.0)), *rest])


class Verbose(HedgingEnv):
    """Hedgers see their cash first, and have a third number before the others."""

    def observation_parts(self):
        cash = Part(1, lambda env: env.cash[:, None], unit=10.0)
        return {"cash": cash, **super().observation_parts()}

    def action_bounds(self):
        return {"urgency": (0.0, 1.0), **super().action_bounds()}


@pytest.mark.parametrize("env", [HedgingEnv(3), book_env(3), QuotingEnv(3, num_makers=3, privileged=True)])
def test_spaces_and_columns_follow_from_the_tables(env):
    observation, _ = env.reset(seed=0)
    parts, bounds = env.observation_parts(), env.action_bounds()
    assert list(env.columns) == list(parts)
    ends = [columns.stop for columns in env.columns.values()]
    starts = [columns.start for columns in env.columns.values()]
    assert starts == [0, *ends[:-1]]
    assert [end - start for start, end in zip(starts, ends, strict=True)] == [part.width for part in parts.values()]
    assert observation.shape[-1] == ends[-1] == env.single_observation_space.shape[-1]
    counts = [count[0] if count else 1 for _, _, *count in bounds.values()]
    assert env.single_action_space.shape[-1] == env.action_size == sum(counts)
    low, high = (torch.from_numpy(x).double() for x in (env.single_action_space.low, env.single_action_space.high))
    expected = [(x[0], x[1]) for x, count in zip(bounds.values(), counts, strict=True) for _ in range(count)]
    expected = torch.tensor(expected, dtype=F64)
    torch.testing.assert_close(low.view(-1, env.action_size)[0], expected[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(high.view(-1, env.action_size)[0], expected[:, 1], rtol=1e-6, atol=0)


def test_names_of_numbers():
    """One name for one number is a column, one for several is a slice; messages count them."""
    assert HedgingEnv(1).action_columns == {"offset": 0, "half_width": 1}
    market = QuotingEnv(1, options=[(95.0, 60, False), (100.0, 60)], fair_marks=False)
    assert market.action_columns == {"ask": slice(0, 2), "bid": slice(2, 4), "target": 4, "band": 5}
    assert market.action_names() == ["ask 0", "ask 1", "bid 0", "bid 1", "target", "band"]
    one = QuotingEnv(1, options=[(100.0, 60)], fair_marks=False)
    assert one.action_columns["ask"] == slice(0, 1)  # an axis of its own, though there is one option
    assert one.by_name(torch.zeros(7, 4))["ask"].shape == (7, 1)


@pytest.mark.parametrize(("env", "size"), [(HedgingEnv(3), (3,)), (QuotingEnv(3), (3, 2)), (Talkative(3), (3, 2))])
def test_actions_by_name(env, size):
    shapes = {name: (*size, *count) for name, (_, _, *count) in env.action_bounds().items()}
    generator = torch.Generator().manual_seed(0)
    numbers = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    actions = env.to_action(**numbers)
    assert actions.shape == (*size, env.action_size)
    assert all(torch.equal(env.by_name(actions)[name], value) for name, value in numbers.items())
    first, second, *others = numbers
    partial = env.by_name(env.to_action(**{second: torch.ones(shapes[second]), first: 0.5}))
    assert (partial[first] == 0.5).all()
    assert (partial[second] == 1).all()
    assert all((partial[name] == 0).all() for name in others)
    with pytest.raises(ValueError, match=f"an action has no hedge \\(only {', '.join(numbers)}\\)"):
        env.to_action(hedge=torch.ones(size))
    wrong = torch.zeros(*size, env.action_size + 1)
    with pytest.raises(ValueError, match=f"actions have {env.action_size + 1} columns \\({env.action_size}: {first}"):
        env.by_name(wrong)


def test_quotes_are_composed_of_half_spread_skew_and_tilt():
    market = QuotingEnv(3, fair_marks=False)
    half_spread, skew = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, -0.2, 0.0])
    tilt = torch.tensor([0.5, 0.0, 0.0, 0.0, -0.5])
    action = market.by_name(market.quote(half_spread, skew, tilt, target=skew, band=0.3))
    up = skew[:, None] + tilt
    torch.testing.assert_close(action["ask"], half_spread[:, None] + up)
    torch.testing.assert_close(action["bid"], half_spread[:, None] - up)
    assert torch.equal(action["target"], skew)
    assert (action["band"] == 0.3).all()
    each = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    action = market.by_name(market.quote(each, tilt=0.1 * each))
    torch.testing.assert_close(action["ask"], 1.1 * each)
    torch.testing.assert_close(action["bid"], 0.9 * each)
    assert (action["target"] == 0).all()


def test_a_new_observation_is_misread_by_no_one():
    """Wherever the new parts are: state, classical makers and their results are those of the plain market."""
    plain, more = (kind(64, num_makers=3, num_steps=6, dtype=F64) for kind in (QuotingEnv, Talkative))
    assert more.maker_observation_space.shape == (plain.maker_observation_space.shape[0] + 3,)
    assert more.maker_action_space.shape == (13,)

    def played(market):
        formulas = [makers.avellaneda_stoikov(market, 0.2, 1.0), makers.constant_spread(market, 1.0)]
        glft = makers.glft(market, 1.5, 0.8)
        own = makers.with_the_smile(market, glft, StepMoves(market), 0.5, 0.1)
        formulas[1] = makers.minimum_variance_band(market, formulas[1], 0.1)
        env = AgainstRivals(market, formulas)
        observation, _ = env.reset(seed=0)
        rewards, states = [], []
        for _ in range(env.num_steps):
            states.append(torch.cat([x.flatten().to(F64) for x in market.decode(observation)]))
            observation, reward, *_ = env.step(own(observation))
            rewards.append(reward)
        return torch.stack(rewards), torch.stack(states), env, observation

    rewards, states, env, _ = played(plain)
    rewards_too, states_too, env_too, observation = played(more)
    assert torch.equal(rewards, rewards_too)
    assert torch.equal(states, states_too)
    assert torch.equal(observation[:, 0], more.spot[6])
    assert torch.equal(observation[:, more.columns["account"]], torch.stack((more.cash, more.holding), -1)[:, 0])
    vega = torch.linspace(-1, 1, 8, dtype=F64)
    still, still_too = env.standing_still(8), env_too.standing_still(8)
    assert type(still_too.env) is Talkative
    one, two = plain.decode(still.observe_at(3, vega)), more.decode(still_too.observe_at(3, vega))
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def test_those_who_know_the_model_quote_in_a_market_with_more_numbers():
    results = []
    for kind in (QuotingEnv, Talkative):
        market = kind(64, GBM(0.2, 1 / 504), num_steps=6)
        env = AgainstRivals(market, [makers.constant_spread(market, 1.1)])
        moves = StepMoves(market)
        policies = [kind(env, moves, 1.0, 1.1, 0.8, 0.1) for kind in (MultiAsset, VegaProgramming)]
        env.reset(seed=0)
        results.append([play(env, policy)["objective"] for policy in (*policies, BestResponse(env))])
    assert all((one == two).all() for one, two in zip(*results, strict=True))


@pytest.mark.parametrize(
    "strategy",
    [hedgers.black_scholes_delta, hedgers.leland, hedgers.minimum_variance_delta, hedgers.whalley_wilmott,
     hedgers.kallsen_muhle_karbe, hedgers.zakamouline, lambda env: hedgers.constant_band(env, 0.1), optimal_hedge],
)  # fmt: skip
def test_hedgers_too(strategy):
    plain, more = (kind(64, num_steps=8, dtype=F64) for kind in (HedgingEnv, Verbose))
    for env in (plain, more):
        env.reset(seed=0)
    one, two = (play(env, strategy(env)) for env in (plain, more))
    assert all((one[name] == two[name]).all() for name in one)
    observation, _ = more.replay()
    assert torch.equal(observation[:, 0], more.cash)
    assert more.observation_units[0] == 10.0
    after, _ = more.after_trade(observation, more.to_action(offset=torch.full((64,), 0.1, dtype=F64)))
    assert torch.equal(after[:, 0], observation[:, 0])
    before_and_after = (x[:, more.columns["net delta"]][:, 0] for x in (observation, after))
    assert [bool((x == 0.1).all()) for x in before_and_after] == [False, True]
    state, expected = more.decode(observation), plain.decode(plain.replay()[0])
    assert all(torch.equal(x, y) for x, y in zip(state, expected, strict=True))


@pytest.mark.parametrize("env", [Verbose(3, num_steps=8, cost_rate=0.01), Talkative(3, num_steps=6)])
def test_the_same_environment_in_another_size(env):
    more = env.like(5)
    assert type(more) is type(env)
    assert more.num_envs == 5
    assert more.settings == {**env.settings, "num_envs": 5}
    more.reset(seed=1)
    env.reset(seed=1)
    torch.testing.assert_close(more.spot[:, :3], env.spot)
