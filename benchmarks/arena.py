"""Arena: agents of phases 3 and 4, makers of your own and the classical makers, each against each, on the same takers.

    python benchmarks/arena.py runs/A my_maker.py …
    python benchmarks/arena.py runs/A runs/B --flags="--dynamics gbm"     in another market than that of runs/A

A maker of your own is a Python file with one function, `maker(market)`, which returns a policy: observation (n, size) →
action (n, actions). docs/arena.md shows one of ten lines. Such a file is code that is run: read it before you run
somebody else's. (A checkpoint holds no code.)

The market is that of the first run, or phase 4's default. Table, ratings and heat map go to runs/arena/ (or -2, -3 …).
"""

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro

import phase3_spread_vs_bs as phase3
import phase4_selfplay as phase4
from envs.benchmark.league import LEAGUE, LEAGUE_EPISODES, CrossPlay, cross_play
from envs.benchmark.makers import classical_makers
from envs.figures import selfplay as figures
from envs.market.hedging import Policy
from envs.market.quoting import ROUNDING, QuotingEnv
from envs.market.rivals import Maker
from envs.market.units import TRADING_DAYS
from envs.models import QuotingArgs, check_options, make_model
from envs.run import page
from envs.run.args import check_range, parse_args, saved_args
from envs.run.errors import UsageError, check
from envs.run.files import load_checkpoint, load_weights, new_folder, write_json
from envs.run.run import run_main

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PHASES = {module.PHASE: module for module in (phase3, phase4)}
MOST = 24  # entrants


@dataclass
class Args:
    """Plays makers against each other."""

    entrants: tyro.conf.Positional[tuple[str, ...]] = ()
    """run folders or checkpoints of phases 3 and 4, and files of makers (.py)"""
    flags: str = ""
    """flags of phase4_selfplay.py that make it another market, as in --flags="--dynamics gbm" (with the equals sign)"""
    episodes: int = LEAGUE_EPISODES
    """episodes of each match"""

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        check(0 < len(self.entrants) <= MOST, f"entrants are {len(self.entrants)} (at least 1, at most {MOST})")
        check_range(self, 2, 2**20, "episodes")


def names_of(entrants: Sequence[str]) -> list[str]:
    """Files of makers by their names, runs by those of their folders, without the time where that is enough.

    Raises:
        UsageError: two of the same name.
    """
    names = []
    for path in map(Path, entrants):
        folder = path if path.is_dir() else path.parent
        names.append(path.stem if path.suffix == ".py" else folder.resolve().name)
    short = [re.sub(r"__\d{8}-\d{6}(-\d+)?$", "", name) for name in names]
    names = short if len(set(short)) == len(short) else names
    for name in names:
        check(names.count(name) == 1 and name not in LEAGUE, f"two entrants are called {name!r}")
    return names


def market_args(checkpoints: dict[str, dict], flags: str) -> phase4.Args:
    """Phase 4's flags of the market: those that the first run was trained with, and `flags`.

    Raises:
        UsageError: flags that cannot be, or a run whose agent quotes other options.
    """
    trained = {
        source: saved_args(PHASES[content["phase"]].Args, content["args"], source)
        for source, content in checkpoints.items()
    }
    args = phase4.Args()
    for first in list(trained.values())[:1]:
        args = phase4.Args(**{field.name: getattr(first, field.name) for field in fields(QuotingArgs)})
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise UsageError(f"--flags is {flags!r} ({error})") from None
    args = parse_args(phase4.Args, words, default=args)
    args.evaluate, args.exploitability = "", False  # so that flags of training are not looked at
    args.fill()
    args.check()
    for source, own in trained.items():
        try:
            check_options(args, own)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None
    return args


def load_agent(source: str, content: dict, market: QuotingEnv) -> Policy:
    """The policy of a checkpoint of phase 3 or 4."""
    module = PHASES[content["phase"]]
    agent = module.Agent(market, saved_args(module.Args, content["args"], source).apart)
    load_weights(agent, content["agent"], source)
    return agent.to(market.device).policy


