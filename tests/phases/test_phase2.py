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


@pytest.mark.slow
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
        names = phase2.Batch._fields
        columns = [x[:, None].expand(n, 3) if "books" in name else x for name in names]
        buffer.add(phase2.Batch(*((100 * i + column) for i, column in enumerate(columns))))

    add(1, 4)
    (batch,) = buffer.sample(1, 1000, generator)
    assert set(batch.books[:, 0].tolist()) == {1, 2, 3, 4}
    add(5, 4)
    add(9, 4)
    one, batch = buffer.sample(2, 2000, generator)
    assert not torch.equal(one.books, batch.books)
    assert set(batch.books[:, 0].tolist()) == set(range(3, 13))
    for i, (name, column) in enumerate(zip(batch._fields, batch, strict=True)):
        assert column.shape == ((2000, 3) if "books" in name else (2000,))
        assert torch.equal(column.view(2000, -1)[:, -1], 100 * i + batch.books[:, 0])  # rows stay together
    assert buffer.bytes_needed(10, 3) == buffer.table.nelement() * buffer.table.element_size()


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
    kept = buffer.batch(buffer.table)
    learnt = kept.rewards.view(30, -1).sum(0) / 2.0 * agent.reward_unit - trade_costs + opening
    assert kept.dones.view(30, -1)[-1].all()
    assert kept.dones.sum() == 20_000
    gain = (objective - torch.from_numpy(black_scholes).float()).numpy()
    difference = report.estimate(learnt.numpy() - gain)
    assert abs(difference.mean) < 4 * difference.se + 0.005 * abs(gain.mean())
    assert learnt.std() < 0.9 * gain.std()  # with less noise


def test_what_is_kept_of_a_transition():
    """Books, net deltas and costs are those of the observations, step by step; the next ones are one step later."""
    args, env, agent = make(num_envs=32, reward_scale=2.0)
    agent.fit(env)
    buffer = phase2.ReplayBuffer(32 * 30, env.single_observation_space.shape[0])
    env.generator.manual_seed(3)
    phase2.rollout(env, agent, buffer, args, torch.Generator().manual_seed(0), explore=False)
    kept = buffer.batch(buffer.table.view(30, 32, -1).flatten(0, 1))
    kept = phase2.Batch(*(column.unflatten(0, (30, 32)) for column in kept))
    noise = torch.randn(30, 32, 2, generator=torch.Generator().manual_seed(0))
    env.generator.manual_seed(3)
    observation, _ = env.reset()
    for t in range(30):
        action, _ = agent.act(agent.book(observation), noise[t])
        action[:8] = torch.erf(noise[t, :8] / 2**0.5)
        after, cost = env.after_trade(observation, agent.to_band(action))
        traded = env.book_scale * env.column(after, "net delta")
        torch.testing.assert_close(kept.books[t], agent.book(observation))
        torch.testing.assert_close(kept.traded[t], traded, rtol=1e-4, atol=1e-4)
        moved = (kept.traded[t] - kept.net_deltas[t]).abs()
        torch.testing.assert_close(kept.share_costs[t] * moved, 2.0 / agent.reward_unit * cost, rtol=1e-3, atol=1e-3)
        seen = agent.with_net_delta(kept.books[t], kept.traded[t])
        natural = (after * agent.observation_units - agent.observation_mean) / agent.observation_std
        torch.testing.assert_close(seen, natural.clamp(-10, 10), rtol=1e-4, atol=1e-4)
        if t > 0:
            for now in ("books", "net_deltas", "share_costs"):
                assert torch.equal(getattr(kept, now)[t], getattr(kept, f"next_{now}")[t - 1])
        observation, *_ = env.step(agent.to_band(action))


