"""Every instruction set x dtype x op against torch, numpy and each other; answers are bits."""

import functools
import itertools
import math
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pyallreduce._core import kernels

ISAS = ["baseline", "avx2", "avx512"]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.uint8]
OPS = ["sum", "avg", "prod", "min", "max"]
CASES = [(dtype, op) for dtype in FLOATS + INTEGERS for op in OPS if dtype in FLOATS or op != "avg"]
NUM_SOURCES = [1, 2, 3, 4, 5, 8]
LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 1000003]
FORMS = {"sum": torch.add, "avg": torch.add, "prod": torch.mul, "min": torch.minimum}
FORMS["max"] = torch.maximum


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def name_of(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param not in kernels.isas():
        pytest.skip(f"this CPU does not run {request.param}")
    return request.param


def accumulator(dtype):
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def bits(tensor):
    """The bit pattern, with one pattern for all NaNs, as kernels write them."""
    if tensor.is_floating_point():
        tensor = torch.where(tensor.isnan(), torch.full_like(tensor, torch.nan), tensor)
    return tensor.contiguous().view(torch.uint8)


def run_reduce(sources, op, isa, destinations=None):
    if destinations is None:
        destinations = [torch.empty_like(sources[0])]
    kernels.reduce(
        [t.data_ptr() for t in sources],
        [t.data_ptr() for t in destinations],
        sources[0].numel(),
        name_of(sources[0].dtype),
        op,
        1 / len(sources),
        isa,
    )
    return destinations[0]


def reference(sources, op):
    """The contract, spelled with torch: in source order, in the accumulator, one rounding."""
    result = functools.reduce(FORMS[op], [t.to(accumulator(t.dtype)) for t in sources])
    if op == "avg":
        result = result * torch.tensor(1 / len(sources), dtype=result.dtype)
    return result.to(sources[0].dtype)


@functools.cache
def small_integers(op):
    """Of which every op gives results exact in every dtype: at most 8 significant bits."""
    values = torch.tensor([1, 2, 1, -2] if op == "prod" else range(-15, 16), dtype=torch.int32)
    generator = torch.Generator().manual_seed(1)
    shape = (max(NUM_SOURCES), max(LENGTHS))
    return values[torch.randint(len(values), shape, generator=generator)]


@functools.cache
def any_bits(dtype, count, length):
    """Random bit patterns, and every kind of special value against every other."""
    generator = torch.Generator().manual_seed(2)
    raw = torch.randint(
        256, (count, length * dtype.itemsize), dtype=torch.uint8, generator=generator
    )
    sources = [row.clone().view(dtype) for row in raw]
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        kinds = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.5, info.max, -info.max]
        kinds += [info.tiny, -info.tiny, info.smallest_normal / 4, -info.smallest_normal / 4]
        specials = torch.tensor(kinds, dtype=torch.float64).to(dtype)
        for k, source in enumerate(sources):
            chosen = (torch.arange(1024) // len(kinds) ** (k % 2)) % len(kinds)
            source[:1024] = specials[chosen]
    return sources


# ---- reduce ----


@pytest.mark.parametrize(("dtype", "op"), CASES, ids=name_of)
def test_reduces_integer_values_exactly(isa, dtype, op):
    integers = small_integers("prod" if op == "prod" else "sum")
    integers = integers.abs() if dtype == torch.uint8 else integers
    sources, exact = integers.to(dtype), integers[0]
    space = torch.empty(max(LENGTHS), dtype=dtype)
    for count in range(1, max(NUM_SOURCES) + 1):
        if count > 1:
            exact = FORMS[op](exact, integers[count - 1])
        if count not in NUM_SOURCES:
            continue
        expected = exact
        if op == "avg":  # exact where the count is a power of two
            wide = exact.to(accumulator(dtype))
            expected = wide * torch.tensor(1 / count, dtype=wide.dtype)
        expected = expected.to(dtype)
        for length in LENGTHS:
            parts = [source[:length] for source in sources[:count]]
            result = run_reduce(parts, op, isa, destinations=[space[:length]])
            assert torch.equal(result, expected[:length]), f"{count} sources of {length}"


@pytest.mark.parametrize(("dtype", "op"), CASES, ids=name_of)
def test_any_bits_match_torch(isa, dtype, op):
    # Includes integers that wrap, NaN, infinities, -0.0, subnormals; 16-bit floats rounded once.
    for count in (1, 2, 3, 8):
        sources = any_bits(dtype, 8, 4099)[:count]
        result = run_reduce(sources, op, isa)
        assert torch.equal(bits(result).view(torch.uint8), result.view(torch.uint8))
        expected = reference(sources, op)
        if op in ("min", "max"):  # which of 0.0 and -0.0 is torch's own choice
            assert torch.equal(result.isnan(), expected.isnan())
            assert torch.equal(result[~result.isnan()], expected[~expected.isnan()])
        else:
            assert torch.equal(bits(result), bits(expected)), f"{count} sources"


@pytest.mark.parametrize(("dtype", "op"), CASES, ids=name_of)
def test_bits_do_not_depend_on_the_instruction_set(isa, dtype, op):
    for count in (1, 2, 3, 8):
        sources = any_bits(dtype, 8, 4099)[:count]
        result, baseline = (run_reduce(sources, op, name) for name in (isa, "baseline"))
        assert torch.equal(result.view(torch.uint8), baseline.view(torch.uint8))


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=name_of)
def test_bits_do_not_depend_on_the_position(isa, dtype):
    # Block, vector and single element are different code.
    sources = any_bits(dtype, 8, 4099)[:3]
    whole = run_reduce(sources, "sum", isa).view(torch.uint8)
    for begin, end in [(1, 4099), (5, 300), (4000, 4099), (7, 8)]:
        # Pointers are aligned to the element only, each differently.
        shifted = [torch.empty(4099 + k, dtype=dtype)[k:] for k in range(1, 5)]
        for source, target in zip(sources, shifted, strict=False):
            target.copy_(source)
        part = [t[begin:end] for t in shifted]
        result = run_reduce(part[:3], "sum", isa, destinations=part[3:])
        size = dtype.itemsize
        assert torch.equal(result.view(torch.uint8), whole[begin * size : end * size])


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=name_of)
def test_writes_every_destination_in_place_and_nothing_else(isa, dtype):
    for length in (0, 1, 17, 65, 1000):
        buffers = [torch.full((length + 2,), k + 1).to(dtype) for k in range(5)]
        inside = [buffer[1:-1] for buffer in buffers]
        run_reduce(inside[:4], "sum", isa, destinations=[*inside[1:], inside[0]])
        for k, buffer in enumerate(buffers):
            assert buffer[0] == buffer[-1] == k + 1
            assert torch.equal(buffer[1:-1], torch.full((length,), 10).to(dtype))