def load_maker(path: str, market: QuotingEnv) -> Policy:
    """The policy that the function `maker` of a Python file makes for this market. The file is run.

    Raises:
        UsageError: no file, an error in it, or a policy whose actions no market takes (also when it plays).
    """
    check(Path(path).is_file(), f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"maker_of_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    _called(path, lambda: spec.loader.exec_module(module))
    maker = getattr(module, "maker", None)
    check(callable(maker), f"{path}: has no function maker(market)")
    policy = _called(path, lambda: maker(market))
    check(callable(policy), f"{path}: maker(market) is a {type(policy).__name__} (a policy, observation → action)")

    def checked(observation: torch.Tensor) -> torch.Tensor:
        action = _called(path, lambda: policy(observation))
        _check_action(path, action, (len(observation), market.action_size), market)
        return action

    observation, _ = market.reset(seed=0)
    checked(observation.flatten(0, 1))
    return policy if isinstance(policy, Maker) else checked


def _called(path: str, function: Callable):
    """What `function`, of a user's file, returns; its errors in one line, with the line of the file."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        line = getattr(error, "lineno", None)  # of a syntax error
        trace = error.__traceback__
        while trace is not None:
            if Path(trace.tb_frame.f_code.co_filename).resolve() == Path(path).resolve():
                line = trace.tb_lineno
            trace = trace.tb_next
        where = "" if line is None else f", line {line}"
        raise UsageError(f"{path}{where}: {type(error).__name__}: {error}") from None


def _check_action(path: str, action, wanted: tuple[int, int], market: QuotingEnv) -> None:
    kind = "" if isinstance(action, torch.Tensor) else f", a {type(action).__name__}"
    shape = tuple(getattr(action, "shape", ()))
    check(not kind and shape == wanted, f"{path}: its action has the shape {shape}{kind} ({wanted}, a tensor)")
    check(bool(action.isfinite().all()), f"{path}: its action is NaN or infinite")
    by_name = market.by_name(action)
    spread = float((by_name["ask"] + by_name["bid"]).min())
    check(spread >= -ROUNDING, f"{path}: ask + bid of an option are {spread:g} (0 or more, or the quotes cross)")


def write(folder: Path, league: CrossPlay, title: str) -> str:
    """Writes table, ratings, heat map and one page of all of it; returns the table as text."""
    table = league.table()
    text = f"{title}\n\n{table}\n\n{league.summary()}\n"
    (folder / "arena.md").write_text(f"# {text}", encoding="utf-8")
    write_json(folder / "arena.json", league.content())
    figures.cross_play(folder / "arena.png", league, title, league.names[0], "the first entrant")
    parts = [page.table(table.header, table.cells()), f"<p>{page.text(league.summary())}</p>", page.figures(folder)]
    (folder / "report.html").write_text(page.page(title, *parts), encoding="utf-8")
    return text


def main(argv) -> bool:
    args = parse_args(Args, argv)
    args.check()
    torch.set_num_threads(1)
    names = names_of(args.entrants)
    runs = [entrant for entrant in args.entrants if Path(entrant).suffix != ".py"]
    checkpoints = {source: load_checkpoint(source, list(PHASES), ["args", "agent"]) for source in runs}
    of_market = market_args(checkpoints, args.flags)
    model = make_model(of_market, dt=0.5 / TRADING_DAYS)
    market = phase4.make_market(of_market, model, of_market.tuning_episodes, DEVICE)
    policies = {}
    for name, entrant in zip(names, args.entrants, strict=True):
        small = market.like(4)  # whatever a file does to it
        known = checkpoints.get(entrant)
        policies[name] = load_maker(entrant, small) if known is None else load_agent(entrant, known, market)
    print("the classical makers, recorded or tuned now, play too …", flush=True)
    classics = classical_makers(market)
    policies |= {name: classics.policies[name] for name in LEAGUE if name in classics.policies}
    league = cross_play(market, policies, args.episodes)
    folder = new_folder(Path("runs/arena"))
    title = f"Arena ({of_market.dynamics}, {of_market.num_makers} makers, {args.episodes:,} episodes of each match)"
    print(f"\n{write(folder, league, title)}\nreport and figure: {folder}")
    return True


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
