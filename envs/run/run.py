"""`Run`: folder, resume, metrics, checkpoint, progress bar, Weights & Biases and exit code of a phase's command.

A phase script opens a run, says what to keep in its checkpoint, and goes through the iterations itself:

    run = Run.open(Args, argv, PHASE, QUICK)
    run.begin("heston", "a line that says what is about to happen")
    run.keep(agent=agent, optimizer=optimizer, generator=generator)       # and restores them with --resume
    iterate = run.captured(iterate)                                       # a CUDA graph with --cudagraphs
    for iteration in run.iterations(args.num_iterations, args.steps_per_iteration):
        losses = iterate()
        if run.due(iteration):
            run.log({...})                                                # metrics.csv, W&B, checkpoint, bar
    return run.finish(result, figures)

Exit codes: 0 benchmark passed, 1 benchmark failed, 2 bad input, 3 an error or a run that diverged, 130 Ctrl-C or
SIGTERM, 141 nobody reads the output (`| head`).
"""

import contextlib
import inspect
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

from envs.run import page
from envs.run.args import parse_args, parse_command
from envs.run.errors import DivergenceError, RankLost, UsageError, check, one_line
from envs.run.files import (
    MetricsFile,
    clear,
    hold,
    let_go,
    load_checkpoint,
    load_weights,
    new_folder,
    replacing_files,
    save_checkpoint,
    write_json,
)
from envs.run.forms import fits, same_form, tensors_in
from envs.run.graph import CaptureError, cuda_graph
from envs.run.provenance import ROOT, provenance, read_origin
from envs.run.ranks import gather, join_ranks, leave_ranks, rank, rank_seed, world_size

WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")