def test_sum_ignores_scale_and_integers_have_no_average(isa):
    assert run_reduce([torch.ones(3), torch.ones(3)], "sum", isa).tolist() == [2, 2, 2]
    with pytest.raises(Exception, match="no kernel for avg of int32"):
        run_reduce([torch.ones(3, dtype=torch.int32)], "avg", isa)


# ---- conversions ----


def run_convert(tensor, dtype, isa):
    result = torch.empty(tensor.shape, dtype=dtype)
    kernels.convert(
        name_of(tensor.dtype),
        tensor.data_ptr(),
        name_of(dtype),
        result.data_ptr(),
        tensor.numel(),
        isa,
    )
    return result


def every_half(dtype):
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def around_every_rounding_boundary(dtype):
    """Every value, every middle of two neighbours, the floats next to both; then random bits."""
    halves = every_half(dtype).float().numpy()
    finite = np.sort(halves[np.isfinite(halves)]).astype(np.float64)
    beyond = 2 * finite[-1] - finite[-2]  # where the next value would be: its middle rounds to inf
    finite = np.concatenate([[-beyond], finite, [beyond]])
    points = np.concatenate([finite[1:-1], (finite[1:] + finite[:-1]) / 2]).astype(np.float32)
    specials = np.array([np.nan, -np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45], np.float32)
    random = np.random.default_rng(3).integers(2**32, size=1 << 20, dtype=np.uint32)
    with np.errstate(over="ignore"):
        return torch.from_numpy(
            np.concatenate(
                [
                    points,
                    np.nextafter(points, np.float32(np.inf)),
                    np.nextafter(points, np.float32(-np.inf)),
                    specials,
                    random.view(np.float32),
                ]
            )
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_converts_as_torch_does(isa, dtype):
    halves = every_half(dtype)
    assert torch.equal(bits(run_convert(halves, torch.float32, isa)), bits(halves.float()))
    values = around_every_rounding_boundary(dtype)
    result = run_convert(values, dtype, isa)
    assert torch.equal(result.view(torch.int16), bits(values.to(dtype)).view(torch.int16))
    # One element at a time, which is other code.
    odd = torch.stack([run_convert(values[i : i + 1], dtype, isa) for i in range(0, 60000, 101)])
    assert torch.equal(odd.flatten().view(torch.int16), result[:60000:101].view(torch.int16))


def test_converts_float16_as_numpy_does(isa):
    values = around_every_rounding_boundary(torch.float16)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = torch.from_numpy(values.numpy().astype(np.float16))
    assert torch.equal(bits(run_convert(values, torch.float16, isa)), bits(expected))


def test_subnormal_halves_survive_a_thread_that_flushes_subnormal_floats(isa):
    expected = every_half(torch.float16).float()
    if not torch.set_flush_denormal(True):
        pytest.skip("torch cannot flush subnormals on this CPU")
    try:
        widened = run_convert(every_half(torch.float16), torch.float32, isa)
        narrowed = run_convert(widened, torch.float16, isa)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(bits(widened), bits(expected))
    assert torch.equal(bits(narrowed), bits(every_half(torch.float16)))


def test_refuses_other_conversions(isa):
    with pytest.raises(Exception, match="no kernel for conversion of int64"):
        run_convert(torch.zeros(1, dtype=torch.int64), torch.float32, isa)
    with pytest.raises(Exception, match="no kernel for conversion of float16"):
        run_convert(torch.zeros(1, dtype=torch.float16), torch.bfloat16, isa)


# ---- SGD ----

KINDS = ["plain", "momentum", "nesterov"]


def scalars(kind, form="reference", lr=0.1, previous_lr=0.1, decay=1e-4, m=0.9):
    m = 0.0 if kind == "plain" else m
    absorbed = form == "absorbed"
    return kernels.SgdScalars(
        decay=decay,
        history=m * lr / previous_lr if absorbed else m,
        gain=lr if absorbed else 1.0,
        momentum=m,
        rate=1.0 if absorbed else lr,
        nesterov=kind == "nesterov",
    )


def run_sgd(gradients, weights, momentum, scalars, scale, isa, zero_gradients=False):
    return kernels.sgd(
        [t.data_ptr() for t in gradients],
        [t.data_ptr() for t in weights],
        0 if momentum is None else momentum.data_ptr(),
        weights[0].numel(),
        name_of(weights[0].dtype),
        scalars,
        scale,
        zero_gradients,
        isa,
    )


def sgd_statement(gradients, weight, momentum, s, scale):
    """The formula in numpy, which never contracts a*b + c: new weight, new momentum."""
    dtype = weight.dtype
    real = np.float64 if dtype == torch.float64 else np.float32
    decay, history, gain, m, rate, scale = (
        real(x) for x in (s.decay, s.history, s.gain, s.momentum, s.rate, scale)
    )

    def widened(tensor):
        return tensor.to(accumulator(dtype)).numpy()

    total = functools.reduce(np.add, [widened(g) for g in gradients])
    g = widened(torch.from_numpy(total * scale).to(dtype))
    w = widened(weight)
    g = g + decay * w
    u = d = gain * g
    if momentum is not None:
        u = history * widened(momentum) + gain * g
        d = gain * g + m * u if s.nesterov else u
    return torch.from_numpy(w - rate * d).to(dtype), torch.from_numpy(u).to(dtype)


@functools.cache
def training_state(dtype, length=1000003):
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(length, generator=generator) for _ in range(5)]
    return [t.to(dtype) for t in tensors]  # weight, momentum, three gradients


