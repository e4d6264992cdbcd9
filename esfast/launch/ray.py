"""Engines as Ray actors, one each, that share a run: scalars, prompts and texts go to and fro.

The driver has no weights. It deals the members of a generation one at a time to whoever is idle,
scores what comes back while others generate, writes the journal ahead and sends every engine the
same update. An engine that dies is started again: it loads the base, replays the journal and
rejoins, while the others go on; the member that it had goes back into the queue. Checksums are
compared between engines, and a difference stops the run by name.
"""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esfast.engines.base import Completion, Prompt, Sampling
from esfast.engines.fleet import MemberAnswers
from esfast.errors import EsfastError, LostError, StateError
from esfast.launch.ray_actor import EngineActor, completion_of, packed
from esfast.launch.ray_cluster import Cluster, Share, is_death, last_line
from esfast.launch.ray_weights import RayWeights
from esfast.measure import GENERATION, PERTURB

LONG_START = 120.0  # seconds; then a wait for engines is told
MOST_DEATHS = 3
"""Of one engine within a generation: then it is given up."""


@dataclass(frozen=True)
class Making:
    """How an actor makes its engine: module:function, its arguments (JSON), and its share."""

    function: str
    arguments: Mapping[str, Any]
    share: Share


@dataclass
class Seat:
    """One engine's place: the actor that holds it now, and what it is doing."""

    number: int
    actor: Any = None
    joining: Any = None  # the reply that tells that it has joined
    generation: int | None = None  # None before it has joined
    deaths: int = 0
    pid: int = 0


