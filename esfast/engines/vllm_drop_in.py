"""What the workers of published ES scripts do, exactly: perturb, restore, update, agree.

Those scripts call names in the workers and pass seeds and scales. Their perturbation adds noise and
their restore subtracts it; here it is the same sum, kept as a list of what is added to the weights
as last settled:

    perturb(seed, s)    adds (seed, s), or takes (seed, -s) off the list
    restore(seed, s)    takes (seed, s) or (seed, -s) off; adds (seed, -s) where neither is there
    before the model runs: all but the last of the list is one update, rounded once and
    stochastically, and stays; the last is a perturbation that a restore undoes to the bit

So members that are evaluated and restored cost nothing, perturbations that are meant as updates
accumulate, and an update of one engine reaches the others as seeds and coefficients (`agree`, which
alone keeps the last of the list too: what all engines are to have is no member).
Rounding is keyed by the number of updates since the weights were loaded, as in a run of esfast with
seed 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

from esfast.engines.vllm_plugin import followed
from esfast.engines.vllm_shard import Shard
from esfast.errors import ConfigError, StateError, first_line
from esfast.home_folders import at_home
from esfast.members import Member, generation_seed, whole
from esfast.strategy import LARGEST, SMALLEST, AnchoredDecay, real
from esfast.update import Update

LONGEST_WAIT = timedelta(minutes=30)  # for an engine whose members take longer


def _perturbation(seed: int, scale: float) -> tuple[int, float]:
    """Both as the list holds them. ConfigError, before it does, for what no update could add."""
    numbers = whole(seed), real(scale)
    if numbers[0] is None or numbers[1] is None or abs(numbers[1]) > LARGEST:
        raise ConfigError(
            f"a perturbation of seed {seed!r} and scale {scale!r}; expected a whole number and a "
            f"finite one of at most {LARGEST:g}."
        )
    return numbers[0] % 2**64, numbers[1] if abs(numbers[1]) >= SMALLEST else 0.0


def _member(seed: int) -> Member:
    """Of a seed of an update, read as those of perturbations are."""
    number = whole(seed)
    if number is None:
        raise ConfigError(f"an update of seed {seed!r}; expected a whole number.")
    return Member(number % 2**64)


def _scaled(coefficient: float, scale: float) -> float:
    """What is no number is refused here, what is none of fp32's by `Update`."""
    number = real(coefficient)
    if number is None:
        raise ConfigError(f"an update of coefficient {coefficient!r}; expected a finite number.")
    return scale * number


def _require_engine(source: int, engines: int) -> None:
    """ConfigError where no engine has this rank."""
    number = whole(source)
    if number is None or not 0 <= number < engines:
        known = f"ranks are 0 to {engines - 1}" if engines > 1 else "an engine alone is rank 0"
        hint = "" if engines > 1 else "; call init_inter_engine_group first where there are more"
        raise ConfigError(f"engine {source!r} of {engines} is to be the source; {known}{hint}.")