@pytest.mark.parametrize("form", ["reference", "absorbed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_sgd_is_the_formula_bit_for_bit(isa, dtype, kind, form):
    s = scalars(kind, form, lr=0.3, previous_lr=0.1)
    for length in [*LENGTHS[:-1], 10007]:
        for count, scale in [(1, 1.0), (1, 1 / 1024), (3, 1 / 3)]:
            weight, momentum, *gradients = (t[:length].clone() for t in training_state(dtype))
            momentum = None if kind == "plain" else momentum
            expected = sgd_statement(gradients[:count], weight, momentum, s, scale)
            copies = [weight, weight.clone(), torch.empty_like(weight)]
            run_sgd(gradients[:count], copies, momentum, s, scale, isa, zero_gradients=count == 3)
            assert all(torch.equal(bits(copy), bits(expected[0])) for copy in copies)
            assert momentum is None or torch.equal(bits(momentum), bits(expected[1]))
            untouched = training_state(dtype)[2:]
            for gradient, before in zip(gradients, untouched, strict=True):
                after = torch.zeros_like(gradient) if count == 3 else before[:length]
                assert torch.equal(gradient, after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_fused_sgd_is_reduce_then_sgd(isa, dtype, kind):
    # On arbitrary bits; the gradients' pointers are aligned to the element only.
    weight, momentum, *rest = any_bits(dtype, 8, 4099)
    gradients = [torch.cat([g[:1], g])[1:] for g in rest[:4]]
    s = scalars(kind)
    fused = [weight.clone(), None if kind == "plain" else momentum.clone()]
    apart = [weight.clone(), None if kind == "plain" else momentum.clone()]
    run_sgd(gradients, fused[:1], fused[1], s, 0.25, isa)
    mean = run_reduce(gradients, "avg", "baseline")
    run_sgd([mean], apart[:1], apart[1], s, 1.0, "baseline")
    assert torch.equal(fused[0].view(torch.uint8), apart[0].view(torch.uint8))
    assert kind == "plain" or torch.equal(fused[1].view(torch.uint8), apart[1].view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=name_of)
def test_reference_form_is_torch_sgd(isa, dtype, kind):
    m = 0.0 if kind == "plain" else 0.9
    parameter = torch.nn.Parameter(training_state(dtype)[0][:1003].clone())
    weight, momentum = parameter.detach().clone(), torch.zeros(1003, dtype=dtype)
    optimizer = torch.optim.SGD(
        [parameter],
        lr=0.1,
        momentum=m,
        weight_decay=1e-4,
        nesterov=kind == "nesterov",
        foreach=False,
    )
    for step in range(4):
        lr = optimizer.param_groups[0]["lr"] = [0.1, 0.3, 0.3, 0.03][step]
        parameter.grad = training_state(dtype)[2 + step % 3][:1003].clone()
        optimizer.step()
        history = None if kind == "plain" else momentum
        run_sgd([parameter.grad], [weight], history, scalars(kind, lr=lr), 1.0, isa)
        # The same formula; torch contracts parts of it to FMA, hence other roundings.
        torch.testing.assert_close(
            weight, parameter.detach(), rtol=4 * torch.finfo(dtype).eps, atol=1e-7
        )


@pytest.mark.parametrize("kind", ["momentum", "nesterov"])
def test_absorbed_form_equals_reference_form_while_the_learning_rate_changes(isa, kind):
    weights, momenta = (
        [training_state(torch.float64)[k][:1003].clone() for _ in "ab"] for k in (0, 1)
    )
    rates = [0.1, 0.1, 0.4, 3.2, 3.2, 0.32]  # warm-up, then a drop
    momenta[1] *= rates[0]
    for step, (previous, lr) in enumerate(zip(rates[:1] + rates, rates, strict=False)):
        gradient = training_state(torch.float64)[2 + step % 3][:1003]
        for form, weight, momentum in zip(["reference", "absorbed"], weights, momenta, strict=True):
            run_sgd([gradient], [weight], momentum, scalars(kind, form, lr, previous), 1.0, isa)
        torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)


def test_sgd_many_is_sgd_of_each(isa):
    lengths, s = [0, 1, 17, 1003], scalars("nesterov")
    each, many = (
        [[t[:n].clone() for t in training_state(torch.float32)[:3]] for n in lengths] for _ in "ab"
    )
    for weight, momentum, gradient in each:
        run_sgd([gradient], [weight], momentum, s, 0.5, isa, zero_gradients=True)
    spans = [(w.data_ptr(), u.data_ptr(), g.data_ptr(), w.numel()) for w, u, g in many]
    kernels.sgd_many(spans, "float32", s, 0.5, True, isa)
    assert all(
        torch.equal(a, b)
        for one, other in zip(each, many, strict=True)
        for a, b in zip(one, other, strict=True)
    )


# ---- sum of squares ----


def run_sum_squares(tensor, isa):
    return kernels.sum_squares(tensor.data_ptr(), tensor.numel(), name_of(tensor.dtype), isa)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 1000, 4097])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_sum_of_squares_is_that_of_exact_arithmetic(isa, dtype, length):
    values = training_state(dtype)[0][:length]
    exact = math.fsum(x * x for x in values.double().tolist())
    result = run_sum_squares(values.clone(), isa)
    assert result == pytest.approx(exact, rel=1e-14, abs=0)
    assert result == run_sum_squares(values, "baseline")
    for k in (1, 3):  # aligned to the element only
        shifted = torch.empty(length + k, dtype=dtype)[k:].copy_(values)
        assert run_sum_squares(shifted, isa) == result
    integers = small_integers("sum")[0][:length]
    assert run_sum_squares(integers.to(dtype), isa) == integers.square().sum().item()


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_sum_of_squares_of_extreme_values(isa, dtype):
    info = torch.finfo(dtype)
    for special in (torch.nan, torch.inf, -torch.inf, info.max, info.smallest_normal / 4):
        for at in (0, 9, 16):  # among whole vectors and alone
            values = torch.zeros(17, dtype=dtype)
            values[at] = special
            result, x = run_sum_squares(values, isa), values[at].item()
            assert result == x * x or (math.isnan(result) and math.isnan(x))


