"""The decays once more, in numpy float64, straight from the formulas: what the modules are compared with.

Nothing here imports decay_core. Stable forms are not used where the plain ones are good enough for moderate f.
"""

import math

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def silu(x):
    return x * sigmoid(x)


def lower_bounds(logits):
    """(L, ...) logits -> (L, ...) bounds: softmax over layers, running sum, minus the first."""
    e = np.exp(logits - logits.max(axis=0))
    running = np.cumsum(e / e.sum(axis=0), axis=0)
    return running - running[0]


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def tnl(form, layer, layers, heads):
    if form == "as_published":
        return np.array([-(8 * j / heads) * (1 - layer / layers) for j in range(1, heads + 1)])
    n = np.array([2 * 128 ** (j / (heads - 1) if heads > 1 else 0.5) for j in range(heads)])
    return -(1 / n) * (1 - layer / (layers - 1) + 1e-5)


def running_total(f):
    """z_0 .. z_T along axis 1 with z_0 = 0: (B, T, ...) -> (B, T + 1, ...)."""
    return np.logaddexp.accumulate(np.concatenate([np.zeros_like(f[:, :1]), f], axis=1), axis=1)


def log_decay_and_key(decay, form, f, parameters, place):
    """(log decay, shared key) of a decay by name. `parameters`: the module's own by name, plus `bound` for hgrn2."""
    layer, layers, heads = place
    if decay.startswith("mamba2"):
        step = softplus(f + parameters.get("step_bias", 0.0))
        log_decay = -np.exp(parameters.get("log_rate", 0.0)) * step
        return log_decay, step if form == "as_run" else 1 - np.exp(log_decay)
    if decay == "gla":
        log_decay = np.log(sigmoid(f / 16)) if form == "as_run" else np.log(sigmoid(f)) / 16
        return log_decay, 1 - np.exp(log_decay)
    if decay == "hgrn2":
        value = parameters["bound"] + (1 - parameters["bound"]) * sigmoid(f)
        return np.log(value), 1 - value
    if decay == "lightnet":
        z = running_total(f)
        previous = np.concatenate([np.zeros_like(f[:, :1]), f[:, :-1]], axis=1)
        return z[:, :-1] - z[:, 1:], np.exp((previous if form == "as_run" else f) - z[:, 1:])
    if decay == "sigmoid":
        return np.log(sigmoid(f)), 1 - sigmoid(f)
    if decay == "simple_decay":
        value = sigmoid(f + parameters["offset"])
        return np.log(value), 1 - value
    constants = {
        "tnl": lambda: tnl(form, layer, layers, heads),
        "tnl_l": lambda: parameters["theta"],
        "retnet": lambda: np.array([math.log(1 - 2.0 ** (-5 - j)) for j in range(heads)]),
        "none": lambda: np.zeros(heads),
    }
    return constants[decay](), None


def encoded(x, position, form):
    """(B, T, H, K) queries or keys with their position, (B, T, H, K) or (B, T, H, 2K)."""
    length, width = x.shape[1], x.shape[-1]
    time = np.arange(length)[:, None, None]
    rates = np.array([10_000.0 ** (-2 * i / width) for i in range(width)])
    if position in ("none", "tpe"):
        return x
    if position == "lrpe" or position == "lrpe_half" or (position == "rope" and form == "as_run"):
        turning = width if position == "lrpe" else width // 2
        angle = time * np.where(np.arange(width) < turning, rates, 0)
        return np.concatenate([x * np.cos(angle), x * np.sin(angle)], axis=-1)
    pairs = width // 2
    angle = time * np.where(np.arange(pairs) < (pairs // 2 if position == "rope_half" else pairs), rates[:pairs], 0)
    turned = (x[..., :pairs] + 1j * x[..., pairs:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def channel_decays(log_decay, granularity, width):
    """log λ of every encoded channel: (B, T, H), (B, T, H, K) or (B, T, H, K / 2) -> (B, T, H, width)."""
    if granularity == "scalar":
        return np.repeat(log_decay[..., None], width, axis=-1)
    return np.concatenate([log_decay] * (width // log_decay.shape[-1]), axis=-1)


def tpe(x, query, key, logit, gain, weight):
    """s_t = λ s_{t-1} + x_t per head; W RMSNorm(concat c_j s_t). x (B, T, d); query, key (H, d / H)."""
    heads = query.shape[0]
    state, out = np.zeros((x.shape[0], heads, x.shape[-1] // heads)), []
    for t in range(x.shape[1]):
        state = sigmoid(logit)[:, None] * state + x[:, t].reshape(state.shape)
        out.append(((query * key).sum(axis=-1)[:, None] * state).reshape(x.shape[0], -1))
    s = np.stack(out, axis=1)
    return (math.sqrt(s.shape[-1]) * s / np.sqrt((s**2).sum(axis=-1, keepdims=True) + 1e-5) * gain) @ weight.T


def attention(q, k, v, head_dim):
    """Causal softmax attention over (B, T, H, .) arrays with scale 1/√head_dim."""
    scores = np.einsum("bthk,bshk->bhts", q, k) / math.sqrt(head_dim)
    later = np.triu(np.ones(scores.shape[-2:], dtype=bool), 1)
    return np.einsum("bhts,bshv->bthv", softmax(np.where(later, -np.inf, scores)), v)


def delta_scan(q, k, v, log_decay, beta, beta_on_write):
    """The delta rule over (B, T, H, .) arrays by its matrices; log_decay (B, T, H, K), beta (B, T, H)."""
    batch, length, heads, width = q.shape
    state = np.zeros((batch, heads, width, v.shape[-1]))
    o = np.zeros((batch, length, heads, v.shape[-1]))
    for t in range(length):
        erase = np.eye(width) - beta[:, t, :, None, None] * k[:, t][..., :, None] * k[:, t][..., None, :]
        write = k[:, t][..., None] * v[:, t][..., None, :]
        if beta_on_write:
            write = beta[:, t, :, None, None] * write
        state = erase @ (np.exp(log_decay[:, t])[..., None] * state) + write
        o[:, t] = np.einsum("bhkv,bhk->bhv", state, q[:, t])
    return o


def scan(q, k, v, log_decay):
    """The recurrence over (B, T, H, .) arrays; log_decay (B, T, H, K)."""
    batch, length, heads, width = q.shape
    state = np.zeros((batch, heads, width, v.shape[-1]))
    o = np.zeros((batch, length, heads, v.shape[-1]))
    for t in range(length):
        state = np.exp(log_decay[:, t])[..., None] * state + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = np.einsum("bhkv,bhk->bhv", state, q[:, t])
    return o
