"""What is particular to phase 2; what all phases share is in test_scripts.py."""

import json

import numpy as np
import pytest
import torch
from common import CPU, PHASES, SP500_GARCH

import phase2_multi_order_sac as phase2
from envs.baselines import hedgers
from envs.benchmark import contest, report
from envs.benchmark.hedging import BLACK_SCHOLES
from envs.figures.hedging import cost_trend
from envs.market import dynamics
from envs.run.files import read_metrics

PHASE = PHASES["phase2"]


def make(num_envs=32, **changes):
    args = PHASE.args(**changes)
    env = phase2.make_env(args, dynamics.GBM(), num_envs, CPU)
    agent = phase2.Agent(env, args.hidden_size)
    return args, env, agent


def test_one_strike_has_an_exact_optimum(script, tmp_path):
    flags = PHASE.flags(num_strikes=1, expiries=6, num_steps=6, mean_order_size=1, arrival_rate=0.25)
    result = script(PHASE.script, *flags)
    assert result.returncode in (0, 1), result.stderr
    (folder,) = tmp_path.glob("runs/*")
    content = json.loads((folder / "benchmark.json").read_text())
    assert "exact optimum" in content["rows"]
    assert "gap from Black–Scholes delta to exact optimum closed" in content["shares"]
    row, predicted = content["rows"]["exact optimum"], content["settings"]
    predicted = predicted["exact optimum: value predicted by dynamic programming"]
    assert abs(row["objective"] - predicted) < 4 * row["objective_se"]


def test_default_book():
    env = phase2.make_env(phase2.Args(), dynamics.GBM(), 1, CPU)
    assert [option.strike for option in env.options] == [90.0, 95.0, 100.0, 105.0, 110.0] * 2
    assert [option.expiry for option in env.options] == [15] * 5 + [30] * 5
    assert [option.is_call for option in env.options] == [False, False, True, True, True] * 2


def test_replay_buffer_keeps_the_latest_and_samples_only_what_it_has():
    buffer = phase2.ReplayBuffer(10, 3)
    generator = torch.Generator().manual_seed(0)

    def add(first, n):
        x = torch.arange(first, first + n, dtype=torch.float32)
        buffer.add(x[:, None].expand(n, 3), x, x, x[:, None].expand(n, 3), torch.zeros(n))

    add(1, 4)
    observations, net_deltas, rewards, next_observations, _ = buffer.sample(1000, generator)
    assert set(rewards.tolist()) == {1, 2, 3, 4}
    add(5, 4)
    add(9, 4)
    observations, net_deltas, rewards, next_observations, _ = buffer.sample(2000, generator)
    assert set(rewards.tolist()) == set(range(3, 13))
    for column in (observations[:, 0], net_deltas, next_observations[:, 2]):
        assert torch.equal(column, rewards)  # rows stay together
    assert buffer.bytes_needed(10, 3) == sum(
        x.nelement() * x.element_size() for name, x in buffer.named_buffers() if name not in ("position", "filled")
    )


def test_memory_of_the_default_flags_is_below_a_gibibyte():
    args = phase2.Args()
    size = phase2.make_env(args, dynamics.GBM(), 1, CPU).single_observation_space.shape[0]
    assert phase2.ReplayBuffer.bytes_needed(args.buffer_size, size) < 2**30


@pytest.mark.parametrize("model", [dynamics.GBM(), SP500_GARCH, dynamics.Heston()])
def test_rewards_in_the_buffer_add_up_to_the_gain_over_black_scholes(model):
    """What is learnt is what is measured: E[Σ reward − cost of the trades] is E[objective] less the delta hedge's."""
    args = PHASE.args(reward_scale=2.0)
    env = phase2.make_env(args, model, 20_000, CPU)
    agent = phase2.Agent(env, args.hidden_size)
    agent.fit(phase2.make_env(args, model, 1000, CPU))
    buffer = phase2.ReplayBuffer(20_000 * 30, env.single_observation_space.shape[0])
    env.generator.manual_seed(3)
    phase2.rollout(env, agent, buffer, args, torch.Generator().manual_seed(0), explore=True)
    noise = torch.Generator().manual_seed(0)
    actions = [torch.erf(torch.randn(20_000, 2, generator=noise) / 2**0.5) for _ in range(30)]
    observation, _ = env.replay()
    objective, trade_costs = torch.zeros(20_000), torch.zeros(20_000)
    for action in actions:
        _, cost = env.after_trade(observation, agent.to_band(action))
        trade_costs += cost
        observation, reward, _, _, info = env.step(agent.to_band(action))
        objective += reward - info["income"] - info["wealth_change"]
    opening = env.cost_rate * 100.0 * env.delta[0].abs()  # of the delta hedge, known before the first action
    black_scholes = contest.play(env, lambda observation: torch.zeros(20_000, 2))["objective_centred"]
    learnt = buffer.rewards.view(30, -1).sum(0) / 2.0 * agent.reward_unit - trade_costs + opening
    assert buffer.dones.view(30, -1)[-1].all()
    assert buffer.dones.sum() == 20_000
    gain = (objective - torch.from_numpy(black_scholes).float()).numpy()
    difference = report.estimate(learnt.numpy() - gain)
    assert abs(difference.mean) < 4 * difference.se + 0.005 * abs(gain.mean())
    assert learnt.std() < 0.9 * gain.std()  # with less noise


