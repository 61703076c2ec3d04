"""Reproduces the documentation: runs its commands and writes their tables and figures into README.md and docs/.

    .venv/bin/python benchmarks/reproduce.py --list             every command, the minutes it takes, what is done
    .venv/bin/python benchmarks/reproduce.py phase1             all tables of docs/phase1.md
    .venv/bin/python benchmarks/reproduce.py phase1-gbm phase4 --seeds 1 2 3 --jobs 1
    .venv/bin/python benchmarks/reproduce.py                    everything

A table stands in its document between two markers, `<!-- reproduce: NAME -->` and `<!-- /reproduce -->`; the rest of
the document is left alone. A run's name, `--exp-name EXPERIMENT.HASH`, has a hash of its command and of the code that
it runs. So a finished run is found again and not repeated, an unfinished one is continued with --resume, and a run of
other code does not count (unless with --any-code). Ctrl-C stops; the same command goes on. In the folder of a finished
run reproduced.json records commit, date, versions and machine, which are printed below the table.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import NamedTuple

import numpy as np
import tyro
from as_user import ROOT, run_phase  # puts the root of the project on the path, too

from envs.benchmark.makers import (
    AS_SMILE,
    BELIEVER_BAND,
    BEST_RESPONSE,
    CONSTANT_SPREAD,
    GLFT,
    GLFT_SMILE,
    MULTI_ASSET,
    VEGA_DP,
)
from envs.benchmark.makers import AVELLANEDA_STOIKOV as AS
from envs.benchmark.training_seeds import over_seeds, probability_of_improvement
from envs.run.args import check_range, parse_args
from envs.run.errors import DivergenceError, UsageError, check
from envs.run.files import replacing, write_json
from envs.run.provenance import provenance
from envs.run.run import run_main

# EXPERIMENTS: the commands of the documentation


@dataclass(frozen=True)
class Experiment:
    """A command of the documentation.

    `flags` may hold `{seed}` (the first of --seeds), `{seeds}` (the first `num_seeds` of them), `{OTHER}` (run folder
    of that experiment with the same seed) and `{OTHER:first}` (with the first seed). A phase is run once for each of
    the first `num_seeds` seeds, a script of benchmarks/ once in all. `minutes` are those of one run, with two side by
    side on two cores.
    """

    name: str
    script: str
    flags: str = ""
    minutes: float = 0.0
    num_seeds: int = 3

    @property
    def is_benchmark(self) -> bool:
        return self.script.startswith("benchmarks/")

    @property
    def needs(self) -> list[str]:
        """Names of the experiments whose run folders are in the flags."""
        names = (name.removesuffix(":first") for name in re.findall(r"\{([^}]+)\}", self.flags))
        return [name for name in names if name not in ("seed", "seeds")]


# fmt: off
PHASE0 = "phase0_marlvol_calibration.py"
PHASE1 = "phase1_delta_hedge_ppo.py"
PHASE2 = "phase2_multi_order_sac.py"
PHASE3 = "phase3_spread_vs_bs.py"
PHASE4 = "phase4_selfplay.py"
STARTS = "benchmarks/selfplay_starts.py"
THROUGHPUT = "benchmarks/throughput.py"
NEUTRAL = "--risk-aversion 0 --cost-rate 0"
SURFACE = "--moneyness -1 -0.5 0 0.5 1 --expiries 60 90 120 180"
UNTIL_2010 = "--dynamics garch --history-end 2010-12-31"
BOOTSTRAP = "--dynamics bootstrap --history-end 2010-12-31"
IN_MARLVOL = "--dynamics marlvol --marlvol-checkpoint {phase0:first}"
MIXED = ("gbm", "heston", "garch", "merton")  # the models of a mixture


def evaluated_in(script: str, name: str) -> list[Experiment]:
    """Evaluations of the agents of an experiment in each model of the mixture, and on real closes."""
    markets = {model: model for model in MIXED} | {"historical": "historical --history-end 2010-12-31"}
    return [
        Experiment(f"{name}-in-{market}", script, f"--evaluate {{{name}}} --dynamics {flags}", 0.5)
        for market, flags in markets.items()
    ]


EXPERIMENTS = (
    Experiment("phase0", PHASE0, "", 5, 10),
    Experiment("phase0-memoryless", PHASE0, "--task exotic --state non-path-dependent --no-antithetic", 3),
    Experiment("phase0-bermudan", PHASE0, "--task exotic --beside {phase0-memoryless}", 3),
    Experiment("phase0-ablation", "benchmarks/marlvol_ablation.py", "--seconds 30 --seeds {seeds}", 15),
    Experiment("phase0-csv", PHASE0, "--smile benchmarks/steep_smile.csv", 5, 1),
    Experiment("phase0-max", PHASE0, "--task exotic --objective max", 5, 1),
    Experiment("phase0-target", PHASE0, "--task exotic --objective target --target-price 119", 5, 1),
    Experiment("phase0-slv", PHASE0, "--task slv --smile heston", 5),
    Experiment("phase0-sensitivity", "benchmarks/marlvol_sensitivity.py", "--seed {seed}", 6),
    Experiment("phase0-in-1", PHASE1, IN_MARLVOL, 3),
    Experiment("phase0-in-2", PHASE2, IN_MARLVOL, 4, 1),
    Experiment("phase0-in-3", PHASE3, f"{IN_MARLVOL} --num-steps 50", 4, 1),
    Experiment("phase0-in-4", PHASE4, f"{IN_MARLVOL} --num-steps 50 --no-exploitability", 4, 1),
    Experiment("phase1-gbm", PHASE1, "", 2, 10),
    Experiment("phase1-garch", PHASE1, "--dynamics garch", 2),
    Experiment("phase1-heston", PHASE1, "--dynamics heston", 2, 1),
    Experiment("phase1-merton", PHASE1, "--dynamics merton", 2, 1),
    Experiment("phase1-mixture", PHASE1, "--dynamics mixture", 3),
    *evaluated_in(PHASE1, "phase1-mixture"),
    Experiment("phase1-until-2010", PHASE1, UNTIL_2010, 2),
    Experiment("phase1-historical", PHASE1, "--evaluate {phase1-until-2010} --dynamics historical", 0.5),
    Experiment("phase1-bootstrap", PHASE1, BOOTSTRAP, 2),
    Experiment("phase1-bootstrap-historical", PHASE1, "--evaluate {phase1-bootstrap} --dynamics historical", 0.5),
    Experiment("phase1-nasdaq", PHASE1, f"--history nasdaq {UNTIL_2010}", 2),
    Experiment("phase1-nasdaq-historical", PHASE1, "--evaluate {phase1-nasdaq} --dynamics historical", 0.5),
    Experiment("phase1-nasdaq-bootstrap", PHASE1, f"--history nasdaq {BOOTSTRAP}", 2),
    Experiment("phase1-nasdaq-bootstrap-historical", PHASE1,
               "--evaluate {phase1-nasdaq-bootstrap} --dynamics historical", 0.5),
    Experiment("phase2", PHASE2, "", 2.5, 10),
    Experiment("phase2-one-strike", PHASE2,
               "--num-strikes 1 --expiries 30 --arrival-rate 0.25 --mean-order-size 1", 2.5),
    Experiment("phase2-heston", PHASE2, "--dynamics heston", 2.5, 1),
    Experiment("phase2-garch", PHASE2, "--dynamics garch", 2.5, 1),
    Experiment("phase2-merton", PHASE2, "--dynamics merton", 2.5, 1),
    Experiment("phase2-mixture", PHASE2, "--dynamics mixture", 4),
    *evaluated_in(PHASE2, "phase2-mixture"),
    Experiment("phase2-until-2010", PHASE2, UNTIL_2010, 2.5),
    Experiment("phase2-historical", PHASE2, "--evaluate {phase2-until-2010} --dynamics historical", 1),
    Experiment("phase2-cost", "benchmarks/cost_trend.py", "--seed {seed}", 20),
    Experiment("phase3", PHASE3, "", 4, 10),
    Experiment("phase3-neutral", PHASE3, f"{NEUTRAL} --gamma 0 --min-std 0.05", 4, 5),
    Experiment("phase3-neutral-gbm", PHASE3, f"--dynamics gbm {NEUTRAL} --gamma 0 --min-std 0.05", 4, 5),
    Experiment("phase3-gbm", PHASE3, "--dynamics gbm", 4, 5),
    Experiment("phase3-garch", PHASE3, "--dynamics garch", 5, 1),
    Experiment("phase3-merton", PHASE3, "--dynamics merton", 5, 1),
    Experiment("phase3-to-garch", PHASE3, "--evaluate {phase3} --dynamics garch", 1, 1),
    Experiment("phase3-to-merton", PHASE3, "--evaluate {phase3} --dynamics merton", 1, 1),
    Experiment("phase3-to-gbm", PHASE3, "--evaluate {phase3} --dynamics gbm", 1, 1),
    Experiment("phase3-until-2010", PHASE3, UNTIL_2010, 5),
    Experiment("phase3-historical", PHASE3, "--evaluate {phase3-until-2010} --dynamics historical", 2),
    Experiment("phase3-informed", "benchmarks/informed_sweep.py", "--seed {seed}", 15),
    Experiment("phase3-toxic", "benchmarks/informed_sweep.py", "--takers toxic --seed {seed}", 15),
    Experiment("phase3-start", "benchmarks/ablation_start.py", "--seeds {seeds}", 40),
    Experiment("phase3-surface", PHASE3, SURFACE, 15),
    Experiment("phase4", PHASE4, "--num-envs 64", 5, 10),
    Experiment("phase4-wide", PHASE4, "--num-envs 128", 5, 2),
    Experiment("phase4-neutral", STARTS, "--neutral --seeds {seeds}", 15),
    Experiment("phase4-three", STARTS, '--neutral --seeds {seeds} --flags="--num-makers 3 --tuning-episodes 512"', 25),
    Experiment("phase4-gamma", STARTS, '--neutral --seeds {seed} --flags="--gamma 1"', 5),
    Experiment("phase4-starts", STARTS, "--seeds {seeds}", 15),
    Experiment("phase4-until-2010", PHASE4, f"--num-envs 64 --no-exploitability {UNTIL_2010}", 5),
    Experiment("phase4-historical", PHASE4, "--evaluate {phase4-until-2010} --dynamics historical", 2),
    Experiment("phase4-surface", PHASE4, f"--num-envs 64 {SURFACE}", 15),
    Experiment("speed1", THROUGHPUT, "--phases phase1 --num-envs 64 1024 --peers --iterations 40", 3),
    Experiment("speed1-wide", THROUGHPUT, "--phases phase1 --num-envs 16384 --peers --iterations 4", 4),
    Experiment("speed2", THROUGHPUT, "--phases phase2 --num-envs 64 1024 --peers --iterations 10", 5),
    Experiment("speed3", THROUGHPUT, "--phases phase3 --num-envs 64 1024 --peers --iterations 10", 7),
    Experiment("speed4", THROUGHPUT, "--phases phase4 --num-envs 64 --iterations 10", 3),
    Experiment("speed-market", THROUGHPUT, "--phases market --num-envs 64 1000 10000", 3),
    Experiment("kernels", "benchmarks/kernels.py", "", 1),
)
NAMED = {experiment.name: experiment for experiment in EXPERIMENTS}

# ROWS: label, and template of a cell. The template is filled with the content of a run's folder (see `read_run`). For
# an advantage or a share `:.4f` and `:.1%` print the 95 % interval, too.

BS = "Black–Scholes delta"
WW = "Whalley–Wilmott, tuned"
BAND = "constant band, tuned"
ZAKAMOULINE = "Zakamouline, tuned"
KMK = "Kallsen–Muhle-Karbe, tuned"
MV_BAND = "min-variance band, tuned"
MV_WW = "min-variance Whalley–Wilmott, tuned"
MV_KMK = "min-variance Kallsen–Muhle-Karbe, tuned"
DUPIRE = "Dupire local volatility"
HESTON = "Heston, in daily steps"
GAP = f"shares[gap from {BS} to exact optimum closed]"
EXPLOITED = "shares[best response, trained, gains (a lower bound)]"
OFF_BEST = "numbers[edge within 3 % of the best response]"


def over(name: str, spec: str = ".4f") -> str:
    """Template of the agent's advantage over that contestant."""
    return f"{{advantages[{name}]:{spec}}}"


