"""Parameter tables: what they hold, and what they refuse before anything is changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import tensor_id

from esfast import EsfastError, EvolutionStrategy, Member, ParameterTable, Weights
from esfast.errors import ParameterError
from esfast.segments import Segment

COLLIDING = ("w.101237", "w.144138")  # one 32-bit tensor id; found by trying w.0, w.1, ...


class Wrapping(torch.Tensor):
    """As DTensor and quantised tensors are: the elements are another tensor's."""

    def __new__(cls, inner: torch.Tensor) -> Wrapping:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return args[0]


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight


def test_from_module_names_and_sizes() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2).half())
    table = ParameterTable.from_module(model)
    assert list(table.names) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert table.numel == 12 + 4 + 8 + 2
    assert table.nbytes == 4 * 16 + 2 * 10
    assert torch.device(table.device) == torch.device("cpu")
    for one, parameter in zip(table.segments, model.parameters(), strict=True):
        assert one.tensor.data_ptr() == parameter.data_ptr()
        assert tuple(one.shape) == tuple(parameter.shape)


def test_tied_weights_are_one_tensor() -> None:
    model = Tied()
    table = ParameterTable.from_module(model)
    assert list(table.names) == ["embed.weight", "norm.weight", "norm.bias"]
    assert table.numel == 66 + 12
    es = EvolutionStrategy(model, sigma=0.1, population_size=2)
    before = model.head.weight.detach().clone()
    for _ in es.population():
        assert model.head.weight is model.embed.weight
        assert not torch.equal(model.head.weight, before)
    assert torch.equal(model.head.weight, before)


def test_tensors_that_are_tied_by_storage_alone_are_refused_or_one() -> None:
    """Two names over one storage would be perturbed twice."""
    w = torch.ones(4, 3)
    try:
        table = ParameterTable.from_tensors({"a": w, "b": w})
    except EsfastError as error:
        assert "a" in str(error) and "b" in str(error)
    else:
        assert table.numel == 12


def test_buffers_are_not_parameters() -> None:
    model = torch.nn.BatchNorm1d(4)
    assert set(ParameterTable.from_module(model).names) == {"weight", "bias"}


def test_include_and_exclude() -> None:
    model = Tied()
    only = ParameterTable.from_module(model, include=["norm.*"])
    assert set(only.names) == {"norm.weight", "norm.bias"}
    rest = ParameterTable.from_module(model, exclude=["norm.*"])
    assert list(rest.names) == ["embed.weight"]
    with pytest.raises(EsfastError, match="table is empty"):
        ParameterTable.from_module(model, exclude=["*"])


def test_a_pattern_that_matches_nothing_is_said() -> None:
    """exclude=["embed"] would edit the embedding, ["head.weight"] what the head is tied to."""
    for options in ({"exclude": ["norm.*", "embed"]}, {"include": ["norm.*", "head.weight"]}):
        with pytest.raises(ParameterError, match="matches none of the 3 tensors"):
            ParameterTable.from_module(Tied(), **options)


@pytest.mark.parametrize("what", ["include", "exclude"])
@pytest.mark.parametrize("given", ["norm.*", (pattern for pattern in ["norm.*"])], ids=type)
def test_patterns_are_a_list(what: str, given: object) -> None:
    with pytest.raises(ParameterError, match=f"{what}=.* is no list of patterns"):
        ParameterTable.from_module(Tied(), **{what: given})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(3, 3).to_sparse(),
        Wrapping(torch.ones(3)),
        torch.nn.UninitializedParameter(),
    ],
    ids=["sparse", "wrapping", "lazy"],
)
def test_exclude_lets_tensors_without_plain_memory_through(other: torch.Tensor) -> None:
    model = torch.nn.Linear(2, 2)
    lazy = isinstance(other, torch.nn.UninitializedParameter)
    model.odd = other if lazy else torch.nn.Parameter(other)
    weights = Weights(ParameterTable.from_module(model, exclude=["odd"]))
    weights.perturb(Member(seed=1), 0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_is_a_module() -> None:
    model = torch.jit.trace(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.ones(1, 2))
    before = model(torch.ones(1, 2))
    Weights(ParameterTable.from_module(model)).perturb(Member(seed=1), 0.1)
    assert not torch.equal(model(torch.ones(1, 2)), before)


def test_exclude_lets_a_bad_dtype_through() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double())
    with pytest.raises(ParameterError, match=r"'1\.weight' is float64"):
        ParameterTable.from_module(model)
    assert len(ParameterTable.from_module(model, exclude=["1.*"]).names) == 2


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64]
)
def test_other_dtypes_are_refused_with_what_to_do(dtype: torch.dtype) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    with pytest.raises(ParameterError) as caught:
        ParameterTable.from_tensors({"fine": torch.ones(2), name: torch.ones(2).to(dtype)})
    message = str(caught.value)
    assert name in message and str(dtype).removeprefix("torch.") in message
    for word in ("float32", "float16", "bfloat16", "exclude"):
        assert word in message


