"""One token of the delta scan, for decoding, as one Triton kernel: the state is read once, faded, corrected and written once.

    S ← (I − β k kᵀ) diag(λ) S + w k vᵀ        o = scale · Sᵀ q        w = β or 1

What is unusual: as in decay_step_triton.py the decay's formula is computed here too, and the new state may be the old one's
memory. A program has a slice of V with all of K, since the recall kᵀ S goes over K. No gradient.
Source: delta_scan_naive.py is the definition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decay_source import DecaySource
from kernels.launching import cdiv, launch, next_power_of_2, on_device_of
from kernels.scan_arguments import check_delta_scan
from kernels.triton_gate import KINDS, log2_decay
from kernels.triton_toolchain import choose_ptxas

choose_ptxas()  # before the first kernel is compiled
ENTRIES = 4096  # of a state in one program: 32 for each of 128 threads
KEY_EPS = tl.constexpr(1e-5)


@triton.jit(do_not_specialize=["heads", "q_b", "q_h", "k_b", "k_h", "v_b", "v_h", "beta_b", "beta_h", "x_b", "x_h", "x_k"])
def _step_kernel(
    q, k, v, beta, x, gain, offset, before, after, o, slope, scale, heads,
    q_b, q_h, k_b, k_h, v_b, v_h, beta_b, beta_h, x_b, x_h, x_k,
    KIND: tl.constexpr, VECTOR: tl.constexpr, WRITE: tl.constexpr, NORM: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    ck = tl.arange(0, BLOCK_K)
    cv = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_k, inside_v = ck < K, cv < V
    query = tl.load(q + batch * q_b + head * q_h + ck, mask=inside_k, other=0.0).to(tl.float32)
    key = tl.load(k + batch * k_b + head * k_h + ck, mask=inside_k, other=0.0).to(tl.float32)
    value = tl.load(v + batch * v_b + head * v_h + cv, mask=inside_v, other=0.0).to(tl.float32)
    rate = tl.load(beta + batch * beta_b + head * beta_h).to(tl.float32)
    if NORM:
        key *= tl.rsqrt(tl.sum(key * key, 0) + KEY_EPS)
    entries = sequence * (K * V) + ck[:, None] * V + cv[None, :]
    inside = inside_k[:, None] & inside_v[None, :]
    state = tl.load(before + entries, mask=inside, other=0.0).to(tl.float32)
    if x is not None:
        # One λ per head is read as the same number for every channel.
        channel = ck if VECTOR else ck * 0
        width = K if VECTOR else 1
        activation = tl.load(x + batch * x_b + head * x_h + channel * x_k, mask=inside_k, other=0.0).to(tl.float32)
        factor = tl.full([BLOCK_K], 1.0, tl.float32)
        shift = tl.zeros([BLOCK_K], tl.float32)
        if gain is not None:
            factor = tl.load(gain + head * width + channel, mask=inside_k, other=1.0).to(tl.float32)
        if offset is not None:
            shift = tl.load(offset + head * width + channel, mask=inside_k, other=0.0).to(tl.float32)
        state *= tl.exp2(log2_decay(activation, factor, shift, slope, KIND))[:, None]
    recalled = tl.sum(state * key[:, None], 0)
    write = rate * (value - recalled) if WRITE else value - rate * recalled
    state += key[:, None] * write[None, :]
    tl.store(after + entries, state, mask=inside)
    out = tl.sum(state * (query * scale)[:, None], 0)
    tl.store(o + sequence * V + cv, out.to(o.dtype.element_ty), mask=inside_v)


@torch.library.custom_op("decay::delta_step", mutates_args={"state"})
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    x: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    before: Tensor | None,
    state: Tensor,
    kind: str,
    slope: float,
    scale: float,
    beta_on_write: bool,
    normalize_key: bool,
) -> Tensor:
    batch, _, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    o = v.new_empty(batch, 1, heads, value_dim)
    block_k = next_power_of_2(key_dim)
    block_v = min(max(ENTRIES // block_k, 16), next_power_of_2(value_dim))
    vector = x is not None and x.dim() == 4
    steps = {
        f"{name}_{axis}": 0 if y is None else y.stride(i)
        for name, y in zip(("q", "k", "v", "beta", "x"), (q, k, v, beta, x), strict=True)
        for i, axis in ((0, "b"), (2, "h"))
    }
    arguments = dict(
        q=q, k=k, v=v, beta=beta, x=x, gain=gain, offset=offset, before=state if before is None else before, after=state, o=o,
        slope=float(slope), scale=float(scale), heads=heads, **steps, x_k=x.stride(3) if vector else 0,
        KIND=KINDS[kind], VECTOR=vector, WRITE=beta_on_write, NORM=normalize_key, K=key_dim, V=value_dim, BLOCK_K=block_k,
        BLOCK_V=block_v,
    )  # fmt: skip
    with on_device_of(q):
        launch(_step_kernel, (batch * heads, cdiv(value_dim, block_v)), arguments, num_warps=4)
    return o


@_step.register_fake
def _(q, k, v, beta, x, gain, offset, before, state, kind, slope, scale, beta_on_write, normalize_key):
    return torch.empty(v.shape, device=v.device, dtype=v.dtype)


def delta_step_triton(
    q_bthk: Tensor,
    k_bthk: Tensor,
    v_bthv: Tensor,
    beta_bth: Tensor,
    decay: Tensor | DecaySource | None = None,
    beta_on_write: bool = True,
    state_bhkv: Tensor | None = None,
    scale: float = 1.0,
    normalize_key: bool = False,
    new_state_bhkv: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (o (B, 1, H, V) in v's dtype, the state after the token).

    The arguments are those of delta_scan_naive with T = 1; the kernels' dtypes and widths. The new state goes into
    `new_state_bhkv`, contiguous fp32, which may be `state_bhkv` itself; without it into fresh memory. ValueError for arguments
    that do not fit.
    """
    check_delta_scan(q_bthk, k_bthk, v_bthv, beta_bth, decay, state_bhkv, scale)
    source = decay if isinstance(decay, DecaySource) or decay is None else DecaySource(x=decay)
    batch, length, heads, key_dim = q_bthk.shape
    shape = (batch, heads, key_dim, v_bthv.shape[-1])
    if length != 1:
        raise ValueError(f"q of shape {tuple(q_bthk.shape)} has {length} tokens, a step has one; use the scan")
    state = new_state_bhkv
    if state is not None and (state.shape != shape or state.dtype != torch.float32 or not state.is_contiguous()):
        what = f"new_state of shape {tuple(state.shape)}, {state.dtype}"
        raise ValueError(f"{what}, is no contiguous float32 tensor of {shape}; make one with torch.empty")
    before = None if state_bhkv is None else state_bhkv.float().contiguous()
    if state is None:
        empty = torch.zeros if before is None else torch.empty
        state = empty(shape, device=q_bthk.device, dtype=torch.float32)
    elif before is None:
        state.zero_()
    if batch == 0 or heads == 0:
        return torch.zeros_like(v_bthv), state
    q, k, v = (y if y.stride(-1) == 1 else y.contiguous() for y in (q_bthk, k_bthk, v_bthv))
    formula: tuple[str, float] = ("log", 1.0) if source is None else (source.kind, source.slope)
    made_of = (None, None, None) if source is None else (source.x, source.gain, source.offset)
    x, gain, offset = (made_of[0], *(y if y is None else y.contiguous() for y in made_of[1:]))
    same = before is not None and before is new_state_bhkv
    given = (q, k, v, beta_bth, x, gain, offset, None if same else before, state)
    return _step(*given, *formula, scale, beta_on_write, normalize_key), state