SMILE = (
    ("agent: RMSE, largest error", "{rows[agent][rmse]:.3f}, {rows[agent][worst]:.2f}"),
    ("Dupire's local volatility, same grid and paths", f"{{rows[{DUPIRE}][rmse]:.3f}}, {{rows[{DUPIRE}][worst]:.2f}}"),
    ("RMSE, Dupire − agent [95 %]", over(DUPIRE, ".3f")),
    ("best constant volatility", "{rows[constant volatility][rmse]:.2f}, {rows[constant volatility][worst]:.1f}"),
    ("days 5 to 20, RMSE: agent; Dupire", f"{{rows[agent][rmse_early]:.3f}}; {{rows[{DUPIRE}][rmse_early]:.3f}}"),
)
BERMUDAN = (
    ("price, at least and at most, bp of the spot", "{rows[agent][price]:.2f}, {rows[agent][upper]:.2f}"),
    ("plain local volatility's", f"{{rows[{DUPIRE}][price]:.2f}}, {{rows[{DUPIRE}][upper]:.2f}}"),
    ("way from local volatility to the bound [95 %]", "{shares[way to the bound of all models]:.1%}"),
    ("switch value, vol points; local volatility's",
     f"{{rows[agent][switch_value]:.3f}}; {{rows[{DUPIRE}][switch_value]:.3f}}"),
    ("vanilla RMSE; local volatility's", f"{{rows[agent][rmse]:.3f}}; {{rows[{DUPIRE}][rmse]:.3f}}"),
    ("price above the European floor, bp of the spot", "{above_floor:.2f}"),
    ("ln m per standard deviation of ln S_t1, of ln S_t",
     "{settings[ln m per standard deviation of ln S_t1 and of ln S_t]}"),
    ("mean localised multiplier bends at S_t1 =", "{settings[mean localised multiplier bends at S_t1 =]:.3f}"),
)
MEMORYLESS = (
    ("non-path-dependent: switch value, vanilla RMSE", "{rows[agent][switch_value]:.3f}, {rows[agent][rmse]:.3f}"),
)
OBJECTIVES_HEADER = ("seed 1", "price, at least and at most (bp)", "way to the bound", "off the target (vol points)",
                     "vanilla RMSE", "verdict")
