"""What a GPU would refuse, found without one.

Two stand-ins. The meta device: tensors without data, so an iteration that reads one on the host, mixes devices or
copies from the host fails. And CUDA graphs on the CPU: a tape of the operators with their very tensors, which is played
again, so memory that was replaced since, what Python alone remembers and generators that were not registered show up as
other numbers.
"""

import contextlib
import copy

import pytest
import torch
import torch.nn as nn
from common import CPU, PHASES, invented, quoted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import phase0_marlvol_calibration as phase0
import phase1_delta_hedge_ppo as phase1
import phase2_multi_order_sac as phase2
import phase3_spread_vs_bs as phase3
import phase4_selfplay as phase4
from envs import QuotingEnv
from envs.baselines import makers as formulas
from envs.benchmark import makers
from envs.calibration import marlvol
from envs.calibration.game import CalibrationGame
from envs.market import dynamics, smiles
from envs.market.moves import StepMoves
from envs.market.quoting import BadQuote
from envs.market.units import TRADING_DAYS
from envs.models import make_model
from envs.optimum.makers import BestResponse, MultiAsset, VegaProgramming
from envs.run.errors import DivergenceError
from envs.run.run import Run

META = torch.device("meta")
CLASSICS = (makers.AVELLANEDA_STOIKOV, makers.BELIEVER_BAND)  # who know no moves of options


def calibrated(dt: float) -> marlvol.Marlvol:
    """A market of phase 0 whose policy nobody has trained."""
    game = CalibrationGame(smiles.SURFACES["sp500-2018"], 100)
    policy = nn.Sequential(nn.Linear(game.observation_size, 4), nn.Tanh(), nn.Linear(4, game.action_size))
    nn.init.zeros_(policy[-1].weight)
    nn.init.zeros_(policy[-1].bias)
    return marlvol.Marlvol(marlvol.export_market(game, policy), dt)


# THE META DEVICE


class MetaGenerator(torch.Generator):
    device = property(lambda self: META)


class NoHost(TorchDispatchMode):
    """Inside, nothing may go from the host to the device (what goes the other way has no data and fails by itself)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        to = kwargs.get("device")
        on_device = any(x.is_meta for x in tensors) or (to is not None and torch.device(to).type == "meta")
        hosts = [x for x in tensors if not x.is_meta]
        if on_device and hosts and (any(x.dim() for x in hosts) or torch.Tag.pointwise not in func.tags):
            raise RuntimeError(f"{func} takes {[tuple(x.shape) for x in hosts]} from the host")
        return func(*args, **kwargs)


def on_meta(thing, seen=None):
    """A copy of an environment, a policy's tables … with all tensors on the meta device."""
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return seen[id(thing)]
    if isinstance(thing, nn.Module):
        return copy.deepcopy(thing).to(META)
    if isinstance(thing, torch.Tensor):
        return thing.to(META)
    if isinstance(thing, torch.Generator):
        return MetaGenerator()
    if isinstance(thing, torch.device):
        return META
    if type(thing) in (list, tuple):
        return type(thing)(on_meta(x, seen) for x in thing)
    ours = type(thing).__module__.startswith("envs.") and hasattr(thing, "__dict__")
    if ours and not isinstance(thing, dynamics.Dynamics | type):
        new = seen[id(thing)] = copy.copy(thing)
        for name, value in vars(thing).items():
            new.__dict__[name] = on_meta(value, seen)
        return new
    return thing


def sgd(agent):
    return torch.optim.SGD([p for p in agent.parameters() if p.requires_grad], lr=1e-3)  # fused Adam has no meta


def classics_of(market: QuotingEnv) -> makers.Makers:
    """The makers that take turns as opponents; they know no moves, which are measured before training."""
    parameters = invented(*CLASSICS)
    env = makers.against_rival(market, parameters[makers.RIVAL])
    policies = {name: makers.classical_maker(name, env, parameters[name], None) for name in CLASSICS}
    return makers.Makers(env, policies, parameters, "invented")


