"""Where this process holds the entries of a parameter that many processes share, and how to see them whole again.

Three ways of holding a parameter are understood. Whole: one device, or DDP. By rows: a DTensor of FSDP2, whose
processes hold blocks of rows, all replicas alike (also hybrid, HSDP). Flat: DeepSpeed's ZeRO, whose optimizer steps on
a master copy of its own, a run of the flattened parameter in each process, which the weights then follow. In each of
them, what this process holds is ``index`` along ``dim`` of some tensor of its own: a ``Part``. Of a parameter of many
experts, ``[expert, row, column]``, an entry is a row or column of one expert.

Shapes: a whole parameter is ``[row, column]``, a bias ``[row]``; ``index`` and ``experts`` are ``[entry]``, in the
coordinates of the whole parameter; flat tensors are ``[number]``, row after row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.hooks import RemovableHandle

from safeneuron.errors import InputError

# DeepSpeed's optimizers whose own optimizer steps, in this process, on the master copy that ``_master`` finds.
ZERO = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")


@dataclass(frozen=True)
class Part:
    """What this process holds of some entries: ``index`` along ``dim`` of ``tensor``, or of its own shard of that.

    With ``experts``, as many, entry ``n`` is ``index[n]`` along ``dim`` within ``tensor[experts[n]]``.
    """

    name: str
    tensor: Tensor
    dim: int
    index: Tensor
    experts: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of ``values()``."""
        shape = list(_local(self.tensor).shape)
        if self.experts is not None:
            shape = [len(self.index), *(size for at, size in enumerate(shape) if at not in (0, self.dim))]
        else:
            shape[self.dim] = len(self.index)
        return torch.Size(shape)

    def values(self) -> Tensor:
        """A copy of the entries as they are now; those of experts one after another, ``[entry, ...]``."""
        with torch.no_grad():
            return _selected(_local(self.tensor), self.dim, self.index, self.experts)

    def restore(self, values: Tensor) -> None:
        """Write the entries, in the precision that they have here."""
        with torch.no_grad():
            local = _local(self.tensor)
            new = values.to(local.device, local.dtype)
            if self.experts is None:
                local.index_copy_(self.dim, self.index, new)
            else:
                local.movedim(self.dim, 1)[self.experts, self.index] = new

    def clear_gradient(self) -> None:
        """Set the gradient of the entries to zero."""
        if self.tensor.grad is not None:
            with torch.no_grad():
                _clear(_local(self.tensor.grad), self.dim, self.index, self.experts)

    def has_gradient(self) -> bool:
        """Whether any entry would be moved; NaN is what clipping makes of zero when another gradient is not finite."""
        if self.tensor.grad is None:
            return False
        with torch.no_grad():
            gradient = _selected(_local(self.tensor.grad), self.dim, self.index, self.experts)
        return bool((gradient.abs() > 0).any())


