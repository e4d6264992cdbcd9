"""The fast phase: GEPA (arXiv 2507.19457; the `gepa` package) over an engine and a task.

One text component, the instruction. A metric call is one answer to one problem, scored. An
iteration takes a candidate from the Pareto front, answers three problems under it, asks a
reflection for a better instruction, and answers the three again; where the sum of scores rises the
new one joins the pool, and is scored on all the problems that candidates are scored on. The pool
begins with the first of the seeds; the others are the first proposals, without a reflection, and
the second joins the pool whatever its three answers are worth. An instruction joins it once. The
budget is looked at before each iteration, as the package does, so the last may pass it by less than
an iteration.

The same weights, problems, seeds and seed give the same candidates, if the reflection repeats.
Nothing is printed and no file is written. What a problem's scoring or a reflection does wrong costs
that problem or proposal; an error of the engine ends the search.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from esfast.cost import Tokens
from esfast.engines.base import Bounded, Completion, Engine, Prompt, Sampling
from esfast.errors import ConfigError, DataError
from esfast.failures import Failures
from esfast.fast_slow.cycles import Candidate
from esfast.fast_slow.instructed import under
from esfast.fast_slow.reflection import Reflection, ReflectionFailure
from esfast.tasks.base import Example, Score, Task
from esfast.tasks.draws import digest_int

INSTRUCTION = "instruction"
MINIBATCH = 3  # problems of a proposal, answered before and after; the package's own
KEPT_REASONS = 20


def require_gepa() -> None:
    """Raises ConfigError where the package is not there."""
    try:
        import gepa  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"esfast fast-slow evolves prompts with GEPA ({error}); pip install "
            "'esfast[fast-slow]'."
        ) from None


@dataclass(frozen=True)
class Answered:
    """One problem under one instruction: what GEPA calls a trajectory."""

    problem: Prompt
    answer: str
    score: Score


class Asker:
    """Answers problems under an instruction and scores them, with the weights as they are.

    calls: answers scored; tokens: of them and of reflections. room_for: further problems that an
    instruction must leave room for in the model's context, beside those that it is asked under.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        sampling: Sampling,
        failures: Failures,
        room_for: Sequence[Example] = (),
    ) -> None:
        self.engine = engine
        self.calls = 0
        self.tokens = Tokens()
        self._task = task
        self._sampling = sampling
        self._failures = failures
        self._room_for = room_for

    def answer(self, problems: Sequence[Example], instruction: str) -> list[Answered]:
        """One a problem, in order."""
        prompts = [example.prompt for example in under(problems, instruction)]
        completions = self.engine.generate(prompts, self._sampling)
        texts = [completion.text for completion in completions]
        scores = self._task.score_all(problems, texts)
        self._failures.add(scores, "an answer of the prompt search")
        self.calls += len(problems)
        for completion in completions:
            self.spend(completion)
        return [
            Answered(problem.prompt, text, score)
            for problem, text, score in zip(problems, texts, scores, strict=True)
        ]

    def spend(self, completion: Completion) -> None:
        """Counts its tokens."""
        self.tokens.prompt += completion.prompt_tokens
        self.tokens.generated += completion.tokens

    def require_usable(self, instruction: str) -> None:
        """ReflectionFailure for an instruction that no prompt could begin with."""
        if not instruction:
            raise ReflectionFailure("the reflection's answer holds no instruction")
        try:
            instruction.encode()
        except UnicodeEncodeError:
            raise ReflectionFailure("the instruction holds half a character") from None
        if not isinstance(self.engine, Bounded):
            return
        prompts = [example.prompt for example in under(self._room_for, instruction)]
        try:
            self.engine.require_room(prompts, self._sampling.max_new_tokens)
        except (ConfigError, DataError):  # one reason for all, whatever their lengths
            raise ReflectionFailure(
                "the instruction does not fit the model's context with the longest problem"
            ) from None


