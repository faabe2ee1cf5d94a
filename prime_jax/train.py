"""One run from config to result.json: data -> step -> checkpoints -> evaluation -> record.

A run can be stopped at any moment and continued: the state comes from the newest undamaged
checkpoint, the data order and all random numbers from (seed, step).
"""

import contextlib
import dataclasses
import io
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax
import jax
import numpy as np

from prime_jax import __version__, flops, optim, schedule, tuned
from prime_jax.config import (
    KernelConfig,
    RunConfig,
    constant_steps,
    differences,
    remark,
    run_id,
    trajectory_id,
    validate,
)
from prime_jax.data import codes, loader, manifest, tokenizers
from prime_jax.errors import UserError
from prime_jax.evaluate import draws, likelihood
from prime_jax.evaluate.partial import Partial
from prime_jax.evaluate.trained import codebook_of
from prime_jax.hardware import chips, roofline
from prime_jax.interchange import folder, layouts
from prime_jax.kernels import selection
from prime_jax.kernels.selection import Choices
from prime_jax.runtime import checkpoint, distributed, meshes, sharding, storage, watchdog
from prime_jax.runtime.lineage import Lineage, made_on
from prime_jax.runtime.metrics import (
    Clock,
    MetricsLog,
    NoLog,
    Pace,
    Profile,
    evaluated,
    memory_high_water,
    rows_through,
)
from prime_jax.runtime.records import SCHEMA, Loss, as_dict, read_json, write_json_atomic
from prime_jax.runtime.storage import Path
from prime_jax.settings import from_dict, to_dict
from prime_jax.step import Metrics, Program, State, program
from prime_jax.subtokens import Codebook

HEARTBEAT_SECONDS = 1.0
PHASES = ("train", "input", "compile", "eval", "checkpoint")
OnHeartbeat = Callable[[dict[str, Any]], bool]


class Interrupted(Exception):
    """The run stopped early after saving a checkpoint; a new start continues it.

    Attributes:
        seconds: spent until then, by phase.
    """

    seconds: Mapping[str, float] = MappingProxyType({})


class Preempted(Interrupted):
    """The process received SIGTERM or SIGINT."""


class Stopped(Interrupted):
    """`heartbeat` returned False: this process must stop the run."""


class Diverged(Exception):
    """A loss or gradient was not finite."""


