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


def tnl(form, layer, layers, heads):
    if form == "as_published":
        return np.array([-(8 * j / heads) * (1 - layer / layers) for j in range(1, heads + 1)])
    n = np.array([2 * 128 ** (j / (heads - 1)) for j in range(heads)])
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


def scan(q, k, v, log_decay):
    """The recurrence over (B, T, H, .) arrays; log_decay (B, T, H, K)."""
    batch, length, heads, width = q.shape
    state = np.zeros((batch, heads, width, v.shape[-1]))
    o = np.zeros((batch, length, heads, v.shape[-1]))
    for t in range(length):
        state = np.exp(log_decay[:, t])[..., None] * state + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = np.einsum("bhkv,bhk->bhv", state, q[:, t])
    return o
