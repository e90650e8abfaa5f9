"""JAX's side of the measurement: ``lax.scan`` under ``jit``. Runs as a script, in an environment that has JAX.

It stands alone: elman is not installed there, and JAX not here. A line of JSON in, one out, until the input ends:
{"load": file.npz, "cell": name} takes xs, the weights and the gradient of ys, and answers with the seconds that
compiling took; {"save": file.npz} writes ys and all gradients; {"run": mode} answers with the milliseconds of one
run, forward or training, after another that is not timed, for it finds the threads of the other side awake.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import numpy as np

__all__ = ["STEPS", "main"]


def _lstm(jnp: Any, sigmoid: Any, w: Any, a: Any, state: Any) -> Any:
    h, s = state
    i, f, n, q = jnp.split(a + h @ w["weight_hh"].T, 4, -1)
    s = sigmoid(f) * s + sigmoid(i) * jnp.tanh(n)
    return sigmoid(q) * jnp.tanh(s), s


def _peephole_lstm(jnp: Any, sigmoid: Any, w: Any, a: Any, state: Any) -> Any:
    h, s = state
    p = w["weight_peephole"]
    i, f, n, q = jnp.split(a + h @ w["weight_hh"].T, 4, -1)
    s = sigmoid(f + p[1] * s) * s + sigmoid(i + p[0] * s) * jnp.tanh(n)
    return sigmoid(q + p[2] * s) * jnp.tanh(s), s


def _norm(jnp: Any, a: Any, gain: Any) -> Any:
    centred = a - a.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5) * gain


def _layer_norm_lstm(jnp: Any, sigmoid: Any, w: Any, a: Any, state: Any) -> Any:
    h, s = state
    i, f, n, q = jnp.split(a + _norm(jnp, h @ w["weight_hh"].T, w["norm_hh.weight"]), 4, -1)
    s = sigmoid(f) * s + sigmoid(i) * jnp.tanh(n)
    return sigmoid(q) * jnp.tanh(_norm(jnp, s, w["norm_cell.weight"]) + w["norm_cell.bias"]), s


def _gru(jnp: Any, sigmoid: Any, w: Any, a: Any, state: Any) -> Any:
    (h,) = state
    x_r, x_u, x_n = jnp.split(a, 3, -1)
    h_r, h_u, h_n = jnp.split(h @ w["weight_hh"].T + w["bias_hh"], 3, -1)
    n = jnp.tanh(x_n + sigmoid(x_r + h_r) * h_n)
    u = sigmoid(x_u + h_u)
    return ((1 - u) * n + u * h,)


STEPS = {
    "LSTM": (_lstm, 2),
    "peephole LSTM": (_peephole_lstm, 2),
    "layer-norm LSTM": (_layer_norm_lstm, 2),
    "GRU": (_gru, 1),
}
"""The step of a cell, and how many states it has."""


class Loaded:
    """A cell with its weights, compiled."""

    def __init__(self, name: str, file: str) -> None:
        jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
        step, states = STEPS[name]
        self.jax = jax
        with np.load(file) as arrays:
            self.weights = {key: jnp.asarray(arrays[key]) for key in arrays.files if key not in ("xs", "weight")}
            self.xs, self.weight = jnp.asarray(arrays["xs"]), jnp.asarray(arrays["weight"])
        hidden = self.weight.shape[-1]

        def forward(w: Any, xs: Any) -> Any:
            a = xs @ w["weight_ih"].T
            if name == "layer-norm LSTM":
                a = _norm(jnp, a, w["norm_ih.weight"])
            a = a + w["bias_ih"] + (0 if name == "GRU" else w["bias_hh"])

            def body(state: Any, a: Any) -> Any:
                state = step(jnp, jax.nn.sigmoid, w, a, state)
                return state, state[0]

            return jax.lax.scan(body, (jnp.zeros((xs.shape[1], hidden), xs.dtype),) * states, a)[1]

        def training(w: Any, xs: Any, weight: Any) -> Any:
            ys, pull = jax.vjp(forward, w, xs)
            return ys, *pull(weight)

        begun = time.perf_counter()
        self.forward = jax.jit(forward).lower(self.weights, self.xs).compile()
        self.training = jax.jit(training).lower(self.weights, self.xs, self.weight).compile()
        self.seconds = time.perf_counter() - begun

    def run(self, mode: str) -> Any:
        given = (self.weights, self.xs) if mode == "forward" else (self.weights, self.xs, self.weight)
        return self.jax.block_until_ready(getattr(self, mode)(*given))

    def save(self, file: str) -> None:
        ys, of_weights, of_xs = self.run("training")
        np.savez(file, ys=ys, xs=of_xs, **of_weights)


def main() -> None:
    loaded: Any = None
    print(json.dumps({"jax": importlib.import_module("jax").__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, object] = {}
        if "load" in asked:
            loaded = Loaded(asked["cell"], asked["load"])
            answer["seconds"] = loaded.seconds
        elif "save" in asked:
            loaded.save(asked["save"])
        else:
            loaded.run(asked["run"])
            begun = time.perf_counter()
            loaded.run(asked["run"])
            answer["milliseconds"] = 1e3 * (time.perf_counter() - begun)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
