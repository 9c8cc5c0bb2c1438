"""The C++ core. Submodules are written as classes: an extension module is one file."""

from collections.abc import Sequence
from enum import Enum
from typing import NoReturn, TypedDict, overload

from typing_extensions import Buffer

__version__: str
has_cuda: bool

def now_s() -> float: ...
def num_callers() -> int:
    """Threads inside a call of a Communicator or Work, other than asynchronous ones."""

def forget_callers() -> None:
    """In a forked child, which has none of them."""

def cuda_device_count() -> int: ...
def select_isa(isa: str) -> bool: ...

class _Env(TypedDict):
    isa: str
    cudart: str
    nccl: str
    port: int
    timeout_s: float
    trace: str

def read_env() -> _Env: ...

class DType(Enum):
    float64 = 0
    float32 = 1
    bfloat16 = 2
    float16 = 3
    int64 = 4
    int32 = 5
    uint8 = 6

class Op(Enum):
    sum = 0
    avg = 1
    prod = 2
    min = 3
    max = 4

class Work:
    def wait(self) -> None: ...
    def done(self) -> bool: ...
    def times(self) -> tuple[float, float, float, list[float]]:
        """Enqueued, start, end, and when each rank arrived; seconds of now_s()."""

    def findings(self) -> tuple[float, tuple[int | None, int] | None]:
        """Sum of squares, if wanted; global rank (None: only the sum overflows) and element of the first inf or NaN."""

class Part(Buffer): ...

class UpdatePlan:
    def __init__(self, entries: Sequence[tuple[int, int, int]], flags_begin: int) -> None:
        """Entries: first element, number of elements, index of the param group."""

class Communicator:
    def __init__(
        self, local_rank: int, global_ranks: Sequence[int], name: str, token: str, timeout_s: float
    ) -> None: ...
    def all_reduce(
        self, data: int, num_elems: int, dtype: DType, op: Op, layout: int, async_op: bool, /
    ) -> Work | None: ...
    def reduce_scatter(
        self, output: int, input: int, num_elems: int, dtype: DType, op: Op, async_op: bool, /
    ) -> Work | None: ...
    def all_gather(
        self, output: int, input: int, num_elems: int, dtype: DType, async_op: bool, /
    ) -> Work | None: ...
    def broadcast(
        self, data: int, num_elems: int, dtype: DType, root: int, layout: int, async_op: bool, /
    ) -> Work | None: ...
    def barrier(self, layout: int, /) -> None: ...
    def raise_mismatch(self, message: str, peers: Sequence[int], /) -> NoReturn:
        """Of a disagreement that Python has found: every rank calls it, and the communicator is poisoned by it."""

    def aggregate(
        self,
        data: int,
        num_elems: int,
        dtype: DType,
        op: Op,
        layout: int,
        watched_elems: int,
        norm_is_wanted: bool,
        subject: str,
        /,
    ) -> Work:
        """An asynchronous all_reduce of symmetric memory with findings() about the first ``watched_elems``."""

    def update(
        self,
        plan: UpdatePlan,
        groups: Sequence[tuple[kernels.SgdScalars, float]],
        gradients: int,
        num_elems: int,
        weights: int,
        momentum: int,
        dtype: DType,
        scale: float,
        is_reduced: bool,
        layout: int,
        subject: str,
        /,
    ) -> Work:
        """``scale``: of the sum of all ranks' gradients; of this rank's, if they are reduced already."""

    def allocate(self, num_elems: int, dtype: DType, one_copy: bool, /) -> Part: ...
    def refuse_forked_child(self) -> None:
        """UsageError there."""

    def check_not_failed(self) -> None:
        """Raises the first error, if one has happened."""

    def close(self) -> None: ...

class Mark:
    def passed_s(self) -> float | None:
        """When the device passed it, on the clock of now_s(); None before."""

class DeviceWork:
    """A collective on its way to a device."""

    def wait(self, stream: int) -> None:
        """Returns when all ranks have launched it; what ``stream`` does later waits for its end."""

    def wait_launched(self) -> None:
        """Returns when all ranks have launched it."""

    def done(self) -> bool: ...
    def times(self) -> tuple[float, float | None, float | None, list[float]]:
        """Enqueued, begun and ended on the device (None: not yet), arrivals of the ranks' hosts. Once launched."""

class DeviceMemory:
    @property
    def address(self) -> int: ...
    @property
    def bytes(self) -> int: ...

