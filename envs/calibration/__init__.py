"""Calibration of a market to option smiles by multi-agent reinforcement learning (MARLVol, phase 0)."""
