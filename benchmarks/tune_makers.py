"""Tunes the classical makers of phases 3 and 4 and records them in envs/benchmark/tuned_makers.json.

    python benchmarks/tune_makers.py                              every market below
    python benchmarks/tune_makers.py --markets default gbm        these; others may be tuned side by side

Every result is written at once, so that the next market can be tuned by another process at the same time.
"""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import phase3_spread_vs_bs as phase3
from envs.benchmark import makers
from envs.benchmark.contest import play
from envs.market.units import TRADING_DAYS
from envs.models import make_model
from envs.run.args import check_range, parse_args
from envs.run.errors import check
from envs.run.files import write_json
from envs.run.run import run_main
from envs.run.seeds import TUNING_SEED

RISK_NEUTRAL = {"risk_aversion": 0.0, "cost_rate": 0.0}
MARKETS = {
    "default": {},
    "gbm": {"dynamics": "gbm"},
    "garch": {"dynamics": "garch"},
    "merton": {"dynamics": "merton"},
    "neutral": RISK_NEUTRAL,
    "neutral-gbm": {"dynamics": "gbm", **RISK_NEUTRAL},
    "informed-0": {"informed_share": 0.0},
    "informed-0.1": {"informed_share": 0.1},
    "informed-0.5": {"informed_share": 0.5},
    "informed-1": {"informed_share": 1.0},
    "surface": {"expiries": (60, 90, 120, 180)},
}


@dataclass
class Args:
    """Tunes the classical makers of phases 3 and 4 in some markets and records them."""

    markets: tuple[str, ...] = tuple(MARKETS)
    """which: phase 3's default (heston, a fifth of the takers informed), or what its name says is different"""
    episodes: int = 8192
    """episodes that every candidate plays"""


def recorded() -> dict:
    """What tuned_makers.json holds."""
    return json.loads(makers.RECORDED.read_text(encoding="utf-8")) if makers.RECORDED.exists() else {}


def record(market: str, found: dict) -> None:
    """Adds a market to tuned_makers.json, which other processes may write to as well.

    There is no lock: what another process wrote between our reading and our writing is lost. So each looks again until
    its own entry has stayed for a second.
    """
    found = json.loads(json.dumps(found))  # lists in place of tuples, as they are read
    own = makers.RECORDED.with_name(f"{makers.RECORDED.name}.{os.getpid()}")
    while recorded().get(market) != found:
        write_json(own, {**recorded(), market: found})
        os.replace(own, makers.RECORDED)
        time.sleep(1)


def tune(name: str, episodes: int) -> None:
    """Tunes the makers of a market, records them, and prints the objective that each reached."""
    start = time.perf_counter()
    flags = phase3.Args(**MARKETS[name])
    model = make_model(flags, dt=0.5 / TRADING_DAYS)
    market = phase3.make_market(flags, model, episodes, torch.device("cpu"))
    rival = makers.tune_rival(market)
    parameters = makers.tune_makers(market, rival, (*rival, 1.0))
    record(makers.describe(market), {"parameters": parameters, "episodes": episodes, "seed": TUNING_SEED})
    print(f"{name}: {makers.describe(market)}, {time.perf_counter() - start:.0f} s")
    tuned = makers.assemble(market, parameters, "")
    tuned.env.reset(seed=TUNING_SEED)
    for maker, values in parameters.items():
        reached = ""
        if maker in tuned.policies:
            reached = f"{play(tuned.env, tuned.policies[maker])['objective_centred'].mean():8.4f}"
        print(f"  {maker:42} {reached:8}  {' '.join(f'{x:.4g}' for x in values)}", flush=True)


def main(argv) -> bool:
    args = parse_args(Args, argv)
    check(set(args.markets) <= set(MARKETS), f"--markets are {', '.join(MARKETS)}")
    check_range(args, 2, 2**20, "episodes")
    torch.set_num_threads(1)
    for name in args.markets:
        tune(name, args.episodes)
    return True


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