class Device:
    """Collectives of a device's memory, in one order with those of ``comm``. ``stream``: the caller's. Errors are those
    of Communicator; Error too where a library is missing. ``is_mocked``: device memory is host memory, for tests."""

    def __init__(
        self,
        comm: Communicator,
        index: int,
        runtime_folders: Sequence[str],
        nccl_folders: Sequence[str],
        is_mocked: bool = False,
    ) -> None: ...
    @property
    def index(self) -> int: ...
    @property
    def has_kernels(self) -> bool: ...
    def all_reduce(
        self,
        data: int,
        num_elems: int,
        dtype: DType,
        op: Op,
        layout: int,
        async_op: bool,
        stream: int,
        /,
    ) -> DeviceWork | None: ...
    def reduce_scatter(
        self,
        output: int,
        input: int,
        num_elems: int,
        dtype: DType,
        op: Op,
        async_op: bool,
        stream: int,
        /,
    ) -> DeviceWork | None: ...
    def all_gather(
        self,
        output: int,
        input: int,
        num_elems: int,
        dtype: DType,
        async_op: bool,
        stream: int,
        /,
    ) -> DeviceWork | None: ...
    def broadcast(
        self,
        data: int,
        num_elems: int,
        dtype: DType,
        root: int,
        layout: int,
        async_op: bool,
        stream: int,
        /,
    ) -> DeviceWork | None: ...
    def aggregate(
        self,
        data: int,
        num_elems: int,
        dtype: DType,
        op: Op,
        layout: int,
        subject: str,
        stream: int,
        /,
    ) -> DeviceWork:
        """An asynchronous all_reduce whose times are kept."""

    def update(
        self,
        table: kernels.UpdateTable,
        image: int,
        rules: Sequence[kernels.UpdateRule],
        gradients: int,
        num_elems: int,
        dtype: DType,
        flags_begin: int,
        scale: float,
        layout: int,
        subject: str,
        stream: int,
        /,
    ) -> DeviceWork:
        """Sums all ranks' gradients, then one SGD step behind it, of pieces whose flag is not zero: gradients are
        multiplied by ``scale`` and are zero afterwards. Keep ``table`` until it is launched."""

    def hold_back(self, stream: int, /) -> None:
        """What ``stream`` does later waits for all that was launched, updates too. Raises the first error."""

    def mark(self, stream: int, /) -> Mark: ...
    @property
    def aborted(self) -> int:
        """Where the word lies that is not zero once results are worthless; after the first collective."""

    def allocate(self, bytes: int, /) -> DeviceMemory:
        """Memory that NCCL has registered; after the first collective. Error if NCCL gives none."""

class device:
    class _Runtime(TypedDict):
        path: str
        how: str
        version: str
        devices: int

    class _Nccl(TypedDict):
        path: str
        how: str
        version: str
        missing: list[str]

    @staticmethod
    def cuda_runtime(folders: Sequence[str] = ()) -> _Runtime:
        """The CUDA runtime, and how it was found. ``folders``: of installed packages. Error when there is none."""

    @staticmethod
    def nccl(folders: Sequence[str] = ()) -> _Nccl:
        """NCCL, how it was found, and the optional functions that it lacks. Error when none can be used."""

