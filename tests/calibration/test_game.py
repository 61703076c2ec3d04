"""The calibration game: simulation, prices, rewards, localisation."""

import math

import pytest
import torch

from envs.calibration.game import CalibrationGame, judged, play, sample
from envs.market import smiles

SP500 = smiles.SURFACES["sp500-2018"]
HESTON = smiles.SURFACES["heston"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def played(game, choose, seed=0):
    """The game after one run of actions `choose(game)`."""
    game.reset(generator(seed))
    for _ in range(game.num_steps):
        game.step(choose(game))
    return game


def constant_actions(game, *values):
    return torch.tensor(values).expand(game.num_runs, game.num_players, -1)


def test_constant_volatility_has_its_own_smile():
    game = CalibrationGame(SP500, 2**16)
    play(game, CalibrationGame.step_constant, 1)
    errors = game.volatility_errors(game.prices(game.log_spots))[0]
    expected = (game.constant_volatility - game.market_volatility) / 0.01
    assert (judged(errors) - judged(expected)).abs().max() < 0.5  # the far wings are noisy
    middle = (errors - expected)[:, 4:9]
    assert middle.abs().max() < 0.15
    log_ratio = math.log(game.constant_volatility / game.reference_volatility)
    play(game, lambda game: game.step(constant_actions(game, log_ratio)), 1)
    torch.testing.assert_close(game.volatility_errors(game.prices(game.log_spots))[0], errors, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("task", "state", "action_map", "action"),
    [
        ("local-vol", "local", "direct", (0.3,)),
        ("local-vol", "local", "normal", (0.1, 1.0)),
        ("local-vol", "non-path-dependent", "stochastic", (0.5, 0.3, -0.4)),
        ("exotic", "path-dependent", "direct", (0.5,)),
        ("exotic", "path-dependent", "stochastic", (0.5, 0.3, -0.4)),
        ("slv", "non-path-dependent", "stochastic", (-0.1, -0.4, -0.8)),
    ],
)
def test_spots_are_martingales_and_actions_are_what_they_say(task, state, action_map, action):
    game = CalibrationGame(HESTON if task == "slv" else SP500, 2**15, task=task, state=state, action_map=action_map)
    played(game, lambda game: constant_actions(game, *action))
    for log_spot in game.log_spots:
        spot = log_spot[0].double().exp()
        assert abs(spot.mean() - 1) < 4 * spot.std() / len(spot) ** 0.5 + 1e-6
    log_volatility = torch.stack(game.log_volatilities)[:, 0]
    if action_map == "normal":
        assert log_volatility.std().item() == pytest.approx(0.1 * math.e, rel=0.01)
        assert log_volatility.mean().item() == pytest.approx(0.1 + math.log(game.reference_volatility), abs=0.01)
    if action_map == "stochastic" and task == "local-vol":
        change, returns = log_volatility.diff(dim=0), torch.stack(game.log_spots)[:, 0].diff(dim=0)[:-1]
        eta, rho = 2 * math.exp(0.3), math.tanh(-0.4)
        assert change.std().item() == pytest.approx(eta / 252**0.5, rel=0.01)
        assert change.mean().item() == pytest.approx(3 * 0.5 / 252, abs=0.002)
        shock = game.shocks[:-1, 0]
        assert torch.corrcoef(torch.stack((change.flatten(), shock.flatten())))[0, 1].item() == pytest.approx(
            rho, abs=0.01
        )
        assert torch.corrcoef(torch.stack((change.flatten(), returns.flatten())))[0, 1] < 0.5 * rho


def test_runs_have_common_random_numbers_or_their_own():
    same = played(CalibrationGame(SP500, 100, num_runs=3), lambda game: constant_actions(game, 0.0))
    assert torch.equal(same.log_spots[-1][0], same.log_spots[-1][2])
    own = played(CalibrationGame(SP500, 100, num_runs=3, common=False), lambda game: constant_actions(game, 0.0))
    assert not torch.equal(own.log_spots[-1][0], own.log_spots[-1][2])
    assert torch.allclose(same.shocks[:, 0, :50], -same.shocks[:, 0, 50:])  # players in antithetic pairs
    again = played(CalibrationGame(SP500, 100, num_runs=3), lambda game: constant_actions(game, 0.0))
    assert torch.equal(same.log_spots[-1], again.log_spots[-1])


@pytest.mark.parametrize("reference", ["local-vol", "black-scholes"])
def test_reference_takes_out_what_the_sample_is_off_by(reference):
    """The reference itself has its expected error exactly; a model like it has far less noise than without."""
    step = CalibrationGame.step_dupire if reference == "local-vol" else CalibrationGame.step_constant
    game = CalibrationGame(SP500, 2000, reference=reference)
    play(game, step, 3)
    torch.testing.assert_close(game.errors()[0], game.reference_errors, atol=1e-3, rtol=0)
    if reference == "local-vol":
        near, plain = (
            torch.stack(
                [
                    played(g, lambda g: g.grid.lookup(g.local_volatility[g.t][None], g.t, g.state.log_spot)
                           .div(g.reference_volatility).log().add(0.02)[..., None], seed).errors()[0]
                    for seed in range(4)
                ]
            ).std(0)
            for g in (game, game.like(reference="none"))
        )  # fmt: skip
        assert judged(near).mean() < 0.15 * judged(plain).mean()


def test_difference_rewards_are_the_derivative_of_the_shared_one():
    """Moving one path at one day changes the shared reward by 1/n of the change of its own, to first order."""
    game = CalibrationGame(SP500, 4000)
    play(game, CalibrationGame.step_dupire, 2)  # near the market, where first order is enough

    def errors():
        return game.volatility_errors(game.prices(game.log_spots))

    shared, own = game.shared_rewards(errors())[0], game.difference_rewards(errors()[0], torch.stack(game.log_spots))
    path = int((game.log_spots[30][0] + 0.02).abs().argmin())  # in the money of some puts
    before = errors()[0]
    game.log_spots[30] = game.log_spots[30].clone()
    game.log_spots[30][0, path] -= 0.005
    after = game.shared_rewards(errors())[0] - shared
    difference = game.difference_rewards(before, torch.stack(game.log_spots)) - own
    assert after[29] != 0
    assert after.sum().item() == pytest.approx((difference.sum() / game.num_players).item(), rel=0.15)
    assert torch.equal(after != 0, torch.arange(51) == 29)


def test_conditional_mean_and_lookup():
    game = CalibrationGame(SP500, 50_000)
    play(game, CalibrationGame.step_dupire, 0)
    t, x = 40, game.log_spots[40]
    values = torch.sin(30 * x)
    found = game.grid.lookup(game.grid.conditional_mean(values, t, x), t, x)
    assert (found - values).abs().mean() < 6e-3
    noise = values + torch.randn(values.shape, generator=generator())
    found = game.grid.lookup(game.grid.conditional_mean(noise, t, x), t, x)
    assert (found - values).square().mean().sqrt() < 0.06
    table = torch.stack((game.grid.log_spot[t], 2 * game.grid.log_spot[t]))
    both = game.grid.lookup(table, t, x.expand(2, -1))
    inside = x.clamp(*game.grid.log_spot[t, [0, -1]].tolist())  # crashes leave the grid: constant outside
    torch.testing.assert_close(both, torch.cat((inside, 2 * inside)), atol=1e-4, rtol=0)
    right = game.grid.conditional_mean(values, t, x, empty=math.nan)[0, -1]  # where nobody gets to
    assert right.isnan()


def test_localisation_keeps_the_vanillas_whatever_the_players_do():
    """Even wild, path-dependent volatilities leave the smile where plain local volatility has it (Gyöngy)."""
    game = CalibrationGame(SP500, 2**15, task="exotic", state="path-dependent", reference="local-vol")
    wild = played(game, lambda g: (20 * (g.state.log_spot_t1 - 0.5 * g.state.log_spot)).clamp(-0.6, 0.6)[..., None], 5)
    errors = judged(wild.errors()[0] - wild.reference_errors)
    assert errors.square().mean().sqrt() < 0.06
    assert wild.log_volatilities[-1].std() > 0.3
    unlocalised = torch.stack([x[0] for x in wild.log_volatilities[: wild.t1]])  # plain before t1
    dupire = game.like(reference="none")
    play(dupire, CalibrationGame.step_dupire, 5)
    torch.testing.assert_close(unlocalised, torch.stack([x[0] for x in dupire.log_volatilities[: wild.t1]]))


def test_half_days():
    """102 steps to the same 51 days: rewards at the end of the days, and local volatility with less error."""
    daily, halves = CalibrationGame(SP500, 2**16), CalibrationGame(SP500, 2**16, num_steps=102, steps_per_day=2)
    assert (halves.num_days, halves.dt) == (51, 1 / 504)
    assert torch.equal(daily.market_volatility, halves.market_volatility)
    errors = []
    for game in (daily, halves):
        paths = sample(game, CalibrationGame.step_dupire, 2**18, 1)
        errors.append(game.volatility_errors(paths.prices.mean(0)))
    sizes = [float(judged(x).square().mean().sqrt()) for x in errors]
    assert sizes[1] < 0.85 * sizes[0]
    rewards = halves.shared_rewards(errors[1][None])
    assert rewards.shape == (1, 102)
    assert torch.equal(rewards[:, 1::2], daily.shared_rewards(errors[1][None]))
    assert rewards[:, ::2].abs().max() == 0
    own = halves.difference_rewards(errors[1], torch.stack(halves.log_spots))
    ends = torch.stack(halves.log_spots[::2])
    assert torch.equal(own[1::2], daily.difference_rewards(errors[1], ends))
    assert own[::2].abs().max() == 0


def test_half_days_of_the_exotic():
    """Dates are days: players act from the end of day 21, step 42, on, and the Bermudan is worth about the same."""
    game = CalibrationGame(SP500, 2**15, 1, 102, task="exotic", state="path-dependent", steps_per_day=2)
    assert (game.t1, game.first_move, game.payoff.days) == (42, 42, (21, 51))
    play(game, CalibrationGame.step_dupire, 4)
    assert game.exotic_cashflows().shape == (52, 1, 2**15)
    assert 1e4 * game.exotic_paid().mean().item() == pytest.approx(131, abs=3)
    plain = game.errors()[0]
    play(game, lambda game: game.step((10 * game.state.log_spot_t1 - 5 * game.state.log_spot)[..., None]), 4)
    assert torch.equal(game.state.log_spot_t1, game.log_spots[42])
    assert judged(game.errors()[0] - plain).square().mean().sqrt() < 0.06
    assert game.leverage_effects(game.exotic_paid()).shape == (102, 1, 2**15)


def test_too_many_days_for_the_smile():
    with pytest.raises(ValueError, match=r"num_steps is 45 \(at least 22, at most 44, the last maturity\)"):
        CalibrationGame(smiles.SURFACES["sp500-2018-slices"], 100, num_steps=45)
    assert CalibrationGame(smiles.SURFACES["sp500-2024"], 100, num_steps=40).days[-1] == 40


def test_difference_rewards_of_the_exotic_count_the_leverage():
    """Raising ln m is credited with what it truly does to the price when the leverage is estimated again.

    Everywhere: nothing, as localisation takes it out. Where S_t1 > 1: something small. With the leverage left as it
    was, which is what a path's own cashflow shows, both would be worth several basis points.
    """
    game = CalibrationGame(SP500, 2**15, task="exotic", state="path-dependent")

    def paid(raised, size, seed, leverage=None):
        """Cashflows where ln m is higher by `size` where `raised` says."""
        game.leverage = leverage
        where = {"everywhere": lambda x: torch.ones_like(x), "above 1": lambda x: (x > 0).float()}[raised]
        played(
            game,
            lambda g: (
                (4 * g.state.log_spot_t1 - 2 * g.state.log_spot).clamp(-0.5, 0.5) + size * where(g.state.log_spot_t1)
            )[..., None],
            seed,
        )
        return game.exotic_paid(), torch.stack(game.leverages) if leverage is None else leverage

    size = 0.05
    for raised in ("everywhere", "above 1"):
        true, own, credited = [], [], []
        for seed in range(2):
            before, leverage = paid(raised, 0.0, seed)
            effects = game.leverage_effects(before)
            assert effects.sum(-1).abs().max() < 1e-3 * before.sum()  # at every spot they add up to nothing
            shares = torch.stack(game.log_volatilities).exp() ** 2 / torch.stack(
                [game._local(t, x) ** 2 for t, x in enumerate(game.log_spots[:-1])]
            )  # m²/E[m²|S]
            where = torch.ones_like(before) if raised == "everywhere" else (game.log_spots[game.t1] > 0).float()
            # The effect is linear in m²/E[m²|S] − 1
            slopes = torch.where((shares - 1).abs() > 1e-3, effects / (shares - 1), 0.0) * 2.0 * shares
            change = (slopes[game.t1 :].sum(0) * size * where).mean()
            up, down = (paid(raised, sign * size, seed, leverage)[0].mean() for sign in (1, -1))
            own.append((up - down) / 2)
            credited.append(own[-1] + change)
            up, down = (paid(raised, sign * size, seed)[0].mean() for sign in (1, -1))
            true.append((up - down) / 2)
        true, own, credited = (1e4 * float(torch.stack(x).mean()) for x in (true, own, credited))
        assert own > 1.5 + true
        assert credited == pytest.approx(true, abs=0.8)


def test_players_may_act_before_t1():
    """Then the vanillas are kept as well, and the continuation value at t1 depends on the last multiplier."""
    game = CalibrationGame(SP500, 2**14, task="exotic", state="path-dependent", act_before_t1=True)

    def wild(game):
        return (30 * game.state.log_spot - 0.4 * game.state.log_volatility + 0.3).clamp(-0.7, 0.7)[..., None]

    play(game, CalibrationGame.step_dupire, 1)
    plain = game.errors()[0]
    play(game, lambda game: game.step(wild(game)), 1)
    assert judged(game.errors()[0] - plain).square().mean().sqrt() < 0.15
    assert game.remembered[game.t1 - 1].std() > 0.1
    ((log_spot, last),) = game.regressors()
    assert torch.equal(log_spot, game.log_spots[game.t1])
    assert torch.equal(last, game.state.log_volatility_t1)
    later = game.like(act_before_t1=False)
    played(later, wild, 1)
    assert later.remembered[later.t1 - 1].abs().max() == 0
    assert [len(row) for row in later.regressors()] == [1]


def test_time_is_a_root_and_features_are_of_order_one():
    game = CalibrationGame(SP500, 4096, task="exotic", state="path-dependent")
    play(game, CalibrationGame.step_dupire, 0)
    seen = game.features(game.num_steps - 1, game.state)
    assert seen.shape == (1, 4096, 5)
    assert 1 < seen.abs().quantile(0.99) < 8
    assert game.features(0, game.state)[..., 0].unique().item() == -2
