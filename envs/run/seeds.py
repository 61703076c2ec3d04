"""Seeds of random streams that must not meet: all apart from each other and from `--seed`, which is below a million.

Seeds that are added to `--seed` begin a stream of a training run. The others are the same in every run, so that all
policies meet the same markets.
"""

BENCHMARK_SEED = 1_000_000
TUNING_SEED = 2_000_000  # of what the classical strategies are tuned on
VALIDATION_SEED = 3_000_000  # of the learning curve
EXPLORATION_SEED = 4_000_000  # added to --seed: exploration and minibatches; --seed itself is the market's
SCALE_SEED = 5_000_000  # of the scales of observations and actions
OPPONENT_SEED = 6_000_000  # added to --seed: the choice of an opponent from a pool
RESPONSE_SEED = 7_000_000  # added to --seed: the run of a best response
PROJECTION_SEED = 8_000_000  # of the particles of a calibrated market
REFERENCE_SEED = 9_000_000  # of the reference model of the calibration game