class kernels:
    class SgdScalars:
        def __init__(
            self,
            *,
            decay: float,
            history: float,
            gain: float,
            momentum: float,
            rate: float,
            nesterov: bool,
        ) -> None: ...
        @property
        def decay(self) -> float: ...
        @property
        def history(self) -> float: ...
        @property
        def gain(self) -> float: ...
        @property
        def momentum(self) -> float: ...
        @property
        def rate(self) -> float: ...
        @property
        def nesterov(self) -> bool: ...

    @staticmethod
    def isas() -> list[str]: ...
    @staticmethod
    def active_isa() -> str: ...
    @staticmethod
    def reduce(
        sources: Sequence[int],
        destinations: Sequence[int],
        num_elems: int,
        dtype: str,
        op: str,
        scale: float = 1.0,
        isa: str = "",
    ) -> tuple[int, int | None] | None:
        """Element and source (None: only the sum) of the first inf or NaN, for sum and avg of floats."""

    @staticmethod
    def sum_squares(data: int, num_elems: int, dtype: str, isa: str = "") -> float: ...
    @staticmethod
    def hash_many(entries: Sequence[Sequence[tuple[int, int]]], hashes: int) -> None:
        """For each entry a uint64 at address ``hashes``: over its spans (address, bytes) in order, 0 without any."""

    @staticmethod
    def convert(
        from_dtype: str,
        source: int,
        to_dtype: str,
        destination: int,
        num_elems: int,
        isa: str = "",
    ) -> None: ...
    @staticmethod
    def sgd(
        gradients: Sequence[int],
        weights: Sequence[int],
        momentum: int,
        num_elems: int,
        dtype: str,
        scalars: kernels.SgdScalars,
        scale: float = 1.0,
        zero_gradients: bool = False,
        isa: str = "",
    ) -> tuple[int, int | None] | None: ...
    @staticmethod
    def sgd_many(
        spans: Sequence[tuple[int, int, int, int]],
        dtype: str,
        scalars: kernels.SgdScalars,
        scale: float = 1.0,
        zero_gradients: bool = False,
        isa: str = "",
    ) -> None: ...

    class SpanTable:
        """What one launch of ``cast`` works on: spans (source, destination, elements). An address may be an offset in
        bytes from the launch's ``sources`` or ``destinations``. Types are equal, or float32 and a 16-bit float."""

        def __init__(
            self,
            from_dtype: str,
            to_dtype: str,
            spans: Sequence[tuple[int, int, int]],
            chunk_elems: int = 0,
        ) -> None: ...
        @property
        def num_chunks(self) -> int: ...
        def image(self) -> bytes:
            """What is copied to the device; its address goes with each launch, a multiple of 16."""

    class UpdateTable:
        """What one launch of ``update`` works on: pieces (weight, momentum, gradient, copy, elements, group). Addresses
        may be offsets in bytes, as above. No momentum: SGD without. A copy is of the gradients' dtype: 16 bits, where
        weights are float32."""

        def __init__(
            self,
            gradient_dtype: str,
            weight_dtype: str,
            pieces: Sequence[tuple[int, int | None, int, int | None, int, int]],
            chunk_elems: int = 0,
        ) -> None: ...
        @property
        def num_chunks(self) -> int: ...
        def image(self) -> bytes:
            """As SpanTable's; the kernels write into it, so launches with one image must not overlap."""

    class UpdateRule:
        """Of a param group. ``idle_scale``: what a momentum is multiplied by whose parameter no rank has used."""

        def __init__(self, scalars: kernels.SgdScalars, idle_scale: float = 1.0) -> None: ...
        @staticmethod
        def on_device(
            *,
            form: str,
            decay: float,
            momentum: float,
            nesterov: bool,
            learning_rate: int,
            momentum_unit: int = 0,
        ) -> kernels.UpdateRule:
            """``form``: reference, absorbed, corrected. ``learning_rate``: address of a float32, read when the kernel
            runs. ``momentum_unit``: of a float64, for "corrected": the learning rate in whose units the momentum is
            kept, 0 at first, changed by ``close_step``."""

class cuda_twin:
    """The CUDA kernels' source, run by one thread on host memory. All arguments named like memory are addresses, 0 for
    none; ``max_blocks`` 0: as many as run at once. Errors: UsageError; Error if a launch fails. Nothing waits."""

    @staticmethod
    def copy(
        source: int, destination: int, num_bytes: int, *, stream: int = 0, max_blocks: int = 0
    ) -> None:
        """Whole words of 4 bytes."""

    @staticmethod
    def reduce(
        sources: Sequence[int],
        destinations: Sequence[int],
        num_elems: int,
        dtype: str,
        scale: float = 1.0,
        *,
        stream: int = 0,
        max_blocks: int = 0,
    ) -> None:
        """Sum in source order times ``scale``; at most 16 of each."""

    @staticmethod
    def cast(
        table: kernels.SpanTable,
        image: int,
        *,
        sources: int = 0,
        destinations: int = 0,
        scale: float = 1.0,
        stream: int = 0,
        max_blocks: int = 0,
    ) -> None:
        """destination = source * scale for every span, rounded once: pack, unpack, cast, scale in place."""

    @staticmethod
    def update(
        table: kernels.UpdateTable,
        image: int,
        rules: Sequence[kernels.UpdateRule],
        *,
        weights: int = 0,
        momentum: int = 0,
        gradients: int = 0,
        copies: int = 0,
        flags: int = 0,
        scale: float = 1.0,
        loss_scale: int = 0,
        clip: int = 0,
        zero_gradients: bool = False,
        found_inf: int = 0,
        aborted: int = 0,
        new_found_inf: int = 0,
        sum_squares: int = 0,
        stream: int = 0,
        max_blocks: int = 0,
    ) -> None:
        """One SGD step of every piece. Gradients are multiplied by scale / loss_scale (float32) * clip (float64) and
        rounded to the weights' dtype. Nothing changes where found_inf (float32) or aborted (uint32, host-mapped too)
        is not zero. ``flags``: an element of the gradients' dtype per piece, zero where no rank has used it.
        Scaled gradients that are inf or NaN set new_found_inf (float32) to 1; their squares are added to sum_squares
        (float64)."""

    @staticmethod
    def inspect(
        table: kernels.UpdateTable,
        image: int,
        *,
        gradients: int = 0,
        flags: int = 0,
        scale: float = 1.0,
        loss_scale: int = 0,
        aborted: int = 0,
        new_found_inf: int = 0,
        sum_squares: int = 0,
        stream: int = 0,
        max_blocks: int = 0,
    ) -> None:
        """What ``update`` would find, without the update: before clipping, and for GradScaler."""

    @staticmethod
    def close_step(
        rules: Sequence[kernels.UpdateRule],
        *,
        found_inf: int = 0,
        aborted: int = 0,
        stream: int = 0,
    ) -> None:
        """After an iteration's last update: writes the momentum units of rules on the device."""

    @staticmethod
    def clip(sum_squares: int, max_norm: float, factor: int, *, stream: int = 0) -> None:
        """factor (float64) = min(1, max_norm / (sqrt(sum_squares) + 1e-6))."""