PRICES = "{rows[agent][price]:.2f}, {rows[agent][upper]:.2f}"
OFF_TARGET = "{numbers[price within 0.02 vol points of the target]:+.4f}"
VANILLAS = "{rows[agent][rmse]:.3f}"
WAY = "{shares[way to the bound of all models]:.1%}"
OBJECTIVES = (
    ("max", "phase0-max", (PRICES, WAY, "–", VANILLAS, "{verdict}")),
    ("target, 119 bp", "phase0-target", (PRICES, "–", OFF_TARGET, VANILLAS, "{verdict}")),
)
FORWARD = "{{rows[{0}][forward_rmse]:.3f}}, {{rows[{0}][forward_worst]:.3f}}"
SLV = (
    ("forward starts, RMSE and largest error: agent", FORWARD.format("agent")),
    ("Dupire's local volatility", FORWARD.format(DUPIRE)),
    ("the Heston model itself, in daily steps", FORWARD.format(HESTON)),
    ("vanilla RMSE: agent; Dupire; Heston",
     f"{{rows[agent][rmse]:.3f}}; {{rows[{DUPIRE}][rmse]:.3f}}; {{rows[{HESTON}][rmse]:.3f}}"),
    ("η of σ: agent; Heston; true", f"{{rows[agent][eta]:.2f}}; {{rows[{HESTON}][eta]:.2f}}; 1.25"),
    ("ρ of σ and S: agent; Heston; true", f"{{rows[agent][rho]:.2f}}; {{rows[{HESTON}][rho]:.2f}}; −0.70"),
    ("verdict", "{verdict}"),
)
IN_MARLVOL_1 = (
    ("agent − Black–Scholes delta", over(BS)),
    ("agent − Whalley–Wilmott", over(WW)),
    ("agent − constant band", over(BAND)),
    ("agent − Zakamouline", over(ZAKAMOULINE)),
    ("agent − minimum-variance delta", over("minimum-variance delta")),
    ("agent − min-variance band", over(MV_BAND)),
    ("agent − min-variance Whalley–Wilmott", over(MV_WW)),
    ("Black–Scholes delta's objective", f"{{rows[{BS}][objective]:.3f}}"),
)
HEDGE_GBM = (
    ("gap closed [95 %]", f"{{{GAP}:.1%}}"),
    ("agent − Black–Scholes delta", over(BS)),
    ("agent − Whalley–Wilmott", over(WW)),
    ("agent − constant band", over(BAND)),
    ("agent − Zakamouline", over(ZAKAMOULINE)),
)
HEDGE_GARCH = (
    *HEDGE_GBM[:4],
    ("agent − minimum-variance delta with a constant band", over(MV_BAND)),
    ("agent − the same with Whalley–Wilmott's band", over(MV_WW)),
)
HISTORICAL = (
    ("over Black–Scholes delta", over(BS, ".3f")),
    ("over Whalley–Wilmott", over(WW, ".3f")),
    ("over the constant band", over(BAND, ".3f")),
    ("over Zakamouline", over(ZAKAMOULINE, ".3f")),
    ("over the minimum-variance delta with a constant band", over(MV_BAND, ".3f")),
    ("over the same with Whalley–Wilmott's band", over(MV_WW, ".3f")),
    ("over the fitted model's own optimum", over("optimum of the fitted model", ".3f")),
)
HEDGE_BOOK = (*HEDGE_GBM[1:], ("agent − Kallsen–Muhle-Karbe", over(KMK)))
CLASSICS = {  # the makers of phases 3 and 4: name → label
    AS: "Avellaneda–Stoikov",
    CONSTANT_SPREAD: "constant spread",
    GLFT: "GLFT",
    BELIEVER_BAND: "GLFT, minimum-variance delta, band",
    AS_SMILE: "Avellaneda–Stoikov with the smile",
    GLFT_SMILE: "GLFT with the smile",
    MULTI_ASSET: "multi-asset closed form",
    VEGA_DP: "dynamic programming in vega",
}


def beside(measure: str) -> str:
    """Template of a measure of the agent, of the strongest classical maker and of Avellaneda–Stoikov."""
    return "; ".join(f"{{{who}[{measure}]:.2f}}" for who in ("rows[agent]", "strongest", f"rows[{AS}]"))


MAKER = (
    ("objective: agent; strongest classic; Avellaneda–Stoikov", beside("objective")),
    ("mean P&L of these", beside("pnl_mean")),
    ("standard deviation of their P&L", beside("pnl_sd")),
    ("the strongest classic", "{strongest[label]}"),
    *((f"agent − {label}", over(name, ".3f")) for name, label in CLASSICS.items()),
)
MAKER_HISTORICAL = (
    *MAKER[:4],
    ("agent − strongest classic", "{strongest[advantage]:.3f}"),
    ("agent − Avellaneda–Stoikov", over(AS, ".3f")),
    ("agent − GLFT, minimum-variance delta, band", over(BELIEVER_BAND, ".3f")),
)
MAKER_GBM = (
    ("gbm: agent − strongest classic", "{strongest[advantage]:.3f}"),
    ("gbm: the strongest classic", "{strongest[label]}"),
    ("gbm: agent − dynamic programming in vega", over(VEGA_DP, ".3f")),
    ("gbm: agent − Avellaneda–Stoikov", over(AS, ".3f")),
)


def neutral(market: str) -> Sequence[tuple[str, str]]:
    """Rows of a market without risk aversion and costs, where the best response is exact."""
    return (
        (f"{market}, without risk: learnt edges off the best response, on average", f"{{{OFF_BEST}:.2f}} %"),
        (f"{market}, without risk: agent − best response", over(BEST_RESPONSE, ".3f")),
        (f"{market}, without risk: objective below it", "{below_best:.2%} %"),
    )


SELFPLAY = (
    *MAKER,
    ("best response, trained as long again, gains", f"{{{EXPLOITED}:+.2%}}"),
    ("least margin over its own snapshots, any rival", "{cross_play[least_margin]:+.4f}"),
    ("that margin's 95 % interval, the snapshot, the rival", "{least_margin}"),
    ("intransitive part of the margins; cycles", "{cross_play[intransitivity]:.2%} %; {cross_play[cycles]}"),
    ("net delta left, of the sum of the options' deltas",
     "{rows[agent][net_delta]:.2f} shares, {rows[agent][delta_share]:.1%} %"),
)
SELFPLAY_WIDE = (
    ("agent − Avellaneda–Stoikov", over(AS, ".3f")),
    ("agent − strongest classic", "{strongest[advantage]:.3f}"),
    ("comparisons of 36 in which a snapshot earns more", "{cross_play[snapshots_ahead]}"),
    ("verdict", "{verdict}"),
)

# Tables with a row for each experiment, or for each contestant: header; label, name, cells

BOOK_HEADER = ("seed 1", "agent − Black–Scholes delta", "agent − Kallsen–Muhle-Karbe",
               "agent − minimum-variance delta with a constant band",
               "agent − the same with Kallsen–Muhle-Karbe's band")
BOOK = (over(BS), over(KMK), over(MV_BAND), over(MV_KMK))
BOOK_HISTORICAL = (
    ("agent − Black–Scholes delta", over(BS, ".3f")),
    ("agent − Kallsen–Muhle-Karbe", over(KMK, ".3f")),
    ("agent − the minimum-variance delta with a constant band", over(MV_BAND, ".3f")),
    ("agent − the same with Kallsen–Muhle-Karbe's band", over(MV_KMK, ".3f")),
    ("verdict", "{verdict}"),
)
CARRIED_HEADER = ("market", "one agent", "the market's own", "of that", "one agent over the strongest classic there")
BOOK_MARKETS = (("heston", "phase2-heston", BOOK), ("garch", "phase2-garch", BOOK))
HEDGE_MARKETS = (("heston", "phase1-heston", ["{verdict}"]), ("merton", "phase1-merton", ["{verdict}"]))
MARLVOL_HEADER = ("phase, seed 1", "above the named baseline", "above the strongest classic", "verdict")
MARLVOL = (
    ("2", "phase0-in-2", (over(BS, ".3f"), over(MV_KMK, ".3f"), "{verdict}")),
    ("3", "phase0-in-3", (over(AS, ".3f"), "{strongest[advantage]:.3f}", "{verdict}")),
    ("4", "phase0-in-4", (over(AS, ".3f"), "{strongest[advantage]:.3f}", "{verdict}")),
)
MAKERS_HEADER = ("seed 1", "agent − Avellaneda–Stoikov", "agent − GLFT, minimum-variance delta, band",
                 "agent − strongest classic", "the strongest classic")
