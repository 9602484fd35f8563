"""Inputs and gradients of kernels, whatever wrote the products, against per-example gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivenet import trees
from adaptivenet.models.functional import functional
from adaptivenet.models.lenet import lenet5, lenet5_init
from adaptivenet.models.mlp import mlp, mlp_init
from adaptivenet.models.recurrent import lstm, lstm_init
from adaptivenet.models.resnet import resnet, resnet_init
from adaptivenet.models.transformer import transformer, transformer_init
from adaptivenet.posterior.capture import capture, trace

KEY = jax.random.key(0)


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def jittered(params, scale=0.3):
    """Without the zeros and ones of fresh parameters, which hide mistakes."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    noise = [np.asarray(scale * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, [x + e for x, e in zip(leaves, noise, strict=True)])


def agrees(apply, params, inputs, *, kernels, others=(), rtol=2e-4):
    """Captured products and other gradients make up the gradient of every example."""
    found = trace(apply, params, inputs)
    assert [site.path for site in found.sites] == list(kernels)
    assert sorted(found.others) == sorted(others)
    outputs = jax.jit(apply)(params, inputs)
    cotangent = normal(*outputs.shape, seed=7).astype(outputs.dtype)
    got = jax.jit(lambda *given: capture(apply, *given))(params, inputs, cotangent)
    np.testing.assert_allclose(got.outputs, outputs, rtol=1e-4, atol=1e-5)

    def one(x, c):
        pull = jax.vjp(lambda p: apply(p, jax.tree.map(lambda v: v[None], x))[0], params)[1]
        return pull(c)[0]

    expected = jax.tree.leaves(jax.jit(jax.vmap(one))(inputs, cotangent))
    seen = set()
    for site in found.sites:
        rows, deltas = got.inputs[site.path], got.gradients[site.path]
        assert rows.shape == (outputs.shape[0], site.positions, site.shape[0])
        assert deltas.shape == (outputs.shape[0], site.positions, site.shape[1])
        whole = jnp.einsum("nsi,nso->nio", rows, deltas, precision="highest")
        for place, leaf in jax.vmap(site.leaves)(whole).items():
            atol = rtol * float(jnp.abs(expected[place]).max())
            np.testing.assert_allclose(leaf, expected[place], rtol=rtol, atol=atol)
            seen.add(place)
    for name, leaf in got.others.items():
        place = trees.paths(params).index(name)
        atol = rtol * float(jnp.abs(expected[place]).max())
        np.testing.assert_allclose(leaf, expected[place], rtol=rtol, atol=atol)
        seen.add(place)
    assert seen == set(range(len(expected)))
    return found