def test_loss_is_sac():
    """The summed loss against the textbook's three, written out; and no gradient goes where it must not."""
    args, env, agent = make(num_envs=64)
    agent.fit(env)
    agent.target_critic.load_state_dict(phase2.Twin(18, args.hidden_size).state_dict())
    agent.log_alpha.data.fill_(-2.0)
    observation, _ = env.reset(seed=0)
    band = agent.to_band(torch.zeros(64, 2))
    next_observation, *_ = env.step(band)
    after, _ = env.after_trade(observation, band)
    generator = torch.Generator().manual_seed(0)
    rewards, dones = torch.randn(64, generator=generator), (torch.rand(64, generator=generator) < 0.3).float()
    noise = torch.randn(2, 64, 2, generator=generator)
    batch = (observation, env.column(after, "net delta"), rewards, next_observation, dones)
    loss, parts = phase2.sac_loss(agent, env, batch, noise, args)
    alpha = np.exp(-2.0)

    def soft_value(critic, observation, noise):
        action, logprob = agent.act(observation, noise)
        after, cost = env.after_trade(observation, agent.to_band(action))
        one, two = critic(agent.normalise(after))
        return torch.minimum(one, two) - args.reward_scale / agent.reward_unit * cost - alpha * logprob, logprob

    target = rewards + (1 - dones) * soft_value(agent.target_critic, next_observation, noise[0])[0]
    critic = sum(((q - target.detach()) ** 2).mean() for q in agent.critic(agent.normalise(after)))
    soft, logprob = soft_value(agent.critic, observation, noise[1])
    temperature = -alpha * (logprob.mean() + args.target_entropy)
    torch.testing.assert_close(loss, critic - soft.mean() + temperature, rtol=1e-4, atol=1e-5)
    assert parts[0].item() == np.float32(critic.item())
    loss.backward()
    assert all(p.grad is None for p in agent.target_critic.parameters())
    of_both = [p.grad.clone() for p in agent.critic.parameters()]
    of_actor, of_alpha = [p.grad.clone() for p in agent.actor.parameters()], agent.log_alpha.grad.clone()
    agent.zero_grad()
    _, logprob = agent.act(observation, noise[1])
    critic_only = sum(((q - target.detach()) ** 2).mean() for q in agent.critic(agent.normalise(after)))
    critic_only.backward()
    for both, alone in zip(of_both, agent.critic.parameters(), strict=True):
        torch.testing.assert_close(both, alone.grad)
    agent.zero_grad()
    (-soft_value(agent.critic, observation, noise[1])[0].mean()).backward()
    for both, alone in zip(of_actor, agent.actor.parameters(), strict=True):
        torch.testing.assert_close(both, alone.grad)
    # d/d(ln α) of −α (E ln π + target): α is a constant in the two other losses
    assert of_alpha.item() == pytest.approx(temperature.item(), rel=1e-4)


def test_logprob_is_that_of_a_squashed_gaussian():
    _, env, agent = make()
    observation, _ = env.reset(seed=0)
    agent.actor[-1].weight.data.normal_()
    agent = agent.double()
    observation, noise = observation.double(), torch.randn(32, 2, dtype=torch.float64)
    action, logprob = agent.act(observation, noise)
    mean, log_std = agent.head(agent.actor, observation)
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    torch.testing.assert_close(logprob, squashed.log_prob(action).sum(-1), rtol=1e-3, atol=1e-3)