@dataclass(frozen=True)
class _Run:
    """Entries ``first`` to ``first + count`` of a flattened parameter, which stand from ``start`` on in ``flat``."""

    flat: Tensor
    start: int
    first: int
    count: int

    def positions(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these entries of the flattened parameter are in the run, and where in ``flat`` they stand."""
        here = ((numbers >= self.first) & (numbers < self.first + self.count)).nonzero().flatten()
        return here, numbers[here] - self.first + self.start


def local_parts(
    name: str, parameter: nn.Parameter, dim: int, index: Tensor, experts: Tensor | None = None
) -> list[Part]:
    """What this process holds of the entries ``index`` along ``dim`` of the whole parameter, or of its ``experts``.

    Args:
        name: What an error calls the parameter.
        parameter: Whole, a DTensor of FSDP2, or one of DeepSpeed's ZeRO.
        dim: Along which entries are chosen.
        index: Their places, ``[entry]``, in the whole parameter.
        experts: For a parameter of many experts, in which of them each entry is, ``[entry]``.

    Returns:
        The part of the weights themselves; where the optimizer steps on a copy of them, then the part of that copy.

    Raises:
        InputError: If the parameter is spread in a way that is not understood.
    """
    index = index.to(parameter.device)
    # FSDP2: blocks of rows, or of whole experts. Columns are in every block.
    if isinstance(parameter, DTensor):
        here, _ = _rows_here(name, parameter)
        along = index if experts is None else experts.to(index.device)
        if dim == 0 or experts is not None:
            held = (along >= here.start) & (along < here.stop)
            if experts is not None:
                return [Part(name, parameter, dim, index[held], along[held] - here.start)]
            index = index[held] - here.start
        return [Part(name, parameter, dim, index)]
    # ZeRO: runs of the flattened weights (stage 3) and of the optimizer's own copy of them (all stages).
    runs = [run for run in (_partition(name, parameter), _master(name, parameter)) if run is not None]
    experts = None if experts is None else experts.to(parameter.device)
    weights = [] if _is_partitioned(parameter) else [Part(name, parameter, dim, index, experts)]
    if runs:
        numbers = _numbers(shape_of(parameter), dim, index, experts)
        weights += [Part(name, run.flat, 0, run.positions(numbers)[1].to(run.flat.device)) for run in runs]
    return weights


def gather_whole(name: str, parameter: nn.Parameter, dim: int, index: Tensor, experts: Tensor | None = None) -> Tensor:
    """The entries of the whole parameter, ``parameter.index_select(dim, index)`` or of its experts, in every process.

    Only these entries are exchanged, never a whole parameter. All processes that share the parameter must call it.

    Args:
        name: What an error calls the parameter.
        parameter: Whole, a DTensor of FSDP2, or one of DeepSpeed's ZeRO.
        dim: Along which entries are chosen.
        index: Their places, ``[entry]``, in the whole parameter.
        experts: For a parameter of many experts, in which of them each entry is, ``[entry]``.

    Returns:
        The entries, with ``len(index)`` along ``dim``; those of experts one after another, ``[entry, ...]``.

    Raises:
        InputError: If the parameter is spread in a way that is not understood.
    """
    index = index.to(parameter.device)
    # What is here: ``values``, and which ``rows`` of the result, or of its flattened form, they are.
    if isinstance(parameter, DTensor):
        here, group = _rows_here(name, parameter)
        values = local_parts(name, parameter, dim, index, experts)[0].values()
        rows = torch.arange(here.start, here.stop, device=index.device)
        if dim == 0 or experts is not None:
            along = index if experts is None else experts.to(index.device)
            rows = ((along >= here.start) & (along < here.stop)).nonzero().flatten()
    elif (run := _partition(name, parameter)) is not None:
        numbers = _numbers(shape_of(parameter), dim, index, experts)
        rows, places = run.positions(numbers.to(run.flat.device))
        values, group = run.flat.detach()[places], _zero(parameter).ds_process_group
    else:
        return _selected(parameter.detach(), dim, index, experts)
    shape = list(shape_of(parameter))
    shape[dim] = len(index)
    if experts is not None:
        shape = [len(index), *(size for at, size in enumerate(shape_of(parameter)) if at not in (0, dim))]
    # Each entry is in one process, zero in all others: the sum is the whole.
    gathered = values.new_zeros(shape if values.dim() == len(shape) else [math.prod(shape)])
    gathered.index_copy_(0, rows.to(values.device), values)
    return _sum_of_bits(gathered, group).view(shape)


def first_rows(name: str, parameter: nn.Parameter, count: int) -> Tensor:
    """The first rows of the whole parameter, in every process; see ``gather_whole``."""
    if not is_spread(parameter):
        return parameter.detach()[:count]
    rows = min(count, shape_of(parameter)[0])
    return gather_whole(name, parameter, 0, torch.arange(rows, device=parameter.device))


def is_spread(parameter: nn.Parameter) -> bool:
    """Whether only a part of the parameter may be in this process (FSDP2, ZeRO-3)."""
    return isinstance(parameter, DTensor) or _is_partitioned(parameter)


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, however it is spread."""
    return torch.Size(_zero(parameter).ds_shape) if _is_partitioned(parameter) else parameter.shape


def together(flags: Sequence[bool]) -> list[bool]:
    """For each flag whether it is true in any process. All processes must call it, with as many flags."""
    if not flags or not (dist.is_available() and dist.is_initialized()):
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int32, device=_meeting_place(None))
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def same_everywhere(text: str) -> bool:
    """Whether all processes have called this with the same text."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    largest = torch.tensor([number, -number], device=_meeting_place(None))
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return bool(largest.sum() == 0)


def settle(network: nn.Module) -> None:
    """Bring the parameters of FSDP2 back to their shards, where a forward pass alone has left them whole.

    Raises:
        InputError: For FSDP1, whose flat parameters cannot be frozen by rows and columns.
    """
    for module in network.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise InputError(
                f"{type(module.module).__name__} is wrapped in FSDP1, whose flat parameters have no rows and columns "
                "that could be frozen; use FSDP2 (fsdp_version: 2 in the config of accelerate, fully_shard in torch)"
            )
        if isinstance(module, FSDPModule):
            module.reshard()


def stepper(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that changes the weights, or their master copies, when ``optimizer`` steps.

    Args:
        optimizer: That one itself, or what accelerate or DeepSpeed made of it.

    Raises:
        InputError: If its steps cannot be followed.
    """
    from accelerate.optimizer import AcceleratedOptimizer

    inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    if isinstance(inner, torch.optim.Optimizer):
        return inner
    if type(inner).__name__ not in ZERO or hasattr(inner, "backup_optimizer"):
        raise InputError(
            f"{type(inner).__name__} steps on weights that cannot be reached; expected a torch.optim.Optimizer, or one "
            "that accelerate or DeepSpeed's ZeRO stage 1, 2 or 3 has wrapped (not ZeRO stage 0 in 16 bits, ZenFlow, "
            "SuperOffload, or an offload ratio below 1)"
        )
    followed = inner.optimizer
    assert isinstance(followed, torch.optim.Optimizer), "ZeRO steps with an optimizer of torch"
    return followed