def test_integers_have_no_sum_of_squares(isa):
    with pytest.raises(Exception, match="no kernel for sum_squares of int32"):
        run_sum_squares(torch.ones(3, dtype=torch.int32), isa)


# ---- the first inf or NaN ----

WATCHED = 85  # elements: blocks of vectors, vectors and single elements, for every instruction set


def find_in_reduce(sources, isa, scale=1.0, op="avg", in_place=False):
    targets = sources if in_place else [torch.empty_like(sources[0])]
    return kernels.reduce(
        [t.data_ptr() for t in sources],
        [t.data_ptr() for t in targets],
        sources[0].numel(),
        name_of(sources[0].dtype),
        op,
        scale,
        isa,
    )


def find_in_sgd(sources, isa, scale=1.0, kind="nesterov"):
    weight, momentum = (torch.ones_like(sources[0]) for _ in "wm")
    if kind == "plain":
        momentum = None
    return run_sgd(sources, [weight], momentum, scalars(kind), scale, isa)


SCALING_FINDERS = {
    "avg": find_in_reduce,
    "avg in place": functools.partial(find_in_reduce, in_place=True),
    **{f"sgd {kind}": functools.partial(find_in_sgd, kind=kind) for kind in KINDS},
}
FINDERS = {"sum": functools.partial(find_in_reduce, op="sum"), **SCALING_FINDERS}


