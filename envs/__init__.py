"""The market, its prices, the classical baselines, the exact optima and the benchmark: all the finance of the project.

Phase scripts import from here; nothing here imports a phase, reads the command line or talks to Weights & Biases.
Units everywhere: currency for prices and P&L, years of 252 trading days for time, annualised decimals for volatility;
zero interest rate and dividends.
"""

import gymnasium as gym

from envs import (
    baselines,
    benchmark,
    black_scholes,
    calibration,
    dynamics,
    figures,
    hedging,
    makers,
    marlvol,
    optimum,
    quoting,
    runs,
    smiles,
)
from envs.hedging import HedgingEnv, HedgingGymEnv
from envs.quoting import AgainstRivals, QuotingEnv, QuotingGymEnv

__all__ = [
    "AgainstRivals",
    "HedgingEnv",
    "HedgingGymEnv",
    "QuotingEnv",
    "QuotingGymEnv",
    "baselines",
    "benchmark",
    "black_scholes",
    "calibration",
    "dynamics",
    "figures",
    "hedging",
    "makers",
    "marlvol",
    "optimum",
    "quoting",
    "runs",
    "smiles",
]

gym.register("OptionHedging-v0", entry_point="envs:HedgingGymEnv", vector_entry_point="envs:HedgingEnv")
gym.register("OptionQuoting-v0", entry_point="envs:QuotingGymEnv")