class DropIn:
    """One worker's side of a script; `worker` is vLLM's."""

    def __init__(self, shard: Shard, worker: Any) -> None:
        self._shard = shard
        self._added: list[tuple[int, float]] = []
        self._live: tuple[int, float] | None = None  # what the weights have now beside the settled
        self._updates: list[tuple[int, Update]] = []  # numbered; since the engines last agreed
        self._done = 0
        self._group: _Group | None = None
        cached = worker.vllm_config.cache_config.enable_prefix_caching
        if (cached or shard.size > 1) and not followed(worker):
            raise StateError(
                "vLLM's workers are in processes of their own, and the process that calls them "
                "does not know esfast: it would keep a prefix cache of other weights, and take one "
                "call's error for the next one's reply. Install esfast with pip, so that vLLM "
                "finds its plugin."
            )
        shard.open("lean", False, None)
        self._base = shard.checksum()
        run = worker.model_runner.execute_model

        def settled(*arguments: Any, **options: Any) -> Any:
            self._settle()
            return run(*arguments, **options)

        worker.model_runner.execute_model = settled

    def perturb(self, seed: int, scale: float) -> None:
        """Adds scale * noise(seed), a negative scale too; undoes the opposite one."""
        one = _perturbation(seed, scale)
        opposite = (one[0], -one[1])
        if opposite in self._added:
            self._change(self._without(opposite))
        elif one[1]:
            self._change([*self._added, one])

    def restore(self, seed: int, sigma: float) -> None:
        """Takes off what `perturb` added with this seed and scale, of either sign."""
        one = _perturbation(seed, sigma)
        opposite = (one[0], -one[1])
        there = [at for at in (one, opposite) if at in self._added]
        if there:
            self._change(self._without(there[0]))
        elif one[1]:
            self._change([*self._added, opposite])

    def update(
        self,
        seeds: Sequence[int],
        coefficients: Sequence[float],
        scale: float,
        decay: AnchoredDecay | None = None,
        alpha: float | None = None,
    ) -> None:
        """Adds scale * sum_n coefficient_n * noise(seed_n) in one pass, after all but the last of
        the list, which stays a perturbation. decay, alpha: as of `Weights.update`."""
        if len(seeds) != len(coefficients):
            raise ConfigError(
                f"{len(seeds)} seeds and {len(coefficients)} coefficients; give one a seed."
            )
        members = [_member(seed) for seed in seeds]
        scaled = [_scaled(coefficient, scale) for coefficient in coefficients]
        update = Update(members, scaled, decay, alpha)  # refused before anything is kept
        self._keep(self._added[:-1])
        self._apply(self._done, replace(update, seed=self._key()))
        self._follow()

    def keep_initial(self) -> None:
        """Keeps a copy of the weights as they are, for decay to pull to."""
        self._settle()
        self._live = None
        self._shard.anchor()
        self._follow()

    def save(self, path: str) -> None:
        """The weights as they are, with all that was added; no member is forgotten."""
        self._settle()
        at_home(path).parent.mkdir(parents=True, exist_ok=True)
        self._shard.write(str(at_home(path)))

    def load(self, path: str) -> None:
        """The weights of a file; nothing is added to them, and updates are counted from 0, so that
        engines that load the same go on alike."""
        self._shard.load(str(at_home(path)))
        self._added, self._live, self._updates, self._done = [], None, [], 0
        self._base = self._shard.checksum()

    def checksum(self) -> str:
        """Of the weights as the model would run with them."""
        self._settle()
        return f"{self._shard.checksum():016x}"

    def meet(self, address: str, port: int, rank: int, size: int) -> None:
        """Joins the engines of a run: `rank` of `size`; engine 0's first worker keeps the list of
        what is exchanged, at address:port."""
        self._group = _Group(address, port, rank, size, self._shard.rank)

    def agree(self, source: int) -> None:
        """Ends with the weights of engine `source` everywhere, the last of the list included; see
        `WorkerExtension`."""
        _require_engine(source, 1 if self._group is None else self._group.size)
        self._keep(list(self._added))
        if self._group is None:
            return
        updates = [(number, update.record()) for number, update in self._updates]
        told = {"base": self._base, "done": self._done, "updates": updates}
        theirs = self._group.exchange("updates", told)[source]
        error = self._catch_up(theirs, source)
        seen = self._group.exchange("ended", error or f"{self._shard.checksum():016x}")
        self._group.finish()
        apart = [rank for rank, one in enumerate(seen) if one != seen[source]]
        if apart or error:
            raise StateError(
                f"the engines' weights are apart: engine {apart[0]} has {seen[apart[0]]}, engine "
                f"{source} {seen[source]}. Load the same weights in all of them "
                "(load_weights_from_disk), and apply every update on one engine or on all."
            )
        self._updates, self._base = [], self._shard.checksum()

    def _catch_up(self, theirs: dict[str, Any], source: int) -> str | None:
        """Applies what the source applied and this engine did not; says why it cannot."""
        if theirs["base"] != self._base:
            return "other weights since the engines last agreed"
        updates = [(number, Update.of(record)) for number, record in theirs["updates"]]
        if updates[: len(self._updates)] != self._updates:
            return f"updates that engine {source} has not applied"
        for number, update in updates[len(self._updates) :]:
            self._apply(number, update)
        self._done = int(theirs["done"])  # equal weights may have been loaded at another count
        return None

    def _without(self, one: tuple[int, float]) -> list[tuple[int, float]]:
        """The list but the last such entry."""
        at = len(self._added) - 1 - self._added[::-1].index(one)
        return [*self._added[:at], *self._added[at + 1 :]]

    def _change(self, added: list[tuple[int, float]]) -> None:
        """Takes another list; the old one stays where the weights cannot follow."""
        before, self._added = self._added, added
        try:
            self._follow()
        except Exception:
            self._added = before
            raise

    def _follow(self) -> None:
        """The weights follow a list of none or one at once; a longer one before the model runs."""
        if not self._added:
            self._shard.restore()
            self._live = None
        elif len(self._added) == 1 and self._live != self._added[0]:
            self._put(self._added[0])

    def _put(self, one: tuple[int, float]) -> None:
        seed, scale = one
        self._live = None
        self._shard.perturb({"seed": seed, "sign": 1 if scale > 0 else -1}, abs(scale))
        self._live = one

    def _settle(self) -> None:
        self._keep(self._added[:-1])
        self._follow()
        self._shard.derive()

    def _keep(self, entries: list[tuple[int, float]]) -> None:
        """Makes the first entries of the list an update."""
        if entries:
            members = [Member(seed) for seed, _ in entries]
            scales = [scale for _, scale in entries]
            self._apply(self._done, Update(members, scales, seed=self._key()))
            del self._added[: len(entries)]

    def _key(self) -> int:
        """Of the next update's rounding."""
        return generation_seed(0, self._done)

    def _apply(self, number: int, update: Update) -> None:
        self._live = None
        self._shard.update(update.record())
        self._updates.append((number, update))
        self._done = number + 1


