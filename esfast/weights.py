"""Perturb, restore and update the weights of a table in place, exactly.

    perturb   w' = round(fma(eps, sign * sigma, w)), nearest even, to the weights' dtype
    restore   the bits that were there before, for any weights, sigma and number of members
    update    w <- round(decay(w + sum_n c_n eps_n)), one pass for the whole population, fp32 inside

memory="lean" edits in place and records only what rounding loses; "shadow" keeps a base copy in the
weights' dtype; "master" keeps the base in fp32, so that updates of 16-bit weights lose nothing.
Lean and shadow give the same bits. Nobody else may edit the tensors while a member is applied, nor,
under shadow and master, at all without `rebase`; StateError where torch counted such an edit.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from esfast import state_file
from esfast.anchor import Anchor
from esfast.anchor_stream import AnchorStream, streamed
from esfast.device_table import free_bytes, make_records, make_table
from esfast.errors import ConfigError, EsfastError, ParameterError, StateError, require_one_of
from esfast.journal_format import TensorSpec
from esfast.live_weights import LiveWeights, MemoryUse
from esfast.members import Member, require_member, whole
from esfast.outside_edits import OutsideEdits
from esfast.parameters import ParameterTable
from esfast.resources import readable, usable_cores
from esfast.strategy import real
from esfast.update import Update, UpdateReport

MEMORIES = ("lean", "shadow", "master")
MOST_THREADS = 1024
_SMALLEST, _LARGEST = 2.0**-149, (2.0 - 2.0**-23) * 2.0**127  # of fp32
_SAMPLE_STRIDE = 16  # one chunk in 16 tells the size of lean's records to a few per cent


def _scale(sign: int, sigma: float) -> float:
    value = real(sigma)
    if value is None or not _SMALLEST <= value <= _LARGEST:
        raise ConfigError(f"sigma is {sigma!r}; it is a positive number that fp32 can hold.")
    return sign * value  # the core rounds it to fp32


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return usable_cores()
    number = whole(threads)
    # More than a machine has cores wins nothing; a million fails where threads are started.
    if number is None or not 1 <= number <= MOST_THREADS:
        raise ConfigError(
            f"threads is {threads!r}; it is a whole number from 1 to {MOST_THREADS}, or None for "
            "all cores."
        )
    return number


class Weights(LiveWeights):
    """The only thing that edits a model.

    table: what to edit; memory: "lean", "shadow" or "master"; anchor: for decay; threads: None
    takes the cores this process may use. After an exception the weights are restored or untouched.
    Calls from several threads take turns; it cannot be copied or pickled, since it edits addresses.
    A CUDA graph that captured its calls has those addresses too: keep it until the last replay.
    """

    def __init__(
        self,
        table: ParameterTable,
        memory: str = "lean",
        anchor: Anchor | None = None,
        threads: int | None = None,
    ) -> None:
        require_one_of("memory", memory, MEMORIES)
        number = _checked_threads(threads)
        if not isinstance(table, ParameterTable):
            raise ConfigError(
                f"Weights got a {type(table).__name__}; give a ParameterTable, made by from_module "
                "or from_tensors."
            )
        if anchor is not None and not isinstance(anchor, Anchor):
            raise ConfigError(
                f"the anchor is a {type(anchor).__name__}; make it with Anchor.in_memory(table) or "
                "Anchor.from_safetensors(path, table)."
            )
        self.table = table
        self.memory = memory
        self.anchor = anchor
        self.threads = number
        self._records = make_records(table.device)
        self._perturbed = False
        self._turn = threading.RLock()
        self._outside = OutsideEdits(table.segments)
        self._bases: list[torch.Tensor] = []
        self._streamed: AnchorStream | None = None
        rows = table.rows()
        if memory != "lean":
            self._make_bases(rows)
        self._filled = anchor  # outlives `anchor` put elsewhere: the core has its addresses
        if anchor is not None:
            anchor.fill(rows, table)
            self._streamed = streamed(anchor, rows, table.device)
        self._core = make_table(rows, table.device)
        counted = table.counted
        self._counted = self._core if counted.all() else make_table(rows[counted], table.device)
        if self._bases:
            self._core.capture(self.threads)

    def _make_bases(self, rows: np.ndarray) -> None:
        dtypes = [
            torch.float32 if self.memory == "master" else s.tensor.dtype
            for s in self.table.segments
        ]
        needed = sum(
            s.tensor.numel() * d.itemsize for s, d in zip(self.table.segments, dtypes, strict=True)
        )
        there = free_bytes(self.table.device)
        if there is not None and needed > there:
            raise ParameterError(
                f'memory="{self.memory}" needs {needed / 1e9:.2f} GB beside the weights and '
                f'{there / 1e9:.2f} GB are free; memory="lean" needs about a fifth of the weights.'
            )
        for segment, dtype in zip(self.table.segments, dtypes, strict=True):
            shape, device = segment.tensor.shape, segment.tensor.device
            self._bases.append(torch.empty(shape, dtype=dtype, device=device))
        for row, piece in zip(rows, self.table.pieces, strict=True):
            base = self._bases[piece.segment]
            row["base"] = base.data_ptr() + piece.offsets[2] * base.element_size()
            row["base_row_stride"] = piece.strides[2]
            row["base_dtype"] = 0 if base.dtype is torch.float32 else row["live_dtype"]

    def specs(self) -> tuple[TensorSpec, ...]:
        """Canonical names, shapes and dtypes, sorted by name."""
        return self.table.specs

    @property
    def perturbed(self) -> bool:
        """Whether a member is applied now."""
        return bool(self._records.active) if self.memory == "lean" else self._perturbed

    def perturb(self, member: Member, sigma: float) -> None:
        """Applies a member: w' = round(w + sign * sigma * eps). An applied one is taken back first;
        on a CPU in the same pass, which draws the noise of two mirrored members once.

        sigma: in units of the weights, positive. MemoryError (lean) leaves the weights restored, or
        where even that found no memory, `perturbed`: a later `restore` is exact.
        """
        scale = _scale(require_member(member).sign, sigma)
        with self._turn:
            self.require_ready()
            self._outside.tell()
            if self.memory == "lean":
                self._exchange(member, scale)
            else:
                self._perturbed = True  # first: an interrupt right after the call must find it set
                self._core.perturb(member.noise_number, member.spec, scale, self.threads)

    def _exchange(self, member: Member, scale: float) -> None:
        try:
            self._core.perturb_recorded(
                self._records, member.noise_number, member.spec, scale, self.threads
            )
        except MemoryError:  # met before the first weight, it leaves the old member applied
            self.restore()
            raise

    def _require_in_place(self) -> None:
        try:
            self.table.check_in_place()
        except StateError:
            self.restore()  # which says it where the model was moved with a member
            raise

    def restore(self) -> None:
        """Puts back the bits from before `perturb`; does nothing where no member is applied.

        StateError where a tensor's memory was given up meanwhile, or where the model was moved or
        cast under the member and so keeps it.
        """
        with self._turn:
            self.table.check_memory()
            applied = self.perturbed
            if applied:
                self._outside.keep()
                self._outside.tell()
            if self.memory == "lean":
                self._core.restore(self._records, self.threads)
            elif self._perturbed:
                self._core.refresh(self.threads)
                self._perturbed = False
            if applied:
                self._require_not_taken_away()
            self._outside.require_not_under_member(self.memory)

    def _require_not_taken_away(self) -> None:
        try:
            self.table.check_in_place()
        except StateError as error:
            raise StateError(
                f"{error} That was done under a member: what was moved holds the member's weights. "
                "Load the model's weights again first."
            ) from None

    def require_ready(self) -> None:
        """StateError where an edit would not reach the model, or would undo somebody else's."""
        with self._turn:
            self._require_in_place()
            if (self.perturbed or self._outside.untold) and self._outside.found() is not None:
                self.restore()  # which says it
            self._outside.require_known(self._bases, self.memory)

    def apply(self, update: Update) -> UpdateReport:
        """`update` with its arguments as one value."""
        number, strength = update.pull()
        if number:
            self.require_anchor()
        with self._turn:
            self.require_ready()
            self.restore()
            self._outside.tell()
            core = self._streamed if number and self._streamed is not None else self._core
            saturated = core.update(
                update.members[0].noise_number if update.members else 0,
                [member.spec for member in update.members],
                list(update.coefficients),
                number,
                strength,
                update.rounding == "stochastic",
                update.seed,
                self.threads,
            )
            if number and self.anchor is not None:
                self.anchor.release()
        return UpdateReport(saturated)

    def require_anchor(self) -> None:
        """StateError where there is none for decay."""
        if self.anchor is None:
            raise StateError(
                "decay has no anchor to pull to; make the weights with "
                "Weights(table, anchor=Anchor.in_memory(table)), or Anchor.from_safetensors."
            )

    def checksum(self) -> str:
        """16 hex digits of the live bits: equal iff the bits are, on any target and layout.

        A sum modulo 2^64 over elements, so that the checksums of shards add up to the whole's;
        segments that are not `counted` (another worker's are) stay out of it. StateError where the
        model was moved or cast since the table was made.
        """
        with self._turn:
            self.table.check_in_place()
            return f"{self._counted.checksum(self.threads):016x}"

    def __reduce__(self) -> NoReturn:
        raise StateError(
            "Weights edit their model where it lies, and cannot be copied or pickled. Copy the "
            "model, and make Weights of the copy."
        )

    def anchor_checksum(self) -> str | None:
        """The same of the anchor's elements, in its own dtype; None without an anchor."""
        if self.anchor is None:
            return None
        rows = self.table.rows()
        self.anchor.fill(rows, self.table)
        rows["live"], rows["live_dtype"] = rows["anchor"], rows["anchor_dtype"]
        rows["live_row_stride"], rows["live_column_stride"] = rows["anchor_row_stride"], 1
        rows = rows[self.table.counted]
        checksum = make_table(rows, self.anchor.device).checksum(self.threads)
        self.anchor.release()
        return f"{checksum:016x}"

    def state(self) -> list[torch.Tensor]:
        """What updates start from, a tensor a segment: fp32 bases ("master"), or the live weights.

        Not copies: read them before the next call. StateError as of `checksum`.
        """
        self._require_in_place()
        self.restore()
        if self.memory == "master":
            return list(self._bases)
        return [segment.tensor.detach() for segment in self.table.segments]

    def load_state(self, state: Sequence[torch.Tensor]) -> None:
        """Takes another run's `state`, in the same order, shapes and dtypes; bits are kept."""
        with self._turn:
            own = self.state()
            if not all(isinstance(tensor, torch.Tensor) for tensor in state):
                raise ParameterError(
                    f"the state is a {type(state).__name__} of more than tensors; give the list "
                    "that `state` returns (of a dict its values, in the table's order)."
                )
            if [(t.shape, t.dtype) for t in state] != [(t.shape, t.dtype) for t in own]:
                raise ParameterError(
                    f"a state of {len(state)} tensors does not fit this table of {len(own)} "
                    f'segments under memory="{self.memory}"; shapes and dtypes must be the same.'
                )
            self._outside.tell()
            with torch.inference_mode():  # of bases or weights made in it, torch asks for it again
                for mine, tensor in zip(own, state, strict=True):
                    mine.copy_(tensor)
            if self.memory == "master":
                self._core.refresh(self.threads)
            else:
                self.rebase()

    def write_state(self, path: Path, told: Mapping[str, str]) -> None:
        """`state` in a safetensors file with `told` beside it; EsfastError where the disk fails."""
        with self._turn:
            state_file.write(path, self.state(), self._checksum_of, told)

    def read_state(self, path: Path) -> None:
        """Takes what `write_state` wrote; whatever is raised, no weight was touched.

        ValueError for what is damaged or does not fit this table.
        """
        self.load_state(self.check_state(path))

    def check_state(self, path: Path) -> list[torch.Tensor]:
        """The tensors of a file of `write_state`, compared with this table; ValueError as above."""
        try:
            return state_file.read(path, self.state(), self._checksum_of)
        except state_file.UNREADABLE as error:
            raise ValueError(str(error)) from error

    def rebase(self) -> None:
        """Takes the live weights as they are, edited by somebody else, as what edits start from.

        StateError where a member is applied.
        """
        with self._turn:
            if self.perturbed:
                raise StateError(
                    "a member is applied; restore before the weights are edited elsewhere."
                )
            if self._bases:
                self._core.capture(self.threads)
            self._outside.accept()

    def _checksum_of(self, state: Sequence[torch.Tensor]) -> str:
        segments = zip(self.table.segments, state, strict=True)
        table = ParameterTable(replace(segment, tensor=tensor) for segment, tensor in segments)
        return Weights(table, threads=self.threads).checksum()

    def require_room(self, sigma: float, noise: str = "gaussian") -> int:
        """`expected_bytes`; EsfastError where lean's records would find fewer free."""
        needed, room = self.expected_bytes(sigma, noise), free_bytes(self.table.device)
        if self.memory == "lean" and room is not None and room < needed:
            raise EsfastError(
                f"restoring members exactly needs about {readable(needed)} of memory beside the "
                f"weights, and {readable(room)} are available. Free some, or lower sigma."
            )
        return needed

    def expected_bytes(self, sigma: float, noise: str = "gaussian") -> int:
        """Bytes that this memory mode takes beside the weights for members of this sigma.

        Exact for shadow and master; for lean measured on one chunk in 16 of the weights as they are
        (each perturbed and restored in place).
        """
        if self.memory != "lean":
            return sum(base.nbytes for base in self._bases)
        member, scale = Member(seed=0, noise=noise), _scale(1, sigma)
        with self._turn:
            self.restore()
            drawn = member.noise_number, member.spec, scale
            return int(self._core.expected_record_bytes(*drawn, _SAMPLE_STRIDE, self.threads))

    def memory_use(self) -> MemoryUse:
        """What is held now: lean's records keep their memory between members."""
        extra = self._records.bytes() + sum(base.nbytes for base in self._bases)
        anchor = 0 if self.anchor is None else self.anchor.resident_bytes
        anchor += 0 if self._streamed is None else self._streamed.bytes
        return MemoryUse(self.table.nbytes, extra, anchor)


def weights_of(
    table: ParameterTable,
    memory: str = "lean",
    anchor: Path | bool = False,
    threads: int | None = None,
) -> Weights:
    """`Weights` over a table of this process.

    anchor: the safetensors file or Hugging Face folder that decay pulls to (mapped: a few MB
    are resident while an update runs), True for a copy of the weights as they are now, False for
    none.
    """
    if isinstance(anchor, bool):
        made = Anchor.in_memory(table) if anchor else None
    else:
        made = Anchor.from_safetensors(anchor, table)
    return Weights(table, memory, made, threads)