@pytest.fixture(params=list(FINDERS))
def find(request, isa):
    """Element and source of the first inf or NaN in sources[0] + sources[1] + ..."""
    return functools.partial(FINDERS[request.param], isa=isa)


@pytest.fixture(params=list(SCALING_FINDERS))
def find_scaled(request, isa):
    return functools.partial(SCALING_FINDERS[request.param], isa=isa)


def with_values(dtype, values, count=3):
    """Sources of ones, but for {(element, source): value}."""
    sources = [torch.ones(WATCHED, dtype=dtype) for _ in range(count)]
    for (element, source), value in values.items():
        sources[source][element] = value
    return sources


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_names_an_inf_or_nan_wherever_it_is(find, dtype):
    assert find(with_values(dtype, {})) is None
    values = itertools.cycle([torch.nan, torch.inf, -torch.inf])
    for element, source in itertools.product(range(WATCHED), range(3)):
        assert find(with_values(dtype, {(element, source): next(values)})) == (element, source)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_names_the_first_of_several(find, dtype):
    for first, later in [(3, 4), (3, 40), (40, 84), (83, 84), (0, 64)]:
        found = find(with_values(dtype, {(later, 0): torch.nan, (first, 2): torch.inf}))
        assert found == (first, 2)
        # One element: the first source, also where infinities cancel to NaN.
        found = find(with_values(dtype, {(first, 1): -torch.inf, (first, 2): torch.inf}))
        assert found == (first, 1)
        overflow = {(later, 0): torch.finfo(dtype).max, (later, 1): torch.finfo(dtype).max}
        assert find(with_values(dtype, {**overflow, (first, 1): torch.nan})) == (first, 1)
        overflow = {(first, 0): torch.finfo(dtype).max, (first, 1): torch.finfo(dtype).max}
        assert find(with_values(dtype, {**overflow, (later, 1): torch.nan})) == (first, None)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_names_no_source_if_only_the_sum_overflows(find, dtype):
    largest = torch.finfo(dtype).max
    for element in (0, 31, 70, 84):
        both = {(element, 0): -largest, (element, 1): -largest}
        assert find(with_values(dtype, both)) == (element, None)
        assert find(with_values(dtype, {(element, 0): largest, (element, 1): -largest})) is None


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_looks_at_the_scaled_sum_as_it_is_stored(find_scaled, dtype):
    largest = torch.finfo(dtype).max
    # float32 holds the sum of two float16, but not of two bfloat16.
    wide_enough = dtype == torch.float16
    for element in (0, 31, 70, 84):
        both = {(element, 0): largest, (element, 1): largest}
        found = find_scaled(with_values(dtype, both, count=2), scale=0.5)
        assert found == (None if wide_enough else (element, None))
        one = {(element, 0): largest}
        assert find_scaled(with_values(dtype, one, count=1)) is None
        assert find_scaled(with_values(dtype, one, count=1), scale=2.0) == (element, None)