def calibration_iteration(model):
    """Phase 0: a rollout with its rewards, and an update."""
    args = PHASES["phase0"].args(hidden_size=8, num_minibatches=1, reference="local-vol")
    game = phase0.make_game(args, smiles.SURFACES["sp500-2018"], CPU)
    game.reference_errors = torch.zeros_like(game.market_volatility)  # found once, before training
    game, agent, generator = on_meta(game), phase0.Agent(game, args).to(META), MetaGenerator()

    def iterate():
        batch = phase0.rollout(game, agent, args, generator)
        phase0.update(agent, sgd(agent), batch, args, generator)

    return iterate


def hedging_iteration(model):
    """Phase 1."""
    args = phase1.Args(num_envs=8, num_minibatches=1)
    env = phase1.make_env(args, model, 8, CPU)
    agent, env, generator = phase1.Agent(env).to(META), on_meta(env), MetaGenerator()

    def iterate():
        batch = phase1.rollout(env, agent, args, generator)
        phase1.update(agent, sgd(agent), batch, phase1.ppo_loss, args, generator)

    return iterate


def book_iteration(model):
    """Phase 2."""
    args = phase2.Args(num_envs=8, batch_size=16, num_strikes=2)
    env = phase2.make_env(args, model, 8, CPU)
    agent = phase2.Agent(env, 16).to(META)
    env, generator = on_meta(env), MetaGenerator()
    buffer = phase2.ReplayBuffer(500, env.single_observation_space.shape[0]).to(META)

    def iterate():
        phase2.rollout(env, agent, buffer, args, generator, explore=False)
        phase2.update(agent, env, sgd(agent), buffer, phase2.sac_loss, args, generator, 1)

    return iterate


def quoting_iteration(model):
    """Phase 3."""
    args = phase3.Args(num_envs=8, num_steps=2, num_minibatches=1)
    market = on_meta(phase3.make_market(args, model, 8, CPU))
    agent, generator, env = phase3.Agent(market).to(META), MetaGenerator(), classics_of(market).env

    def iterate():
        batch = phase3.rollout(env, agent, args, generator)
        phase3.update(agent, sgd(agent), batch, phase3.ppo_loss, args, generator)

    return iterate


def selfplay_iteration(model):
    """Phase 4, against its past self and every classical maker."""
    args = phase4.Args(num_envs=8, num_steps=2, num_minibatches=1, episodes=1, copies=1, classical_share=0.5)
    market = on_meta(phase4.make_market(args, model, 8, CPU))
    agent, generator, classics = phase4.Agent(market).to(META), MetaGenerator(), classics_of(market)
    opponents = phase4.Opponents(args, agent, [], [classics.policies[name] for name in CLASSICS], market).to(META)

    def iterate():
        batch, lead = phase4.rollout(market, agent, opponents.policy, args, generator)
        opponents.score(lead)
        phase4.update(agent, sgd(agent), batch, phase4.ppo_loss, args, generator)

    return iterate


ITERATIONS = {
    "phase0": (calibration_iteration, None),
    "phase1": (hedging_iteration, dynamics.GBM),
    "phase2": (book_iteration, dynamics.GBM),
    "phase3": (quoting_iteration, lambda: dynamics.Heston(dt=0.5 / TRADING_DAYS)),
    "phase4": (selfplay_iteration, lambda: dynamics.Heston(dt=0.5 / TRADING_DAYS)),
}


@pytest.mark.parametrize("name", ITERATIONS)
def test_an_iteration_neither_reads_the_device_nor_copies_to_it(name):
    make, model = ITERATIONS[name]
    iterate = make(model() if model else None)
    with NoHost():
        iterate()


@pytest.mark.parametrize("name", [name for name in ITERATIONS if name != "phase0"])
def test_nor_does_it_in_a_calibrated_market(name):
    make, _ = ITERATIONS[name]
    iterate = make(calibrated(1 / TRADING_DAYS if name in ("phase1", "phase2") else 0.5 / TRADING_DAYS))
    iterate()  # the first one moves its tables to the device
    with NoHost():
        iterate()


