"""What the tests share: models, a book, and the smallest run of every phase."""

from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn

import phase0_marlvol_calibration as phase0
import phase1_delta_hedge_ppo as phase1
import phase2_multi_order_sac as phase2
import phase3_spread_vs_bs as phase3
import phase4_selfplay as phase4
from envs import HedgingEnv
from envs.benchmark import makers
from envs.calibration import marlvol
from envs.calibration.game import CalibrationGame
from envs.market import dynamics, hedging, quoting, smiles
from envs.market.units import TRADING_DAYS
from envs.models import make_model
from envs.run.run import Run

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")

# Fitted to the S&P 500 of 1999–2018 (tests/market/test_history.py checks that); written out, so that no test has to fit
SP500_GARCH = dynamics.GARCH(omega=2.0746e-6, alpha=0.0, gamma=0.182566, beta=0.892038)
MODELS = {
    "gbm": dynamics.GBM(),
    "garch": SP500_GARCH,
    "heston": dynamics.Heston(),
    "heston without Feller": dynamics.Heston(initial_variance=0.02, mean_reversion=1.0, vol_of_vol=0.9),
    "merton": dynamics.Merton(),
}


def dupire_market() -> dict:
    """Phase 0's result in miniature: a market whose projection is Dupire's local volatility, as a table."""
    game = CalibrationGame(smiles.SURFACES["sp500-2018"], 100)
    content = marlvol.export_market(game, nn.Sequential(nn.Linear(2, 1), nn.Tanh(), nn.Linear(1, 1)))
    content["projection"] = game.local_volatility
    content["tables"] = (game.local_volatility / game.reference_volatility).log()[:, None]
    return content


@cache
def model_called(name: str) -> dynamics.Dynamics:
    """One of MODELS, or marlvol, which takes a moment to make."""
    return marlvol.Marlvol(dupire_market()) if name == "marlvol" else MODELS[name]


def quoted(*expiries: int, dt: float = 1 / 252, moneyness=(-1.0, -0.5, 0.0, 0.5, 1.0)) -> list[hedging.Option]:
    """What a `QuotingEnv` quotes by default, with these expiries, steps."""
    return quoting.moneyness_grid(moneyness, expiries, dt)


def calls(expiry: int, dt: float = 1 / 252, moneyness=(-1.0, -0.5, 0.0, 0.5, 1.0)) -> list[hedging.Option]:
    """The same strikes of one expiry, calls alone."""
    return [option._replace(is_call=True) for option in quoted(expiry, dt=dt, moneyness=moneyness)]


def book_env(num_envs: int, model=None, **settings) -> HedgingEnv:
    """A book as phase 2 has it: ten options, two expiries, client orders."""
    options = hedging.option_grid([90, 95, 100, 105, 110], [15, 30])
    orders = {"arrival_rate": 0.1, "mean_order_size": 2.0, "client_spread": 0.05}
    return HedgingEnv(num_envs, model, **{"options": options, "initial_position": 0.0, **orders, **settings})


INVENTED = {  # parameters of every classical maker that nobody has tuned
    makers.RIVAL: (0.25, 0.8, 1.0),
    makers.AVELLANEDA_STOIKOV: (0.25, 0.8),
    makers.CONSTANT_SPREAD: (2.0,),
    makers.GLFT: (1.2, 0.8),
    makers.BELIEVER_BAND: (1.2, 0.8, 0.15),
    makers.AS_SMILE: (0.25, 0.8, 0.6, 0.1),
    makers.GLFT_SMILE: (1.2, 0.8, 0.4, 0.2),
    makers.MULTI_ASSET: (3.0, 1.1, 0.8, 0.15),
    makers.VEGA_DP: (2.0, 1.2, 0.9, 0.12),
}


def invented(*names: str) -> makers.Parameters:
    """Parameters of these makers and of the rivals, Avellaneda–Stoikov."""
    return {name: INVENTED[name] for name in (makers.RIVAL, *names)}


TUNE = makers.classical_makers
IMITATION = phase3.IMITATION
phase3.IMITATION = phase4.IMITATION = 20  # updates before training, in all tests but those of imitation itself


def untuned(market, rival_spread=1.0, rival_risk_aversion=1.0, known=None, origin=None) -> makers.Makers:
    """`makers.classical_makers` with parameters that nobody has tuned, which takes half a minute in a market."""
    if known is not None:
        return TUNE(market, rival_spread, rival_risk_aversion, known=known, origin=origin)
    neutral = market.risk_aversion == 0
    left_out = {makers.MULTI_ASSET, makers.VEGA_DP} if neutral else set()  # they are the best response there
    found = {name: values for name, values in INVENTED.items() if name not in left_out}
    risk_aversion, k, _ = found[makers.RIVAL]
    found[makers.RIVAL] = (rival_risk_aversion * risk_aversion, k, rival_spread)
    return makers.assemble(market, found, "invented")


