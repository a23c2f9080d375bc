"""deep_ep.utils.math against slow formulas in numpy, and its edge cases."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deep_ep.utils import math

SETTINGS = settings(max_examples=60, deadline=None)

FINITE = st.floats(-1e4, 1e4, width=32)


def matrix(elements, rows=4, columns=6):
    return st.integers(0, rows).flatmap(
        lambda r: st.integers(1, columns).flatmap(
            lambda c: st.lists(st.lists(elements, min_size=c, max_size=c), min_size=r, max_size=r).map(
                lambda values: np.array(values, dtype=object).reshape(r, c)
            )
        )
    )


# ---- calc_diff


def slow_diff(x, y):
    x, y = np.float64(x) + 1, np.float64(y) + 1
    return 1 - 2 * np.sum(x * y) / np.sum(x * x + y * y)


@SETTINGS
@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=20))
def test_calc_diff_is_the_stated_formula(pairs):
    x, y = np.array(pairs, dtype=np.float32).T
    if np.sum((np.float64(x) + 1) ** 2 + (np.float64(y) + 1) ** 2) < 1e-6:
        return  # the formula itself is 0 / 0 near -1
    expected = slow_diff(x, y)
    assert math.calc_diff(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, abs=1e-12)


@SETTINGS
@given(st.lists(FINITE, max_size=20))
def test_calc_diff_of_equal_tensors_is_exactly_zero(values):
    x = torch.tensor(values, dtype=torch.float32)
    assert math.calc_diff(x, x.clone()) == 0.0


def test_calc_diff_sees_small_errors_symmetrically():
    x = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    y = x + 1e-9
    assert 0 < math.calc_diff(x, y) < 1e-17
    assert math.calc_diff(x, y) == math.calc_diff(y, x)


def test_calc_diff_of_minus_one_and_of_nothing():
    minus_one = torch.full((4,), -1.0, dtype=torch.float32)
    assert math.calc_diff(minus_one, minus_one) == 0.0
    assert math.calc_diff(minus_one[:0], minus_one[:0]) == 0.0


def test_calc_diff_with_nan_or_infinity_is_nan():
    x = torch.ones(2, dtype=torch.float32)
    for bad in (float("nan"), float("inf")):
        assert np.isnan(math.calc_diff(x, torch.tensor([1.0, bad], dtype=torch.float32)))


def test_calc_diff_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"calc_diff: y.shape = \(3,\), allowed: \(2,\)"):
        math.calc_diff(torch.ones(2), torch.ones(3))


# ---- integers and quotients


@SETTINGS
@given(st.integers(-(10**30), 10**30), st.integers(1, 10**20))
def test_ceil_div_and_align(a, b):
    quotient = math.ceil_div(a, b)
    assert (quotient - 1) * b < a <= quotient * b
    assert math.align(a, b) == quotient * b


def test_safe_div_of_numbers():
    assert math.safe_div(0, 0) == 0
    assert math.safe_div(3, 4) == 0.75
    with pytest.raises(ZeroDivisionError):
        math.safe_div(1, 0)


def test_safe_div_of_tensors():
    a = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float32)
    b = torch.tensor([0.0, 0.0, 4.0], dtype=torch.float32)
    assert math.safe_div(a, b).tolist() == [0.0, float("inf"), 0.5]
    assert math.safe_div(a, 0).tolist() == [0.0, float("inf"), float("inf")]
    assert math.safe_div(0, b).tolist() == [0.0, 0.0, 0.0]


# ---- FP8


def slow_e4m3(value):
    """The value of E4M3 nearest to a float32, ties to even, saturating. All 127 magnitudes are tried."""
    if np.isnan(value):
        return value
    magnitudes = [m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:-1]
    distance = np.abs(np.array(magnitudes) - min(abs(float(value)), 448.0))
    nearest = np.flatnonzero(distance == distance.min())
    code = nearest[0] if len(nearest) == 1 or nearest[0] % 2 == 0 else nearest[1]
    return np.copysign(np.float32(magnitudes[code]), value)


def slow_cast(row):
    """One row of float32 by the rule of the contract: decoded codes and scales."""
    codes, scales = [], []
    for begin in range(0, len(row), 128):
        block = row[begin : begin + 128].astype(np.float32)
        known = np.abs(block[~np.isnan(block)])
        amax = np.float32(max(np.float32(1e-4), known.max(initial=np.float32(0))))
        scales.append(amax * (np.float32(1) / np.float32(448)))
        with np.errstate(invalid="ignore"):
            codes += [slow_e4m3(value * (np.float32(448) / amax)) for value in block]
    return np.array(codes, dtype=np.float32), np.array(scales, dtype=np.float32)


def bits(array):
    return np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.sampled_from([1e-6, 1e-3, 1.0, 37.0, 1e30]))
def test_cast_is_the_rule_bit_for_bit(seed, n, size):
    x = (np.random.default_rng(seed).standard_normal((2, n)) * size).astype(np.float32)
    values, scales = math.per_token_cast_to_fp8(torch.from_numpy(x))
    assert values.dtype == torch.float8_e4m3fn and values.shape == (2, n)
    assert scales.dtype == torch.float32 and scales.shape == (2, -(-n // 128))
    for row in range(2):
        expected_values, expected_scales = slow_cast(x[row])
        assert np.array_equal(bits(values[row].to(torch.float32).numpy()), bits(expected_values))
        assert np.array_equal(bits(scales[row].numpy()), bits(expected_scales))


def test_cast_divides_as_ieee_does():
    """Reciprocal and product, which torch makes of a number over a tensor, give another last bit for a quarter of all
    amax. The second channel lies between two codes, where that bit decides."""
    amax = np.arange(1, 4097, dtype=np.float32) / np.float32(7)
    differ = 0
    for midpoint in range(17, 32, 2):
        x = np.stack([amax, amax * np.float32(midpoint) / np.float32(448)], axis=1)
        values, _ = math.per_token_cast_to_fp8(torch.from_numpy(x))
        expected = torch.from_numpy(x * (np.float32(448) / amax)[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
        wrong = torch.from_numpy(x) * (448.0 / torch.from_numpy(amax)).unsqueeze(1)
        differ += (wrong.to(torch.float8_e4m3fn).view(torch.uint8) != expected.view(torch.uint8)).sum().item()
    assert differ > 0  # else this test could not fail


def test_cast_of_zeros_nans_and_infinities():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[0.0, -0.0], [nan, 2.0], [nan, nan], [inf, 1.0]], dtype=torch.float32)
    values, scales = math.per_token_cast_to_fp8(x)
    decoded = values.to(torch.float32)
    assert decoded[0].tolist() == [0, 0] and scales[0, 0] == np.float32(1e-4) * np.float32(1 / 448)
    assert decoded[1, 0].isnan() and decoded[1, 1] == 448
    assert decoded[2].isnan().all() and scales[2, 0] == scales[0, 0]
    assert decoded[3, 0].isnan() and scales[3, 0] == inf


@pytest.mark.parametrize("shape", [(0, 256), (3, 0), (0, 0), (2, 0, 128), (2, 3, 200), (5,)])
def test_casts_take_empty_and_batched_rows(shape):
    x = torch.randn(shape, dtype=torch.float32).to(torch.bfloat16)
    values, scales = math.per_token_cast_to_fp8(x)
    assert values.shape == shape and scales.shape == (*shape[:-1], -(-shape[-1] // 128))
    back = math.per_token_cast_back(values, scales)
    assert back.shape == shape and back.dtype == torch.bfloat16
    assert math.calc_diff(back, x) < 2e-3


def test_casts_ignore_default_dtype_and_keep_inputs():
    x = torch.randn((3, 256), dtype=torch.float32, requires_grad=True)
    copy = x.detach().clone()
    torch.set_default_dtype(torch.bfloat16)
    try:
        values, scales = math.per_token_cast_to_fp8(x)
        back = math.per_token_cast_back(values, scales)
    finally:
        torch.set_default_dtype(torch.float32)
    assert scales.dtype == torch.float32 and not values.requires_grad and not scales.requires_grad
    assert torch.equal(x.detach(), copy) and not back.requires_grad


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 700))
def test_cast_back_from_packed_scales(seed, n):
    random = np.random.default_rng(seed)
    blocks, columns = -(-n // 128), -(-n // 512)
    exponents = np.zeros((3, columns * 4), dtype=np.uint8)
    exponents[:, :blocks] = random.integers(100, 150, (3, blocks))
    packed = torch.from_numpy(exponents.view("<i4").astype(np.int32))
    values = torch.from_numpy(random.integers(0, 127, (3, n), dtype=np.uint8)).view(torch.float8_e4m3fn)
    factors = np.repeat(2.0 ** (exponents[:, :blocks].astype(np.float32) - 127), 128, axis=1)[:, :n]
    expected = torch.from_numpy(values.to(torch.float32).numpy() * factors.astype(np.float32)).to(torch.bfloat16)
    assert torch.equal(math.per_token_cast_back(values, packed), expected)


def test_cast_back_takes_transposed_scales():
    values, scales = math.per_token_cast_to_fp8(torch.randn((6, 384), dtype=torch.float32))
    transposed = scales.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert torch.equal(math.per_token_cast_back(values, transposed), math.per_token_cast_back(values, scales))
    packed = torch.full((6, 1), 0x7F7F7F7F, dtype=torch.int32).t().contiguous().t()  # all scales 2^0
    assert torch.equal(math.per_token_cast_back(values, packed), values.to(torch.bfloat16))


def test_casts_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="per_token_cast_to_fp8: x = .*int64, allowed"):
        math.per_token_cast_to_fp8(torch.zeros((2, 128), dtype=torch.int64))
    values = torch.zeros((2, 256), dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scales = \(2, 3\) torch.float32, allowed: \(2, 2\) float32 or \(2, 1\) int32"):
        math.per_token_cast_back(values, torch.ones((2, 3), dtype=torch.float32))
    with pytest.raises(ValueError, match="x_fp8"):
        math.per_token_cast_back(torch.zeros((2, 256), dtype=torch.uint8), torch.ones((2, 2), dtype=torch.float32))


# ---- indices and groups


@SETTINGS
@given(matrix(st.integers(-3, 9)), st.sampled_from([torch.int64, torch.int32]))
def test_inplace_unique(values, dtype):
    x = torch.tensor(values.astype(np.int64), dtype=dtype)
    address = x.data_ptr()
    assert math.inplace_unique(x, 10) is None
    assert x.data_ptr() == address
    for row, before in zip(x.tolist(), values.tolist()):
        distinct = sorted({value for value in before if value >= 0}, reverse=True)
        assert row == distinct + [-1] * (len(before) - len(distinct))


def test_inplace_unique_writes_through_a_view():
    base = torch.tensor([[1, 1, 7], [0, 2, 7]], dtype=torch.int64)
    math.inplace_unique(base[:, :2], 3)
    assert base.tolist() == [[1, -1, 7], [2, 0, 7]]


def test_inplace_unique_refuses_values_out_of_range():
    x = torch.tensor([[1, 4]], dtype=torch.int64)
    with pytest.raises(ValueError, match="x holds 4, allowed: below 4"):
        math.inplace_unique(x, 4)
    assert x.tolist() == [[1, 4]]
    with pytest.raises(ValueError, match="integer dtype"):
        math.inplace_unique(torch.zeros((1, 2), dtype=torch.float32), 4)


@SETTINGS
@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.data())
def test_create_grouped_scores(tokens, groups, size, data):
    scores = torch.arange(1, tokens * groups * size + 1, dtype=torch.float32).view(tokens, groups * size)
    chosen = data.draw(st.lists(st.lists(st.integers(-1, groups - 1), min_size=2, max_size=2),
                                min_size=tokens, max_size=tokens))
    index = torch.tensor(chosen, dtype=torch.int64).view(tokens, 2)
    result = math.create_grouped_scores(scores, index, groups)
    for token in range(tokens):
        for expert in range(groups * size):
            expected = scores[token, expert].item() if expert // size in chosen[token] else 0
            assert result[token, expert].item() == expected


def test_create_grouped_scores_leaves_no_nan_and_passes_gradients():
    scores = torch.tensor([[1.0, 2.0, float("nan"), 4.0]], dtype=torch.float32, requires_grad=True)
    result = math.create_grouped_scores(scores, torch.tensor([[0]], dtype=torch.int64), 2)
    assert result.tolist() == [[1, 2, 0, 0]]
    result.sum().backward()
    assert scores.grad.tolist() == [[1, 1, 0, 0]]
    with pytest.raises(ValueError, match="num_groups = 3, allowed: divisors of 4"):
        math.create_grouped_scores(scores, torch.tensor([[0]], dtype=torch.int64), 3)


# ---- hashes and sizes


@SETTINGS
@given(st.binary(max_size=64))
def test_hash_tensor_is_the_sum_of_int32_words(data):
    padded = data + b"\0" * (-len(data) % 4)
    expected = int(np.frombuffer(padded, dtype=np.int32).astype(np.int64).sum()) if padded else 0
    assert math.hash_tensor(torch.tensor(list(data), dtype=torch.uint8)) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_hash_tensor_of_any_dtype_and_strides(dtype):
    x = torch.arange(24, dtype=torch.float32).view(4, 6).to(dtype)
    octets = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert math.hash_tensor(x) == int(np.frombuffer(octets, dtype=np.int32).astype(np.int64).sum())
    assert math.hash_tensor(x.t().contiguous().t()) == math.hash_tensor(x)


def test_hash_tensors_and_count_bytes():
    a, b = torch.tensor([5], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
    assert math.hash_tensor(torch.tensor([-1, -1], dtype=torch.int32)) == -2
    assert math.hash_tensors(a, b) == 5 ^ 7
    assert math.hash_tensors(a, (b, None)) == 5 ^ 7
    assert math.hash_tensors() == 0 == math.count_bytes()
    assert math.count_bytes(a, [b, None], torch.zeros(3, dtype=torch.bfloat16)) == 4 + 8 + 6