@pytest.mark.parametrize("expiries", [(8,), (8, 12)])
def test_nor_do_makers_who_know_the_model(expiries):
    """What they know is measured once, on the host; after that they play without it."""
    market = QuotingEnv(8, options=quoted(*expiries, dt=0.5 / TRADING_DAYS), num_steps=2)
    parameters = invented(*makers.KNOWING)
    env = makers.against_rival(market, parameters[makers.RIVAL])
    known = StepMoves(market)
    policies = [BestResponse(env, known), MultiAsset(env, known, 3.0, 1.1, 0.8, 0.1)]
    policies.append(VegaProgramming(env, known, 3.0, 1.1, 0.8, 0.1))
    seen = {}
    policies = [on_meta(policy, seen) for policy in policies]
    market, known = on_meta(market, seen), on_meta(known, seen)
    policies.append(formulas.with_the_smile(market, formulas.glft(market, 1.2, 0.8), known, 0.5, 0.1))
    observation, _ = market.reset()
    with NoHost():
        for policy in policies:
            action = policy(observation[:, 0])
            assert action.shape == (8, market.action_size)
            observation, *_ = market.step(action[:, None].expand(-1, 2, -1))
            market.t = 0


def test_the_stand_in_notices_copies_and_reads():
    with NoHost(), pytest.raises(RuntimeError, match="from the host"):
        torch.zeros(3).to(META)
    with pytest.raises(RuntimeError):
        float(torch.zeros((), device=META))


# CUDA GRAPHS ON THE CPU


class Tape(TorchDispatchMode):
    """`torch.cuda.CUDAGraph` and `torch.cuda.graph` in one."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.generators = []

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero"), f"{name} waits for the device"
        if name in ("aten::index.Tensor", "aten::index_put_"):
            masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
            assert not masks, "a mask waits for the device"
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator = kwargs.get("generator")
            assert generator is not None, f"{name} draws from the default generator"
            known = {x.initial_seed() for x in self.generators}
            assert generator.initial_seed() in known, f"{name} draws from a generator that the graph does not know"
        out = func(*args, **kwargs)
        if not func.is_view:
            self.calls.append((func, args, kwargs, out))
        return out

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # kernels alone: autograd was there when they were recorded
            for func, args, kwargs, out in self.calls:
                new = func(*args, **kwargs)
                if not func._schema.is_mutable:
                    for old, fresh in zip(tree_leaves(out), tree_leaves(new), strict=True):
                        if isinstance(old, torch.Tensor):
                            old.copy_(fresh)


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def graphs(monkeypatch):
    """CUDA's graphs replaced by tapes, and what a GPU would not check left unchecked."""
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    monkeypatch.setattr(QuotingEnv, "_check", lambda self, *actions: None)
    monkeypatch.setattr("envs.market.env.ROWS_AHEAD", 0)  # only a CPU draws ahead
    monkeypatch.setattr(phase3, "EPISODES", 16)
    monkeypatch.setattr(phase4, "EPISODES", 16)
    torch.autograd.set_multithreading_enabled(False)  # modes are of a thread
    yield
    torch.autograd.set_multithreading_enabled(True)


CAPTURED = {
    "phase0": {"num_players": 200, "num_runs": 2, "num_basis": 10, "hidden_size": 8, "reference": "none"},
    "phase0, exotic": {"num_players": 200, "num_runs": 2, "hidden_size": 8, "reference": "none", "task": "exotic"},
    "phase1": {"num_steps": 30, "num_minibatches": 2},
    "phase2": {
        "num_steps": 30, "learning_starts": 240, "buffer_size": 500, "batch_size": 32, "hidden_size": 16, "utd": 0.01,
    },
    "phase3": {"num_steps": 4, "num_minibatches": 2},
    "phase4": {"num_steps": 4, "classical_share": 0.5, "anneal_share": 1.0},
    "phase4, pool": {"num_steps": 4, "opponent": "pool", "pool_size": 3, "pool_sampling": "prioritised"},
}  # fmt: skip


