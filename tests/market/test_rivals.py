"""Classical makers in a known market: what is computed for an episode at once is what they do step by step."""

import pytest
import torch
from common import INVENTED, quoted

from envs.benchmark import makers
from envs.market import dynamics, rivals
from envs.market.moves import StepMoves
from envs.market.quoting import QuotingEnv
from envs.market.units import TRADING_DAYS

HALF_DAYS = 0.5 / TRADING_DAYS
MODELS = {"gbm": dynamics.GBM, "heston": dynamics.Heston, "merton": dynamics.Merton}
NAMES = tuple(name for name in INVENTED if name != makers.RIVAL)


@pytest.mark.parametrize("model", MODELS)
def test_a_maker_in_a_known_market_does_what_it_does_step_by_step(model, monkeypatch):
    """For every classical maker, in some of the rows, with two rivals in each; over two episodes and a replay."""
    monkeypatch.setattr(rivals, "ROWS_AT_ONCE", 24)  # terms for four steps at a time
    options = quoted(12, dt=HALF_DAYS)
    market = QuotingEnv(6, MODELS[model](dt=HALF_DAYS), options, num_makers=3, num_steps=6)
    env = makers.against_rival(market, INVENTED[makers.RIVAL])
    moves = StepMoves(market)
    policies = [makers.classical_maker(name, env, INVENTED[name], moves) for name in NAMES]
    rows = slice(2, 5)
    known = [rivals.in_market(policy, market, rows) for policy in policies]
    generator = torch.Generator().manual_seed(0)
    for start in (lambda: market.reset(seed=1), market.replay, lambda: market.reset(seed=2)):
        observation, _ = start()
        for _ in range(market.num_steps):
            seen = observation[rows, 1:].flatten(0, 1)
            for policy, same in zip(policies, known, strict=True):
                torch.testing.assert_close(same(seen), policy(seen), rtol=1e-5, atol=1e-5)
            edges = 0.5 + torch.rand(6, 3, generator=generator)
            quotes = market.quote(edges.flatten()).unflatten(0, (6, 3))
            observation, *_ = market.step(quotes)


def test_any_other_policy_is_left_as_it_is():
    market = QuotingEnv(2)
    assert rivals.in_market(max, market) is max
