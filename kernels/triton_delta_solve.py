"""The delta rule inside a chunk, for all chunks at once: the triangular system that its tokens' erasures make is inverted here.

With K̃_ij = k_i·k_j Γ_ij for j < i (Γ_ij: λ's product over the tokens after j up to i) the pseudo-values of a chunk solve
(I + β K̃) U = R, and what the walks want is M = K̃ (I + β K̃)^-1, of which (I + β K̃)^-1 = I − β M and (I + K̃ β)^-1 = I − M β.

What is surprising:
- M rather than the inverse is kept: the unit diagonal stays exact, and what uses M divides nothing by β.
- Blocks are inverted in pairs, from single tokens up: between two halves M β is (I − M β) K̃ β (I − M β). No power of a matrix
  appears, so collinear keys with β near 2 make nothing large, and rounding stays relative to M's own entries. All of K̃ is
  multiplied and what lies between halves is taken, so that K̃ is an operand that never changes.
- For 16-bit inputs the products are of fp16 operands, which have tf32's digits at half the cost, where no erasure expands
  (β |k|² <= 2) and keys are not huge. Other chunks are marked, and done by a second kernel in tf32: a program that could do
  both would hold the registers of both.
- For 16-bit inputs M is kept as fp16, and products with it are taken in tf32, with as many digits: where keys repeat, M's
  entries do, and their rounding adds up along a row. An M beyond fp16's range is divided by a factor.
- Gates are left for the other kernels in fp32, by chunk: running sums of log2 λ, β, for fp32 inputs the sums' fractions and
  else the factor, and 1 / |k| where keys are normalized.
Source: the pairwise inversion is the textbook inverse of a block triangular matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_scalar_tiles import between, gate_parameters, get_decays, get_tile, locate_slot, running

WHOLE, BETA, OTHER, INVERSE_NORM = (tl.constexpr(n) for n in range(4))  # planes of the gates
KEY_EPS = tl.constexpr(1e-5)
RUNTIME = ["slope", "tokens", "heads", "sequences", "search_steps", "log2_scale"]
STRIDES = [f"{tensor}_{axis}" for tensor in ("q", "k", "v", "x", "d", "beta") for axis in ("b", "t", "h")]


def planes(norm: bool) -> int:
    """How many numbers the gates have for a token."""
    return 3 + norm


@triton.jit
def put_gates(gates, rows, whole, other, beta, inverse_norm, CHUNK: tl.constexpr, NORM: tl.constexpr):
    tl.store(gates + WHOLE * CHUNK + rows, whole)
    tl.store(gates + BETA * CHUNK + rows, beta)
    tl.store(gates + OTHER * CHUNK + rows, other)
    if NORM:
        tl.store(gates + INVERSE_NORM * CHUNK + rows, inverse_norm)


@triton.jit
def get_gates(gates, rows, CHUNK: tl.constexpr, SPLIT: tl.constexpr, NORM: tl.constexpr):
    """Running sums of log2 λ as (whole, fraction), and 1 / |k| or 1."""
    whole = tl.load(gates + WHOLE * CHUNK + rows)
    fraction = tl.load(gates + OTHER * CHUNK + rows) if SPLIT else tl.zeros([CHUNK], tl.float32)
    inverse_norm = tl.load(gates + INVERSE_NORM * CHUNK + rows) if NORM else tl.full([CHUNK], 1.0, tl.float32)
    return whole, fraction, inverse_norm


@triton.jit
def get_beta(gates, rows, CHUNK: tl.constexpr):
    return tl.load(gates + BETA * CHUNK + rows)


@triton.jit
def get_factor(gates, CHUNK: tl.constexpr, SPLIT: tl.constexpr):
    """What M of a chunk has been divided by."""
    return 1.0 if SPLIT else tl.load(gates + OTHER * CHUNK)


@triton.jit
def times_inverse(m, x, summand, LP: tl.constexpr, PRECISION: tl.constexpr):
    """M x + summand; of bf16 operands M is two, its digits being more than one has."""
    high = m.to(LP)
    summand = tl.dot(high, x.to(LP), summand, input_precision=PRECISION)
    if LP == tl.bfloat16:
        low = (m.to(tl.float32) - high.to(tl.float32)).to(LP)
        summand = tl.dot(low, x.to(LP), summand, input_precision=PRECISION)
    return summand


@triton.jit
def get_total(gates, CHUNK: tl.constexpr, SPLIT: tl.constexpr):
    """log2 of λ's product over a chunk, as (whole, fraction)."""
    whole = tl.load(gates + WHOLE * CHUNK + CHUNK - 1)
    fraction = tl.load(gates + OTHER * CHUNK + CHUNK - 1) if SPLIT else 0.0
    return whole, fraction