def test_loss_is_sac():
    """The summed loss against the textbook's three, written out; and no gradient goes where it must not."""
    args, env, agent = make(num_envs=64)
    agent.fit(env)
    with torch.no_grad():
        agent.target_critics.vector.add_(0.1 * torch.randn(agent.target_critics.vector.shape))
    agent.log_alpha.data.fill_(-2.0)
    observation, _ = env.reset(seed=0)
    cost = args.reward_scale / agent.reward_unit * env.cost_rate
    now = (agent.book(observation), env.book_scale * env.column(observation, "net delta"), cost * env.spot[0])
    traded = env.to_band(now[1], agent.to_band(torch.zeros(64, 2)))
    observation = env.advance(agent.to_band(torch.zeros(64, 2)))
    later = (agent.book(observation), env.book_scale * env.column(observation, "net delta"), cost * env.spot[1])
    generator = torch.Generator().manual_seed(0)
    rewards, dones = torch.randn(64, generator=generator), (torch.rand(64, generator=generator) < 0.3).float()
    noise = torch.randn(2, 64, 2, generator=generator)
    batch = phase2.Batch(*now, traded, rewards, dones, *later)
    loss, parts = phase2.sac_loss(agent, env, batch, noise, args)
    alpha = np.exp(-2.0)

    def soft_value(critics, state, noise):
        book, net_delta, share_cost = state
        action, logprob = agent.act(book, noise)
        after = env.to_band(net_delta, agent.to_band(action))
        one, two = critics(agent.with_net_delta(book, after))
        cost = share_cost * (after - net_delta).abs()
        return torch.minimum(one, two)[:, 0] - cost - alpha * logprob, logprob

    def critic_loss():
        both = agent.critics(agent.with_net_delta(now[0], traded))
        return sum(((q[:, 0] - target.detach()) ** 2).mean() for q in both)

    target = rewards + (1 - dones) * soft_value(agent.target_critics, later, noise[0])[0]
    soft, logprob = soft_value(agent.critics, now, noise[1])
    temperature = -alpha * (logprob.mean() + args.target_entropy)
    torch.testing.assert_close(loss, critic_loss() - soft.mean() + temperature, rtol=1e-4, atol=1e-5)
    assert parts[0].item() == pytest.approx(critic_loss().item(), rel=1e-5)
    loss.backward()
    assert agent.target_critics.vector.grad is None
    of_critics, of_actor, of_alpha = (
        p.grad.clone() for p in (agent.critics.vector, agent.actor.vector, agent.log_alpha)
    )
    agent.zero_grad()
    critic_loss().backward()
    torch.testing.assert_close(of_critics, agent.critics.vector.grad)
    agent.zero_grad()
    (-soft_value(agent.critics, now, noise[1])[0].mean()).backward()
    torch.testing.assert_close(of_actor, agent.actor.vector.grad)
    # d/d(ln α) of −α (E ln π + target): α is a constant in the two other losses
    assert of_alpha.item() == pytest.approx(temperature.item(), rel=1e-4)


def test_logprob_is_that_of_a_squashed_gaussian():
    _, env, agent = make()
    observation, _ = env.reset(seed=0)
    agent.actor.layers("actor")[-1][0].normal_()
    agent = agent.double()
    book, noise = agent.book(observation.double()), torch.randn(32, 2, dtype=torch.float64)
    action, logprob = agent.act(book, noise)
    mean, log_std = agent.head(agent.actor, book)
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
    book = agent.book(observation)
    assert not torch.allclose(agent.policy(observation), agent.to_band(agent.act(book, torch.zeros(32, 2))[0]))
    agent.average_actor.load_state_dict(agent.actor.state_dict())
    action, _ = agent.act(book, torch.zeros(32, 2))
    torch.testing.assert_close(agent.policy(observation), agent.to_band(action))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_some_environments_always_act_at_random(share):
    args, env, agent = make(num_envs=32, random_share=share)
    agent.fit(env)
    agent.actor.layers("actor")[-1][1].copy_(torch.tensor([0.0, 0.0, -9.0, -9.0]))  # hardly any noise
    buffer = phase2.ReplayBuffer(32 * 30, env.single_observation_space.shape[0])
    phase2.rollout(env, agent, buffer, args, torch.Generator().manual_seed(0), explore=False)
    kept = buffer.batch(buffer.table)
    action = torch.tanh(agent.head(agent.actor, kept.books)[0])
    after = env.to_band(kept.net_deltas, agent.to_band(action))
    as_policy = ((kept.traded - after).abs() < 0.01 * env.book_scale).view(30, 32).all(0)
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
    agent.average_actor.layers("actor")[-1][0].normal_()
    observation, _ = env.reset(seed=0)
    moved = observation.clone()
    moved[:, env.columns["net delta"]] += 0.3
    assert torch.equal(agent.policy(observation), agent.policy(moved))
    seen = [
        agent.with_net_delta(agent.book(x), env.book_scale * env.column(x, "net delta")) for x in (observation, moved)
    ]
    assert not torch.equal(agent.critics(seen[0])[0], agent.critics(seen[1])[0])


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