def test_the_colliding_names_collide() -> None:
    assert tensor_id(COLLIDING[0]) == tensor_id(COLLIDING[1])


def test_id_collisions_are_refused() -> None:
    one, two = COLLIDING
    with pytest.raises(ParameterError) as caught:
        ParameterTable.from_tensors({one: torch.ones(2), "x": torch.ones(2), two: torch.ones(2)})
    assert one in str(caught.value) and two in str(caught.value)


def piece(rows: slice, columns: slice, name: str = "w") -> Segment:
    whole = torch.ones(8, 8)
    return Segment(name, (8, 8), whole[rows, columns].clone(), (rows.start, columns.start))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((slice(0, 4), slice(0, 8)), (slice(3, 8), slice(0, 8))),
        ((slice(0, 8), slice(0, 4)), (slice(0, 8), slice(3, 8))),
        ((slice(0, 8), slice(0, 8)), (slice(5, 6), slice(2, 3))),
        ((slice(2, 4), slice(2, 4)), (slice(2, 4), slice(2, 4))),
    ],
)
def test_overlapping_segments_are_refused(first: tuple, second: tuple) -> None:
    with pytest.raises(ParameterError, match="'w' is given twice for the same canonical elements"):
        ParameterTable([piece(*first), piece(*second)])


def test_what_lies_between_hides_no_overlap() -> None:
    upper, lower = piece(slice(0, 4), slice(0, 8)), piece(slice(4, 8), slice(0, 8))
    with pytest.raises(ParameterError, match="given twice"):
        ParameterTable([upper, lower, piece(slice(0, 1), slice(0, 8))])
    room = torch.ones(100)
    for parts in (
        (slice(0, 99, 2), slice(1, 2), slice(50, 51)), (slice(50, 60), slice(70, 80), slice(55, 57))
    ):  # fmt: skip
        with pytest.raises(ParameterError, match="shares memory"):
            ParameterTable.from_tensors({str(part): room[part] for part in parts})


def test_touching_segments_and_partial_tables_are_fine() -> None:
    table = ParameterTable([piece(slice(0, 4), slice(0, 8)), piece(slice(4, 8), slice(0, 3))])
    assert table.numel == 32 + 12


def test_segments_over_one_storage_are_refused() -> None:
    """Canonically apart, but in memory on top of each other."""
    room = torch.ones(6, 8)
    with pytest.raises(ParameterError, match="'b' shares memory"):
        ParameterTable(
            [Segment("a", (4, 8), room[:4], (0, 0)), Segment("b", (4, 8), room[2:6], (0, 0))]
        )


def test_interleaved_views_of_one_storage_are_fine() -> None:
    room = torch.ones(6, 8)
    table = ParameterTable.from_tensors({"even": room[:, ::2], "odd": room[:, 1::2]})
    weights = Weights(table)
    weights.perturb(Member(seed=1), 0.1)
    assert not (room == 1).any()
    weights.restore()
    assert (room == 1).all()


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(1, 4).expand(3, 4), "shares memory with itself"),
        (torch.as_strided(torch.ones(10), (4, 4), (2, 1)), "shares memory with itself"),
        (torch.ones(3, device="meta"), "is on the meta device"),
        (torch.ones(3, 3).to_sparse(), "is on the meta device or not strided"),
        (Wrapping(torch.ones(3)), "is a Wrapping that wraps other tensors"),
    ],
    ids=["expanded", "overlapping strides", "meta", "sparse", "wrapping"],
)
def test_tensors_without_memory_of_their_own_are_refused(tensor: torch.Tensor, reason: str) -> None:
    with pytest.raises(ParameterError, match=f"'w' {reason}"):
        ParameterTable.from_tensors({"w": tensor})


def test_things_that_are_not_tensors_are_refused() -> None:
    for bad in ([1.0, 2.0], None, "w"):
        with pytest.raises(EsfastError, match=f"'w' is a {type(bad).__name__}"):
            ParameterTable.from_tensors({"w": bad})  # type: ignore[dict-item]


BAD_SEGMENTS = {
    "outside": lambda: Segment("w", (4, 4), torch.ones(2, 4), (3, 0)),
    "negative": lambda: Segment("w", (4, 4), torch.ones(2, 4), (-1, 0)),
    "rank": lambda: Segment("w", (4, 4), torch.ones(8), (0,)),
    "start rank": lambda: Segment("w", (4, 4), torch.ones(2, 4), (0,)),
    "larger": lambda: Segment("w", (4, 4), torch.ones(5, 4), (0, 0)),
}


@pytest.mark.parametrize("case", BAD_SEGMENTS)
def test_segments_outside_their_tensor_are_refused(case: str) -> None:
    with pytest.raises(ParameterError, match="does not lie inside the canonical shape"):
        ParameterTable([BAD_SEGMENTS[case]()])