class Phase(NamedTuple):
    """A phase and the smallest run of it: 12 iterations and 4 evaluations."""

    module: ModuleType
    iteration: dict  # flags that say how much an iteration is
    small: dict  # flags beside
    figures: set[str]
    named: set[str]  # contestants that are always in the table
    learning_rate: float

    @property
    def name(self) -> str:
        return self.module.PHASE

    @property
    def script(self) -> str:
        return f"{self.module.__name__}.py"

    @property
    def num_envs(self) -> int:
        return self.iteration["num_envs"]

    @property
    def num_steps(self) -> int:
        return self.iteration["num_steps"]

    def _settings(self, iterations: int, changes: dict) -> dict:
        length = {"num_iterations": iterations}
        if self.module is not phase0:
            length = {"total_timesteps": self.num_envs * self.num_steps * iterations}
        return {**self.iteration, "num_evaluations": 4, **length, **self.small, **changes}

    def flags(self, iterations: int = 12, **changes) -> list[str]:
        """Command-line flags of the smallest run."""
        words = []
        for name, value in self._settings(iterations, changes).items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        return words

    def args(self, iterations: int = 12, **changes):
        """The same as the phase's Args."""
        args = self.module.Args(**self._settings(iterations, changes))
        args.fill()
        return args

    def run(self, args, folder: Path, device="cpu") -> Run:
        """A run that nobody has begun: no tracker, no line printed."""
        return Run(args, self.name, device, folder=folder)

    def market(self, args, device="cpu"):
        """What `train` takes beside the run: gbm in phases 1 and 2, the classical makers in 3 and 4, the game in 0."""
        if self.module is phase0:
            return (phase0.make_game(args, smiles.SURFACES["sp500-2018"], torch.device(device)),)
        if self.module in (phase1, phase2):
            return (dynamics.GBM(),)
        model = make_model(args, dt=0.5 / TRADING_DAYS)
        classics = untuned(self.module.make_market(args, model, args.tuning_episodes, torch.device(device)))
        return (classics,) if self.module is phase3 else (classics, {})

    def train(self, args, folder: Path, device="cpu"):
        """Trains in gbm, phases 3 and 4 in their default heston: the agent."""
        trained = self.module.train(self.run(args, folder, device), *self.market(args, device))
        return trained[0] if self.module is phase4 else trained


HEDGERS = {"agent", "Black–Scholes delta", "Leland", "Whalley–Wilmott, tuned", "constant band, tuned"}
MAKERS = {
    "agent", "Avellaneda–Stoikov, tuned", "constant spread, tuned", "GLFT, tuned", "GLFT, min-variance band, tuned",
    "Avellaneda–Stoikov with the smile, tuned", "GLFT with the smile, tuned", "multi-asset closed form, tuned",
    "dynamic programming, tuned",
}  # fmt: skip
SAC_SMALL = {
    "learning_starts": 3_000, "buffer_size": 6_000, "batch_size": 64, "hidden_size": 32, "utd": 0.01, "average": 0.05,
}  # fmt: skip
QUOTING_FIGURES = {"learning_curve.png", "learnt_quotes.png", "episode.png", "pnl.png"}
SELFPLAY_FILES = {
    "cross_play.png", "cross_play.json", "competition.png", "edge_over_training.png", "selfplay_episode.png",
    "market_shares.png",
}  # fmt: skip
EPISODES = {"eval_episodes": 512}
PHASES = {
    "phase0": Phase(
        phase0,
        {"num_players": 200, "num_runs": 2, "num_basis": 10},
        {"hidden_size": 8, "reference": "none", "eval_paths": 12_000},
        {"learning_curve.png", "smiles.png", "local_volatility.png"},
        {"agent", "Dupire local volatility", "constant volatility"},
        1e-2,
    ),
    "phase1": Phase(
        phase1,
        {"num_envs": 64, "num_steps": 30},
        EPISODES,
        {"learning_curve.png", "no_trade_bands.png", "pnl.png"},
        HEDGERS,
        1e-3,
    ),
    "phase2": Phase(
        phase2,
        {"num_envs": 32, "num_steps": 30},
        {**EPISODES, **SAC_SMALL},
        {"learning_curve.png", "no_trade_bands.png", "pnl.png", "book_episode.png"},
        HEDGERS,
        1e-3,
    ),
    "phase3": Phase(
        phase3,
        {"num_envs": 64, "num_steps": 6},
        {**EPISODES, "tuning_episodes": 64},
        QUOTING_FIGURES | {"rival_sweep.png", "rival_sweep.json"},
        MAKERS,
        7e-4,
    ),
    "phase4": Phase(
        phase4,
        {"num_envs": 64, "num_steps": 6},
        {**EPISODES, "tuning_episodes": 64, "num_minibatches": 2, "episodes": 1},
        QUOTING_FIGURES | SELFPLAY_FILES,
        MAKERS,
        1.4e-3,
    ),
}
MARKET_PHASES = [name for name in PHASES if name != "phase0"]  # those that trade in a market


def phases(default: str, slow: str = ""):
    """Parametrises a test by `phase`: "1 4" are in the default suite, and the `slow` ones share most of their code."""
    names = [f"phase{number}" for number in default.split()]
    more = [pytest.param(f"phase{number}", marks=pytest.mark.slow) for number in slow.split()]
    return pytest.mark.parametrize("phase", [*names, *more], indirect=True)


def check_margins(result) -> None:
    """A criterion's margin, where it has one, says the same as its verdict."""
    measured = [criterion for criterion in result.criteria if criterion.margin is not None]
    assert measured
    for criterion in measured:
        assert criterion.passed == (criterion.margin > 0 or (criterion.margin == 0 and "beats" not in criterion.name))