class TestModels:
    def test_mlp(self):
        params = jittered(mlp_init(KEY, (5, 4, 3)))
        found = agrees(mlp, params, normal(6, 5), kernels=["dense1/kernel", "dense2/kernel"])
        assert [site.shape for site in found.sites] == [(6, 4), (5, 3)]
        assert found.last().path == "dense2/kernel"

    def test_convolutions_as_products_of_patches(self):
        params = jittered(lenet5_init(KEY, channels=(2, 3), hidden=5, outputs=4), 0.05)
        names = ["conv1/kernel", "conv2/kernel", "dense1/kernel", "dense2/kernel"]
        found = agrees(lenet5, params, normal(2, 784), kernels=names)
        assert [site.positions for site in found.sites] == [24 * 24, 8 * 8, 1, 1]
        assert found.sites[1].shape == (5 * 5 * 2 + 1, 3)

    def test_convolutions_with_strides_and_shortcuts(self):
        params, stats = resnet_init(KEY, 2, (3, 4), 3)
        names = ["stem/kernel", "block1/conv1/kernel", "block1/conv2/kernel"]
        names += ["block2/conv1/kernel", "block2/conv2/kernel", "block2/shortcut/kernel"]
        norms = [name for name in trees.paths(params) if "norm" in name]
        agrees(
            lambda p, x: resnet(p, stats, x),
            jittered(params, 0.1),
            normal(2, 6, 6, 2),
            kernels=[*names, "readout/kernel"],
            others=norms,
        )

    def test_a_kernel_within_a_scan(self):
        params = jittered(lstm_init(KEY, 2, 3, 4))
        names = ["cells/kernel", "cells/carried", "readout/kernel"]
        found = agrees(lstm, params, normal(3, 5, 2), kernels=names)
        assert [site.positions for site in found.sites] == [5, 5, 1]
        assert [site.bias is not None for site in found.sites] == [True, False, True]

    def test_attention_and_a_tied_embedding(self):
        params = jittered(transformer_init(KEY, 7, 5, width=4, heads=2, blocks=1))
        tokens = jax.random.randint(KEY, (3, 4), 0, 7)
        block = [f"block1/attention/{name}" for name in ("query", "key", "value", "out")]
        names = [*block, "block1/hidden/kernel", "block1/back/kernel"]
        others = ["embedding", "position", *(n for n in trees.paths(params) if "norm" in n)]
        found = agrees(transformer, params, tokens, kernels=names, others=others, rtol=1e-3)
        assert found.others["embedding"] == "it stands in gather"
        with pytest.raises(ValueError, match="output of this function is not a product"):
            found.last()


def module(build):
    apply, params = functional(build(nnx.Rngs(0)))
    return apply, jittered(params)


