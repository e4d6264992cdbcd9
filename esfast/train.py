"""The training loop: evolution strategies over an engine and a task.

A generation: every member answers the same prompts; its reward is the mean score; the strategy
turns rewards into coefficients, which go to the run's journal before the weights move; one update.
The held-out prompts are answered at the start, every `eval_every` generations and at the end,
greedily and by the model itself, no member. So are the prior tasks (`esfast.prior`), on their own
account of time.

What stops a run (Ctrl-C, an engine or a disk that fails) leaves the weights those of the last whole
generation, and the folder with all that was measured until then. A run whose folder has a journal
goes on from its end, to the bit; its base is evaluated again, to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from esfast.engines.base import Engine
from esfast.engines.fleet import Fleet
from esfast.errors import EsfastError
from esfast.evolution import EvolutionStrategy
from esfast.held_out import HeldOut
from esfast.journal import JournalWriter
from esfast.journal_format import MarkRecord, SegmentRecord
from esfast.loggers import Logger
from esfast.measure import (
    EVALUATION,
    GENERATION,
    RECORDS,
    SCORING,
    SETUP,
    Clock,
)
from esfast.progress import GenerationReport
from esfast.replay import catch_up, header_of, require_base, require_settings
from esfast.resources import readable
from esfast.rollout import Earned, Rollout, TrainConfig, strategy_over
from esfast.run_folder import RunFolder
from esfast.snapshots import save_snapshot
from esfast.tasks.base import Example, Task
from esfast.training_run import TrainingRun, TrainResult, require_not_over


class Trainer(TrainingRun):
    """Runs one training; owns the order of things."""

    config: TrainConfig

    def __init__(
        self,
        engine: Engine,
        task: Task,
        config: TrainConfig,
        folder: RunFolder,
        *,
        save_model: Callable[[Path], object],
        anchor: Path | None = None,
        loggers: Sequence[Logger] = (),
        clock: Clock | None = None,
    ) -> None:
        """`save_model` writes the live weights to a folder; `anchor`: the folder of the model that
        decay pulls to (without it a copy is kept); `clock` may have started earlier."""
        members = config.strategy.population_size
        super().__init__(engine, task, config, folder, save_model, loggers, clock, members)
        self.rollout = Rollout(engine, task, config, self.clock)
        self.rollout.failures = self.failures
        self._anchor = anchor
        self._greedy = replace(config.sampling, temperature=0.0)
        if isinstance(engine, Fleet):
            engine.note = lambda text: self.progress.note(text)
        self._caught_up = False
        self._report: GenerationReport | None = None  # of the generation whose line is not written
        self.es: EvolutionStrategy | None = None

    def run(self) -> TrainResult:
        """The whole run. Ctrl-C ends it early, with what there is; errors are raised again."""
        with self.progress:
            try:
                self._start()
                self._loop()
                status = "finished"
            except BaseException as error:
                if not self.folder.begun:  # a run that goes on is left as it was
                    self._leave_journal()
                    raise
                if not isinstance(error, KeyboardInterrupt):
                    self._fail()
                    raise
                status = "interrupted"
            self._restore()
            return self._finish(status)

    def _fail(self) -> None:
        for ending in (self._restore, lambda: self._finish("failed"), self._leave_journal):
            with suppress(Exception):  # the first error is the one to tell
                ending()

    def _start(self) -> None:
        """What generating costs without training is measured before any ES structure exists, but
        for a run that goes on, whose model is looked at first."""
        writer = self.folder.journal
        es = None
        if writer is not None:
            require_not_over(self.config.generations, writer.generation)
            es = strategy_over(self.engine, self.config, self._anchor)
            require_settings(writer.header, es)
            require_base(writer.header, es)
        self.folder.begin()
        prompts = [example.prompt for example in self.rollout.batch(0)]
        self._measure_start(
            0 if writer is None else writer.generation,
            lambda: self.engine.generate(prompts, self.rollout.sampling(0)),
        )
        self.clock.lap(SETUP)
        self.es = es or strategy_over(self.engine, self.config, self._anchor)
        self.account.parameters = sum(spec.elements for spec in self.es.weights.specs())
        self._tell_memory(self.es)
        self._open_journal(self.es)
        self._caught_up = True
        self._go_on(self.es.generation)
        self._write_samples()
        self.clock.lap(SETUP)

    def _go_on(self, done: int) -> None:
        """Takes up the account and the clock, and completes the last generation's line of
        metrics.jsonl, which a run that was stopped in it may not have written or evaluated."""
        lines = self.folder.lines()
        kept = self.folder.pending(done)
        earlier = lines if kept is None else [*lines, kept]
        last = earlier[-1] if earlier else None
        self.account.go_on(earlier)
        self.clock.go_on(earlier)
        if last is None or last["generation"] != done:
            return
        held_out = self._evaluate_if_due(done) if last.get("held_out") is None else None
        if kept is None and held_out is None:
            return
        counted = {**self._evaluated(held_out), "cost": self.account.counts()}
        write = self.folder.complete_metrics if kept is None else self.folder.add_metrics
        write({**last, **counted})

    def _open_journal(self, es: EvolutionStrategy) -> None:
        """A new run's journal, or an old one's, whose end the weights are brought to."""
        writer = self.folder.journal
        if writer is None:
            header = header_of(es, self.folder.identity, self.config.checksum_every)
            es.journal = JournalWriter.create(self.folder.journal_path, header)
            self.rollout.workers.share(self.folder.journal_path.read_bytes())
            return
        self.rollout.workers.share(writer.path.read_bytes())
        done = len(writer.journal.generations)
        self.progress.note(f"going on after generation {done}: replaying the journal")
        catch_up(
            es,
            writer.journal,
            self.folder.snapshots,
            note=self.progress.note,
            after=lambda n: self.progress.doing(f"replaying generation {n}/{done}"),
        )
        self.engine.weights_changed()
        writer.append(SegmentRecord(es.generation, self.folder.changes))
        self._failed_rewards = sum(record.failed for record in writer.journal.generations)
        es.journal = writer

    def _tell_memory(self, es: EvolutionStrategy) -> None:
        config = self.config.strategy
        needed = es.weights.require_room(config.sigma, config.noise)
        weights = es.weights.memory_use().weights_bytes
        self.progress.note(
            f"{self.config.memory} memory: {readable(needed)} beside {readable(weights)} of "
            f"weights ({needed / weights:.2f} of them)"
        )

    def _loop(self) -> None:
        assert self.es is not None
        self._evaluate_prior(self.es.generation)
        if self.es.generation >= self.config.generations and self._after is None:
            self._after = self._answer_again(self.es.generation)
        while self.es.generation < self.config.generations:
            report = self._generation(self.es)
            done = self.es.generation
            self._snapshot(self.es)
            held_out = self._evaluate_if_due(done)
            self._evaluate_prior(done)
            self._report = None
            self._record(report, held_out)
        self.rollout.workers.compare(self.es.weights.checksum(), self.es.generation)

    def _generation(self, es: EvolutionStrategy) -> GenerationReport:
        """One generation; its line of metrics.jsonl is kept before the journal has it."""
        started = sum(self.clock.seconds.values())
        generation = es.generation
        earned = self.rollout.population(es, lambda n: self.progress.member(generation, n))
        self._failed_rewards += earned.failed
        self.account.read(self.account.training, earned.read, earned.tokens)
        workers = self.rollout.workers.size
        members = earned.rewards.mean(axis=1) if earned.rewards.ndim == 2 else earned.rewards
        report = GenerationReport(
            generation=generation + 1,
            reward_mean=float(members.mean()),
            reward_spread=float(members.std()),
            reward_best=float(members.max()),
            failed_rewards=earned.failed,
            tokens_per_second=earned.tokens * workers / max(earned.seconds, 1e-9),
            seconds=sum(self.clock.seconds.values()) - started,
            outside_share=self.clock.outside_share(),
            saturated=0,
        )
        self.folder.pend(self._line(report, None))
        self._report = report
        saturated = self._step(es, earned)
        seconds = sum(self.clock.seconds.values()) - started
        share = self.clock.outside_share()
        self._report = replace(report, seconds=seconds, outside_share=share, saturated=saturated)
        return self._report

    def _step(self, es: EvolutionStrategy, earned: Earned) -> int:
        """Writes the generation down, then moves the weights; returns how many saturated."""
        assert es.journal is not None
        record = es.decide(earned.rewards, failed=earned.failed)
        es.journal.append(record)
        return self.rollout.update(es, record)

    def _snapshot(self, es: EvolutionStrategy) -> None:
        every = self.config.snapshot_every
        if not every or es.generation % every or es.journal is None:
            return
        try:
            save_snapshot(self.folder.snapshots, es.weights, es.generation, es.journal.chain)
        except EsfastError as error:
            self.progress.note(f"{error} The run goes on: its journal is enough to resume.")

    def _evaluate(self, generation: int) -> HeldOut:
        return self._answered(generation, self._held_out)

    def _answered(self, generation: int, examples: Sequence[Example]) -> HeldOut:
        self.progress.doing("held-out prompts")
        started = dict(self.clock.seconds)
        scores, texts, spent = self.rollout.answers(list(examples), self._greedy)
        self.clock.move((GENERATION, SCORING), EVALUATION, started)
        self.account.read(self.account.evaluation, spent.read, spent.tokens)
        return HeldOut(generation, tuple(scores), tuple(texts))

    def _restore(self) -> None:
        if self.es is not None:
            self.es.weights.restore()
            self.engine.weights_changed()

    def _leave_journal(self) -> None:
        for journal in (self.folder.journal, None if self.es is None else self.es.journal):
            if journal is not None:
                journal.close()

    def _close_journal(self) -> None:
        """Marks the end with the weights' checksum, unless the last update is still to be done."""
        assert self.es is not None and self.es.journal is not None
        journal = self.es.journal
        if self.es.generation == journal.generation:
            journal.append(MarkRecord(self.es.generation, self.es.weights.checksum()))
        journal.close()

    def _finish(self, status: str) -> TrainResult:
        """Samples, model, loggers, and last the summary."""
        self.clock.lap(RECORDS)
        generations = self.es.generation if self.es is not None and self._caught_up else 0
        if self._report is not None and self._report.generation <= generations:
            measured = self._after is not None and self._after.generation == generations
            # What was not measured yet a run that goes on makes up for.
            self._record(self._report, self._after if measured else None)
        self.progress.doing("saving")
        self._write_samples()
        if generations:
            self._save_model(self.folder.model)
            self._close_journal()
        else:
            self._leave_journal()
        return self._summarise(status, generations)