LONG = "phase0, exotic"


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case == LONG)) for case in CAPTURED])
def test_captured_iterations_give_the_same_numbers(case, tmp_path, graphs):
    """Nine iterations with an annealed rate, so that a rate that was replaced after the capture would be noticed."""
    module = PHASES[case.split(",")[0]].module
    weights = []
    for captured in (False, True):
        settings = {"num_evaluations": 1, "save_model": False, "cudagraphs": captured, **CAPTURED[case]}
        if module is phase0:
            args = module.Args(num_iterations=9, **settings)
            args.fill()
        else:
            args = module.Args(num_envs=8, **settings)
            args.total_timesteps = 9 * args.steps_per_iteration
        market = (dynamics.GBM(),)
        if module is phase0:
            market = (phase0.make_game(args, smiles.SURFACES["sp500-2018"], CPU),)
        if module in (phase3, phase4):
            model = make_model(args, dt=0.5 / TRADING_DAYS)
            market = (classics_of(module.make_market(args, model, 8, CPU)), *([{}] if module is phase4 else []))
        agent = module.train(Run(args, module.PHASE, CPU, folder=tmp_path), *market)
        agent = agent[0] if module is phase4 else agent
        weights.append(torch.cat([p.detach().flatten() for p in agent.parameters()]))
    assert torch.equal(*weights)


class Broken(Tape):
    """CUDA graphs that cannot be: capture fails, or a later PyTorch no longer registers generators."""

    fails = ""

    def __enter__(self):
        if self.fails == "capture":
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")
        return super().__enter__()

    def replay(self):
        states = [generator.get_state() for generator in self.generators]
        super().replay()
        for generator, state in zip(self.generators, states, strict=True):
            if self.fails == "generators":  # it draws what the capture has drawn, again and again
                generator.set_state(state)


@pytest.mark.parametrize("fails", ["capture", "generators"])
def test_a_run_that_cannot_be_captured_has_the_numbers_of_an_eager_one(fails, tmp_path, graphs, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Broken)
    monkeypatch.setattr(Broken, "fails", fails)
    weights = []
    for captured in (False, True):
        args = phase1.Args(num_envs=8, num_evaluations=1, save_model=False, cudagraphs=captured, **CAPTURED["phase1"])
        args.total_timesteps = 3 * args.steps_per_iteration
        agent = phase1.train(Run(args, "phase1", CPU, folder=tmp_path), dynamics.GBM())
        weights.append(torch.cat([p.detach().flatten() for p in agent.parameters()]))
    assert torch.equal(*weights)
    reason = {
        "capture": "CUDA error: operation not permitted when stream is capturing",
        "generators": "its random numbers would be the same in every iteration",
    }[fails]
    assert capsys.readouterr().out == f"no CUDA graph, so the run goes on without: {reason}\n"


def test_the_shape_of_quotes_is_checked_without_reading_them():
    market = on_meta(QuotingEnv(4, num_steps=2))
    market.reset()
    right = torch.zeros(4, 2, market.action_size, device=META)
    for wrong in (right[:3], right[:, :1], right[..., :-1]):
        with NoHost(), pytest.raises(BadQuote, match="actions have the shape"):
            market.step(wrong)
    with NoHost():
        market.step(right)


def test_a_best_response_that_is_nan_is_noticed(tmp_path, monkeypatch):
    """On a GPU no quote is checked, so NaN would be one more gain that is not above the best."""
    monkeypatch.setattr(QuotingEnv, "_check", lambda self, *actions: None)
    monkeypatch.setattr(phase4, "EPISODES", 16)
    args = phase4.Args(num_envs=8, num_steps=2, num_minibatches=2, episodes=1, learning_rate=1e30, anneal_share=1.0)
    args.total_timesteps = 4 * args.steps_per_iteration
    market = phase4.make_market(args, dynamics.Heston(dt=0.5 / TRADING_DAYS), 8, CPU)
    agent = phase4.Agent(market)
    run = Run(args, "phase4", CPU, folder=tmp_path)
    with pytest.raises(DivergenceError, match=r"best response|parameter"):
        phase4.best_response(run, market, agent)