MAKERS = (over(AS, ".3f"), over(BELIEVER_BAND, ".3f"), "{strongest[advantage]:.3f}", "{strongest[label]}")
MAKER_MARKETS = (
    ("trained and evaluated in garch", "phase3-garch", MAKERS),
    ("trained and evaluated in merton", "phase3-merton", MAKERS),
    ("trained in heston, evaluated in garch", "phase3-to-garch", MAKERS),
    ("trained in heston, evaluated in merton", "phase3-to-merton", MAKERS),
    ("trained in heston, evaluated in gbm", "phase3-to-gbm", MAKERS),
)
LEVELS = {"agent": "agent", **CLASSICS}
LEVELS_COLUMNS = (("objective", "{objective:.2f}"), ("P&L mean", "{pnl_mean:.2f}"), ("sd", "{pnl_sd:.2f}"),
                  ("CVaR95", "{cvar95:.2f}"), ("edge earned", "{income:.2f}"), ("hedging cost", "{cost:.2f}"),
                  ("market share", "{market_share:.3f}"), ("half-spread", "{half_spread:.2f}"),
                  ("mean net delta", "{net_delta:.3f}"), ("mean net vega", "{net_vega:.3f}"))

# The README: its table has a row for each phase, found again by its first cell; a cell is made of pairs (experiment,
# template) and prints the range over the seeds.

GAIN = f"{{advantages[{AS}].mean:+.2f}}"
SUMMARY_HEADER = ("phase", "question", "gain over Black–Scholes", "over the strongest classic", "of what is possible")
SUMMARY = (
    ("[0](docs/phase0.md)", "calibrate the market to option smiles",
     [("phase0", "RMSE {rows[agent][rmse]:.2f} vol points; "),
      ("phase0", "constant volatility {rows[constant volatility][rmse]:.2f}")],
     [("phase0", f"Dupire on the same grid: {{rows[{DUPIRE}][rmse]:.3f}}")],
     [("phase0", "an exact fit exists: RMSE 0")]),
    ("[1a](docs/phase1.md)", "hedge one sold option",
     [("phase1-gbm", f"{{advantages[{BS}].mean:+.3f}}")],
     [("phase1-gbm", f"{{advantages[{WW}].mean:+.3f}}")],
     [("phase1-gbm", f"{{{GAP}.mean:.1%}} % of the gap to dynamic programming")]),
    ("[1b](docs/phase1.md)", "the same, autocorrelated volatility",
     [("phase1-garch", f"{{advantages[{BS}].mean:+.2f}}")],
     [("phase1-garch", f"{{advantages[{MV_WW}].mean:+.3f}}")],
     [("phase1-garch", f"{{{GAP}.mean:.1%}} %")]),
    ("[2](docs/phase2.md)", "hedge a book of client orders",
     [("phase2", f"{{advantages[{BS}].mean:+.2f}}")],
     [("phase2", f"{{advantages[{KMK}].mean:+.3f}}")],
     [("phase2-one-strike", f"one strike: {{{GAP}.mean:.1%}} %")]),
    ("[3](docs/phase3.md)", "quote every option against a classical maker",
     [("phase3", GAIN)],
     [("phase3", "{strongest[advantage].mean:+.2f}, which knows the smile")],
     [("phase3-neutral", f"without risk: edges {{{OFF_BEST}:.1f}} % off the best response")]),
    ("[4](docs/phase4.md)", "the same, learnt by self-play",
     [("phase4", GAIN)],
     [("phase4", "{strongest[advantage].mean:+.2f}")],
     [("phase4", f"best response gains {{{EXPLOITED}.mean:.1%}} %; "),
      ("phase4-neutral", "without risk: edges {off_nash:.1%} % off Nash")]),
)
ANSWER = (
    "**Yes. In a market with a smile, where a fifth of the takers know what options are worth, its risk-adjusted "
    f"objective is {{rows[agent][objective]:.1f}}; Black–Scholes with Avellaneda–Stoikov quotes, tuned, reaches "
    f"{{rows[{AS}][objective]:.1f}} in the same seat, and {{rows[{AS}][pnl_mean]:.1f}} of mean P&L where the agent has "
    "{rows[agent][pnl_mean]:.1f}.** A classical maker that knows the whole model, the {strongest[label]}, tuned, "
    "reaches {strongest[objective]:.1f}. The agent, which starts as an imitation of it and never observes a fair "
    "value, is {strongest[advantage].mean:.2f} ahead of it (phase 3)."
)
# fmt: on

# WHAT A RUN LEFT


class Missing(Exception):
    """A run that a table needs is not there."""


class Interval(NamedTuple):
    """An advantage or a share with its 95 % interval; `:.4f` prints both, `:.1%` in per cent."""

    mean: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        end = spec.lstrip("+")
        if spec.endswith("%"):
            return f"{number(self.mean, spec)} % [{number(self.low, end)}, {number(self.high, end)}]"
        return f"{self.mean:+{end}} [{self.low:+{end}}, {self.high:+{end}}]"


def number(value: float, spec: str) -> str:
    """`value` as the spec says; where it ends in %, in per cent and without the sign %."""
    return f"{100 * value:{spec[:-1]}f}" if spec.endswith("%") else f"{value:{spec}}"


def read_json(path: Path):
    """Content of a JSON file.

    Raises:
        UsageError: none there, or a damaged one.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"{path}: missing or damaged") from None


def read_run(folder: Path) -> dict:
    """The values that templates are filled with: benchmark.json, and figures derived from it and from cross_play.json.

    `numbers` are the first number in each criterion's detail; `made` is reproduced.json; `strongest` is the classical
    maker of the highest objective. A script of benchmarks/ has `made` and `folder` only, selfplay_starts --neutral also
    `off_nash`, the mean distance of each run's edges from Nash, as a share.
    """
    run = {"folder": folder, "made": read_json(folder / "reproduced.json")}
    if (folder / "selfplay_starts.json").is_file():
        run["off_nash"] = [row["off_nash"] for row in read_json(folder / "selfplay_starts.json") if "off_nash" in row]
    if run["made"]["seed"] is None:
        return run
    run |= read_json(folder / "benchmark.json")
    for kind in ("advantages", "shares"):
        run[kind] = {name: Interval(*(x[key] for key in Interval._fields)) for name, x in run[kind].items()}
    details = {criterion["name"]: criterion["detail"] for criterion in run["criteria"]}
    found = {name: re.search(r"[-+]?\d+(\.\d+)?", detail) for name, detail in details.items()}
    run["numbers"] = {name: float(match[0]) for name, match in found.items() if match}
    run["verdict"] = "passed" if run["passed"] else "failed"
    rows = run["rows"]
    agent = rows["agent"]
    classics = [name for name in CLASSICS if name in rows]
    if classics:
        name = max(classics, key=lambda name: rows[name]["objective"])
        run["strongest"] = {"label": CLASSICS[name], "advantage": run["advantages"][name], **rows[name]}
    if BEST_RESPONSE in rows:
        run["below_best"] = 1 - agent["objective"] / rows[BEST_RESPONSE]["objective"]
    if "floor" in agent:
        run["above_floor"] = agent["price"] - agent["floor"]
    if (folder / "cross_play.json").is_file():
        run["cross_play"] = read_cross_play(folder / "cross_play.json")
        run["least_margin"] = next((least_margin(x) for name, x in details.items() if "snapshot" in name), "")
    return run


def read_cross_play(path: Path) -> dict:
    """Intransitivity and cycles, and the agent's margins over its own snapshots, whoever the rival is."""
    played = read_json(path)
    objective = dict(zip(played["names"], np.array(played["objective"]), strict=True))
    margins = [objective["agent"] - row for name, row in objective.items() if name.startswith("step ")]
    return {
        "intransitivity": played["intransitivity"],
        "cycles": "; ".join(" > ".join(cycle) for cycle in played["cycles"]) or "none",
        "least_margin": float(np.min(margins)) if margins else float("nan"),
        "snapshots_ahead": str(int(np.sum(np.array(margins) < 0))),
    }


