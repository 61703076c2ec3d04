"""What is particular to phase 1; what all phases share is in test_scripts.py."""

import pytest
import torch
from common import PHASES

import phase1_delta_hedge_ppo as phase1
from envs.benchmark.contest import play
from envs.market.dynamics import GBM
from envs.run.errors import UsageError
from envs.run.files import read_metrics


def test_training_improves_the_policy_and_the_agent_agrees_when_trading_is_free(tmp_path):
    """Half a million steps: well above the first evaluation; at zero cost the agent is as good as delta and optimum."""
    for cost_rate in (1e-3, 0.0):
        args = phase1.Args(cost_rate=cost_rate, total_timesteps=30_720 * 16, num_evaluations=4, save_model=False)
        run = PHASES["phase1"].run(args, tmp_path)
        agent = phase1.train(run, GBM())
        curve = [row["charts/gain_over_black_scholes"] for row in read_metrics(tmp_path / "metrics.csv")]
        assert curve[-1] > curve[0]
        if cost_rate == 0.0:
            args.eval_episodes = 16_384
            result, _ = phase1.benchmark(run, GBM(), agent)
            assert result.passed, result.verdict()
            assert "agrees with exact optimum" in result.verdict()


def test_agent_policy_is_what_training_acts_with():
    env = phase1.HedgingEnv(16)
    agent = phase1.Agent(env)
    agent.fit_normaliser(env)
    observation, _ = env.reset(seed=0)
    raw = agent.network.actor(agent.normalise(observation))
    torch.testing.assert_close(agent.policy(observation), agent.to_band(raw))
    logprob, _, _ = agent.evaluate_actions(agent.normalise(observation), raw)
    expected = torch.distributions.Normal(raw, agent.actor_logstd.exp()).log_prob(raw).sum(-1)
    torch.testing.assert_close(logprob, expected)
    assert play(env, agent.policy)["pnl"].shape == (16,)


def test_trains_on_real_closes_and_is_evaluated_on_later_ones(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    phase = PHASES["phase1"]
    phase1.main(phase.flags(iterations=4, num_evaluations=1, dynamics="bootstrap", history_end="2010-12-31"))
    (folder,) = (tmp_path / "runs").iterdir()
    assert "beats min-variance Whalley–Wilmott, tuned" in capsys.readouterr().out
    phase1.main(["--evaluate", str(folder), "--dynamics", "historical"])
    assert "historical on cpu" in capsys.readouterr().out
    with pytest.raises(UsageError, match="was trained on closes of the S&P 500 until 2010-12-31"):
        phase1.main(["--evaluate", str(folder), "--dynamics", "historical", "--history-end", "2009-12-31"])