class _Group:
    """The same worker of every engine, over a store of torch: each says something, all hear it."""

    def __init__(self, address: str, port: int, rank: int, size: int, worker: int) -> None:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        if not 0 <= rank < size:
            raise ConfigError(f"engine {rank} of {size}; ranks are 0 to {size - 1}.")
        try:
            keeps = rank == 0 and worker == 0
            store = TCPStore(
                address, port, is_master=keeps, timeout=LONGEST_WAIT, wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            raise StateError(
                f"engine {rank} cannot reach engine 0 at {address}:{port}: "
                f"{first_line(error)}. Call init_inter_engine_group on all engines with "
                "the address of engine 0's machine and a free port."
            ) from None
        self._store = PrefixStore(f"esfast/{worker}", store)
        self._rank, self.size, self._round = rank, size, 0

    def exchange(self, what: str, said: Any) -> list[Any]:
        """What every engine said, by rank."""
        keys = [f"{self._round}/{what}/{rank}" for rank in range(self.size)]
        try:
            self._store.set(keys[self._rank], json.dumps(said))
            self._store.wait(keys, LONGEST_WAIT)
            return [json.loads(self._store.get(key)) for key in keys]
        except RuntimeError as error:
            raise StateError(
                f"engine {self._rank} waited for the others in vain: {first_line(error)}. "
                "broadcast_all_weights has to be called on all engines."
            ) from None

    def finish(self) -> None:
        """The round is over; who keeps the store waits until all have read it."""
        self._store.set(f"{self._round}/read/{self._rank}", "1")
        if self._rank == 0:
            self._store.wait([f"{self._round}/read/{n}" for n in range(self.size)], LONGEST_WAIT)
        self._round += 1