def least_margin(detail: str) -> str:
    """Interval, snapshot and rival of the least margin, from what the criterion on snapshots says of it."""
    found = re.search(r"the least [-+.\d]+ (\[[^]]+\]), (.+) against (.+)", detail)
    return ", ".join(found.groups()) if found else detail


# TABLES


def spread(values: Sequence, spec: str) -> str:
    """One text for the values of several runs: numbers from the least to the largest, others one after the other.

    Of intervals, the least and the largest mean, and the range that holds them all.
    """
    if len(values) > 1 and all(isinstance(value, Interval) for value in values):
        means = spread([x.mean for x in values], spec if spec.endswith("%") else f"+{spec.lstrip('+')}")
        ends = format(Interval(0.0, min(x.low for x in values), max(x.high for x in values)), spec)
        return means + ends[ends.index(" ") :]
    if all(isinstance(value, float | int) for value in values):
        least = number(min(values), spec)
        most = number(max(values), spec)
        return least if least == most else f"{least} to {most}"
    return "; ".join(dict.fromkeys(format(value, spec) for value in values))


def fill(template: str, runs: Sequence[dict]) -> str:
    """The template with the values of its fields in `runs` (see `read_run`); of several runs their range.

    Raises:
        UsageError: a run does not have such a field.
    """
    text = ""
    for literal, name, spec, _ in Formatter().parse(template):
        text += literal
        if name is None:
            continue
        values = []
        for run in runs:
            try:
                value = Formatter().get_field(name, (), run)[0]
            except (AttributeError, KeyError, TypeError):
                raise UsageError(f"{run['folder']}: has no {name}, which the documentation shows") from None
            values += value if isinstance(value, list) else [value]
        text += spread(values, spec)
    return text


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))


Runs = Callable[[str], list[dict]]  # name of an experiment → what each of its runs left; raises Missing
Write = Callable[[Runs, str], str]  # runs and the old text between the markers → the new text


def by_seed(*parts: tuple[str, Sequence[tuple[str, str]]]) -> Write:
    """A table of one column for each seed; the rows of one experiment, then those of the next.

    Of more than five seeds there is one column, from the least to the largest.
    """

    def write(runs: Runs, old: str) -> str:
        body = []
        for name, rows in parts:
            groups = [[run] for run in runs(name)] if len(runs(name)) <= 5 else [runs(name)]
            header = ["", *(f"S = {spread([run['made']['seed'] for run in group], 'd')}" for group in groups)]
            body += [[label, *(fill(template, group) for group in groups)] for label, template in rows]
        return markdown(header, body)

    return write


def by_experiment(header: Sequence[str], rows: Sequence[tuple[str, str, Sequence[str]]]) -> Write:
    """A table of one row for each experiment, with the first seed: label, name, templates of the cells."""

    def write(runs: Runs, old: str) -> str:
        return markdown(header, [[label, *(fill(x, runs(name)[:1]) for x in cells)] for label, name, cells in rows])

    return write


def by_contestant(name: str) -> Write:
    """A table of one row for each contestant in an experiment's benchmark, with the first seed."""

    def write(runs: Runs, old: str) -> str:
        run = runs(name)[0]
        body = []
        for contestant, label in LEVELS.items():
            row = {**run["rows"][contestant], "folder": run["folder"]}
            body.append([label, *(fill(cell, [row]) for _, cell in LEVELS_COLUMNS)])
        return markdown([f"seed {run['made']['seed']}", *(title for title, _ in LEVELS_COLUMNS)], body)

    return write


def over_all_seeds(name: str) -> Write:
    """Two tables of an experiment over all its seeds: what it gains, and by how much each criterion is met.

    Intervals are bootstrapped over the seeds, see `envs.benchmark.training_seeds`.
    """

    def interval(values: Sequence[float], spec: str) -> list[str]:
        found = over_seeds(values)
        return [f"{Interval(found.mean, found.low, found.high):{spec}}", spread(values, spec)]

    def margin(values: np.ndarray) -> list[str]:
        deviations = f"{values.mean() / values.std(ddof=1):.1f}" if values.std() > 0 else "all alike"
        return [f"{values.mean():+.3g}", f"{values.min():+.3g}", deviations]

    def write(runs: Runs, old: str) -> str:
        seeds = runs(name)
        if len(seeds) < 3:
            raise Missing
        gains = []
        for other in seeds[0]["advantages"]:
            values = np.array([run["advantages"][other].mean for run in seeds])
            ahead = f"{100 * probability_of_improvement(values):.0f} %"
            gains.append([f"over {other}", *interval(values, "+.3f"), ahead])
        for share in seeds[0]["shares"]:
            gains.append([share, *interval([run["shares"][share].mean for run in seeds], ".1%"), ""])
        met = []
        for criteria in zip(*(run["criteria"] for run in seeds), strict=True):
            values = [criterion["margin"] for criterion in criteria]
            cells = ["", "", ""] if None in values else margin(np.array(values))
            met.append([criteria[0]["name"], f"{sum(c['passed'] for c in criteria)} of {len(seeds)}", *cells])
        return "\n\n".join([
            markdown([f"{len(seeds)} seeds", "interquartile mean [95 %]", "least to most", "seeds ahead"], gains),
            markdown(["criterion", "met by", "margin, mean", "least", "mean, in standard deviations"], met),
        ])  # fmt: skip

    return write


def carried_over(name: str, specialists: dict[str, str]) -> Write:
    """A table of one row for each market: what an agent of all of them gains there over Black–Scholes delta hedging,
    and of what the agent that was trained there gains (first seed) which share.

    Args:
        name: experiment of the agents that were trained in all markets; evaluated in `NAME-in-MARKET`.
        specialists: market → experiment of the agent that was trained in it.
    """

    def write(runs: Runs, old: str) -> str:
        body = []
        for market, specialist in specialists.items():
            seeds = runs(f"{name}-in-{market}")
            gains = [run["advantages"][BS] for run in seeds]
            own = runs(specialist)[0]["advantages"][BS]
            shares = [gain.mean / own.mean for gain in gains]
            least = [min(x for key, x in run["advantages"].items() if key.endswith(", tuned")) for run in seeds]
            cells = (spread(gains, ".3f"), format(own, ".3f"), f"{spread(shares, '.0%')} %", spread(least, ".3f"))
            body.append([market, *cells])
        return markdown(CARRIED_HEADER, body)

    return write