class TestLayouts:
    @pytest.mark.parametrize(
        "options",
        [
            {"kernel_size": (3,), "strides": 2},
            {"kernel_size": (2, 3), "padding": "VALID", "kernel_dilation": (1, 2)},
            {"kernel_size": (3, 2), "padding": ((2, 1), (0, 1)), "input_dilation": 2},
        ],
    )
    def test_convolutions_of_flax(self, options):
        apply, params = module(lambda rngs: nnx.Conv(2, 3, rngs=rngs, **options))
        space = (7, 6)[: len(options["kernel_size"])]
        agrees(apply, params, normal(3, *space, 2), kernels=["kernel"])

    @pytest.mark.parametrize("out_spec", ["NHWC", "NCHW", "HWNC", "CWHN"])
    @pytest.mark.parametrize(("lhs", "rhs"), [("NHWC", "HWIO"), ("NCHW", "OIHW"), ("NHWC", "OWHI")])
    def test_layouts_of_a_convolution(self, lhs, rhs, out_spec):
        sizes = {"H": 2, "W": 3, "I": 2, "O": 4}
        params = {"kernel": normal(*(sizes[c] for c in rhs)), "bias": normal(4)}
        image = {"N": 2, "C": 2, "H": 5, "W": 6}
        inputs = normal(2, *(image[c] for c in lhs if c != "N"))

        def apply(params, x):
            found = jax.lax.conv_general_dilated(
                x, params["kernel"], (1, 2), "SAME", dimension_numbers=(lhs, rhs, out_spec)
            )
            shape = [4 if c == "C" else 1 for c in out_spec]
            found = jnp.tanh(found + params["bias"].reshape(shape))
            return jnp.moveaxis(found, out_spec.index("N"), 0)

        found = agrees(apply, params, inputs, kernels=["kernel"])
        assert found.sites[0].bias is not None

    @settings(max_examples=12)
    @given(
        st.sampled_from(
            ["tf,fo->to", "tf,of->to", "tf,fo->ot", "tf,gof->tgo", "tfe,efo->to", "tef,feo->ot"]
        )
    )
    def test_einsum(self, formula):
        sizes = {"t": 3, "f": 4, "o": 2, "e": 3, "g": 2}
        left, right = formula.split("->")[0].split(",")
        params = {"kernel": normal(*(sizes[c] for c in right))}
        inputs = normal(2, *(sizes[c] for c in left), seed=2)
        batched = "n" + formula.replace("->", "->n")
        agrees(
            lambda p, x: jnp.sin(jnp.einsum(batched, x, p["kernel"])),
            params,
            inputs,
            kernels=["kernel"],
        )

    def test_several_axes_of_units_and_their_bias(self):
        apply, params = module(
            lambda rngs: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=rngs)
        )
        found = agrees(apply, params, normal(3, 2, 3), kernels=["kernel"])
        assert found.sites[0].shape == (7, 20)

    def test_matrix_and_leaves_are_inverse(self):
        params = jittered(transformer_init(KEY, 7, 5, width=4, heads=2, blocks=1))
        leaves = jax.tree.leaves(params)
        for site in trace(transformer, params, jnp.zeros((1, 4), int)).sites:
            matrix = site.matrix(leaves)
            assert matrix.shape == site.shape
            back = site.leaves(matrix)
            assert set(back) == set(site.members)
            for place, leaf in back.items():
                np.testing.assert_array_equal(leaf, leaves[place])

    def test_a_kernel_used_twice_has_more_positions(self):
        params = {"w": normal(3, 3), "b": normal(3)}

        def apply(p, x):
            return jnp.tanh(jnp.tanh(x @ p["w"] + p["b"]) @ p["w"] + p["b"])

        found = agrees(apply, params, normal(4, 3), kernels=["w"])
        assert found.sites[0].positions == 2
        assert found.sites[0].shape == (4, 3)

    def test_casts(self):
        params = {"w": normal(3, 2), "b": normal(2)}

        def apply(p, x):
            return x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16) + p["b"].astype(
                jnp.bfloat16
            )

        found = capture(apply, params, normal(4, 3), jnp.ones((4, 2), jnp.bfloat16))
        assert found.outputs.dtype == jnp.bfloat16
        assert found.inputs["w"].dtype == found.gradients["w"].dtype == jnp.float32
        assert found.inputs["w"].shape == (4, 1, 4)

    def test_recomputed_and_nested(self):
        params = {"w": normal(3, 3), "v": normal(3, 2)}

        @jax.checkpoint
        def layer(w, x):
            return jax.nn.relu(jax.jit(jnp.matmul)(x, w))

        def apply(p, x):
            def deep(carry, _):
                inner = jax.lax.scan(lambda c, _: (layer(p["w"], c), c.sum()), carry, length=2)[0]
                return inner, None

            return jax.lax.scan(deep, x, length=3)[0] @ p["v"]

        found = agrees(apply, params, normal(2, 3), kernels=["w", "v"])
        assert found.sites[0].positions == 6

    def test_several_inputs(self):
        params = {"w": normal(3, 2), "v": normal(2, 2)}
        inputs = {"x": normal(4, 3), "y": (normal(4, 2),)}
        agrees(
            lambda p, z: z["x"] @ p["w"] + jnp.tanh(z["y"][0]) @ p["v"],
            params,
            inputs,
            kernels=["w", "v"],
        )


