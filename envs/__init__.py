"""The market, the classical baselines, the exact optima and the benchmark: all the finance of the project.

Each folder has one purpose, and imports only point down:

    figures                      pictures of a benchmark
    benchmark                    the same fresh episodes for every contestant, and the verdict
    baselines optimum calibration    classical strategies; exact references; MARLVol, the market of phase 0
    market                       prices, models of the underlying, HedgingEnv and QuotingEnv
    run                          flags, files, resume, torchrun: the manners of a command, no finance

`models.py` builds the model of the underlying that the flags describe, `gym.py` has the environments of gymnasium's
registry, `networks.py` small networks that are fast on a CPU. Nothing here imports a phase script, and only `run` knows
Weights & Biases.
"""

import gymnasium

from envs.gym import HedgingGymEnv, HedgingGymVectorEnv, QuotingGymEnv, QuotingGymVectorEnv
from envs.market.hedging import HedgingEnv
from envs.market.quoting import QuotingEnv
from envs.market.rivals import AgainstRivals

__all__ = [
    "AgainstRivals",
    "HedgingEnv",
    "HedgingGymEnv",
    "HedgingGymVectorEnv",
    "QuotingEnv",
    "QuotingGymEnv",
    "QuotingGymVectorEnv",
]

gymnasium.register(
    "OptionHedging-v0", entry_point="envs.gym:HedgingGymEnv", vector_entry_point="envs.gym:HedgingGymVectorEnv"
)
gymnasium.register(
    "OptionQuoting-v0", entry_point="envs.gym:QuotingGymEnv", vector_entry_point="envs.gym:QuotingGymVectorEnv"
)