def train(
    config: RunConfig,
    run_dir: Path,
    *,
    earlier: Sequence[Path] = (),
    donors: Sequence[Sequence[Path]] = (),
    pinned: int = 0,
    initial: folder.Weights | None = None,
    choices: Choices | None = None,
    heartbeat: OnHeartbeat = lambda _: True,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train to the end, evaluate, write result.json and return it.

    Args:
        earlier: directories of other attempts at this run; training continues from the newest step.
        donors: of each other run whose first steps may be those of this run, the directories of its
            attempts, oldest first; a checkpoint there is used if it is newer and `Lineage` allows.
        pinned: a step that is saved and kept, for others to continue from; 0 for none.
        initial: the weights that the run starts from, for a config of `starting_from`; a run that
            has begun needs them no more.
        choices: kernels measured on this kind of chip; by default those in this user's table. A run
            that has begun, here or in `earlier`, keeps the kernels that it recorded.
        heartbeat: called about once a second with step, steps, loss, tokens_per_second, mfu, phase
            and save_seconds; returns whether to continue.
        log: receives one line for each event: resumption, damaged checkpoints, evaluations.
    Returns:
        The record (records.py); status `diverged` after a non-finite loss.
    Raises:
        NoData: the data of the run is not on this machine.
        UserError: bad config, checkpoint or disk, or another process uses the run directory.
        Preempted, Stopped: interrupted after saving.
    """
    with watchdog.explaining():
        run = Run(
            config=config,
            run_dir=run_dir,
            earlier=earlier,
            donors=donors,
            pinned=pinned,
            heartbeat=heartbeat,
            log=log,
            choices=choices,
            initial=initial,
        )
        with storage.locked(run.run_dir) if distributed.is_writer() else contextlib.nullcontext():
            return run.complete()


def check_data(config: RunConfig) -> None:
    """Raises: NoData: the data of a run, or the file of its codes, is not on this machine."""
    codes.of_run(config, manifest.of_run(config))


def prepare_directory(config: RunConfig, run_dir: Path) -> None:
    """Create or check a run directory.

    Raises:
        UserError: it cannot be created, or holds another run.
    """
    storage.make_folder(run_dir)
    existing = run_dir / "config.json"
    if storage.exists(existing):
        other = from_dict(RunConfig, read_json(existing), str(existing))
        if run_id(other) != run_id(config):
            raise UserError(
                f"{run_dir} holds run {run_id(other)}, not {run_id(config)}: "
                f"{'; '.join(differences(other, config))}; use another directory, and --init-from "
                f"{run_dir} to start from the weights there"
            )
    write_json_atomic(existing, to_dict(config))


def fill_fingerprint(config: RunConfig, data: manifest.Manifest) -> RunConfig:
    """`config` with the fingerprint of its dataset, and the hash of its codes if they are a file.

    Raises:
        NoData: the file of codes is missing, of no use or another than before.
    """
    known = dataclasses.replace(config.data, fingerprint=data.fingerprint)
    return codes.filled(dataclasses.replace(config, data=known), data)


def starting_from(config: RunConfig, weights: folder.Weights) -> RunConfig:
    """`config` for a run that starts from `weights`: another run than from a seed.

    Raises:
        UserError: weights of another shape, or of other codes.
    """
    given, s = weights.config.subtokens.codes, config.subtokens
    if given and not s.codes_file:  # of imported weights: nothing else makes them
        config = dataclasses.replace(config, subtokens=dataclasses.replace(s, codes=given))
    elif s.length > 1:
        own = s.codes or Codebook.create(config.model.vocab_size, s).hash
        if own != weights.codebook.hash:
            raise UserError(
                f"--init-from: has other codes ({weights.codebook.hash}) than this run ({own}); "
                "subtokens and model.vocab_size must be equal"
            )
    found = {f"{name}.weight": x for name, x in weights.tensors.items()}
    found[folder.CODES] = weights.codebook.codes
    layouts.check("--init-from", found, folder.shapes(config))
    return dataclasses.replace(config, initial_weights=weights.hash)


class Run:
    """The state of one execution of a run; `complete` is its only public method."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        earlier: Sequence[Path],
        donors: Sequence[Sequence[Path]],
        pinned: int,
        heartbeat: OnHeartbeat,
        log: Callable[[str], None],
        choices: Choices | None = None,
        initial: folder.Weights | None = None,
    ):
        self.clock = Clock()
        validate(config)
        schedule.check(config.objective)
        self.data = manifest.of_run(config)
        manifest.check(self.data, config)
        self.config = fill_fingerprint(config, self.data)
        self.run_dir, self.earlier, self.initial = storage.path(run_dir), earlier, initial
        self.donors, self.pinned = donors, pinned
        self.heartbeat, self.log = heartbeat, log
        if said := remark(config):
            log(said)
        self.id = run_id(self.config)
        self.kernels_written = False
        self.shared_rows: list[dict[str, Any]] = []  # of the run that this one branches off from
        known = initial.codebook if initial and config.subtokens.codes else None
        known = known or codes.of_run(self.config, self.data)
        book = known or codebook_of(config, (self.run_dir, *earlier))
        self.program: Program = program(self._with_kernels(choices), self.data.eos_id, book)
        # Validates the names before training.
        likelihood.estimators_of(self.config)
        origin = {"config": to_dict(self.config), "tokenizer": self.data.tokenizer_hash}
        self.checkpoints = checkpoint.Writer(
            directory=self.run_dir / "checkpoints",
            about=self._about(),
            config=config.checkpoint,
            log=log,
            origin=origin,
            pinned=pinned,
        )
        self.blocks = loader.eval_blocks(self.data, "valid", config.eval.examples)
        self.pending: tuple[int, Metrics] | None = None  # the step whose metrics are not read yet
        self.last_heartbeat = time.monotonic()
        self.speed = 0.0
        self.first_seconds: float | None = None  # from the start to the metrics of the first step
        tokens = config.batch_size * config.data.seq_len
        by_convention = {n: flops.flops_per_token(config, n) for n in flops.CONVENTIONS}
        self.pace = Pace(self.clock, tokens, by_convention, self._peak())
        self.loss = float("nan")
        self._count_clipped(0, step=0)

    def _with_kernels(self, choices: Choices | None) -> RunConfig:
        """The config with every kernel named: as the run began, else as is measured or usual."""
        kind = jax.devices()[0].device_kind
        begun = None
        if distributed.is_writer():
            begun = tuned.begun((self.run_dir, *self.earlier))
        config = self.config
        if begun := distributed.broadcast(begun):
            kept = selection.recorded(config, begun, kind)
            if kept is None:
                self.log(f"kernels chosen anew: the run began on {begun.get('device_kind')}")
            config = kept or config
        named = None
        if distributed.is_writer():  # whose tables count for all processes
            choices = tuned.load(kind) if choices is None else choices
            named = to_dict(selection.resolved(config, kind, choices))
        kernels = from_dict(KernelConfig, distributed.broadcast(named))
        return dataclasses.replace(config, kernels=kernels)

    def _write_kernels(self) -> None:
        """Once a step is made, by these: whoever continues the run rounds as it does."""
        self.kernels_written = True
        if distributed.is_writer():
            path = self.run_dir / selection.FILE
            storage.retry(lambda: write_json_atomic(path, self._kernels()), self.log)
        made = self._made()  # a kernel that does not compile has been replaced by now
        same = not self.first_step or made == self.lineage.made
        self._descend(dataclasses.replace(self.lineage, made=made if same else None))

    def _kernels(self) -> dict[str, Any]:
        return selection.record(self.program.train.kernels, jax.devices()[0].device_kind)

    def _made(self) -> dict[str, Any]:
        m, (*sizes, _) = self.config.mesh, self.program.mesh_choice
        settings = {"accumulate": m.accumulate, "remat": m.remat}
        return made_on(sizes, self._kernels(), {"prime_jax": __version__}, **settings)

    def _descend(self, lineage: Lineage) -> None:
        """What the next seals say of the steps before them."""
        self.lineage, self.checkpoints.lineage = lineage, lineage.as_dict()

    def complete(self) -> dict[str, Any]:
        with distributed.PreemptionGuard() as self.guard:
            self.guard.at_once = True  # while programs are traced and the state is restored
            try:
                return self._complete()
            except distributed.StoppedAtOnce:
                raise Preempted(
                    f"received a signal to stop: nothing new to save of run {self.id}"
                ) from None
            except Interrupted as stop:
                stop.seconds = dict(self.clock.seconds)
                raise

    def _complete(self) -> dict[str, Any]:
        finished = self._prepare()
        if finished is not None:
            return finished
        if jax.device_count() > 1:
            self.log(str(self.program.mesh_choice))
        state = self._restore()
        self.first_step = self.last_step = int(state.step)
        self.profile = Profile(self.run_dir / "profile", self.config.log.profile)
        missed = distributed.broadcast(self._missed_evaluation())
        self.metrics_log = self._open_log() if distributed.is_writer() else NoLog()
        with self.checkpoints:
            try:
                if missed:
                    self._evaluate(state, final=False)
                with self.profile, self.clock.measure("train"):
                    state = self._train(state)
                losses = self._evaluate(state, final=True)
                result = self._result("done", losses)
            except Diverged as error:
                result = self._result("diverged", [], str(error))
            finally:
                self.metrics_log.close()
        if distributed.is_writer():
            path = self.run_dir / "result.json"
            storage.retry(lambda: write_json_atomic(path, result), self.log)
        return result

    def _prepare(self) -> dict[str, Any] | None:
        """Create the run directory on one process; the stored result if the run is finished."""
        if distributed.is_writer():
            prepare_directory(self.config, self.run_dir)
            self._write_arrays("codebook.npy", lambda s: np.save(s, self.program.codebook.codes))
            storage.retry(lambda: tokenizers.copy(self.data.path, self.run_dir), self.log)
        distributed.barrier("run directory", self.log)
        finished = self.run_dir / "result.json"
        return read_json(finished) if storage.exists(finished) else None

    def _write_arrays(self, name: str, save: Callable[[io.BytesIO], None]) -> None:
        stream = io.BytesIO()
        save(stream)
        storage.retry(lambda: storage.write(self.run_dir / name, stream.getvalue()), self.log)

    # --- training

    def _train(self, state: State) -> State:
        c, steps = self.config, self.config.steps
        horizon, seed = optim.horizon(c), np.uint32(c.seed)
        batches = loader.train_batches(
            self.data,
            seed=c.seed,
            batch_size=c.batch_size,
            start=self.first_step,
            stop=steps,
            rows=sharding.local_rows(self.program.mesh, c.batch_size),
            first=c.data.unique_blocks,
        )
        row = None
        saves = checkpoint.Schedule(c.checkpoint, self.first_step, self.pinned)
        mark, marked_step = time.perf_counter(), self.first_step
        for step in range(self.first_step, steps):
            with self.clock.measure("input"):
                tokens, example = next(batches)
                if row is None:  # this process has the same rows of every batch
                    row = (example - step * c.batch_size).astype(np.int32)
                    row = sharding.shard_local_rows(self.program.mesh, row, c.batch_size)
                tokens = sharding.shard_local_rows(self.program.mesh, tokens, c.batch_size)
            state, metrics = self.program.train(self.clock, state, tokens, row, seed, horizon)
            self.last_step = step + 1
            self.guard.at_once = False
            self._read_pending()  # only now, while the device is busy
            self.profile.step(step + 1 - self.first_step)
            self.pending = (step + 1, metrics)
            now = time.perf_counter()
            if now - mark >= HEARTBEAT_SECONDS:
                self.speed = (step - marked_step) * c.batch_size * c.data.seq_len / (now - mark)
                mark, marked_step = now, step
            if step + 1 < steps and saves.should_save(step + 1):  # the last step is saved below
                self._save(step + 1, state)
                saves.restart(step + 1)
            if self._evaluates_at(step + 1):
                self._evaluate(state, final=False)
            self._poll(step + 1, state, "train")
        self._read_pending()
        if self.first_step < steps:
            self._save_with_retries(steps, state, storage.PATIENCE)
        return state

    def _read_pending(self) -> None:
        """Log the metrics of the pending step (counted from 1); raise if they are not finite."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        values = {k: float(v) for k, v in jax.device_get(metrics)._asdict().items()}
        self.loss = values["loss"]
        if self.clipped_steps is not None:
            beyond = 0 < self.config.optim.clip < values["grad_norm"]
            self._count_clipped(self.clipped_steps + beyond, step)
        if not self.kernels_written:
            self._write_kernels()
        if self.first_seconds is None:
            self.first_seconds = self.clock.total()
            if self.first_step:
                self.log(f"first step after {self.first_seconds:.1f} s")
        finite = np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])
        if step % self.config.log.every == 0 or step in (1, self.config.steps) or not finite:
            named = {k: v if np.isfinite(v) else None for k, v in values.items()}
            seconds = round(self.clock.total(), 3)
            named |= {"clipped": self.clipped, "seconds": seconds}
            self.metrics_log.write({"step": step, **named, **self.pace.row(step)})
        if not finite:
            raise Diverged(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, "
                f"learning rate {values['lr']:.3g}"
            )

    def _count_clipped(self, steps: int | None, step: int) -> None:
        """Gradients that were clipped until `step`; None if its checkpoint is too old to know."""
        self.clipped_steps = steps
        self.clipped = None if steps is None else steps / max(step, 1)
        self.checkpoints.tally = {} if steps is None else {"clipped_steps": steps}

    def _about(self) -> dict[str, str]:
        return {
            "run": self.id,
            "codebook": self.program.codebook.hash,
            "data": self.data.fingerprint,
        }

    def _save(self, step: int, state: State) -> None:
        self._read_pending()  # a diverged state is never saved
        if step == self.pinned:
            self.metrics_log.flush()  # who finds the checkpoint reads the log of its steps
        with self.clock.measure("checkpoint"):
            self.checkpoints.try_save(step, state)

    def _save_with_retries(self, step: int, state: State, patience: float) -> None:
        self._read_pending()
        with self.clock.measure("checkpoint"):
            self.checkpoints.save_with_retries(step, state, patience)

    def _restore(self) -> State:
        own = [d / "checkpoints" for d in (self.run_dir, *self.earlier)]
        know = lambda place, *found: place or self.checkpoints.know(*found)  # noqa: E731
        mine = Lineage(trajectory_id(self.config), constant_steps(self.config), self._made())
        refused: dict[str, str] = {}

        def donates(seal: dict[str, Any]) -> bool:
            passes, unlike = mine.passes(seal), mine.unlike(seal)
            if passes and unlike:
                refused[seal["about"]["run"]] = unlike
            return passes and not unlike

        with self.clock.measure("checkpoint"):
            donors = [d / "checkpoints" for run in self.donors for d in run]
            found = checkpoint.newest(own, self.log, know, donors=donors, donates=donates)
            branched = found is not None and found.place >= len(own)
            for run, unlike in {} if branched else refused.items():
                self.log(f"run {run} has made steps of this one, but on another {unlike}")
            if found is None:
                self._descend(mine)
                state = self.program.init(self.clock, self.config.seed)
                return self._with_initial(state) if self.config.initial_weights else state
            about, lineage = self._about(), Lineage.of(found.seal)
            if branched:
                donor = about["run"] = found.seal["about"]["run"]
                lineage = dataclasses.replace(mine, donor=donor, branch=found.step)
            load = checkpoint.load_from_donor if branched else checkpoint.load
            state = load(found, self.program.abstract, about)
            if state is not None:
                if branched and distributed.is_writer():
                    self.shared_rows = self._rows_of(found)
                self._descend(lineage or dataclasses.replace(mine, made=None))
                tally = found.seal.get("tally", {})  # older versions have none
                self._count_clipped(tally.get("clipped_steps"), found.step)
        if state is None:  # pruned while it was read: another may be left
            return self._restore()
        source = f", from run {lineage.donor}" if branched else ""
        self.log(f"run {self.id} continues at step {found.step} of {self.config.steps}{source}")
        return state

    def _rows_of(self, found: checkpoint.Found) -> list[dict[str, Any]]:
        """Those of another run's logs that stand for the steps before a checkpoint of it: all
        steps, and evaluations on the way if both evaluate alike."""
        attempts = next(run for run in self.donors if found.directory.parent in run)
        rows = rows_through(attempts, found.step, found.seal["about"]["run"])
        evals = (found.seal["origin"]["config"]["eval"], to_dict(self.config.eval))
        one, other = (values | {"batch_size": 0} for values in evals)
        return [row for row in rows if one == other or "eval" not in row]

    def _open_log(self) -> MetricsLog:
        rows = self.shared_rows
        at = 0 if rows else self.first_step
        log = MetricsLog(self.config, self.run_dir, self.id, at, self.log)
        for row in rows:
            log.write(row)
        return log

    def _with_initial(self, state: State) -> State:
        """The state of step 0 with the weights that the run starts from."""
        if self.initial is None:
            raise UserError(
                f"run {self.id} starts from weights {self.config.initial_weights}: give them with "
                "--init-from"
            )
        tree = folder.to_params(self.initial.tensors, self.config, self.program.codebook)
        place = lambda: folder.place(tree, self.program.abstract.params)  # noqa: E731
        # Two copies: a step gives the buffers of its state away.
        return state._replace(params=place(), ema=place() if self.config.optim.ema else state.ema)

    # --- interruption

    def _poll(self, step: int, state: State, phase: str) -> None:
        """Between steps and batches: call `heartbeat`; save and stop on a signal or if it returns
        False."""
        now = time.monotonic()
        wanted = True
        if now - self.last_heartbeat >= HEARTBEAT_SECONDS and distributed.is_writer():
            self.last_heartbeat = now
            wanted = self.heartbeat(
                {
                    "step": step,
                    "steps": self.config.steps,
                    "loss": self.loss,
                    "tokens_per_second": self.speed,
                    "mfu": self._mfu(self.speed, "matmul"),
                    "phase": phase,
                    "save_seconds": self.checkpoints.seconds,
                }
            )
        if not wanted and jax.process_count() > 1:
            self.guard.stop_all()
        if not self.guard.should_stop() and (wanted or jax.process_count() > 1):
            return
        saved = self._save_before_leaving(step, state)
        if not wanted and self.guard.number is None:
            raise Stopped(f"stopped run {self.id}: {saved}")
        raise Preempted(f"received a signal to stop: {saved} of run {self.id}")

    def _save_before_leaving(self, step: int, state: State) -> str:
        """Save, unless the last save took longer than the grace period."""
        grace, needed = self.config.checkpoint.grace_seconds, self.checkpoints.seconds
        steps = storage.retry(self.checkpoints.steps, self.log, checkpoint.PATIENCE)
        saved, slow = distributed.broadcast([step in steps, bool(grace) and needed > grace])
        if not saved and slow:
            self.checkpoints.wait()
            last = (self.checkpoints.steps() or [0])[-1]
            return (
                f"a save takes {needed:.0f} s, longer than the grace period of {grace:g} s: "
                f"the last saved step is {last}"
            )
        if not saved:
            self._save_with_retries(step, state, grace or checkpoint.PATIENCE)
        return f"saved step {step}"

    # --- evaluation and record

    def _evaluates_at(self, step: int) -> bool:
        """Whether there is an evaluation on the way after so many steps."""
        every = self.config.eval.every
        return bool(every) and step % every == 0 and 0 < step < self.config.steps

    def _missed_evaluation(self) -> bool:
        """Whether the run was interrupted in an evaluation; known to the writer only."""
        if not distributed.is_writer() or not self._evaluates_at(self.first_step):
            return False
        if any(row["step"] == self.first_step and "eval" in row for row in self.shared_rows):
            return False
        return not any(evaluated(d, self.first_step) for d in (self.run_dir, *self.earlier))

    def _evaluate(self, state: State, *, final: bool) -> list[Loss]:
        params = state.ema if self.config.optim.ema else state.params
        step = int(state.step)
        draw = draws.of_program(self.program)
        self.guard.at_once = final  # all steps are saved, and draws from time to time

        def partial_of(name: str, rows: int) -> Partial:
            identity = self._about() | {"eval_set": self.blocks.hash, "step": step, "of": name}
            own, *earlier = (
                d / "eval" / f"{name.replace(':', '-')}.npz" for d in (self.run_dir, *self.earlier)
            )
            return Partial(own, identity, rows, earlier)

        with self.clock.measure("eval"):
            losses, nats, n_tokens = likelihood.evaluate(
                self.config,
                codebook=self.program.codebook,
                run_batch=lambda name, row, watch: draw(
                    self.clock, name, params, self.blocks.tokens[row.example], row, watch
                ),
                token_ExL=self.blocks.tokens,
                doc_E=self.blocks.doc,
                eos_id=self.data.eos_id,
                tick=lambda: self._poll(step, state, "evaluate"),
                devices=self.program.mesh_choice.replica * self.program.mesh_choice.data,
                log=self.log,
                partial_of=partial_of,
            )
        self.guard.at_once = False
        self.metrics_log.write({"step": step, "eval": [as_dict(loss) for loss in losses]})
        if final and distributed.is_writer():
            self._write_arrays(
                "eval.npz", lambda stream: np.savez(stream, n_tokens=n_tokens, **nats)
            )
        if not final:
            shown = ", ".join(f"{x.estimator} {x.kind} {x.value:.4f}" for x in losses)
            self.log(f"step {step}: {shown} nats/token")
        return losses

    def _peak(self) -> float | None:
        """Peak FLOP/s of all devices of the run; None if their kind is unknown."""
        devices = self.program.mesh.devices.reshape(-1)
        peak = chips.peak_flops(devices[0].device_kind)
        return peak and peak * len(devices)

    def _mfu(self, tokens_per_second: float, convention: flops.Convention) -> float | None:
        return self.pace.peak and self.pace.flops[convention] * tokens_per_second / self.pace.peak

    def _result(self, status: str, losses: list[Loss], reason: str = "") -> dict[str, Any]:
        c, seconds = self.config, self.clock.seconds
        tokens_here = (self.last_step - self.first_step) * c.batch_size * c.data.seq_len
        speed = tokens_here / max(seconds["train"] + seconds["input"], 1e-9)
        n_bytes = int(self.blocks.n_bytes.sum())
        devices = self.program.mesh.devices.reshape(-1)
        kind, slices = devices[0].device_kind, meshes.count_slices(devices)
        donor, branch = self.lineage.donor, self.lineage.branch
        own_tokens = (self.last_step - branch) * c.batch_size * c.data.seq_len
        return {
            "schema": SCHEMA,
            "run": self.id,
            "status": status,
            "reason": reason,
            "family": c.family,
            "seed": c.seed,
            "steps": c.steps,
            "batch_size": c.batch_size,
            "tokens": c.tokens,
            "epochs": c.tokens
            / ((c.data.unique_blocks or self.data.train.blocks) * c.data.seq_len),
            "lr": c.optim.peak_lr,
            "clipped": self.clipped,
            "shape": {"layers": c.model.layers, "width": c.model.width, "heads": c.model.heads},
            "params": flops.param_counts(c),
            "flops": {name: flops.train_flops(c, name) for name in flops.CONVENTIONS},
            "flops_spent": {
                name: own_tokens * flops.flops_per_token(c, name) for name in flops.CONVENTIONS
            },
            "shared_prefix": {"run": donor, "steps": branch} if donor else None,
            "losses": [as_dict(loss) for loss in losses],
            "bits_per_byte": {x.estimator: likelihood.bits_per_byte(x, n_bytes) for x in losses},
            "hashes": {
                "data": self.data.fingerprint,
                "tokenizer": self.data.tokenizer_hash,
                "permutation": self.program.codebook.hash,
                "eval_set": self.blocks.hash,
            },
            "versions": {
                "prime_jax": __version__,
                "jax": jax.__version__,
                "flax": flax.__version__,
                "python": platform.python_version(),
            },
            "kernels": self._kernels(),
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "seconds": {
                "total": self.clock.total(),
                "first_step": self.first_seconds,
                **{k: seconds[k] for k in PHASES},
            },
            "first_step": self.first_step,
            "tokens_per_second": speed,
            "mfu": {name: self._mfu(speed, name) for name in flops.CONVENTIONS},
            "step_seconds": c.batch_size * c.data.seq_len / speed if speed else None,
            "memory_bytes": memory_high_water() or None,
            "predicted": roofline.of_run(c, self.program.mesh_choice, kind, slices),
        }
