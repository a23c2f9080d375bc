"""Small numeric helpers that scripts written for DeepEP import: `from deep_ep.utils.math import calc_diff`.

Everything works on tensors of any device, needs torch alone, and leaves its inputs as they are, except
`inplace_unique`. Programs that call `init_dist` run with another default device and dtype, so every tensor made here
names both.
"""

from __future__ import annotations

from typing import Tuple, Union

import torch
from torch.nn import functional

__all__ = [
    "align",
    "calc_diff",
    "ceil_div",
    "count_bytes",
    "create_grouped_scores",
    "hash_tensor",
    "hash_tensors",
    "inplace_unique",
    "per_token_cast_back",
    "per_token_cast_to_fp8",
    "safe_div",
]

_BLOCK = 128  # channels that share one scale
_E4M3_MAX = 448.0  # the largest finite E4M3 value
_AMAX_FLOOR = 1e-4  # keeps the multiplier finite for a block of zeros


def calc_diff(x: torch.Tensor, y: torch.Tensor) -> float:
    """How far two tensors are apart: 0 for equal ones, growing with the squared error.

    With x' = x + 1 and y' = y + 1 in float64 this is 1 - 2*sum(x'y') / sum(x'x' + y'y').

    Args:
        x, y: equal shapes, any dtype that converts to float64; empty tensors do not differ.

    Returns:
        A float in [0, 2]; NaN if either holds a NaN or an infinity.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(
            f"calc_diff: y.shape = {tuple(y.shape)}, allowed: {tuple(x.shape)} (the shape of x). "
            "Compare tensors of one shape."
        )
    x = x.detach().to(torch.float64) + 1
    y = y.detach().to(torch.float64) + 1
    total = (x * x + y * y).sum().item()
    if total == 0:  # both are -1 everywhere, or empty
        return 0.0
    # sum((x' - y')^2) is what remains of total - 2*sum(x'y'), without the cancellation: equal tensors give exactly 0.
    return (x - y).square().sum().item() / total


def safe_div(a, b):
    """a / b, where 0 / 0 is 0: a rate of nothing in no time.

    Args:
        a, b: numbers or tensors that broadcast. Numbers divide as Python does: anything else over 0 raises
            ZeroDivisionError. Tensors divide as torch does: anything else over 0 is an infinity.

    Returns:
        A float, or a tensor if either argument is one.
    """
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        quotient = torch.div(a, b) if isinstance(a, torch.Tensor) else torch.div(torch.full_like(b, a), b)
        nothing = (torch.eq(a, 0) if isinstance(a, torch.Tensor) else a == 0) & (b == 0)
        return quotient.masked_fill(nothing, 0.0) if isinstance(nothing, torch.Tensor) else quotient
    return 0.0 if a == 0 and b == 0 else a / b


def ceil_div(a: int, b: int) -> int:
    """The least integer that is not below a / b, for integers with b > 0. Exact at any size."""
    return -(-a // b)


def align(a: int, b: int) -> int:
    """The least multiple of b that is not below a, for integers with b > 0."""
    return ceil_div(a, b) * b


def per_token_cast_to_fp8(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Casts rows to E4M3 with one float32 scale for every 128 channels; the same bits on every device.

    Per block: amax = max(1e-4, max|x|) without NaNs, value = E4M3(x * (448 / amax)), rounded to nearest even and
    saturated at 448, scale = amax * float32(1 / 448). NaNs stay NaNs; a block with an infinity becomes NaN or 0 with
    an infinite scale.

    Args:
        x: [..., n], float32, float16 or bfloat16, any strides. The last block of a row may be partial.

    Returns:
        ([..., n] float8_e4m3fn, [..., ceil(n / 128)] float32), both contiguous, without gradients.

    Raises:
        ValueError: x has no dimension, or is not of those dtypes.
    """
    if x.dim() < 1 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"per_token_cast_to_fp8: x = {tuple(x.shape)} {x.dtype}, allowed: [..., n] float32, float16 or bfloat16. "
            "Pass rows of activations."
        )
    n = x.shape[-1]
    blocks = ceil_div(n, _BLOCK)
    padded = functional.pad(x.detach().to(torch.float32), (0, blocks * _BLOCK - n))
    rows = padded.reshape(*x.shape[:-1], blocks, _BLOCK)
    magnitude = rows.abs()
    amax = magnitude.masked_fill(magnitude.isnan(), 0.0)
    # amax() over no element is an error, also where there is no row that would need one.
    amax = amax.amax(dim=-1) if rows.numel() else amax.new_empty(rows.shape[:-1], dtype=torch.float32, device=x.device)
    amax = amax.clamp(min=_AMAX_FLOOR)
    # A number over a tensor becomes a reciprocal and a product in torch, which rounds twice: divide tensors.
    multiplier = torch.full_like(amax, _E4M3_MAX) / amax
    # torch casts what exceeds 448 to NaN; clamp saturates and lets NaN pass.
    values = (rows * multiplier.unsqueeze(-1)).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    values = values.reshape(*x.shape[:-1], blocks * _BLOCK)[..., :n].contiguous()
    return values, amax * (1.0 / _E4M3_MAX)


