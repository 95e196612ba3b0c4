"""What a process holds of some entries of a parameter, against taking them from the whole; two processes do it for real
in test_devices.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from safeneuron.errors import InputError
from safeneuron.runtime import sharding

INDEX = torch.tensor([0, 3, 4, 10, 16])
ROWS, COLUMNS = 17, 23


def a_parameter(rows: int = ROWS, columns: int = COLUMNS) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, columns) if columns else (rows,)
    return nn.Parameter(torch.randn(shape, generator=generator))


@contextmanager
def process(rank: int, count: int) -> Iterator[None]:
    """As one of many processes, none of which hears of the others: what they would exchange stays as it is."""
    dist.init_process_group("fake", rank=rank, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def by_rows(whole: Tensor, count: int, replicas: int) -> DTensor:
    """Its block of the rows, as FSDP2 would leave it in this process."""
    shape = (replicas, count) if replicas > 1 else (count,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    placements = [Replicate(), Shard(0)][-len(shape) :]
    chunks = list(whole.detach().chunk(count))
    chunks += [whole.detach()[:0]] * (count - len(chunks))
    local = chunks[mesh.get_local_rank("shard")].clone()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )


# -- whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
def test_a_whole_parameter_is_one_part(dim):
    parameter = a_parameter()
    (part,) = sharding.local_parts("p", parameter, dim, INDEX)
    expected = parameter.detach().index_select(dim, INDEX)
    assert torch.equal(part.values(), expected)
    assert part.shape == expected.shape
    assert torch.equal(sharding.gather_whole("p", parameter, dim, INDEX), expected)
    assert torch.equal(sharding.first_rows("p", parameter, 4), parameter[:4])
    assert sharding.together([True, False]) == [True, False]


def test_parts_are_restored_in_the_precision_that_they_have():
    parameter = a_parameter()
    (part,) = sharding.local_parts("p", parameter, 1, INDEX)
    saved, before = part.values(), parameter.detach().clone()
    with torch.no_grad():
        parameter += 1.0
    part.restore(saved.double())
    assert torch.equal(parameter[:, INDEX], before[:, INDEX])
    assert (parameter != before).sum() == ROWS * (COLUMNS - len(INDEX))


# -- by rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "replicas"), [(1, 1), (2, 1), (5, 1), (8, 1), (40, 1), (3, 2)])
@pytest.mark.parametrize(("dim", "columns"), [(0, COLUMNS), (1, COLUMNS), (0, 0)], ids=["rows", "columns", "bias"])
def test_blocks_of_rows_make_the_whole(dim, columns, count, replicas):
    """Seventeen rows over 40 processes: most of them hold none."""
    parameter = a_parameter(columns=columns)
    expected = parameter.detach().index_select(dim, INDEX)
    gathered, held = torch.zeros_like(expected), 0
    for rank in range(count):
        with process(rank, count * replicas):
            here = by_rows(parameter, count, replicas)
            (part,) = sharding.local_parts("p", nn.Parameter(here), dim, INDEX)
            held += part.values().numel()
            assert part.values().shape == part.shape
            # The others' entries are zero here, as this process does not hear of them.
            gathered += sharding.gather_whole("p", nn.Parameter(here), dim, INDEX)
    assert torch.equal(gathered, expected)
    assert held == expected.numel(), "each entry is held once"


@pytest.mark.parametrize("dim", [0, 1])
def test_a_block_is_restored_and_its_gradient_cleared(dim):
    with process(1, 3):
        parameter = nn.Parameter(by_rows(a_parameter(), 3, 1))
        (part,) = sharding.local_parts("p", parameter, dim, INDEX)
        local, saved = parameter.to_local().detach(), part.values()
        before = local.clone()
        local += 1.0
        part.restore(saved)
        stayed = local == before
        assert int(stayed.sum()) == saved.numel() > 0
        parameter.grad = torch.ones_like(parameter)
        assert part.has_gradient()
        part.clear_gradient()
        assert not part.has_gradient()
        assert torch.equal(parameter.grad.to_local() == 0, stayed)


@pytest.mark.parametrize(
    ("placements", "shape"),
    [([Shard(1)], (2,)), ([Partial()], (2,)), ([Shard(0), Shard(0)], (2, 2)), ([Shard(0), Shard(1)], (2, 2))],
    ids=str,
)
def test_other_ways_of_spreading_are_refused(placements, shape):
    with process(0, 2 ** len(shape)):
        mesh = init_device_mesh("cpu", shape)
        parameter = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, placements, run_check=False))
        for ask in (sharding.local_parts, sharding.gather_whole):
            with pytest.raises(InputError, match="blocks of rows"):
                ask("mlp.up_proj", parameter, 0, torch.tensor([0]))


# -- experts ----------------------------------------------------------------------------------------------------------

EXPERTS = torch.tensor([0, 0, 2, 4, 4])
PLACES = torch.tensor([1, 3, 0, 2, 6])


def stacked(dim: int) -> nn.Parameter:
    """Five experts of seven rows and columns and some more of the other, or of seven biases."""
    shape = {0: (5, 7), 1: (5, 7, 4), 2: (5, 4, 7)}[dim]
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def entries(tensor: Tensor, dim: int) -> Tensor:
    return torch.stack(
        [tensor[expert].select(max(dim, 1) - 1, place) for expert, place in zip(EXPERTS, PLACES, strict=True)]
    )


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["bias", "rows", "columns"])
@pytest.mark.parametrize("how", ["whole", "rows", "zero"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_parts_of_experts_make_the_whole(dim, how, count):
    parameter, at = stacked(dim), max(dim, 1)
    expected = entries(parameter.detach(), dim)
    gathered, first, held = torch.zeros_like(expected), torch.zeros_like(parameter[:1]), 0
    for rank in range(1 if how == "whole" else count):
        with process(rank, count):
            here = {
                "whole": lambda: parameter,
                "rows": lambda: nn.Parameter(by_rows(parameter, count, 1)),
                "zero": lambda rank=rank: partitioned(parameter, rank, count),
            }[how]()
            parts = sharding.local_parts("p", here, at, PLACES, EXPERTS)
            held += parts[0].values().numel()
            assert parts[0].shape == parts[0].values().shape
            gathered += sharding.gather_whole("p", here, at, PLACES, EXPERTS)
            first += sharding.first_rows("p", here, 1)
    assert torch.equal(gathered, expected)
    assert torch.equal(first, parameter[:1])
    assert held == expected.numel()


@pytest.mark.parametrize("dim", [1, 2], ids=["rows", "columns"])
@pytest.mark.parametrize("how", ["whole", "rows"])
def test_parts_of_experts_are_restored_and_their_gradients_cleared(dim, how):
    with process(1, 2):
        parameter = stacked(dim) if how == "whole" else nn.Parameter(by_rows(stacked(dim), 2, 1))
        (part,) = sharding.local_parts("p", parameter, dim, PLACES, EXPERTS)
        local = parameter.detach() if how == "whole" else parameter.to_local().detach()
        saved, before = part.values(), local.clone()
        local += 1.0
        part.restore(saved)
        stayed = local == before
        assert int(stayed.sum()) == saved.numel() > 0
        parameter.grad = torch.ones_like(parameter)
        assert part.has_gradient()
        part.clear_gradient()
        assert not part.has_gradient()
        cleared = parameter.grad if how == "whole" else parameter.grad.to_local()
        assert torch.equal(cleared == 0, stayed)


# -- flat -------------------------------------------------------------------------------------------------------------


def partitioned(whole: Tensor, rank: int, count: int, swap: bool = False) -> nn.Parameter:
    """What DeepSpeed's ZeRO-3 makes of a parameter: nothing in it, its part of the flattened weights beside it, padded,
    and the master copy in the middle of a longer tensor; with the names that version 0.19.8 gives them."""
    size = -(-whole.numel() // count)
    padded = torch.cat([whole.detach().flatten(), torch.full((size * count - whole.numel(),), 7.0)])
    flat = padded[rank * size : (rank + 1) * size].clone()
    flat.ds_numel = size
    master = nn.Parameter(torch.cat([torch.zeros(5), flat.clone(), torch.zeros(2)]))
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape, parameter.ds_numel = 3, whole.shape, whole.numel()
    parameter.ds_tensor, parameter.ds_process_group = flat, dist.group.WORLD
    parameter._z3_optimizer = SimpleNamespace(
        swap_optimizer=swap,
        get_param_id=lambda parameter: parameter.ds_id,
        grad_position={3: [1, 5, size]},
        fp32_partitioned_groups_flat=[None, master],
    )
    return parameter


@pytest.mark.parametrize("count", [1, 2, 5, 400])
@pytest.mark.parametrize(("dim", "columns"), [(0, COLUMNS), (1, COLUMNS), (0, 0)], ids=["rows", "columns", "bias"])
def test_partitions_of_zero_3_make_the_whole(dim, columns, count):
    parameter = a_parameter(columns=columns)
    expected = parameter.detach().index_select(dim, INDEX)
    gathered, top, held = torch.zeros_like(expected), torch.zeros_like(parameter[:4]), [0, 0]
    for rank in range(count):
        with process(rank, count):
            here = partitioned(parameter, rank, count)
            assert sharding.shape_of(here) == parameter.shape
            weights, master = sharding.local_parts("p", here, dim, INDEX)
            assert weights.tensor is here.ds_tensor
            assert torch.equal(weights.values(), master.values())
            held = [held[0] + len(weights.index), held[1] + len(master.index)]
            gathered += sharding.gather_whole("p", here, dim, INDEX)
            top += sharding.first_rows("p", here, 4)
    assert torch.equal(gathered, expected)
    assert torch.equal(top, parameter[:4])
    assert held == [expected.numel()] * 2


@pytest.mark.parametrize("dim", [0, 1])
def test_masters_of_zero_1_and_2_are_found(dim):
    """Of two processes the second has the end of the parameter, at the beginning of its master copies."""
    parameter = a_parameter()
    middle = 100
    master = nn.Parameter(torch.cat([parameter.detach().flatten()[middle:], torch.full((50,), 7.0)]))
    count = parameter.numel() - middle
    parameter._hp_mapping = SimpleNamespace(
        hp_fragment=master.narrow(0, 0, count),
        hp_fragment_address=SimpleNamespace(start=0, numel=count),
        lp_fragment_address=SimpleNamespace(start=middle, numel=count),
    )
    weights, copy = sharding.local_parts("p", parameter, dim, INDEX)
    expected = parameter.detach().index_select(dim, INDEX)
    assert torch.equal(weights.values(), expected)
    numbers = torch.arange(parameter.numel()).view(ROWS, COLUMNS).index_select(dim, INDEX)
    assert torch.equal(copy.values(), expected[numbers >= middle])
    master.grad = torch.ones_like(master)
    assert copy.has_gradient()
    with torch.no_grad():
        master += 1.0
    copy.restore(expected[numbers >= middle])
    stayed = torch.zeros(parameter.numel(), dtype=torch.bool)
    stayed[numbers[numbers >= middle]] = True
    assert torch.equal(master[:count] == parameter.flatten()[middle:], stayed[middle:])


def test_a_parameter_whose_masters_are_elsewhere_has_one_part():
    parameter = a_parameter()
    parameter._hp_mapping = None
    assert len(sharding.local_parts("p", parameter, 0, INDEX)) == 1


def test_weights_and_masters_on_nvme_are_refused():
    with process(0, 2):
        parameter = partitioned(a_parameter(), 0, 2)
        parameter.ds_tensor.data = torch.ones(1)
        with pytest.raises(InputError, match="NVMe"):
            sharding.gather_whole("mlp.up_proj", parameter, 0, INDEX)
        parameter = partitioned(a_parameter(), 0, 2, swap=True)
        with pytest.raises(InputError, match="master weights"):
            sharding.local_parts("mlp.up_proj", parameter, 0, INDEX)


@pytest.mark.parametrize("zero", [False, True])
def test_gradients_are_zero_before_anything_is_made_of_them(zero):
    """ZeRO takes a gradient away in a hook of its own, which came first."""
    parameter, seen = a_parameter(), []
    if zero:
        parameter._hp_mapping = None
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    handle = sharding.keep_gradient_zero("p", parameter, 1, INDEX)
    (parameter * torch.arange(1.0, 1 + COLUMNS)).sum().backward()
    (gradient,) = seen if zero else [parameter.grad]
    assert not gradient[:, INDEX].any()
    assert int((gradient != 0).sum()) == ROWS * (COLUMNS - len(INDEX))
    handle.remove()
    parameter.sum().backward()
    assert parameter.grad.all()


# -- optimizers -------------------------------------------------------------------------------------------------------


def named(name: str, **attributes: object) -> object:
    return type(name, (SimpleNamespace,), {})(**attributes)


def test_the_optimizer_that_steps_is_found():
    sgd = torch.optim.SGD([a_parameter()], lr=0.1)
    assert sharding.stepper(sgd) is sgd
    assert sharding.stepper(Accelerator(cpu=True).prepare_optimizer(sgd)) is sgd
    assert sharding.stepper(named("DeepSpeedZeroOptimizer_Stage3", optimizer=sgd)) is sgd


UNKNOWN: dict[str, Callable[[torch.optim.Optimizer], object]] = {
    "ZeRO-0 in 16 bits": lambda sgd: named("FP16_UnfusedOptimizer", optimizer=sgd),
    "SuperOffload": lambda sgd: named("SuperOffloadOptimizer_Stage3", optimizer=sgd),
    "ZenFlow": lambda sgd: named("ZenFlowZeroOptimizerParallel", optimizer=sgd),
    "offload in part": lambda sgd: named("DeepSpeedZeroOptimizer_Stage3", optimizer=sgd, backup_optimizer=sgd),
    "no optimizer": lambda sgd: [sgd],
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_optimizers_that_cannot_be_followed_are_refused(kind):
    given = UNKNOWN[kind](torch.optim.SGD([a_parameter()], lr=0.1))
    with pytest.raises(InputError, match="reached"):
        sharding.stepper(given)