def test_shards_that_disagree_about_the_canonical_shape_are_refused() -> None:
    with pytest.raises(ParameterError, match="all segments of a tensor share one"):
        ParameterTable(
            [
                Segment("w", (8, 8), torch.ones(4, 8), (0, 0)),
                Segment("w", (8, 9), torch.ones(4, 8), (4, 0)),
            ]
        )


ODD_SEGMENTS = {
    "start": (lambda: Segment("w", (4, 4), torch.ones(2, 2), (1.0, 0.5)), "start="),  # type: ignore[arg-type]
    "shape": (lambda: Segment("w", "44", torch.ones(2, 2)), "shape='44'"),  # type: ignore[arg-type]
    "count": (
        lambda: Segment("w", (2**33, 2**33), torch.ones(2, 2)),
        r"expected at most 2\*\*64 elements",
    ),
    "name": (lambda: Segment("\ud800", (2,), torch.ones(2)), "no text that UTF-8 can hold"),
    "tensor": (lambda: torch.ones(3), "was given a Tensor for a segment"),
}


@pytest.mark.parametrize("case", ODD_SEGMENTS)
def test_what_is_no_segment_is_refused(case: str) -> None:
    make, said = ODD_SEGMENTS[case]
    with pytest.raises(ParameterError, match=said):
        ParameterTable([make()])  # type: ignore[list-item]


def test_numbers_of_any_library_name_a_box() -> None:
    start = (np.int64(1), torch.tensor(2))
    segment = Segment("w", torch.Size([4, 4]), torch.ones(2, 2), start)  # type: ignore[arg-type]
    assert (segment.shape, segment.origin) == ((4, 4), (1, 2))


def test_shards_of_two_dtypes_are_refused() -> None:
    halves = [
        Segment("w", (4, 4), torch.ones(2, 4), (0, 0)),
        Segment("w", (4, 4), torch.ones(2, 4).half(), (2, 0)),
    ]
    with pytest.raises(ParameterError, match=r"torch.float32 and torch.float16; all segments"):
        ParameterTable(halves)


def test_a_wrapped_module_has_the_names_of_what_it_wraps() -> None:
    """Or its noise, and its journal, would be another's."""
    inner = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    plain = ParameterTable.from_module(inner)
    for wrapped in (torch.compile(inner), torch.nn.DataParallel(inner)):
        table = ParameterTable.from_module(wrapped)
        assert table.names == plain.names
        assert [s.tensor.data_ptr() for s in table.segments] == [
            s.tensor.data_ptr() for s in plain.segments
        ]
    part = torch.nn.Sequential(torch.compile(torch.nn.Linear(3, 4)), torch.nn.Linear(4, 2))
    assert ParameterTable.from_module(part).names == plain.names


def test_what_is_no_model_is_refused() -> None:
    for make, said in (
        (lambda: EvolutionStrategy({"w": torch.ones(2)}), "got a dict; give a torch module"),  # type: ignore[arg-type]
        (lambda: Weights(torch.nn.Linear(2, 2)), "got a Linear; give a ParameterTable"),  # type: ignore[arg-type]
        (lambda: ParameterTable.from_module({"w": torch.ones(2)}), "a dict was given"),  # type: ignore[arg-type]
        (lambda: ParameterTable.from_module(torch.nn.LazyLinear(3)), "has no shape yet"),
    ):
        with pytest.raises(EsfastError, match=said):
            make()


def test_an_empty_table_is_refused() -> None:
    for build in (
        lambda: ParameterTable([]),
        lambda: ParameterTable.from_tensors({}),
        lambda: ParameterTable.from_module(torch.nn.ReLU()),
    ):
        with pytest.raises(EsfastError, match="table is empty"):
            build()


def test_a_start_left_out_is_zero() -> None:
    table = ParameterTable([Segment("w", (4, 4), torch.ones(4, 4))])
    assert table.numel == 16


def test_parameters_that_require_grad_and_inference_tensors_are_taken() -> None:
    with torch.inference_mode():
        held = torch.ones(5)
    weights = Weights(ParameterTable.from_tensors({"a": held, "b": torch.nn.Parameter(held + 1)}))
    weights.perturb(Member(seed=1), 0.1)
    weights.restore()
    assert (held == 1).all()


def test_the_module_may_not_be_moved_away_unseen() -> None:
    """A table holds the storage it was built on; a model cast since then is a different one, and
    perturbing the old storage would leave the model alone in silence."""
    model = torch.nn.Linear(4, 4)
    weights = Weights(ParameterTable.from_module(model))
    model.to(torch.bfloat16)
    before = model.weight.detach().clone()
    try:
        weights.perturb(Member(seed=1), 0.5)
    except EsfastError as error:
        assert "weight" in str(error)
        return
    assert not torch.equal(model.weight, before)