class Run:
    """One command of a phase.

    Args:
        args: the script's `RunArgs`.
        phase: a checkpoint is only loaded into the phase that wrote it.
        device: where everything lives.
        folder: of the run; `begin` makes one if it is not given.
        checkpoint: what --resume or --evaluate has read, or None.
        trained: the arguments of the run that it is from.

    Attributes:
        iteration: iterations done so far.
        steps: environment steps done so far, over all processes.
        tracker: the W&B run, or None.
    """

    def __init__(self, args, phase: str, device, folder: Path | None = None, checkpoint=None, trained=None):
        self.args = args
        self.phase = phase
        self.device = torch.device(device)
        self.folder = folder
        self.checkpoint = checkpoint
        self.trained = trained
        self.tracker = None
        self.kept = {}
        self.origin = []  # of the run's numbers, see `envs.run.provenance`
        self.metrics = None
        self.bar = None
        self.iteration = 0
        self.steps = 0
        self._restart_clock()
        if checkpoint is not None:
            self.iteration = checkpoint["iteration"]
            self.steps = checkpoint.get("steps")
            if self.steps is None and hasattr(trained, "num_envs"):  # a checkpoint from before it said so
                self.steps = self.iteration * trained.num_envs * trained.num_steps * checkpoint.get("world_size", 1)

    @classmethod
    def open(cls, args_class: type, argv: Sequence[str], phase: str, presets: Callable | dict) -> "Run":
        """Parses and checks the command line, reads the checkpoint that it names, and joins the processes of torchrun.

        Args:
            presets: values of --quick, by field; or a function of the args that returns the values that take the place
                of the defaults. Other flags still change them.

        Raises:
            UsageError: the first argument that cannot work. Nothing has been written then.
        """
        args, checkpoint, trained = parse_command(args_class, argv, phase)
        if args.evaluate is None and args.resume is None:
            changes = presets(args) if callable(presets) else presets if args.quick else {}
            if changes:
                args = parse_args(args_class, argv, default=args_class(**changes))
        args.fill()
        args.check()
        torch.set_num_threads(args.torch_threads)
        return cls(args, phase, join_ranks(args.cuda), checkpoint=checkpoint, trained=trained)

    def begin(self, kind: str, message: str) -> None:
        """Starts W&B, makes the run folder (or takes that of --resume) and says where everything will be.

        Args:
            kind: first part of the folder's name, such as the model of the underlying.
            message: printed after the folder's name.
        """
        args = self.args
        name = f"{kind}__{args.exp_name}__{'evaluate__' if args.evaluate else ''}{args.seed}"
        folder = Path(args.resume or f"runs/{name}__{time.strftime('%Y%m%d-%H%M%S')}")
        if args.track and rank() == 0:
            resumed = self.checkpoint["tracker"] if args.resume and self.checkpoint else None
            self.tracker = start_tracker(args, folder.name, resumed)
        self.folder = folder
        if args.resume is None:
            self.folder = new_folder(folder)
            hold(self.folder)
            write_json(self.folder / "args.json", asdict(args))
            self._record_origin()
        elif rank() == 0:
            clear(self.folder)
        print(f"{self.folder}: {message}", flush=True)

    def _record_origin(self) -> None:
        """Adds this command's commit, versions and machine to the run's origin.json."""
        self.origin = read_origin(self.folder)
        own = provenance("envs", "requirements.txt", inspect.getfile(type(self.args)))
        if own not in self.origin:
            self.origin.append(own)
            write_json(self.folder / "origin.json", self.origin)

    def saved(self, name: str):
        """An entry of the checkpoint that --resume continues, or None for a run from the start.

        Raises:
            UsageError: there is no such entry.
        """
        if not self.args.resume or self.checkpoint is None:
            return None
        check(name in self.checkpoint, f"{self.args.resume}: does not fit this script, it has no {name}")
        return self.checkpoint[name]

    def load(self, agent: torch.nn.Module) -> None:
        """Gives `agent` the weights of the checkpoint that --evaluate names."""
        load_weights(agent, self.checkpoint["agent"], self.args.evaluate)

    def load_vectors(self, name: str, length: int) -> dict[str, torch.Tensor]:
        """The vectors of `length` numbers, by name, in an entry of the checkpoint that --evaluate or --resume names."""
        source = self.args.evaluate or self.args.resume
        vectors = self.checkpoint.get(name)
        check(isinstance(vectors, dict), f"{source}: does not fit this script, it has no {name}")
        for key, vector in vectors.items():
            fits = isinstance(key, str) and same_form(vector, torch.empty(length))
            what = f"{source}: {name.removesuffix('s')} {key!r} does not fit this market"
            check(fits, f"{what}, it is not of {length} numbers")
        return {key: vector.to(self.device) for key, vector in vectors.items()}

    def settings(self) -> dict:
        """The run in the settings of the report."""
        return {"run seed": self.args.seed, "training steps": self.steps}

    def generator(self, seed: int) -> torch.Generator:
        """A stream of random numbers on the device; each process of torchrun has its own."""
        return torch.Generator(self.device).manual_seed(rank_seed(seed))

    # Training

    @contextlib.contextmanager
    def training(self, *diverged: type[Exception]):
        """Within it a lost process, or one of the errors that mean NaN, names the last good checkpoint.

        However it ends, the progress bar is closed, so that what is printed next has a line of its own.
        """
        try:
            yield
        except RankLost as error:
            raise DivergenceError(f"{error}; {self.last_good()}") from error
        except diverged as error:
            raise DivergenceError(f"{error}, by step {self.steps}; {self.last_good()}") from None
        finally:
            if self.bar is not None:
                self.bar.close()

    def keep(self, **things) -> None:
        """What a checkpoint holds beside the run's own state, by name; restored from it with --resume.

        Modules and optimizers are kept by their `state_dict`, generators by their state (one a process), dicts are
        filled again in place; anything else is saved as it is and not restored.
        """
        self.kept = things
        rows = None
        if self.args.resume and self.checkpoint is not None:
            rows = self.saved("rows")
            missing = [name for name in things if name not in self.checkpoint]
            check(not missing, f"{self.folder}: does not fit this script, it has no {', '.join(missing)}")
            for name, thing in things.items():
                unfit = f"{self.folder}: does not fit this script, its {name} has another form"
                check(fits(thing, self.checkpoint[name]), unfit)
            for name, thing in things.items():
                self._restore(name, thing, self.checkpoint[name])
        self.metrics = MetricsFile(self.folder / "metrics.csv", resume_from=rows)
        if self.args.resume:  # now that nothing is left to refuse
            self._record_origin()

    def _restore(self, name: str, thing, state) -> None:
        if isinstance(thing, torch.Generator):
            try:
                thing.set_state(state[rank()])
            except RuntimeError:
                raise UsageError(f"{self.folder}: its {name} is damaged, or was made on another device") from None
        elif hasattr(thing, "load_state_dict"):
            thing.load_state_dict(state)
            for group in getattr(thing, "param_groups", ()):  # read onto the CPU, where a captured update would not
                if isinstance(group["lr"], torch.Tensor):  # see it change
                    group["lr"] = group["lr"].to(self.device)
        elif isinstance(thing, dict):
            thing.clear()
            thing.update({k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in state.items()})

    def captured(self, function: Callable, *things) -> Callable:
        """With --cudagraphs `function` as a CUDA graph, one for each of its arguments; else `function` itself.

        If it cannot be captured, a line says so and it is called as it is. The speed that is logged does not count the
        time of warming up and capturing.

        Args:
            things: the modules, optimizers and generators that it changes; by default all that are kept.
        """
        if not getattr(self.args, "cudagraphs", False):
            return function
        things = things or tuple(self.kept.values())
        modules = [thing for thing in things if isinstance(thing, torch.nn.Module)]
        (optimizer,) = (thing for thing in things if isinstance(thing, torch.optim.Optimizer))
        generators = [thing for thing in things if isinstance(thing, torch.Generator)]

        @cache
        def graph(*arguments) -> Callable:
            eager = partial(function, *arguments)
            if not self.args.cudagraphs:  # another one could not be captured
                return eager
            start = time.perf_counter()
            try:
                return cuda_graph(eager, torch.nn.ModuleList(modules), optimizer, generators)
            except CaptureError as error:
                self.args.cudagraphs = False
                tqdm.write(one_line(f"no CUDA graph, so the run goes on without: {error}"))
                return eager
            finally:
                self.clock += time.perf_counter() - start

        return lambda *arguments: graph(*arguments)()

    def iterations(self, num_iterations: int, steps: int) -> Iterator[int]:
        """The numbers of the iterations that are left, up to `num_iterations`, of `steps` environment steps each.

        Moves the progress bar.
        """
        times = self.args.num_evaluations
        self.evaluations = {math.ceil(num_iterations * (i + 1) / times) for i in range(times)}
        first = self.iteration + 1
        self.bar = progress_bar(num_iterations * steps, self.iteration * steps)
        self._restart_clock()
        for iteration in range(first, num_iterations + 1):
            self.iteration = iteration
            self.steps = iteration * steps
            yield iteration
            self.bar.update(steps)
        self.bar.close()

    def due(self, iteration: int) -> bool:
        """Whether the policy is to be evaluated, logged and saved after this iteration."""
        if iteration not in self.evaluations:
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # so that the speed is honest
        self.speed = (self.steps - self.clock_steps) / (time.perf_counter() - self.clock)
        return True

    def _restart_clock(self) -> None:
        self.clock = time.perf_counter()
        self.clock_steps = self.steps

    def check_finite(self, values: dict[str, float], *modules: torch.nn.Module) -> None:
        """Raises `DivergenceError`, naming quantity, step and last good checkpoint, where a value or a parameter is NaN
        or infinite."""
        sums = {f"parameter {name}": p.sum().item() for module in modules for name, p in module.named_parameters()}
        for name, value in {**values, **sums}.items():
            if not math.isfinite(value):
                raise DivergenceError(f"{name} is {value} by step {self.steps}; {self.last_good()}")

    def check_at_most(self, most: float, values: dict[str, float]) -> None:
        """Raises `DivergenceError` likewise where a value that should stay small is above `most`."""
        for name, value in values.items():
            if not value <= most:
                raise DivergenceError(
                    f"{name} was {value:.3g} (at most {most:g}) by step {self.steps}; {self.last_good()}"
                )

    def last_good(self) -> str:
        """The last good checkpoint of a run that has diverged, for its message."""
        checkpoint = self.folder / "checkpoint.pt"
        if checkpoint.exists():
            return f"last good: {checkpoint}"
        return "there is no checkpoint yet" if self.args.save_model else "no checkpoint was kept (--no-save-model)"

    def log(self, row: dict[str, float], shown: str = "", **also) -> None:
        """Writes a row of metrics, to W&B too, shows the figure that matters on the bar and saves a checkpoint.

        Args:
            also: further entries of this checkpoint.
        """
        row = {"global_step": self.steps, **row}
        if self.bar is not None:
            row["charts/SPS"] = int(self.speed)
            self.bar.set_description(shown)
        self.metrics.write(row)
        if self.tracker:
            self.tracker.log(row, step=self.steps)
        if self.args.save_model:
            self._save(also)
        self._restart_clock()

    def _save(self, also: dict) -> None:
        content = {"phase": self.phase, "args": asdict(self.args), "iteration": self.iteration, "steps": self.steps}
        content |= {"rows": self.metrics.rows, "world_size": world_size()}
        content |= {"tracker": self.tracker.id if self.tracker else None}
        for name, thing in self.kept.items():
            if isinstance(thing, torch.Generator):
                thing = gather(thing.get_state())
            elif hasattr(thing, "state_dict"):
                thing = thing.state_dict()
            content[name] = thing
        content |= also
        for name, value in content.items():  # or a checkpoint with NaN in it would be the last good one
            if not all(tensor.isfinite().all() for tensor in tensors_in(value)):
                raise DivergenceError(f"{name} is NaN or infinite by step {self.steps}; {self.last_good()}")
        save_checkpoint(self.folder / "checkpoint.pt", content)

    # The end

    def finish(self, result, draw: Callable[[Path], None]) -> bool:
        """Writes the report, draws the figures, prints the verdict and sends everything to W&B.

        Args:
            result: `envs.benchmark.report.Benchmark`.
            draw: draws the figures into the folder that it is given.

        Returns:
            Whether the benchmark has been passed; True for a quick run.
        """
        if self.args.quick:
            result.withdraw("QUICK RUN: too short for a verdict; the same command without --quick gives one")
        with replacing_files(self.folder) as folder:
            result.write(folder)
            draw(folder)
            parts = [result.html(), *page.run_parts(folder, asdict(self.args), self.origin)]
            (folder / "report.html").write_text(page.page(self.folder.name, *parts), encoding="utf-8")
        let_go(self.folder)
        try:
            if self.tracker:
                script = Path(inspect.getfile(type(self.args)))
                finish_tracker(self.tracker, result, self.folder, self.phase, script)
        finally:  # the verdict comes last, and always
            print(f"\n{result.text()}\nreport and figures: {self.folder}")
        return result.passed


