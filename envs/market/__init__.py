"""Prices, models of the underlying, and the environments. Imports nothing of the other folders but seeds."""