class RayFleet:
    """`engines` actors on a cluster; a `Fleet` (see `esfast.engines.fleet`).

    journal: where the run's journal is, or will be: what an engine is started again from. note:
    told in words what happens to engines. bytes_sent, bytes_received: messages of this driver.
    """

    def __init__(
        self,
        cluster: Cluster,
        making: Making,
        engines: int,
        journal: Path | None = None,
        note: Callable[[str], None] = print,
    ) -> None:
        """Starts the engines. Raises ConfigError for more than the cluster holds, and what making
        an engine raises."""
        cluster.require(engines, making.share)
        self.journal = journal
        self.note = note
        self.done = 0  # updates
        self.bytes_sent = self.bytes_received = 0
        self._cluster = cluster
        self._making = making
        self._live: dict[str, Any] | None = None
        self._last_words = ""
        self._closed = False
        self.seats = [Seat(number) for number in range(engines)]
        try:
            for seat in self.seats:
                self._start(seat)
            self._wait_for_all()
        except BaseException:
            self.close()
            raise

    # --- messages -----------------------------------------------------------------------------

    def _send(self, seat: Seat, name: str, **message: Any) -> Any:
        data = packed(message)
        self.bytes_sent += len(data)
        return seat.actor.answer.remote(name, data)

    def _receive(self, seat: Seat, reply: Any) -> dict[str, Any] | None:
        """The reply; None where the engine died, which is then started again."""
        errors = self._cluster.ray.exceptions
        try:
            data = self._cluster.ray.get(reply)
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EsfastError) and not isinstance(cause, LostError):
                raise type(cause)(f"engine {seat.number}: {cause}") from None
            if not is_death(cause):
                raise
            self._died(seat, error)
            return None
        except (errors.RayActorError, errors.ObjectLostError, errors.WorkerCrashedError) as error:
            self._died(seat, error)
            return None
        self.bytes_received += len(data)
        return json.loads(data)

    def _start(self, seat: Seat) -> None:
        making = self._making
        seat.actor = self._cluster.actor(EngineActor, making.share)
        seat.generation = None
        seat.joining = self._send(
            seat,
            "enter",
            make=making.function,
            arguments=dict(making.arguments),
            environment=dict(making.share.environment),
        )
        if self._live is not None:
            self._send(seat, "live", **self._live)
            seat.joining = self._send_join(seat)

    def _send_join(self, seat: Seat) -> Any:
        journal = None
        if self.journal is not None and self.journal.exists():
            journal = base64.b64encode(self.journal.read_bytes()).decode()
        elif self.done:
            raise StateError("an engine died, and there is no journal to start it again from.")
        return self._send(seat, "join", journal=journal, until=self.done)

    def restart(self, seat: Seat) -> None:
        """Ends an engine and starts it again from base and journal."""
        self._cluster.ray.kill(seat.actor)
        self._start(seat)

    def _died(self, seat: Seat, error: Exception) -> None:
        seat.deaths += 1
        seat.generation = seat.joining = None
        self._cluster.ray.kill(seat.actor)
        why = self._last_words = last_line(error)
        if seat.deaths < MOST_DEATHS:
            self.note(f"engine {seat.number} died ({why}); it is started again.")
            self._start(seat)
            return
        self.note(f"engine {seat.number} died {seat.deaths} times and is given up ({why}).")

    # --- who is there -------------------------------------------------------------------------

    def _joined(self, seat: Seat) -> None:
        """Takes the reply of an engine that is joining; one that the run has overtaken goes on."""
        told = self._receive(seat, seat.joining)
        if told is None:
            return
        seat.joining, seat.generation, seat.pid = None, told["generation"], told["pid"]
        if seat.generation != self.done:
            seat.generation, seat.joining = None, self._send_join(seat)

    def _joining(self) -> dict[Any, Seat]:
        return {seat.joining: seat for seat in self.seats if seat.joining is not None}

    def _wait_for_all(self) -> None:
        while joining := self._joining():
            there, _ = self._cluster.ray.wait(list(joining), timeout=LONG_START)
            if there:
                self._joined(joining[there[0]])
            else:
                self.note(
                    f"waiting for {len(joining)} of {len(self.seats)} engines: loading, or what "
                    "they need of the cluster is in use (ray status shows it)."
                )

    def _next(self, flights: Mapping[Any, Any]) -> Any:
        """Waits until one of the replies is there; takes in engines that join meanwhile, and
        returns None for them."""
        joining = self._joining()
        (reply,), _ = self._cluster.ray.wait([*flights, *(joining.keys() - flights.keys())])
        if reply in joining:
            self._joined(joining[reply])
            return None
        return reply

    def ready(self) -> list[Seat]:
        """Engines at the run's generation; waits for one where there is none."""
        while True:
            there = [seat for seat in self.seats if seat.generation == self.done]
            if there:
                return there
            if not self._joining():
                mend = "mend that and start again"
                if self.journal is not None and self.journal.exists():
                    mend = "what was recorded is whole: go on with esfast train --resume RUN"
                raise StateError(
                    f"no engine is left after {self.done} generations: each died {MOST_DEATHS} "
                    f"times in one of them, the last with: {self._last_words}; {mend}."
                )
            self._next({})

    def ask_all(self, name: str, **message: Any) -> list[tuple[Seat, dict[str, Any]]]:
        """Every ready engine's reply; at least one. Engines that die are started again."""
        while True:
            replies = [(seat, self._send(seat, name, **message)) for seat in self.ready()]
            told = [(seat, self._receive(seat, reply)) for seat, reply in replies]
            there = [(seat, reply) for seat, reply in told if reply is not None]
            if there:
                return there

    def ask_one(self, name: str, **message: Any) -> dict[str, Any]:
        """The first ready engine's reply."""
        while True:
            seat = self.ready()[0]
            reply = self._receive(seat, self._send(seat, name, **message))
            if reply is not None:
                return reply

    # --- an engine like any other -------------------------------------------------------------

    def live_weights(
        self, memory: str = "lean", anchor: Path | bool = False, threads: int | None = None
    ) -> RayWeights:
        """The weights of all engines as one. anchor: only whether there is one; every engine pulls
        to the base that it has loaded. threads: of each engine's edits."""
        self._wait_for_all()
        self._live = {"memory": memory, "anchored": bool(anchor), "threads": threads}
        self.done = 0
        for seat in self.seats:
            seat.generation = None if seat.generation is None else 0
        told = self.ask_all("live", **self._live)
        return RayWeights(self, memory, told[0][1]["tensors"])

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One engine answers: batches are composed as without Ray."""
        told = self.ask_one("generate", prompts=plain(prompts), sampling=asdict(sampling))
        return [completion_of(record) for record in told["completions"]]

    def require_room(
        self, prompts: Sequence[Prompt], max_new_tokens: int, kind: str = "prompt"
    ) -> int | None:
        """What one engine says, None where it cannot tell; see `esfast.engines.base.Bounded`."""
        asked = {"prompts": plain(prompts), "max_new_tokens": max_new_tokens, "kind": kind}
        left: int | None = self.ask_one("context", **asked)["left"]
        return left

    def members(
        self, generation: int, count: int, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[MemberAnswers]:
        """A queue: an idle engine takes the next member; a dead one's goes back."""
        asked = {"generation": generation, "prompts": plain(prompts), "sampling": asdict(sampling)}
        for seat in self.seats:
            seat.deaths = 0
        waiting = deque(range(count))
        flights: dict[Any, tuple[Seat, int]] = {}
        while waiting or flights:
            busy = {seat.number for seat, _ in flights.values()}
            idle = [] if flights else self.ready()  # waits only where nothing is under way
            idle = idle or [seat for seat in self.seats if seat.generation == self.done]
            for seat in idle:
                if waiting and seat.number not in busy:
                    number = waiting.popleft()
                    flights[self._send(seat, "member", number=number, **asked)] = seat, number
            reply = self._next(flights) if flights else None
            if reply is not None:
                seat, number = flights.pop(reply)
                told = self._receive(seat, reply)
                if told is None:
                    waiting.appendleft(number)
                else:
                    yield _answers(number, told)

    def weights_changed(self) -> None:
        """Every engine says so to itself."""

    def reset_peak(self) -> bool:
        """Of all engines."""
        return all(reply["reset"] for _, reply in self.ask_all("reset_peak"))

    def peak_bytes(self) -> int:
        """The engine's that took most."""
        return max(reply["bytes"] for _, reply in self.ask_all("peak_bytes"))

    def save(self, path: Path, made: Mapping[str, Any]) -> None:
        """The live model, written by one engine. Where none writes to a disk that the driver sees
        as well, that is told, with the command that makes the model from the journal."""
        self.ask_one("save", path=str(path.absolute()), made=dict(made))
        if not path.exists():
            self.note(
                f"the model is not at {path}: the engine that saved it has another disk. Make it "
                "with esfast replay RUN --base MODEL --output DIR."
            )

    def close(self) -> None:
        """Ends the engines, and the cluster where it is this run's own."""
        if not self._closed:
            self._closed = True
            for seat in self.seats:
                if seat.actor is not None:
                    self._cluster.ray.kill(seat.actor)
            self._cluster.close()


def plain(prompts: Sequence[Prompt]) -> list[Any]:
    """Prompts as JSON holds them."""
    return [p if isinstance(p, str) else [dict(message) for message in p] for p in prompts]


def _answers(number: int, told: Mapping[str, Any]) -> MemberAnswers:
    completions = tuple(completion_of(record) for record in told["completions"])
    seconds = told["seconds"]
    return MemberAnswers(number, completions, seconds[PERTURB], seconds[GENERATION])