def progress_bar(total: int, initial: int = 0) -> tqdm:
    """A bar over environment steps, on rank 0."""
    return tqdm(total=total, initial=initial, unit="step", unit_scale=True, disable=rank() > 0)


# Weights & Biases


def start_tracker(args, name: str, run_id: str | None):
    """A W&B run, online or offline as WANDB_MODE says; `run_id` is that of the run to continue.

    Raises:
        UsageError: W&B refuses.
    """
    import wandb  # only here: a run without --track needs no account and no import

    mode = os.environ.get("WANDB_MODE") or "online"
    check(mode in WANDB_MODES, f"--track: WANDB_MODE is {mode!r} (one of {', '.join(WANDB_MODES)})")
    try:
        return wandb.init(
            project=args.wandb_project_name, entity=args.wandb_entity, config=asdict(args), name=name,
            id=run_id, resume="allow", save_code=True,
        )  # fmt: skip
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--track: {reason} (WANDB_MODE=offline works without an account)") from None


def finish_tracker(tracker, result, folder: Path, phase: str, script: Path) -> None:
    """Benchmark tables, figures, checkpoint and code to W&B."""
    import wandb

    columns = ["contestant", *next(iter(result.rows.values()))]
    rows = [[name, *row.values()] for name, row in result.rows.items()]
    tracker.log({"benchmark/table": wandb.Table(columns=columns, data=rows)})
    for name, table in result.tables.items():
        tracker.log({f"benchmark/{name}": wandb.Table(columns=table.header, data=table.body)})
    tracker.log({f"benchmark/{path.stem}": wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))})
    tracker.summary["benchmark/passed"] = result.passed
    for name, value in result.rows["agent"].items():
        tracker.summary[f"benchmark/{name}"] = value
    for name, share in result.shares.items():
        tracker.summary[f"benchmark/{name}"] = share.mean
    for name, advantage in result.advantages.items():
        tracker.summary[f"benchmark/advantage over {name}"] = advantage.mean
    if (folder / "checkpoint.pt").is_file():
        artifact = wandb.Artifact(f"{phase}-{tracker.id}", type="model")
        with artifact.new_file("checkpoint.pt", mode="wb") as file:  # what --evaluate needs: without a replay buffer
            torch.save({**load_checkpoint(folder, phase), "buffer": None}, file)
        tracker.log_artifact(artifact)
    code = {script.resolve(), *(ROOT / "envs").rglob("*.py"), *(ROOT / "envs").rglob("*.json")}
    tracker.log_code(str(ROOT), name=f"{phase}-code", include_fn=lambda path: Path(path).resolve() in code)
    tracker.finish()


