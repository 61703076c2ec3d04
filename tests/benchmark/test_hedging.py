"""The benchmark of a hedging agent: contestants, and every criterion of the verdict."""

import numpy as np
import pytest
import torch
from common import MODELS, SP500_GARCH, check_margins

from envs import HedgingEnv
from envs.baselines import hedgers
from envs.benchmark import hedging
from envs.benchmark.bars import HEDGE_BOOK, HEDGE_OPTION
from envs.market.dynamics import GBM
from envs.market.hedging import option_grid
from envs.market.history import Historical
from envs.optimum.hedge import optimal_hedge


def benchmark(agent, model=None, episodes=512, bars=HEDGE_OPTION, **settings):
    """The benchmark of agent(env) in short."""
    model = model or GBM()

    def make(model, num_envs):
        return HedgingEnv(num_envs, model, **settings)

    return hedging.hedging_benchmark(
        title="title", settings={"seed": 1}, agent=agent(make(model if isinstance(model, GBM) else SP500_GARCH, 1)),
        make_env=make, model=model, episodes=episodes, bars=bars,
    )  # fmt: skip


def failed(result) -> set[str]:
    check_margins(result)
    return {criterion.name for criterion in result.criteria if not criterion.passed} - {"has 8,192 episodes or more"}


BANDS = {"Whalley–Wilmott, tuned", "Zakamouline, tuned", "constant band, tuned"}


def test_the_optimum_passes_and_the_named_baseline_does_not():
    result, contest = benchmark(optimal_hedge, episodes=4096)
    assert failed(result) == set()
    assert contest.best == "exact optimum"
    assert contest.exact
    assert contest.played.keys() == {"agent", "Black–Scholes delta", "Leland", *BANDS, "exact optimum"}
    (share,) = result.shares.values()
    assert share.mean == pytest.approx(1)
    assert contest.parameters.keys() == BANDS
    assert all(f"{name}: parameter" in result.settings for name in BANDS)
    assert result.settings["bars"] == HEDGE_OPTION
    worse, _ = benchmark(hedgers.black_scholes_delta)
    beats = {f"beats {name}" for name in ("Black–Scholes delta", *BANDS)}
    assert failed(worse) == {*beats, "closes 97 % of the gap"}


def test_where_trading_is_free_the_agent_must_agree():
    result, _ = benchmark(hedgers.black_scholes_delta, cost_rate=0.0)
    assert failed(result) == set()
    agrees = {"agrees with exact optimum", "agrees with Black–Scholes delta", "has 8,192 episodes or more"}
    assert {criterion.name for criterion in result.criteria} == agrees
    result, _ = benchmark(lambda env: lambda o: torch.tensor([0.5, 0.0]).expand(len(o), 2), cost_rate=0.0)
    assert failed(result) == agrees - {"has 8,192 episodes or more"}


def test_a_book_is_hedged_beside_the_bands_that_know_of_orders_and_of_the_skew():
    book = {"num_steps": 10, "options": option_grid([95, 105], [5, 10]), "initial_position": 0.0}
    orders = {"arrival_rate": 0.1, "mean_order_size": 2.0, "client_spread": 0.05}
    result, contest = benchmark(hedgers.black_scholes_delta, MODELS["heston"], 64, HEDGE_BOOK, **book, **orders)
    bands = {
        *BANDS, "Kallsen–Muhle-Karbe, tuned", "min-variance band, tuned", "min-variance Kallsen–Muhle-Karbe, tuned"
    }  # fmt: skip
    assert contest.parameters.keys() == bands
    assert contest.best in bands
    assert not contest.exact
    assert result.shares == {}
    assert {c.name for c in result.criteria} == {
        "beats Black–Scholes delta", *(f"beats {name}" for name in bands), "has 8,192 episodes or more",
    }  # fmt: skip


def test_real_closes():
    """All windows are episodes, intervals are of dependent values, and nothing is tuned on them."""
    spot, _ = SP500_GARCH.simulate(torch.randn(1, 160, 1, generator=torch.Generator().manual_seed(0)).double())
    closes = spot[0].numpy()
    days = np.datetime64("2020-01-01") + np.arange(len(closes))
    model = Historical(closes, SP500_GARCH, dates=days, source="made up")
    settings = {"num_steps": 10, "options": [(95.0, 10), (100.0, 10)]}  # two options: no optimum is computed
    result, contest = benchmark(hedgers.black_scholes_delta, model, 128, **settings)
    assert contest.block == 20
    assert contest.dates is days
    assert not contest.exact
    assert len(contest.played["agent"]["pnl"]) == result.settings["episodes"] == model.num_windows(10) == 151
    assert result.settings["windows"] == "all of 10 days, 2020-01-02 to 2020-06-09, returns demeaned"
    assert result.settings["closes"] == "made up"
    assert not any("episodes" in criterion.name for criterion in result.criteria)  # there are as many as there are
    (apart,) = result.others.values()
    assert apart.settings["episodes"] == 16
    agent, delta = contest.played["agent"]["objective"], contest.played["Black–Scholes delta"]["objective"]
    assert (agent == delta).all()