class TestWhatIsNotFound:
    @pytest.mark.parametrize(
        ("reason", "apply"),
        [
            ("it stands in mul", lambda p, x: x @ (2.0 * p["w"])),
            ("it stands in slice", lambda p, x: x[:, :2] @ p["w"][:2]),
            ("it stands in dot_general", lambda p, x: x @ (p["w"] @ p["w"].T)),
            ("it stands in products of different layouts", lambda p, x: x @ p["w"] @ p["w"].T),
            (
                "it stands in cond",
                lambda p, x: jax.lax.cond(True, lambda w: x @ w, lambda w: x, p["w"]),
            ),
            (
                "it goes through a scan step by step",
                lambda p, x: jax.lax.scan(lambda c, w: (c + x @ w, 0), x[:, 0], p["w"])[0],
            ),
            ("it is not used", lambda p, x: x),
            ("it is returned", lambda p, x: p["w"].reshape(1, 9)),
            (
                "it is added, but not to a product whose kernel is found",
                lambda p, x: jnp.sin(x @ x.T)[:, :, None] + p["w"],
            ),
        ],
    )
    def test_reasons(self, reason, apply):
        found = trace(apply, {"w": normal(3, 3)}, normal(1, 3))
        assert not found.sites
        assert found.others == {"w": reason}

    def test_what_is_no_bias_of_a_product_is_a_leaf_of_its_own(self):
        params = {"w": normal(3, 2), "b": normal(2), "c": normal(1), "d": normal(4, 2)}
        for apply, rest in [
            (lambda p, x: jnp.sin(x @ p["w"]) + p["b"], "b"),
            (lambda p, x: x @ p["w"] + p["c"], "c"),  # one number for all units
            (lambda p, x: jnp.stack([x] * 4, 1) @ p["w"] + p["d"], "d"),  # differs by position
            (lambda p, x: (lambda y: y * (y + p["b"]))(x @ p["w"]), "b"),  # also read without
        ]:
            chosen = {name: params[name] for name in ("w", rest)}
            agrees(apply, chosen, normal(3, 3), kernels=["w"], others=[rest])

    def test_a_bias_behind_another_sum(self):
        """As in a residual stream; where two kernels share it, the first has it."""
        params = {"v": normal(3, 2), "w": normal(3, 2), "b": normal(2)}
        found = agrees(
            lambda p, x: jnp.sin(x) @ p["v"] + jnp.cos(x) @ p["w"] + p["b"],
            params,
            normal(3, 3),
            kernels=["v", "w"],
        )
        assert [site.bias is not None for site in found.sites] == [True, False]

    def test_a_bias_that_is_turned(self):
        params = {"w": normal(2, 2), "b": normal(2)}
        found = trace(lambda p, x: x @ p["w"] + p["b"][::-1], params, normal(1, 2))
        assert found.others == {"b": "it stands in rev"}

    def test_only_what_is_selected(self):
        params = mlp_init(KEY, (3, 2, 2))
        found = trace(mlp, params, normal(1, 3), select="dense2")
        assert [site.path for site in found.sites] == ["dense2/kernel"]
        found = trace(mlp, params, normal(1, 3), select="kernel")
        assert [site.bias for site in found.sites] == [None, None]
        assert not found.others

    def test_integers_are_no_parameters(self):
        params = {"w": normal(3, 2), "table": jnp.arange(2)}
        found = trace(lambda p, x: x @ p["w"] + p["table"].astype(float), params, normal(1, 3))
        assert [site.path for site in found.sites] == ["w"]
        assert not found.others


class TestErrors:
    def test_no_batch(self):
        with pytest.raises(ValueError, match=r"inputs must be a batch \[batch, \.\.\.\]"):
            trace(mlp, mlp_init(KEY, (3, 2)), jnp.ones(()))

    def test_outputs_without_a_batch(self):
        with pytest.raises(ValueError, match=r"must map a batch .* maps a batch of 1 to \(\)"):
            trace(lambda p, x: (x @ p["w"]).sum(), {"w": normal(3, 2)}, normal(4, 3))
        with pytest.raises(ValueError, match="maps a batch of 1 to tuple"):
            trace(lambda p, x: (x, x), {"w": normal(3, 2)}, normal(4, 3))

    def test_nothing_to_differentiate(self):
        with pytest.raises(ValueError, match="no floating leaf"):
            trace(lambda p, x: x, {"w": jnp.arange(3)}, normal(4, 3))


def test_within_jit_with_traced_constants():
    params, stats = resnet_init(KEY, 2, (3,), 3)

    @jax.jit
    def run(params, stats, x):
        return capture(lambda p, x: resnet(p, stats, x), params, x, lambda y: y).gradients

    got = run(params, stats, normal(2, 4, 4, 2))
    expected = capture(lambda p, x: resnet(p, stats, x), params, normal(2, 4, 4, 2), lambda y: y)
    for name, value in expected.gradients.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5)
