"""The replica-drift sentinel: do all ranks still hold the same parameters and momentum?

Data-parallel SGD keeps one set of weights in many copies, and an all-reduce of gradients does not notice when the
copies part: a checkpoint loaded on one rank, a write outside the update, another learning rate, gradients that were not
synchronised (pytorch#109191, #121594, #187732). The loss goes on falling, only less. So every so many iterations a hash
of 64 bits is compared.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pyallreduce import _core, gpu
from pyallreduce._buffer import is_dense
from pyallreduce.communicator import Communicator, Work

Span = tuple[int, int]  # address and bytes
WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
Named = Iterable[tuple[str, torch.nn.Parameter]]


class DriftSentinel:
    """Compares replicas in every ``every``-th iteration, the first included: checkpoints are loaded before it.

    ``look`` comes before an iteration's first bucket: it hashes, while an eager update has not mended or spread the
    damage yet. ``gather`` comes after it and starts an all-gather of one number per rank; ``finish`` comes after the
    last bucket and raises. So no hook waits for peers; and ranks that have finished as many iterations compare in the
    same ones.

    ``weights``: named parameters to compare. ``momentum``: those whose state in ``optimizer`` is compared, every tensor
    of it. Hashes are of memory, so NaN of equal bits are equal. ``where``: the GPU on which all of it lies. A hash
    there is the sum of the bits as integers, and to compare costs a wait for the device.
    """

    def __init__(
        self,
        comm: Communicator,
        weights: Named,
        momentum: Named,
        optimizer: torch.optim.Optimizer | None,
        every: int,
        where: gpu.Gpu | None = None,
    ) -> None:
        self._comm, self._every = comm, every
        self._weights = list(weights)
        self._momentum = list(momentum) if optimizer is not None else []
        self._optimizer = optimizer
        self._labels = [f"weights of {name}" for name, _ in self._weights]
        self._labels += [f"momentum of {name}" for name, _ in self._momentum]
        self._where = where
        self._hashes = self._numbers(len(self._labels))  # as bits, of each label
        self._totals = self._numbers(comm.size)  # the hash of each rank's hashes
        # The hash of this rank's hashes, if it is to be compared.
        self._total: torch.Tensor | None = None
        self._gathering: Work | None = None
        self._finished = 0  # iterations
        self._is_due = True

    def look_soon(self) -> None:
        """In the next iteration, because it has a reason to. Call it on all ranks."""
        self._is_due = True

    def look(self) -> None:
        """Costs one read of what is compared, on the calling thread, if this is an iteration to compare in. Before an
        eager update may change it."""
        self._total = self._gathering = None  # of a backward that has been given up
        if not self._is_due or not self._labels:
            return
        self._total = self._numbers(1)
        if self._where is not None:
            self._look_on_device(self._total)
            return
        copies: list[torch.Tensor] = []  # alive until they are hashed
        weights = [[_span_of(param, copies)] for _, param in self._weights]
        momentum = [self._state_spans(param, copies) for _, param in self._momentum]
        _hash([*weights, *momentum], self._hashes)
        _hash([[_span_of(self._hashes, copies)]], self._total)

    def _look_on_device(self, total: torch.Tensor) -> None:
        with torch.no_grad():
            sums = [_sum_of_bits([param]) for _, param in self._weights]
            sums += [_sum_of_bits(self._state_of(param)) for _, param in self._momentum]
            self._hashes.copy_(torch.stack([s.to(self._hashes.device) for s in sums]))
            # Their places count: equal errors in two tensors must not cancel out.
            places = torch.arange(1, len(sums) + 1, device=self._hashes.device) * 0x9E3779B97F4A7C1
            total.copy_((self._hashes * places).sum())

    def gather(self) -> None:
        """What look() has found. After the first bucket has gone, which says more about ranks that are in different
        iterations."""
        if self._total is not None:
            self._gathering = self._comm.all_gather(self._totals, self._total, async_op=True)

    def finish(self) -> None:
        """Raises a MismatchError on all ranks if they differ. Every iteration needs it, compared or not."""
        gathering, self._gathering = self._gathering, None
        self._finished += 1
        self._is_due = self._finished % self._every == 0 or (self._is_due and gathering is None)
        if gathering is not None:
            gathering.wait()
            if len(self._totals.unique()) > 1:
                self._accuse()

    def _state_spans(self, param: torch.nn.Parameter, copies: list[torch.Tensor]) -> list[Span]:
        """Of all tensors that the optimizer keeps for it, by name; none before its first update."""
        return [_span_of(tensor, copies, like=param) for tensor in self._state_of(param)]

    def _state_of(self, param: torch.nn.Parameter) -> list[torch.Tensor]:
        assert self._optimizer is not None
        state = self._optimizer.state.get(param, {})
        return [value for _, value in sorted(state.items()) if torch.is_tensor(value)]

    def _numbers(self, count: int) -> torch.Tensor:
        if self._where is None:
            return torch.empty(count, dtype=torch.int64)
        return self._where.empty(count, torch.int64)

    def _accuse(self) -> None:
        """Collective, since all ranks have seen the same totals."""
        comm, count = self._comm, len(self._labels)
        by_rank = self._numbers(comm.size * count)
        comm.all_gather(by_rank, self._hashes)
        table = by_rank.view(comm.size, count)
        differing = (table != table[0]).any(dim=0).nonzero().flatten().tolist()
        first = differing[0]
        others = f" and {len(differing) - 1} more of {count} tensors" if differing[1:] else ""
        comm.core.raise_mismatch(
            f"replicas have drifted apart, seen in iteration {self._finished}: {self._labels[first]}"
            f"{others} differ on {_names(minority(table[:, first].tolist()))}. Look for weights or momentum loaded on "
            "some ranks only, parameters changed outside the update, a learning rate, weight decay or optimizer that "
            "is not the same everywhere, or faulty memory. A new aggregator starts again from rank 0's weights",
            minority(self._totals.tolist()),
        )


def minority(by_rank: list[int]) -> list[int]:
    """The ranks that differ from most (a tie: from rank 0), as for calls that differ (csrc/group/fingerprint.cc)."""
    sizes = {value: by_rank.count(value) for value in by_rank}
    largest = [value for value, size in sizes.items() if size == max(sizes.values())]
    right = largest[0] if len(largest) == 1 else by_rank[0]
    return [rank for rank, value in enumerate(by_rank) if value != right]


def _span_of(
    tensor: torch.Tensor, copies: list[torch.Tensor], like: torch.Tensor | None = None
) -> Span:
    """Its memory; that of a copy if it has gaps, or another order than ``like``, as a loaded state may have."""
    if like is not None and tensor.shape == like.shape and tensor.stride() != like.stride():
        tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
        copies.append(tensor)
    if not is_dense(tensor):
        tensor = tensor.detach().contiguous()
        copies.append(tensor)
    return tensor.data_ptr(), tensor.nbytes


def _sum_of_bits(tensors: list[torch.Tensor]) -> torch.Tensor:
    """On their device; wraps. No order: a loaded state may have other strides."""
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        dtype = next(word for word in WORDS if tensor.itemsize % word.itemsize == 0)
        bits = tensor.detach().contiguous().view(-1).view(dtype)
        total = bits.sum(dtype=torch.int64) + total.to(bits.device)
    return total


def _hash(entries: list[list[Span]], hashes: torch.Tensor) -> None:
    _core.kernels.hash_many(entries, hashes.data_ptr())


def _names(ranks: list[int]) -> str:
    return f"rank{'s' if ranks[1:] else ''} {', '.join(map(str, ranks))}"