class cuda(cuda_twin):
    """The same on the GPU, on ``stream`` of the current device. Only if ``has_cuda``."""

    @staticmethod
    def device_count() -> int:
        """0 also where there is no driver or it is too old."""

class schedules:
    class Transfer:
        def __init__(self, peer: int, begin: int, end: int, reduce: bool) -> None: ...
        @property
        def peer(self) -> int: ...
        @property
        def begin(self) -> int: ...
        @property
        def end(self) -> int: ...
        @property
        def reduce(self) -> bool: ...

    class Step:
        def __init__(
            self, sends: Sequence[schedules.Transfer], recvs: Sequence[schedules.Transfer]
        ) -> None: ...
        @property
        def sends(self) -> tuple[schedules.Transfer, ...]: ...
        @property
        def recvs(self) -> tuple[schedules.Transfer, ...]: ...

    class Schedule:
        def __init__(
            self, rank: int, size: int, num_chunks: int, steps: Sequence[schedules.Step]
        ) -> None: ...
        @property
        def rank(self) -> int: ...
        @property
        def size(self) -> int: ...
        @property
        def num_chunks(self) -> int: ...
        @property
        def steps(self) -> tuple[schedules.Step, ...]: ...

    @staticmethod
    def ring(rank: int, size: int) -> schedules.Schedule: ...
    @staticmethod
    def halving_doubling(rank: int, size: int) -> schedules.Schedule: ...
    @staticmethod
    def direct(rank: int, size: int) -> schedules.Schedule: ...
    @staticmethod
    def names() -> tuple[str, ...]: ...
    @staticmethod
    def cost(
        name: str, size: int, bytes: float, alpha_s: float, beta_s_per_byte: float
    ) -> float: ...
    @staticmethod
    def select(size: int, bytes: float, alpha_s: float, beta_s_per_byte: float) -> str: ...
    @staticmethod
    def ring_reduce_scatter(rank: int, size: int) -> schedules.Schedule: ...
    @staticmethod
    def ring_all_gather(rank: int, size: int) -> schedules.Schedule: ...
    @staticmethod
    def halving_reduce_scatter(rank: int, size: int) -> schedules.Schedule: ...
    @staticmethod
    def doubling_all_gather(rank: int, size: int) -> schedules.Schedule: ...
    @staticmethod
    def direct_reduce_scatter(rank: int, size: int) -> schedules.Schedule: ...
    @staticmethod
    def binomial_tree(rank: int, size: int, root: int) -> schedules.Schedule: ...

class inproc:
    """Ranks as threads, for tests."""

    class Group:
        def all_reduce(
            self, address: int, num_elems: int, dtype: str, op: str, timeout_s: float
        ) -> None: ...
        def reduce_scatter(
            self, output: int, input: int, num_elems: int, dtype: str, op: str, timeout_s: float
        ) -> None: ...
        def all_gather(
            self, output: int, input: int, num_elems: int, dtype: str, timeout_s: float
        ) -> None: ...
        def broadcast(
            self, address: int, num_elems: int, dtype: str, root: int, timeout_s: float
        ) -> None: ...
        def barrier(self, timeout_s: float) -> None: ...

    class World:
        @overload
        def __init__(self, size: int) -> None: ...
        @overload
        def __init__(self, global_ranks: Sequence[int]) -> None: ...
        @property
        def size(self) -> int: ...
        def group(self, rank: int, schedule: str) -> inproc.Group: ...

    @staticmethod
    def hierarchical_group(
        local: World,
        local_rank: int,
        across: World | None,
        node_sizes: Sequence[int],
        node: int,
        local_schedule: str,
        across_schedule: str,
        leaders_up_to_bytes: int,
        timeout_s: float,
    ) -> inproc.Group:
        """Collective over all ranks. Between nodes of unequal sizes only leaders have a world across."""