def pasted(name: str) -> Write:
    """The table that a script of benchmarks/ has written itself, the one .md file in its folder."""

    def write(runs: Runs, old: str) -> str:
        folder = runs(name)[0]["folder"]
        files = list(folder.glob("*.md"))
        check(len(files) == 1, f"{folder}: holds {len(files)} tables, files *.md (1)")
        return files[0].read_text(encoding="utf-8").strip()

    return write


def summary(runs: Runs, old: str) -> str:
    """The README's table of results; a cell whose runs are missing stays as it is."""
    kept = {}
    for line in old.splitlines():
        _, key, _, *texts, _ = (cell.strip() for cell in line.split("|"))
        kept[key] = texts
    rows = []
    for key, question, *cells in SUMMARY:
        texts = kept.get(key, ["pending"] * len(cells))
        for i, cell in enumerate(cells):
            with suppress(Missing):
                texts[i] = "".join(fill(template, runs(name)) for name, template in cell)
        rows.append([key, question, *texts])
    return markdown(SUMMARY_HEADER, rows)


def answer(runs: Runs, old: str) -> str:
    """The README's answer, in three sentences."""
    return textwrap.fill(fill(ANSWER, runs("phase3")), 120)


# DOCUMENTS: which table stands where, from which experiments, and the figures that belong to it


@dataclass(frozen=True)
class Table:
    """A table, which stands between the markers `name` of a document.

    `figures`: figure of the first experiment's first run folder → figure in docs/, both without .png. `plain`: without
    commands, date and versions, as in the README.
    """

    name: str
    document: str
    experiments: tuple[str, ...]
    write: Write
    figures: dict[str, str] = field(default_factory=dict)
    plain: bool = False

    @property
    def phase(self) -> str:
        return Path(self.document).stem


# fmt: off
DOC0 = "docs/phase0.md"
DOC1 = "docs/phase1.md"
DOC2 = "docs/phase2.md"
DOC3 = "docs/phase3.md"
DOC4 = "docs/phase4.md"
EVIDENCE = "docs/evidence.md"
SPEED = "docs/speed.md"
IN_PHASE2 = {"gbm": "phase2", **{model: f"phase2-{model}" for model in MIXED[1:]}}
TABLES = (
    Table("phase0-smile", DOC0, ("phase0",), by_seed(("phase0", SMILE)), {"smiles": "phase0_smiles"}),
    Table("phase0-ablation", DOC0, ("phase0-ablation",), pasted("phase0-ablation")),
    Table("phase0-bermudan", DOC0, ("phase0-bermudan", "phase0-memoryless"),
          by_seed(("phase0-bermudan", BERMUDAN), ("phase0-memoryless", MEMORYLESS)),
          {"learning_curve": "phase0_bermudan", "learnt_dependence": "phase0_learnt_dependence"}),
    Table("phase0-csv", DOC0, ("phase0-csv",), by_seed(("phase0-csv", SMILE))),
    Table("phase0-objectives", DOC0, ("phase0-max", "phase0-target"), by_experiment(OBJECTIVES_HEADER, OBJECTIVES)),
    Table("phase0-slv", DOC0, ("phase0-slv",), by_seed(("phase0-slv", SLV)),
          {"forward_smiles": "phase0_forward_smiles"}),
    Table("phase0-sensitivity", DOC0, ("phase0-sensitivity",), pasted("phase0-sensitivity"),
          {name: f"phase0_sensitivity_{name}" for name in ("num_players", "num_basis", "steps_per_day", "memory")}),
    Table("phase0-in-1", DOC0, ("phase0-in-1",), by_seed(("phase0-in-1", IN_MARLVOL_1))),
    Table("phase0-in-others", DOC0, ("phase0-in-2", "phase0-in-3", "phase0-in-4"),
          by_experiment(MARLVOL_HEADER, MARLVOL)),
    Table("phase1-gbm", DOC1, ("phase1-gbm",), by_seed(("phase1-gbm", HEDGE_GBM))),
    Table("phase1-garch", DOC1, ("phase1-garch",), by_seed(("phase1-garch", HEDGE_GARCH))),
    Table("phase1-markets", DOC1, ("phase1-heston", "phase1-merton"),
          by_experiment(("seed 1", "verdict"), HEDGE_MARKETS)),
    Table("phase1-historical", DOC1, ("phase1-until-2010", "phase1-historical"),
          by_seed(("phase1-historical", HISTORICAL))),
    Table("phase1-mixture", DOC1, ("phase1-mixture", *(f"phase1-mixture-in-{x}" for x in MIXED),
                                   *(f"phase1-{x}" for x in MIXED)),
          carried_over("phase1-mixture", {x: f"phase1-{x}" for x in MIXED})),
    Table("phase1-mixture-historical", DOC1, ("phase1-mixture", "phase1-mixture-in-historical"),
          by_seed(("phase1-mixture-in-historical", HISTORICAL))),
    *(Table(f"{name}-historical", DOC1, (name, f"{name}-historical"), by_seed((f"{name}-historical", HISTORICAL)))
      for name in ("phase1-bootstrap", "phase1-nasdaq", "phase1-nasdaq-bootstrap")),
    Table("phase2-book", DOC2, ("phase2",), by_seed(("phase2", HEDGE_BOOK)), {"book_episode": "phase2_book_episode"}),
    Table("phase2-one-strike", DOC2, ("phase2-one-strike",),
          by_seed(("phase2-one-strike", (HEDGE_GBM[0], *HEDGE_BOOK))), {"no_trade_bands": "phase2_no_trade_bands"}),
    Table("phase2-markets", DOC2, ("phase2-heston", "phase2-garch"), by_experiment(BOOK_HEADER, BOOK_MARKETS)),
    Table("phase2-historical", DOC2, ("phase2-until-2010", "phase2-historical"),
          by_seed(("phase2-historical", BOOK_HISTORICAL))),
    Table("phase2-mixture", DOC2, ("phase2-mixture", *(f"phase2-mixture-in-{x}" for x in MIXED), *IN_PHASE2.values()),
          carried_over("phase2-mixture", IN_PHASE2)),
    Table("phase2-mixture-historical", DOC2, ("phase2-mixture", "phase2-mixture-in-historical"),
          by_seed(("phase2-mixture-in-historical", BOOK_HISTORICAL))),
    Table("phase2-cost", DOC2, ("phase2-cost",), pasted("phase2-cost"), {"cost_trend": "phase2_cost_trend"}),
    Table("phase3-makers", DOC3, ("phase3",), by_seed(("phase3", MAKER)),
          {name: f"phase3_{name}" for name in ("learnt_quotes", "episode", "rival_sweep")}),
    Table("phase3-levels", DOC3, ("phase3",), by_contestant("phase3")),
    Table("phase3-known", DOC3, ("phase3-neutral", "phase3-neutral-gbm", "phase3-gbm"),
          by_seed(("phase3-neutral", neutral("heston")), ("phase3-neutral-gbm", neutral("gbm")),
                  ("phase3-gbm", MAKER_GBM))),
    Table("phase3-markets", DOC3, tuple(name for _, name, _ in MAKER_MARKETS),
          by_experiment(MAKERS_HEADER, MAKER_MARKETS)),
    Table("phase3-informed", DOC3, ("phase3-informed",), pasted("phase3-informed"),
          {"informed_sweep": "phase3_informed_sweep"}),
    Table("phase3-toxic", DOC3, ("phase3-toxic",), pasted("phase3-toxic"), {"toxic_sweep": "phase3_toxic_sweep"}),
    Table("phase3-start", DOC3, ("phase3-start",), pasted("phase3-start"), {"ablation_start": "phase3_start"}),
    Table("phase3-historical", DOC3, ("phase3-until-2010", "phase3-historical"),
          by_seed(("phase3-historical", MAKER_HISTORICAL))),
    Table("phase3-surface", DOC3, ("phase3-surface",), by_seed(("phase3-surface", MAKER)),
          {"learnt_quotes": "phase3_surface_quotes"}),
    Table("phase4-selfplay", DOC4, ("phase4",), by_seed(("phase4", SELFPLAY)),
          {name: f"phase4_{name}" for name in ("cross_play", "market_shares", "selfplay_episode", "competition")}),
    Table("phase4-neutral", DOC4, ("phase4-neutral",), pasted("phase4-neutral"),
          {"selfplay_starts": "phase4_edges_neutral"}),
    Table("phase4-three", DOC4, ("phase4-three",), pasted("phase4-three")),
    Table("phase4-gamma", DOC4, ("phase4-gamma",), pasted("phase4-gamma")),
    Table("phase4-starts", DOC4, ("phase4-starts",), pasted("phase4-starts"), {"selfplay_starts": "phase4_edges"}),
    Table("phase4-wide", DOC4, ("phase4-wide",), by_seed(("phase4-wide", SELFPLAY_WIDE))),
    Table("phase4-historical", DOC4, ("phase4-until-2010", "phase4-historical"),
          by_seed(("phase4-historical", MAKER_HISTORICAL))),
    Table("phase4-surface", DOC4, ("phase4-surface",), by_seed(("phase4-surface", SELFPLAY))),
    *(Table(name, SPEED, (name,), pasted(name)) for name in
      ("speed1", "speed1-wide", "speed2", "speed3", "speed4", "speed-market", "kernels")),
    *(Table(f"seeds-{name}", EVIDENCE, (name,), over_all_seeds(name)) for name in
      ("phase0", "phase1-gbm", "phase2", "phase3", "phase4")),
    Table("answer", "README.md", ("phase3",), answer, plain=True),
    Table("results", "README.md", (), summary, plain=True),
)
# fmt: on
SUMMARY_SEEDS = 3  # the README is written from so many seeds or more


