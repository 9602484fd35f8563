"""Random small networks of a grammar: dense, convolutional, residual, recurrent, attentive."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

OPS = {
    "flat": ("dense", "residual", "branches", "gated", "norm", "heads"),
    "image": ("conv", "grouped", "depthwise", "residual", "branches", "batch", "group", "pool"),
    "sequence": ("dense", "attention", "residual", "norm", "lstm", "gated"),
}


class Network:
    """Layers, drawn one after the other; ``apply(params, x)`` and ``params``.

    Args:
      kind: "flat", "image" or "sequence", what the inputs are.
      names: of layers; those that do not exist for the kind are skipped.
      seed: of the parameters and widths.
    """

    def __init__(self, kind: str, names: list[str], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.params: dict[str, Any] = {}
        self.layers: list[Any] = []
        shape = {"flat": (5,), "image": (6, 6, 4), "sequence": (5, 8)}[kind]
        self.inputs = jnp.asarray(self.rng.normal(size=(2, *shape)), jnp.float32)
        width = shape[-1]
        for name in names:
            if name in OPS[kind]:
                width = getattr(self, f"_{name}")(kind, width)
        if kind != "flat":
            axes = tuple(range(1, len(shape)))
            self.layers.append(lambda p, x: jnp.mean(x, axes))
        key = self._new(kernel=(width, 3), bias=(3,))
        self.layers.append(lambda p, x: x @ p[key]["kernel"] + p[key]["bias"])

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        """The network."""
        for layer in self.layers:
            x = layer(params, x)
        return x

    def _new(self, **shapes: tuple[int, ...]) -> str:
        name = f"layer{len(self.params)}"
        self.params[name] = {
            key: jnp.asarray(self.rng.normal(size=shape) * 0.5, jnp.float32)
            for key, shape in shapes.items()
        }
        return name

    def _width(self) -> int:
        return 4 * int(self.rng.integers(1, 4))

    def _product(self, kind: str, width: int, out: int, **options: Any) -> Any:
        """A dense layer, or a convolution of an image."""
        if kind != "image":
            key = self._new(kernel=(width, out), bias=(out,))
            return lambda p, x: x @ p[key]["kernel"] + p[key]["bias"]
        groups = options.get("groups", 1)
        key = self._new(kernel=(3, 3, width // groups, out), bias=(out,))

        def convolve(p: Any, x: jax.Array) -> jax.Array:
            numbers = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(
                x, p[key]["kernel"], (1, 1), "SAME",
                dimension_numbers=numbers, feature_group_count=groups,
            )  # fmt: skip
            return y + p[key]["bias"]

        return convolve

    def _dense(self, kind: str, width: int) -> int:
        out = self._width()
        layer = self._product(kind, width, out)
        self.layers.append(lambda p, x: jax.nn.relu(layer(p, x)))
        return out

    _conv = _dense

    def _grouped(self, kind: str, width: int) -> int:
        groups = 2
        layer = self._product(kind, width, 8, groups=groups)
        self.layers.append(lambda p, x: jnp.tanh(layer(p, x)))
        return 8

    def _depthwise(self, kind: str, width: int) -> int:
        layer = self._product(kind, width, width, groups=width)
        self.layers.append(lambda p, x: jax.nn.gelu(layer(p, x)))
        return width

    def _residual(self, kind: str, width: int) -> int:
        hidden = self._width()
        up, down = self._product(kind, width, hidden), self._product(kind, hidden, width)
        self.layers.append(lambda p, x: x + down(p, jax.nn.relu(up(p, x))))
        return width

    def _branches(self, kind: str, width: int) -> int:
        left, right = self._product(kind, width, 4), self._product(kind, width, 8)
        self.layers.append(lambda p, x: jnp.concatenate([left(p, x), jnp.abs(right(p, x))], -1))
        return 12

    def _gated(self, kind: str, width: int) -> int:
        out = self._width()
        both = self._product(kind, width, 2 * out)

        def layer(p: Any, x: jax.Array) -> jax.Array:
            value, gate = jnp.split(both(p, x), 2, axis=-1)
            return value * jax.nn.sigmoid(gate)

        self.layers.append(layer)
        return out

    def _norm(self, kind: str, width: int) -> int:
        key = self._new(scale=(width,), bias=(width,))

        def layer(p: Any, x: jax.Array) -> jax.Array:
            y = x - jnp.mean(x, -1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-3)
            return y * p[key]["scale"] + p[key]["bias"]

        self.layers.append(layer)
        return width

    def _batch(self, kind: str, width: int) -> int:
        key = self._new(scale=(width,), bias=(width,), mean=(width,), var=(width,))

        def layer(p: Any, x: jax.Array) -> jax.Array:
            q = p[key]
            y = (x - q["mean"]) * jax.lax.rsqrt(jnp.abs(q["var"]) + 1e-3)
            return jax.nn.relu(y * q["scale"] + q["bias"])

        self.layers.append(layer)
        return width

    def _group(self, kind: str, width: int) -> int:
        key = self._new(scale=(width,), bias=(width,))

        def layer(p: Any, x: jax.Array) -> jax.Array:
            y = x.reshape(*x.shape[:-1], 2, width // 2)
            y = y - jnp.mean(y, (1, 2, 4), keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, (1, 2, 4), keepdims=True) + 1e-3)
            return y.reshape(x.shape) * p[key]["scale"] + p[key]["bias"]

        self.layers.append(layer)
        return width

    def _pool(self, kind: str, width: int) -> int:
        window = (1, 2, 2, 1)
        self.layers.append(
            lambda p, x: jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, window, (1, 1, 1, 1), "VALID"
            )
        )
        return width

    def _heads(self, kind: str, width: int) -> int:
        """A reshape to heads and back, with a product within each head."""
        spread = self._product(kind, width, 12)
        key = self._new(mixing=(3, 4, 2))

        def layer(p: Any, x: jax.Array) -> jax.Array:
            y = spread(p, x).reshape(*x.shape[:-1], 3, 4)
            return jnp.einsum("...hd,hde->...he", y, p[key]["mixing"]).reshape(*x.shape[:-1], 6)

        self.layers.append(layer)
        return 6

    def _attention(self, kind: str, width: int) -> int:
        heads, inner = 2, 4
        key = self._new(
            query=(width, heads, inner), key=(width, heads, inner), value=(width, heads, inner),
            out=(heads, inner, width),
        )  # fmt: skip

        def layer(p: Any, x: jax.Array) -> jax.Array:
            q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[key][n]) for n in ("query", "key", "value"))
            weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k) / np.sqrt(inner))
            mixed = jnp.einsum("bhts,bshe->bthe", weights, v)
            return x + jnp.einsum("bthe,hed->btd", mixed, p[key]["out"])

        self.layers.append(layer)
        return width

    def _lstm(self, kind: str, width: int) -> int:
        hidden = self._width()
        key = self._new(taken=(width, 4 * hidden), carried=(hidden, 4 * hidden), bias=(4 * hidden,))

        def layer(p: Any, x: jax.Array) -> jax.Array:
            def step(state: Any, now: jax.Array) -> Any:
                cell, out = state
                gates = now @ p[key]["taken"] + out @ p[key]["carried"] + p[key]["bias"]
                i, f, g, o = jnp.split(gates, 4, axis=-1)
                cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
                out = jax.nn.sigmoid(o) * jnp.tanh(cell)
                return (cell, out), out

            zeros = jnp.zeros((x.shape[0], hidden))
            _, outs = jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))
            return jnp.swapaxes(outs, 0, 1)

        self.layers.append(layer)
        return hidden