@triton.jit
def merged(inverse, lower, rows, level, PRECISION: tl.constexpr):
    """(I − L)^-1 − I of blocks of 2^(level + 1) tokens from that of their halves; `lower` is L, as products take it."""
    operand = inverse.to(lower.dtype)
    across = tl.dot(operand, lower, lower.to(tl.float32), input_precision=PRECISION)
    across = tl.dot(across.to(lower.dtype), operand, across, input_precision=PRECISION)
    return tl.where(((rows[:, None] ^ rows[None, :]) >> level) == 1, across, inverse)


@triton.jit
def inverted(lower, beta, largest, rows, LEVELS: tl.constexpr, LP: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """M from K̃, strictly lower triangular. largest: of all |k|². HALF: by products of fp16 operands."""
    # M β is what is built; a β that is raised to here changes M by less than its rounding, since it erases by β |k|².
    beta = tl.maximum(beta, 1e-20 if LP == tl.float32 else 6e-5 / tl.maximum(largest, 1.0))
    lower *= -beta[None, :]
    inverse = tl.where((rows[:, None] ^ rows[None, :]) == 1, lower, 0.0)
    if HALF:
        operand = lower.to(tl.float16)
        for level in tl.static_range(1, LEVELS):
            inverse = merged(inverse, operand, rows, level, PRECISION)
    else:
        for level in tl.range(1, LEVELS):
            inverse = merged(inverse, lower, rows, level, PRECISION)
    return inverse * (-1.0 / beta)[None, :]


@triton.jit
def in_range(squares, beta, largest):
    """Whether fp16 has the range: no erasure expands, and no key is huge."""
    return (tl.max(squares * beta, 0) <= 2.05) & (largest <= 1024.0)


@triton.jit
def inverted_either(lower, beta, squares, rows, LEVELS: tl.constexpr, LP: tl.constexpr, PRECISION: tl.constexpr):
    """The same by fp16 operands where fp16 has the range. squares: |k|²."""
    largest = tl.max(squares, 0)
    if LP != tl.float32 and in_range(squares, beta, largest):
        found = inverted(lower, beta, largest, rows, LEVELS, LP, True, PRECISION)
    else:
        found = inverted(lower, beta, largest, rows, LEVELS, LP, False, PRECISION)
    return found


# fmt: off
@triton.jit
def _solve(
    k, x, beta, gain, offset, cu, inverse, gates, slot, head,
    slope, tokens, heads, sequences, search_steps,
    k_b, k_t, k_h, x_b, x_t, x_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr,
    LP: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, NORM: tl.constexpr,
    PLANES: tl.constexpr,
):
    """One chunk; returns whether fp16 has the range for it."""
    batch, start, left = locate_slot(cu, slot, sequences, search_steps, tokens, CHUNK)
    rows = tl.arange(0, CHUNK)
    k_base = k + (batch * k_b + start * k_t + head * k_h) * ALIGN
    products = tl.zeros([CHUNK, CHUNK], tl.float32)
    for piece in tl.static_range(0, (K + BLOCK_K - 1) // BLOCK_K):
        ck = piece * BLOCK_K + tl.arange(0, BLOCK_K)
        kc = get_tile(k_base, rows[:, None] * (k_t * ALIGN) + ck[None, :], rows, ck, left, K, BLOCK_K, LP)
        products = tl.dot(kc, tl.trans(kc), products, input_precision=PRECISION)
    if x is not None:
        factor, shift = gate_parameters(gain, offset, head)
        x_base = x + batch * x_b + start * x_t + head * x_h
        log2 = get_decays(x_base, rows * x_t, rows, left, factor, shift, slope, KIND)
    else:
        log2 = tl.zeros([CHUNK], tl.float32)
    whole, fraction, _whole_total, _fraction_total = running(log2, SPLIT)
    beta_base = beta + batch * beta_b + start * beta_t + head * beta_h
    betas = tl.load(beta_base + rows * beta_t, mask=rows < left, other=0.0).to(tl.float32)
    squares = tl.sum(tl.where(rows[:, None] == rows[None, :], products, 0.0), 1)
    lower = tl.where(rows[:, None] > rows[None, :], products * between(whole, fraction, rows, 0.0, False, SPLIT), 0.0)
    inverse_norm = tl.rsqrt(squares + KEY_EPS)
    if NORM:
        lower *= inverse_norm[:, None] * inverse_norm[None, :]
        squares *= inverse_norm * inverse_norm
    largest = tl.max(squares, 0)
    found = inverted(lower, betas, largest, rows, LEVELS, LP, HALF, PRECISION)
    place = slot.to(tl.int64) * heads + head
    entries = place * (CHUNK * CHUNK) + rows[:, None] * CHUNK + rows[None, :]
    other = fraction
    if not SPLIT:
        other = tl.full([CHUNK], 1.0, tl.float32)
        if not HALF:
            factor = tl.maximum(tl.max(tl.max(tl.abs(found), 1), 0) * 2.0**-15, 1.0)
            found /= factor
            other *= factor
    tl.store(inverse + entries, found.to(inverse.dtype.element_ty))
    put_gates(gates + place * (PLANES * CHUNK), rows, whole, other, betas, inverse_norm, CHUNK, NORM)
    return in_range(squares, betas, largest)


@triton.jit(do_not_specialize=[*RUNTIME, *STRIDES])
def solve_kernel(
    k, x, beta, gain, offset, cu, inverse, gates, unfit,
    slope, tokens, heads, sequences, search_steps,
    k_b, k_t, k_h, x_b, x_t, x_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr,
    LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, NORM: tl.constexpr, PLANES: tl.constexpr,
):
    """inverse: (slots, H, CHUNK, CHUNK), M of each chunk; gates: (slots, H, PLANES, CHUNK). x None: no decay.
    unfit: (slots, H), which chunks fp16 has not the range for; None: products are not of fp16 operands."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    fits = _solve(
        k, x, beta, gain, offset, cu, inverse, gates, tl.program_id(0) // heads, head,
        slope, tokens, heads, sequences, search_steps, k_b, k_t, k_h, x_b, x_t, x_h, beta_b, beta_t, beta_h,
        K, BLOCK_K, CHUNK, LEVELS, KIND, ALIGN, LP, unfit is not None, PRECISION, SPLIT, NORM, PLANES,
    )
    if unfit is not None:
        tl.store(unfit + tl.program_id(0), tl.where(fits, 0, 1))


@triton.jit(do_not_specialize=[*RUNTIME, "places", *STRIDES])
def solve_rest_kernel(
    k, x, beta, gain, offset, cu, inverse, gates, unfit,
    slope, tokens, heads, sequences, search_steps, places,
    k_b, k_t, k_h, x_b, x_t, x_h, beta_b, beta_t, beta_h,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr,
    LP: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr, NORM: tl.constexpr, PLANES: tl.constexpr,
    COUNT: tl.constexpr,
):
    """solve_kernel for the chunks that are marked in unfit, of COUNT places (slot · H + head) in a program."""
    first = tl.program_id(0) * COUNT
    own = first + tl.arange(0, COUNT)
    if tl.max(tl.load(unfit + own, mask=own < places, other=0), 0) > 0:
        for place in tl.range(first, tl.minimum(first + COUNT, places)):
            if tl.load(unfit + place) > 0:
                head = (place % heads).to(tl.int64)
                _solve(
                    k, x, beta, gain, offset, cu, inverse, gates, place // heads, head,
                    slope, tokens, heads, sequences, search_steps, k_b, k_t, k_h, x_b, x_t, x_h, beta_b, beta_t, beta_h,
                    K, BLOCK_K, CHUNK, LEVELS, KIND, ALIGN, LP, False, PRECISION, SPLIT, NORM, PLANES,
                )
# fmt: on