# RUNS: found, started, continued


class Task(NamedTuple):
    """One run of an experiment; a script of benchmarks/ has no seed (None)."""

    experiment: Experiment
    seed: int | None

    @property
    def label(self) -> str:
        return self.experiment.name if self.seed is None else f"{self.experiment.name}, seed {self.seed}"


def digest(experiment: Experiment, seeds: Sequence[int]) -> str:
    """Eight hexadecimal digits of the command and of the code that it runs."""
    files = {
        Path(experiment.script),
        Path("requirements.txt"),
        *Path("envs").rglob("*.py"),
        *Path("envs").rglob("*.json"),
    }
    if experiment.is_benchmark:
        files |= set(Path().glob("phase*.py"))
    content = hashlib.sha256(f"{experiment.script} {experiment.flags}".encode())
    if re.search(r"\{seeds?\}|:first\}", experiment.flags):
        content.update(repr(tuple(seeds[: experiment.num_seeds])).encode())
    for file in sorted(files):
        content.update(file.as_posix().encode() + file.read_bytes())
    for name in experiment.needs:
        content.update(digest(NAMED[name], seeds).encode())
    return content.hexdigest()[:8]


@dataclass
class Folders:
    """The run folders under runs/, and which of them count: those of the present code, or with `any_code` all."""

    seeds: tuple[int, ...]
    any_code: bool = False

    def finished(self, task: Task) -> Path | None:
        """The newest finished run folder of a task."""
        own = digest(task.experiment, self.seeds)
        found = []
        for file in Path("runs").glob("*/reproduced.json"):
            made = read_json(file)
            if (made["experiment"], made["seed"]) == (task.experiment.name, task.seed):
                found += [file] if self.any_code or made["digest"] == own else []
        return max(found, key=lambda file: file.stat().st_mtime).parent if found else None

    def unfinished(self, task: Task, run_name: str) -> Path | None:
        """The newest run folder of a phase's task of that --exp-name which is not finished."""
        found = []
        for file in Path("runs").glob(f"*__{run_name}__*/args.json"):
            done = (file.parent / "reproduced.json").is_file()
            found += [file] if not done and read_json(file)["seed"] == task.seed else []
        return max(found, key=lambda file: file.stat().st_mtime).parent if found else None

    def flags(self, task: Task) -> list[str]:
        """The flags of a task, with seeds and run folders in their places.

        Raises:
            UsageError: a run whose folder is needed is not finished.
        """
        text = with_seeds(task.experiment, self.seeds)
        for name in task.experiment.needs:
            for place, seed in ((f"{{{name}}}", task.seed), (f"{{{name}:first}}", self.seeds[0])):
                if place in text:
                    folder = self.finished(Task(NAMED[name], seed))
                    check(folder is not None, f"{task.label}: needs {name}, seed {seed}, which is not finished")
                    text = text.replace(place, str(folder))
        return shlex.split(text)

    def run(self, task: Task) -> None:
        """Runs a task, or continues it, unless it is finished."""
        if self.finished(task) is not None:
            return
        own = digest(task.experiment, self.seeds)  # before the run: the code may change while it goes on
        flags = self.flags(task)
        start = time.monotonic()
        begun = None
        if task.seed is None:
            folder = run_benchmark(task, flags)
        else:
            name = f"{task.experiment.name}.{own}"
            if "--evaluate" not in flags:  # an evaluation cannot be continued, and has the seed of what it evaluates
                flags += ["--seed", str(task.seed)]
                begun = self.unfinished(task, name)
            flags = ["--resume", str(begun)] if begun is not None else [*flags, "--exp-name", name]
            folder = run_phase(task.experiment.script, flags, task.label)
            if not (folder / "benchmark.json").is_file():
                raise DivergenceError(f"{task.label}: ended without a benchmark")
        minutes = (time.monotonic() - start) / 60 if begun is None else None
        write_json(folder / "reproduced.json", record(task, own, minutes))


def run_benchmark(task: Task, flags: Sequence[str]) -> Path:
    """Runs a script of benchmarks/; the folder that it has left, runs/<its name> or runs/<its name>-2 …"""
    pattern = f"{Path(task.experiment.script).stem}*"
    before = set(Path("runs").glob(pattern))
    run_phase(task.experiment.script, [*flags], task.label)
    new = set(Path("runs").glob(pattern)) - before
    check(len(new) == 1, f"{task.label}: has left {len(new)} folders runs/{pattern} (1)")
    return new.pop()


def with_seeds(experiment: Experiment, seeds: Sequence[int]) -> str:
    """Flags with the seeds in their places."""
    own = " ".join(map(str, seeds[: experiment.num_seeds]))
    return experiment.flags.replace("{seeds}", own).replace("{seed}", str(seeds[0]))


def record(task: Task, own_digest: str, minutes: float | None) -> dict:
    """Content of reproduced.json: what was run, when and where; `minutes` if it was run in one piece."""
    what = {"experiment": task.experiment.name, "seed": task.seed, "digest": own_digest, "minutes": minutes}
    return {**what, **provenance("envs", "requirements.txt", task.experiment.script)}


