"""Units of the whole project, each defined once.

Prices and P&L are in currency, times in years of 252 trading days, volatilities in annualised decimals (a vol point is
0.01). Interest rate and dividends are zero; cash and shares can be borrowed without limit. The batch of environments is
always the first axis of a tensor.
"""

TRADING_DAYS = 252  # a year
VOL_POINT = 0.01
REFERENCE_VOLATILITY = 0.2  # observations are scaled by it, so that a policy means the same under every model
MIN_VARIANCE = 1e-6  # a variance process may touch zero; its logarithm is observed
