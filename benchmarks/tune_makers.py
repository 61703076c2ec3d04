"""Tunes the classical makers of phase 3's markets and records them in envs/benchmark/tuned_makers.json.

    python benchmarks/tune_makers.py --episodes 8192 --dynamics heston gbm garch merton

The default market under each model, and gbm without risk aversion and costs. About three minutes each on one core.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import phase3_spread_vs_bs as phase3
from envs.benchmark import makers
from envs.market.units import TRADING_DAYS
from envs.models import make_model
from envs.run.files import write_json
from envs.run.seeds import TUNING_SEED


@dataclass
class Args:
    dynamics: tuple[str, ...] = ("heston", "gbm", "garch", "merton")
    """models of the underlying"""
    episodes: int = 8192
    """episodes that every candidate plays"""
    risk_neutral: bool = True
    """gbm without risk aversion and costs too"""


def main(args: Args) -> None:
    torch.set_num_threads(1)
    markets = [phase3.Args(dynamics=name) for name in args.dynamics]
    if args.risk_neutral:
        markets.append(phase3.Args(dynamics="gbm", risk_aversion=0.0, cost_rate=0.0))
    for flags in markets:
        start = time.perf_counter()
        market = phase3.make_market(
            flags, make_model(flags, dt=0.5 / TRADING_DAYS), args.episodes, torch.device("cpu")
        )
        rival = makers.tune_rival(market)
        parameters = makers.tune_makers(market, rival, (*rival, 1.0))
        recorded = json.loads(makers.RECORDED.read_text(encoding="utf-8")) if makers.RECORDED.exists() else {}
        found = {"parameters": parameters, "episodes": args.episodes, "seed": TUNING_SEED}
        write_json(makers.RECORDED, {**recorded, makers.describe(market): found})
        print(f"{makers.describe(market)}: {parameters}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