# The command


def run_main(main: Callable[[Sequence[str]], bool], argv: Sequence[str]) -> None:
    """Calls `main(argv)` and exits: 0 if it returns True (benchmark passed), 1 if False, else as the module says."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a redirect that is not UTF-8 must not lose the verdict
            stream.reconfigure(errors="replace")
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = _exit_code(main, argv)
    finally:
        signal.signal(signal.SIGTERM, before)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if world_size() > 1 and code not in (0, 1):
        os._exit(code)  # not to wait for ranks that wait for this one
    leave_ranks()
    sys.exit(code)


def _interrupt(signum, frame) -> None:
    raise KeyboardInterrupt


def _exit_code(main: Callable[[Sequence[str]], bool], argv: Sequence[str]) -> int:
    """Calls `main(argv)` and says on stderr, in a line, what went wrong."""
    try:
        try:
            code = 0 if main(argv) else 1
        except SystemExit as exit_:  # --help
            code = exit_.code or 0
        sys.stdout.flush()
        return code
    except UsageError as error:
        if rank() == 0:  # all of them say the same
            _complain(f"error: {error}")
        return 2
    except (DivergenceError, RankLost) as error:
        which = f"rank {rank()}: " if world_size() > 1 else ""
        _complain(f"error: {which}{error}")
        return 3
    except KeyboardInterrupt:
        if rank() == 0:
            _complain("interrupted; continue with --resume and the run folder")
        return 130
    except BrokenPipeError:
        _complain("stopped, because nobody reads the output; continue with --resume and the run folder")
        return 141
    except OSError as error:  # a full disk, a folder that cannot be written to
        where = f": {error.filename}" if error.filename else ""
        _complain(f"error: {error.strerror or error}{where}; continue with --resume and the run folder")
        return 3
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            _complain(f"error: out of memory, {error}")
        else:
            traceback.print_exc()
        return 3


def _complain(text: str) -> None:
    """Prints a line on stderr, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(one_line(text), file=sys.stderr, flush=True)