def keep_gradient_zero(
    name: str, parameter: nn.Parameter, dim: int, index: Tensor, experts: Tensor | None = None
) -> RemovableHandle:
    """From now on the entries' gradients are zero as soon as they exist, before anything is made of them."""
    if _is_partitioned(parameter) or hasattr(parameter, "_hp_mapping"):
        # ZeRO takes the gradient away right after it was accumulated, so it is masked on its way there.
        handle = parameter.register_hook(lambda gradient: _clear(gradient.clone(), dim, index, experts))  # type: ignore[no-untyped-call]
        assert isinstance(handle, RemovableHandle), "torch makes no other"
        return handle
    # Under FSDP2 only this kind of hook sees the gradient of the shard; everywhere it comes before clipping.
    (part,) = local_parts(name, parameter, dim, index, experts)
    handle = parameter.register_post_accumulate_grad_hook(lambda _: part.clear_gradient())  # type: ignore[no-untyped-call]
    assert isinstance(handle, RemovableHandle), "torch makes no other"
    return handle


def _local(tensor: Tensor) -> Tensor:
    """The tensor, or this process's shard of it; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _selected(tensor: Tensor, dim: int, index: Tensor, experts: Tensor | None) -> Tensor:
    """A copy of the entries."""
    if experts is None:
        return tensor.index_select(dim, index)
    return tensor.movedim(dim, 1)[experts.to(tensor.device), index]


def _clear(tensor: Tensor, dim: int, index: Tensor, experts: Tensor | None) -> Tensor:
    """The tensor itself, its entries at zero."""
    if experts is None:
        return tensor.index_fill_(dim, index, 0)
    tensor.movedim(dim, 1)[experts.to(tensor.device), index] = 0
    return tensor


def _rows_here(name: str, parameter: DTensor) -> tuple[range, dist.ProcessGroup | None]:
    """The rows of the parameter in this process, and the processes that hold the others (``None`` if it holds all)."""
    mesh, placements = parameter.device_mesh, parameter.placements
    shared = [at for at, placement in enumerate(placements) if placement != Replicate()]
    rows = parameter.shape[0]
    if not shared:
        return range(rows), None
    # As torch chunks: equal blocks, rounded up, the last ones smaller or empty.
    chunk = -(-rows // mesh.size(shared[0]))
    first = min(chunk * mesh.get_local_rank(shared[0]), rows)
    here = range(first, min(first + chunk, rows))
    usual = len(shared) == 1 and placements[shared[0]] == Shard(0) and len(here) == _local(parameter).shape[0]
    if not usual:
        raise InputError(
            f"{name} is spread as {tuple(placements)} over a mesh of {tuple(mesh.shape)} devices; expected "
            "blocks of rows (Shard(0), with Replicate for hybrid sharding), as FSDP2 makes them without tensor "
            "parallelism"
        )
    return here, mesh.get_group(shared[0])


def _is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has shared out the weights themselves."""
    return hasattr(parameter, "ds_tensor")