def test_policy_has_the_moving_average_of_the_actors_weights():
    args, env, agent = make(average=0.3, batch_size=16)
    agent.fit(env)
    buffer = phase2.ReplayBuffer(2000, env.single_observation_space.shape[0])
    generator = torch.Generator().manual_seed(0)
    phase2.rollout(env, agent, buffer, args, generator, explore=True)
    before = [p.clone() for p in agent.average_actor.parameters()]
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr=1e-2)
    phase2.update(agent, env, optimizer, buffer, phase2.sac_loss, args, generator, updates=1)
    for old, now, actor in zip(before, agent.average_actor.parameters(), agent.actor.parameters(), strict=True):
        torch.testing.assert_close(now, 0.7 * old + 0.3 * actor)
        assert not torch.equal(old, actor)
    observation, _ = env.reset(seed=0)
    assert not torch.allclose(agent.policy(observation), agent.to_band(agent.act(observation, torch.zeros(32, 2))[0]))
    agent.average_actor.load_state_dict(agent.actor.state_dict())
    action, _ = agent.act(observation, torch.zeros(32, 2))
    torch.testing.assert_close(agent.policy(observation), agent.to_band(action))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_some_environments_always_act_at_random(share):
    args, env, agent = make(num_envs=32, random_share=share)
    agent.fit(env)
    with torch.no_grad():
        agent.actor[-1].bias.copy_(torch.tensor([0.0, 0.0, -9.0, -9.0]))  # hardly any noise
    buffer = phase2.ReplayBuffer(32 * 30, env.single_observation_space.shape[0])
    phase2.rollout(env, agent, buffer, args, torch.Generator().manual_seed(0), explore=False)
    after, _ = env.after_trade(buffer.observations, agent.policy(buffer.observations))
    as_policy = ((buffer.net_deltas - env.column(after, "net delta")).abs() < 0.01).view(30, 32).all(0)
    assert as_policy.tolist() == [i >= share * 32 for i in range(32)]


def test_bands_reach_the_minimum_variance_delta():
    """Also where trading is cheap, and bands are far narrower than the move of the volatility is worth."""
    args = phase2.Args(cost_rate=1e-4)
    env = phase2.make_env(args, dynamics.Heston(), 1024, CPU)
    agent = phase2.Agent(env, args.hidden_size)
    agent.fit(env)
    target, reached = hedgers.minimum_variance_delta(env), []
    observation, _ = env.reset(seed=0)
    for _ in range(30):
        action = target(observation)
        reached.append(action[:, 0].abs() <= agent.offset)
        observation, *_ = env.step(action)
    assert torch.cat(reached).double().mean() > 0.93


def test_policy_means_the_same_under_another_order_flow():
    _, env, agent = make()
    agent.fit(env)
    env.reset(seed=0)
    observation = env.observe()
    _, busy, other = make(arrival_rate=1.0)
    other.load_state_dict(agent.state_dict())
    busy.reset(seed=0)
    busy.set_market(env.spot.T, env.variance.T, tuple(x.transpose(0, 1) for x in (env.order_number, env.order_size)))
    same, _ = busy.replay()
    assert not torch.allclose(same, observation)  # other units
    torch.testing.assert_close(other.policy(same), agent.policy(observation), rtol=1e-4, atol=1e-5)


def test_the_band_does_not_depend_on_what_is_held():
    _, env, agent = make()
    agent.average_actor[-1].weight.data.normal_()
    observation, _ = env.reset(seed=0)
    moved = observation.clone()
    moved[:, env.columns["net delta"]] += 0.3
    assert torch.equal(agent.policy(observation), agent.policy(moved))
    assert not torch.equal(agent.critic(agent.normalise(observation)), agent.critic(agent.normalise(moved)))


@pytest.mark.slow
def test_training_improves_the_policy(tmp_path):
    args = phase2.Args(
        num_strikes=1, expiries=(30,), arrival_rate=0.25, mean_order_size=1.0, num_envs=256, total_timesteps=400_000,
        batch_size=256, hidden_size=64, utd=1 / 256, average=0.02, num_evaluations=4, save_model=False,
        learning_starts=10_000, buffer_size=100_000,
    )  # fmt: skip
    phase2.train(PHASE.run(args, tmp_path), dynamics.GBM())
    curve = [row["charts/share_of_gap_closed"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert curve[-1] > 0.87  # the tuned constant band, where it starts, closes 86 %


def test_cost_trend_figure(tmp_path):
    row = {"turnover": 10.0, "net_delta": 0.2}
    contestants = ("agent", BLACK_SCHOLES, "constant band, tuned", "Whalley–Wilmott, tuned")
    cost_trend(tmp_path / "trend.png", {rate: dict.fromkeys(contestants, row) for rate in (1e-4, 1e-3)}, "title")
    assert (tmp_path / "trend.png").stat().st_size > 10_000


def test_resuming_without_the_buffer_fills_a_new_one(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    phase2.main([*PHASE.flags(), "--no-save-buffer"])
    (folder,) = tmp_path.glob("runs/*")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["buffer"] is None
    assert (folder / "checkpoint.pt").stat().st_size < 200_000
    checkpoint["iteration"], checkpoint["rows"] = 6, 3
    torch.save(checkpoint, folder / "checkpoint.pt")
    phase2.main(["--resume", str(folder)])
    assert len(read_metrics(folder / "metrics.csv")) == 5