def per_token_cast_back(x_fp8: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Decodes E4M3 rows: each value times the scale of its 128 channels in float32, rounded to bfloat16.

    Args:
        x_fp8: [..., n] float8_e4m3fn.
        scales: [..., ceil(n / 128)] float32, or [..., ceil(n / 512)] int32 with four UE8M0 bytes in each element, the
            lowest byte first; byte b stands for the float32 with the bits b << 23. Any strides: the transposed views
            that low-latency dispatch returns are taken as they are. Not looked at if x_fp8 is empty.

    Returns:
        [..., n] bfloat16, contiguous.

    Raises:
        ValueError: another dtype, or scales that do not fit the rows.
    """
    if x_fp8.dim() < 1 or x_fp8.dtype != torch.float8_e4m3fn:
        raise ValueError(
            f"per_token_cast_back: x_fp8 = {tuple(x_fp8.shape)} {x_fp8.dtype}, allowed: [..., n] float8_e4m3fn. "
            "Pass what a cast or a dispatch in FP8 returned."
        )
    if x_fp8.numel() == 0:
        return torch.empty(x_fp8.shape, dtype=torch.bfloat16, device=x_fp8.device)
    n = x_fp8.shape[-1]
    blocks = ceil_div(n, _BLOCK)
    packed = scales.dtype == torch.int32
    columns = ceil_div(blocks, 4) if packed else blocks
    if scales.dtype not in (torch.float32, torch.int32) or scales.shape != (*x_fp8.shape[:-1], columns):
        raise ValueError(
            f"per_token_cast_back: scales = {tuple(scales.shape)} {scales.dtype}, allowed: "
            f"{(*x_fp8.shape[:-1], blocks)} float32 or {(*x_fp8.shape[:-1], ceil_div(blocks, 4))} int32 (UE8M0). "
            "Pass the scales that came with these rows."
        )
    if packed:
        scales = _unpack_ue8m0(scales)[..., :blocks]
    rows = functional.pad(x_fp8.to(torch.float32), (0, blocks * _BLOCK - n))
    rows = rows.reshape(*x_fp8.shape[:-1], blocks, _BLOCK) * scales.unsqueeze(-1)
    return rows.reshape(*x_fp8.shape[:-1], blocks * _BLOCK)[..., :n].to(torch.bfloat16).contiguous()


def _unpack_ue8m0(packed: torch.Tensor) -> torch.Tensor:
    """[..., c] int32 -> [..., 4c] float32, by shifts: right for any strides and byte order."""
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=packed.device)
    exponents = (packed.unsqueeze(-1) >> shifts) & 0xFF
    return (exponents << 23).view(torch.float32).flatten(-2)


def inplace_unique(x: torch.Tensor, num_slots: int) -> None:
    """Replaces each row of x by its distinct non-negative values, descending, then -1 to the end of the row.

    Turns the expert choices of a token, divided by experts per rank, into the ranks that it goes to.

    Args:
        x: [rows, k] integers; negative ones mean "no choice". Written in place.
        num_slots: how many values there are; all of x must be below. The check waits for the device.

    Raises:
        ValueError: x is not a matrix of integers, or holds a value of num_slots or more.
    """
    if x.dim() != 2 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(
            f"inplace_unique: x = {tuple(x.shape)} {x.dtype}, allowed: [rows, k] of an integer dtype. "
            "Pass indices, such as topk_idx."
        )
    if x.numel() == 0:
        return
    highest = int(x.max())
    if highest >= num_slots:
        raise ValueError(
            f"inplace_unique: x holds {highest}, allowed: below {num_slots} (num_slots). "
            "Count all slots that x can name."
        )
    ordered = x.sort(dim=1, descending=True).values
    repeated = functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    x.copy_(ordered.masked_fill(repeated | (ordered < 0), -1).sort(dim=1, descending=True).values)


def create_grouped_scores(scores: torch.Tensor, group_idx: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Gate scores with zeros outside the groups that each token chose, for top-k inside groups.

    Args:
        scores: [T, E]; group g is the columns from g*E/num_groups to (g+1)*E/num_groups.
        group_idx: [T, any] integers, the chosen groups; negative ones mean "no choice".
        num_groups: number of groups, a divisor of E.

    Returns:
        [T, E], dtype and device of scores. Also NaNs outside are zero. Gradients flow to what was chosen.

    Raises:
        ValueError: shapes that do not fit, or an E that num_groups does not divide.
    """
    if scores.dim() != 2 or group_idx.dim() != 2 or scores.shape[0] != group_idx.shape[0]:
        raise ValueError(
            f"create_grouped_scores: scores {tuple(scores.shape)}, group_idx {tuple(group_idx.shape)}, allowed: [T, E] "
            "and [T, chosen groups]. Pass one row for each token in both."
        )
    if num_groups < 1 or scores.shape[1] % num_groups:
        raise ValueError(
            f"create_grouped_scores: num_groups = {num_groups}, allowed: divisors of {scores.shape[1]} "
            "(scores.shape[1]). Choose groups of equal size."
        )
    groups = torch.arange(num_groups, dtype=group_idx.dtype, device=group_idx.device)
    chosen = (group_idx.unsqueeze(-1) == groups).any(dim=1).to(scores.device)
    outside = ~chosen.repeat_interleave(scores.shape[1] // num_groups, dim=1)
    return scores.masked_fill(outside, 0.0)


def hash_tensor(t: torch.Tensor) -> int:
    """The sum of the tensor's bytes read as int32, in 64 bits: equal for equal bytes in equal order.

    Args:
        t: any shape, dtype and strides. Missing bytes of a last incomplete int32 count as 0.

    Returns:
        A Python int; 0 for an empty tensor. It does not tell shapes, dtypes or the order of int32 words apart.
    """
    octets = t.detach().contiguous().reshape(-1).view(torch.uint8)
    octets = functional.pad(octets, (0, align(octets.numel(), 4) - octets.numel()))
    return int(octets.view(torch.int32).sum(dtype=torch.int64).item()) if octets.numel() else 0


def hash_tensors(*tensors: Union[torch.Tensor, tuple, list, None]) -> int:
    """The xor of `hash_tensor` of all tensors. Tuples and lists are gone through; None is left out."""
    value = 0
    for tensor in tensors:
        if isinstance(tensor, (tuple, list)):
            value ^= hash_tensors(*tensor)
        elif tensor is not None:
            value ^= hash_tensor(tensor)
    return value


def count_bytes(*tensors: Union[torch.Tensor, tuple, list, None]) -> int:
    """Bytes of the elements of all tensors. Tuples and lists are gone through; None is left out."""
    total = 0
    for tensor in tensors:
        if isinstance(tensor, (tuple, list)):
            total += count_bytes(*tensor)
        elif tensor is not None:
            total += tensor.numel() * tensor.element_size()
    return total