def tasks_of(names: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """The runs of these experiments and of those that they need."""
    counts = {name: NAMED[name].num_seeds for name in names}
    for name in names:
        for other in NAMED[name].needs:
            count = 1 if f"{{{other}:first}}" in NAMED[name].flags else NAMED[name].num_seeds
            counts[other] = max(counts.get(other, 0), count)
    tasks = []
    for experiment in EXPERIMENTS:
        if experiment.name in counts:
            own = [None] if experiment.is_benchmark else seeds[: counts[experiment.name]]
            tasks += [Task(experiment, seed) for seed in own]
    return tasks


def run_all(folders: Folders, tasks: Sequence[Task], jobs: int) -> bool:
    """Runs the tasks, `jobs` side by side, then scripts of benchmarks/ one by one. False if one ended in an error."""
    phases = [task for task in tasks if task.seed is not None]
    success = run_together(folders, [task for task in phases if not task.experiment.needs], jobs)
    success &= run_together(folders, [task for task in phases if task.experiment.needs], jobs)
    return success & run_together(folders, [task for task in tasks if task.seed is None], 1)


def run_together(folders: Folders, tasks: Sequence[Task], jobs: int) -> bool:
    """Runs the tasks, `jobs` side by side. An error is printed and does not stop the others; then returns False."""
    success = True
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(folders.run, task) for task in tasks]
        try:
            for future in as_completed(futures):
                try:
                    future.result()
                except (UsageError, DivergenceError) as error:
                    print(f"error: {error}", file=sys.stderr, flush=True)
                    success = False
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)  # those that are running have had the Ctrl-C, too
            raise
    return success


# DOCUMENTS: written


def command(experiment: Experiment, seeds: Sequence[int]) -> str:
    """A command as the documentation shows it."""
    flags = re.sub(r"\{[^}]+\}", "runs/NAME", with_seeds(experiment, seeds))
    text = f".venv/bin/python {experiment.script} {flags}".strip()
    if experiment.is_benchmark or "--evaluate" in flags:
        return text
    return f"{text} --seed {'S' if min(experiment.num_seeds, len(seeds)) > 1 else seeds[0]}"


def block(table: Table, runs: Runs, old: str, seeds: Sequence[int]) -> str:
    """The text between the markers: commands, table, and a line that says what made it."""
    text = table.write(runs, old)
    if table.plain:
        return text
    commands = "\n".join(f"    {command(NAMED[name], seeds)}" for name in table.experiments)
    made = [run["made"] for name in table.experiments for run in runs(name)]
    facts = [" and ".join(sorted({run["date"] for run in made}))]
    facts += [", ".join(dict.fromkeys(f"commit {run['commit']}" for run in made))]
    facts += ["; ".join(dict.fromkeys(run[key] for run in made)) for key in ("versions", "machine")]
    return f"{commands}\n\n{text}\n\n*{'; '.join(facts)}.*"


def write_table(table: Table, runs: Runs, seeds: Sequence[int]) -> bool:
    """Writes a table into its document and copies its figures; whether anything changed.

    Raises:
        Missing: a run is missing; nothing has been written.
        UsageError: no document, or not one pair of markers in it.
    """
    document = Path(table.document)
    start = f"<!-- reproduce: {table.name} -->"
    end = "<!-- /reproduce -->"
    check(document.is_file(), f"{document}: no such document")
    text = document.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(start)}\n(.*?)\n{re.escape(end)}", re.DOTALL)
    found = pattern.findall(text)
    check(len(found) == 1, f"{document}: has {len(found)} tables between {start} and {end} (1)")
    content = block(table, runs, found[0].strip(), seeds)
    new = pattern.sub(lambda _: f"{start}\n\n{content}\n\n{end}", text)
    changed = new != text
    if changed:
        with replacing(document) as temporary:
            temporary.write_text(new, encoding="utf-8")
    for name, name_in_docs in table.figures.items():
        source = runs(table.experiments[0])[0]["folder"] / f"{name}.png"
        figure = Path("docs") / f"{name_in_docs}.png"
        check(source.is_file(), f"{source}: no such figure")
        if not figure.is_file() or figure.read_bytes() != source.read_bytes():
            shutil.copyfile(source, figure)
            changed = True
    return changed


def write_documents(folders: Folders, tables: Sequence[Table], tasks: Sequence[Task]) -> bool:
    """Writes every table whose runs are finished, and says what became of each. True if none was left out."""
    found = {(task.experiment.name, task.seed): folders.finished(task) for task in tasks}
    contents: dict[str, list[dict]] = {}

    def runs(name: str) -> list[dict]:
        if name not in contents:
            seeds = [None] if NAMED[name].is_benchmark else folders.seeds[: NAMED[name].num_seeds]
            own = [found.get((name, seed)) for seed in seeds]
            if None in own:
                raise Missing
            contents[name] = [read_run(folder) for folder in own]
        return contents[name]

    complete = True
    for table in tables:
        try:
            outcome = "written" if write_table(table, runs, folders.seeds) else "up to date"
        except Missing:
            outcome = "left as it is, for want of runs"
            complete = complete and table.plain
        print(f"{table.document}, {table.name}: {outcome}")
    return complete


# MAIN


@dataclass
class Args:
    """Runs the documentation's commands and writes their tables and figures into README.md and docs/."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """phases (phase0 to phase4), speed, or single tables by the names in their markers; without any, all of them"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the runs; what the documentation shows for one seed is run with the first of them"""
    list: bool = False
    """print the commands, the minutes that they take, and how many of their runs are done"""
    jobs: int = 2
    """runs side by side"""
    any_code: bool = False
    """let finished runs of other versions of the code count, too; the tables name the commit of each"""


def choose(names: Sequence[str], seeds: Sequence[int]) -> list[Table]:
    """The tables that the command is about, and those of the README if there are seeds enough for it.

    Raises:
        UsageError: a name that is none of theirs.
    """
    known = [*dict.fromkeys(t.phase for t in TABLES if not t.plain), *(t.name for t in TABLES if not t.plain)]
    for name in names:
        check(name in known, f"{name!r} is no phase and no table (one of {', '.join(known)})")
    chosen = [t for t in TABLES if not t.plain and (not names or t.name in names or t.phase in names)]
    return chosen + [t for t in TABLES if t.plain and len(seeds) >= SUMMARY_SEEDS]


def show(folders: Folders, tasks: Sequence[Task]) -> None:
    """Prints a line for each experiment: its name, minutes, runs that are done, and command."""
    total = 0.0
    for experiment in dict.fromkeys(task.experiment for task in tasks):
        own = [task for task in tasks if task.experiment == experiment]
        done = sum(folders.finished(task) is not None for task in own)
        total += experiment.minutes * len(own)
        text = command(experiment, folders.seeds)
        print(f"{experiment.name:18} {len(own)} × {experiment.minutes:4g} min  {done}/{len(own)} done  {text}")
    print(f"{total:g} minutes of runs; phases take half of that on two cores, with two runs side by side")


def main(argv: Sequence[str]) -> bool:
    """Runs the command; True if every table that it is about is up to date."""
    args = parse_args(Args, argv)
    check(len(set(args.seeds)) == len(args.seeds) > 0, "--seeds needs one or more different ones")
    check(all(0 <= seed <= 999_999 for seed in args.seeds), f"--seeds are {args.seeds} (at least 0, at most 999999)")
    check_range(args, 1, 64, "jobs")
    tables = choose(args.names, args.seeds)
    folders = Folders(args.seeds, args.any_code)
    names = dict.fromkeys(name for table in tables if not table.plain for name in table.experiments)
    tasks = tasks_of(list(names), args.seeds)
    if args.list:
        show(folders, tasks)
        return True
    try:
        success = run_all(folders, tasks, args.jobs)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    return write_documents(folders, tables, tasks) and success


if __name__ == "__main__":
    os.chdir(ROOT)
    run_main(main, sys.argv[1:])