class InstructionAdapter:
    """What GEPA asks of esfast: scores of a candidate, the records of a reflection, new texts.

    An error that is none of a proposal's is kept in `broken`, since the package goes on after
    what proposing raises.
    """

    def __init__(
        self, asker: Asker, reflect: Reflection, seeds: Sequence[str], key: tuple[int, ...]
    ) -> None:
        """seeds: the first is the pool's first; key: what the reflections' draws derive from."""
        self.asker = asker
        self.first = seeds[0]
        self.reflections = 0
        self.failed: Counter[str] = Counter()
        self.broken: Exception | None = None
        self._reflect = reflect
        self._offered = list(dict.fromkeys(seed for seed in seeds[1:] if seed != seeds[0]))
        self._certain = seeds[1:2]
        self._pool = {seeds[0]}
        self._key = key

    def evaluate(
        self, batch: list[Example], candidate: Mapping[str, str], capture_traces: bool = False
    ) -> Any:
        """gepa's EvaluationBatch of a candidate's answers to the batch."""
        from gepa.core.adapter import EvaluationBatch

        answered = self.asker.answer(batch, candidate[INSTRUCTION])
        scores = [float(one.score.value) for one in answered]
        return EvaluationBatch(
            outputs=[one.answer for one in answered],
            scores=scores,
            trajectories=answered if capture_traces else None,
        )

    def make_reflective_dataset(
        self, candidate: Mapping[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> dict[str, list[dict[str, str]]]:
        """The problems, answers and feedback that a reflection reads."""
        records = [
            {
                "Inputs": _text(one.problem),
                "Generated Outputs": one.answer,
                "Feedback": f"Score {one.score.value:.3g}. {one.score.feedback}",
            }
            for one in eval_batch.trajectories
        ]
        return dict.fromkeys(components_to_update, records)

    def propose_new_texts(
        self,
        candidate: Mapping[str, str],
        reflective_dataset: Mapping[str, Sequence[Mapping[str, Any]]],
        components_to_update: list[str],
    ) -> dict[str, str]:
        """A seed that is left, or what the reflection wrote; nothing where that failed."""
        try:
            if self._offered:
                text = self._offered.pop(0)
            else:
                text = self._reflected(candidate[INSTRUCTION], reflective_dataset[INSTRUCTION])
            self.asker.require_usable(text)
        except ReflectionFailure as failure:
            reason = " ".join(str(failure).split())[:300]
            self.failed[reason if len(self.failed) < KEPT_REASONS else "other reasons"] += 1
            return {}
        except Exception as error:
            self.broken = error
            return {}
        return {INSTRUCTION: text}

    def _reflected(self, instruction: str, records: Sequence[Mapping[str, Any]]) -> str:
        from gepa.strategies.instruction_proposal import InstructionProposalSignature as Proposal

        asked = {
            "current_instruction_doc": instruction,
            "dataset_with_feedback": records,
            "prompt_template": None,
        }
        self.reflections += 1
        prompt = str(Proposal.prompt_renderer(asked))
        seed = digest_int("reflection", *self._key, self.reflections)
        completion = self._reflect(prompt, seed)
        self.asker.spend(completion)
        text = str(Proposal.output_extractor(completion.text.strip())["new_instruction"]).strip()
        if text in self._pool:  # GEPA would score it again on all problems, as another candidate
            raise ReflectionFailure(
                "the reflection gave an instruction that is in the pool already"
            )
        return text

    def should_accept(self, proposal: Any, state: Any) -> bool:
        """gepa's AcceptanceCriterion: the sum of scores rises, or it is the seed that is sure."""
        text = proposal.candidate[INSTRUCTION]
        before, after = proposal.subsample_scores_before, proposal.subsample_scores_after
        accepted = text in self._certain or sum(after or []) > sum(before or [])
        if accepted:
            self._pool.add(text)
        return accepted


class Silent:
    """gepa's logger; the progress bar is not to be written over."""

    def log(self, message: str) -> None:
        """Nothing."""


def search(
    adapter: InstructionAdapter,
    problems: Sequence[Example],
    scored_on: Sequence[Example],
    metric_calls: int,
    seed: int,
    note: Callable[[int], object] = lambda calls: None,
) -> list[Candidate]:
    """GEPA's pool, which begins with the adapter's first seed; none is kept yet.

    problems: that proposals are tried on; scored_on: that candidates are scored on; note: told the
    metric calls so far. Raises what the engine raises.
    """
    from gepa.api import optimize

    def stop(gepa_state: Any) -> bool:
        note(gepa_state.total_num_evals)
        return adapter.broken is not None

    result: Any = optimize(
        seed_candidate={INSTRUCTION: adapter.first},
        trainset=list(problems),
        valset=list(scored_on),
        adapter=adapter,  # type: ignore[arg-type]
        acceptance_criterion=adapter,
        reflection_minibatch_size=MINIBATCH,
        skip_perfect_score=False,  # a reward's best is not known to be 1
        max_metric_calls=metric_calls,
        stop_callbacks=[stop],
        logger=Silent(),
        seed=seed,
        track_best_outputs=False,
    )
    if adapter.broken is not None:
        raise adapter.broken
    return _pool(result)


def _pool(result: Any) -> list[Candidate]:
    fronts = result.per_val_instance_best_candidates.values()
    return [
        Candidate(
            text=candidate[INSTRUCTION],
            score=float(result.val_aggregate_scores[at]),
            best_on=sum(at in front for front in fronts),
            parent=next((p for p in result.parents[at] if p is not None), None),
        )
        for at, candidate in enumerate(result.candidates)
    ]


def keep(pool: Sequence[Candidate], count: int) -> list[Candidate]:
    """The pool with `count` of its Pareto front marked as kept: those with the best scores, ties in
    the pool's order, each text once. Fewer where the front has fewer."""
    front = [at for at, candidate in enumerate(pool) if candidate.best_on]
    texts: dict[str, int] = {}
    for at in sorted(front, key=lambda at: (-pool[at].score, at)):
        texts.setdefault(pool[at].text, at)
    chosen = set(list(texts.values())[:count])
    return [replace(candidate, kept=at in chosen) for at, candidate in enumerate(pool)]


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