@pytest.mark.parametrize(
    ("dtype", "half_a_step"), [(torch.bfloat16, 2.0**119), (torch.float16, 16.0)], ids=name_of
)
def test_a_16_bit_sum_may_overflow_in_rounding_only(find, dtype, half_a_step):
    largest = torch.finfo(dtype).max
    for element in (0, 31, 70, 84):
        tie = {(element, 0): largest, (element, 1): half_a_step}
        assert find(with_values(dtype, tie, count=2)) == (element, None)
        below = {(element, 0): largest, (element, 1): half_a_step / 2}
        assert find(with_values(dtype, below, count=2)) is None


@pytest.mark.parametrize(("dtype", "op"), CASES, ids=name_of)
def test_looks_at_sums_of_floats_only(isa, dtype, op):
    sources = any_bits(dtype, 8, 4099)[:3]
    result = torch.empty_like(sources[0])
    found = kernels.reduce(
        [t.data_ptr() for t in sources], [result.data_ptr()], 4099, name_of(dtype), op, 1 / 3, isa
    )
    if dtype in FLOATS and op in ("sum", "avg"):
        element, source = found
        assert result[:element].isfinite().all()
        assert not result[element].isfinite()
        bringers = [k for k in range(3) if not sources[k][element].isfinite()]
        assert source == (bringers[0] if bringers else None)
    else:
        assert found is None


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_weights_and_momentum_that_are_not_finite_are_nobodys_gradient(isa, dtype):
    gradient = torch.ones(WATCHED, dtype=dtype)
    bad = [torch.full_like(gradient, torch.nan) for _ in "wm"]
    assert run_sgd([gradient], bad[:1], bad[1], scalars("momentum"), 1.0, isa) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_looking_changes_no_bit(isa, dtype, kind):
    # sgd_many does not look.
    weight, momentum, gradient = any_bits(dtype, 8, 4099)[:3]
    watched, unwatched = ([weight.clone(), momentum.clone(), gradient.clone()] for _ in "ab")
    s = scalars(kind)
    has_momentum = kind != "plain"
    w, u, g = watched
    assert run_sgd([g], [w], u if has_momentum else None, s, 0.5, isa) is not None
    w, u, g = (t.data_ptr() for t in unwatched)
    kernels.sgd_many([(w, u if has_momentum else 0, g, 4099)], name_of(dtype), s, 0.5, False, isa)
    for one, other in zip(watched, unwatched, strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# ---- instruction sets ----


def test_the_best_instruction_set_is_active():
    assert kernels.isas()[-1] == "baseline"
    assert kernels.active_isa() in kernels.isas()
    with pytest.raises(Exception, match="does not run kernels for sse9"):
        run_reduce([torch.ones(1)], "sum", "sse9")


def test_files_of_an_instruction_set_export_their_table_only(tmp_path):
    # Anything weak in them could replace, at link time, code that runs on an older CPU. Without
    # optimisation every function that is not forced inline is emitted.
    compiler, csrc = shutil.which("g++"), Path(__file__).parents[1] / "csrc"
    if not compiler or not shutil.which("nm") or platform.machine() != "x86_64":
        pytest.skip("needs g++ and nm on x86-64")
    flags = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"]
    built = tmp_path / "avx512.o"
    source = csrc / "kernels/cpu/avx512.cc"
    subprocess.run(
        [compiler, "-std=c++20", "-O0", *flags, f"-I{csrc}", "-c", source, "-o", built],
        check=True,
        timeout=120,
    )
    symbols = subprocess.run(["nm", "-C", built], check=True, capture_output=True, text=True).stdout
    exported = [
        line.split(maxsplit=2)[-1] for line in symbols.splitlines() if not line[17].islower()
    ]
    assert exported == ["pyar::kAvx512Table"]


# ---- hash ----


def hash_of(*parts):
    """One hash over the parts, uint8 arrays, in order."""
    result = np.zeros(1, np.uint64)
    kernels.hash_many([[(part.ctypes.data, part.nbytes) for part in parts]], result.ctypes.data)
    return int(result[0])


def mixed(value, word):
    product = (value ^ word) * 0x9E3779B97F4A7C15
    return product >> 64 ^ product % 2**64


def hash_in_python(part, seed=0):
    """The formula of csrc/kernels/kernels.h."""
    padded = np.zeros(-(-part.nbytes // 64) * 64, np.uint8)
    padded[: part.nbytes] = part
    lanes = [mixed(seed, k + 1) for k in range(8)]
    for i, word in enumerate(padded.view("<u8").tolist()):
        lanes[i % 8] = mixed(lanes[i % 8], word)
    return functools.reduce(mixed, lanes, part.nbytes)


def random_bytes(count, seed=0):
    return np.random.default_rng(seed).integers(256, size=count, dtype=np.uint8)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 1000, 100_003])
def test_hash_is_its_formula_at_any_alignment(length):
    data = random_bytes(length)
    for offset in range(9):
        space = np.empty(length + offset, np.uint8)
        space[offset:] = data
        assert hash_of(space[offset:]) == hash_in_python(data)
    first, second = data[: length // 3], data[length // 3 :]
    assert hash_of(first, second) == hash_in_python(second, seed=hash_in_python(first))


def test_hash_of_many_entries():
    parts = [random_bytes(n, seed=n) for n in (5, 64, 300)]
    spans = [(part.ctypes.data, part.nbytes) for part in parts]
    entries = [[], [spans[0]], spans[1:], [(0, 0)], spans[::-1]]
    result = np.full(len(entries), 7, np.uint64)
    kernels.hash_many(entries, result.ctypes.data)
    empty = np.empty(0, np.uint8)
    want = [0, hash_of(parts[0]), hash_of(*parts[1:]), hash_of(empty), hash_of(*parts[::-1])]
    assert result.tolist() == want
    assert len(set(want)) == len(want)  # no state is not an empty one


def test_hash_sees_every_bit_its_place_and_the_length():
    data = random_bytes(130)
    seen = {hash_of(data)}
    for i, bit in itertools.product(range(data.nbytes), range(8)):
        changed = data.copy()
        changed[i] ^= 1 << bit
        seen.add(hash_of(changed))
    assert len(seen) == 1 + 8 * data.nbytes
    zeros = np.zeros(200, np.uint8)
    assert len({hash_of(zeros[:length]) for length in range(201)}) == 201
    words = data[:128].reshape(16, 8)
    for i, k in itertools.combinations(range(16), 2):
        swapped = words.copy()
        swapped[[i, k]] = swapped[[k, i]]
        seen.add(hash_of(swapped.reshape(-1)))
    assert len(seen) == 1 + 8 * data.nbytes + 16 * 15 // 2


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_changes_that_mirror_each_other_do_not_cancel(dtype):
    """Two signs, or one bit of two elements, anywhere: a mere xor or product of words would lose some."""
    values = np.random.default_rng(1).standard_normal(256 // np.dtype(dtype).itemsize).astype(dtype)
    hashes = [hash_of(values.view(np.uint8))]
    for i, k in itertools.combinations(range(len(values)), 2):
        changed = values.copy()
        changed[[i, k]] *= -1
        hashes.append(hash_of(changed.view(np.uint8)))
    hashes += [hash_of((-values).view(np.uint8)), hash_of(values[::-1].copy().view(np.uint8))]
    assert len(set(hashes)) == len(hashes)
