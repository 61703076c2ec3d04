"""The bars of every verdict. Criteria take their texts from here, and every report prints those that it used."""

MIN_EPISODES = 8192
MIN_PATHS = 1_000_000  # of phase 0

HEDGE_OPTION = {"gap closed": 0.97}  # share of the way from Black–Scholes to the exact optimum (phase 1)
HEDGE_BOOK = {"gap closed": 0.95}  # the same (phase 2)
FREE_TRADING = {"standard errors": 3.0}  # within which agent, optimum and Black–Scholes agree where trading is free

QUOTING = {  # in phase 3's default market; objective, currency
    "above Avellaneda–Stoikov": 5.0,
    "above the strongest classic": 0.3,
    "correlation with the smile": 0.95,  # of the quotes' middles, across strikes
}
QUOTING_KNOWN = {  # where nothing is risked and hedging is free
    "objective below it": 0.005,  # share of the best response's
    "edge off the best response": 0.03,  # mean difference, relative, or to 1 vol point where that is less
}

SELFPLAY = {
    "objective gain": 0.28,  # share of Avellaneda–Stoikov's, in the default market
    "best response gains": 0.02,  # share of the agent's objective
    "snapshot level": 0.05,  # of Holm's test that a past snapshot is ahead of the agent
}
SELFPLAY_NEUTRAL = {  # where nothing is risked and hedging is free
    "edge off Nash": 0.03,  # relative difference
    "exploitable": 0.003,  # share of the profit, by a best response in closed form
    "collusion index": 0.1,  # 0 is competition, 1 a cartel
}

SMILE = {  # of a calibrated smile (phase 0), vol points, on the maturities that are judged
    "RMSE": 0.12,
    "largest error": 0.4,
}
EXOTIC = {  # of phase 0's other task
    "vanilla RMSE": 0.13,  # vol points
    "way to the bound": 0.85,  # share of the way from local volatility's price, by the min of a Bermudan
    "off the target": 0.02,  # vol points
    "local, off local volatility's price": 0.05,  # vol points, with the state (t, S)
}
SLV = {  # of its third task, vol points
    "largest forward-start error": 0.1,
    "vanilla RMSE": 0.12,
}