def _zero(parameter: nn.Parameter) -> Any:
    """The parameter with the attributes that DeepSpeed's ZeRO has given it."""
    return parameter


def _partition(name: str, parameter: nn.Parameter) -> _Run | None:
    """The weights of a parameter that ZeRO-3 has shared out, as far as they are here."""
    if not _is_partitioned(parameter):
        return None
    zero = _zero(parameter)
    flat = zero.ds_tensor
    if flat.numel() < flat.ds_numel:
        raise InputError(
            f"the weights of {name} are swapped to NVMe, where they cannot be frozen; use offload_param.device = cpu "
            "or none in the DeepSpeed config"
        )
    first = flat.ds_numel * dist.get_rank(zero.ds_process_group)
    return _Run(flat, 0, first, max(0, min(flat.ds_numel, zero.ds_numel - first)))


def _master(name: str, parameter: nn.Parameter) -> _Run | None:
    """ZeRO's master copy of the parameter, as far as it is here, by the names of DeepSpeed 0.19."""
    # ZeRO-1 and -2: a fragment of the flat fp32 tensor, with its address there and in the parameter.
    if (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
        flat, there, inside = mapping.hp_fragment._base, mapping.hp_fragment_address, mapping.lp_fragment_address
        if flat.dim() != 1:
            raise RuntimeError(f"the tensor that ZeRO steps on has {flat.dim()} dimensions, expected 1")
        return _Run(flat, there.start, inside.start, inside.numel)
    # ZeRO-3: as much as of the weights, in the flat fp32 tensor of its group.
    if (zero := getattr(parameter, "_z3_optimizer", None)) is not None and parameter.requires_grad:
        if zero.swap_optimizer:
            raise InputError(
                f"the master weights of {name} are swapped to NVMe, where they cannot be frozen; use "
                "offload_optimizer.device = cpu or none in the DeepSpeed config"
            )
        group, start, _ = zero.grad_position[zero.get_param_id(parameter)]
        weights = _partition(name, parameter)
        assert weights is not None, "ZeRO-3 shares out all of its parameters"
        return _Run(zero.fp32_partitioned_groups_flat[group], start, weights.first, weights.count)
    return None


def _numbers(shape: torch.Size, dim: int, index: Tensor, experts: Tensor | None = None) -> Tensor:
    """The entries ``index`` along ``dim`` of a parameter, as numbers in its flattened form, row after row."""
    if experts is not None:
        first = experts.to(index.device) * math.prod(shape[1:])
        # Biases of experts: one number each.
        if len(shape) == 2:
            return first + index
        # Rows are runs of numbers, columns are numbers a row apart.
        across = torch.arange(shape[3 - dim], device=index.device)
        step, stride = (shape[2], 1) if dim == 1 else (1, shape[2])
        return ((first + index * step)[:, None] + across * stride).flatten()
    if len(shape) == 1:
        return index
    if len(shape) == 3:
        if dim != 0:
            raise RuntimeError(f"slices of whole experts lie along dimension 0, found {dim}")
        shape = torch.Size((shape[0], math.prod(shape[1:])))
    rows, columns = (torch.arange(size, device=index.device) for size in shape)
    rows, columns = (index, columns) if dim == 0 else (rows, index)
    return (rows[:, None] * shape[1] + columns).flatten()


def _sum_of_bits(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the processes, of which all but one hold zero at each place: exact, for NaN and -0 too."""
    if group is None:
        return values
    bits = values.view(torch.int8).to(_meeting_place(group))
    dist.all_reduce(bits, group=group)
    return bits.to(values.device).view(values.dtype)


def _meeting_place(group: dist.ProcessGroup | None) -> torch.device:
    """A device whose tensors these processes can exchange."""
    if "gloo" in dist.get_backend(group):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
