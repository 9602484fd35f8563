"""Kronecker factors against the exact block, and their Gaussian against dense matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivenet.posterior import kronecker as kfac
from adaptivenet.posterior.capture import trace
from adaptivenet.posterior.kronecker import kronecker, moments


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def squared(outputs, _):
    """Columns of the Hessian of half the squared error: one for each output."""
    count = int(np.prod(outputs.shape[1:]))
    eye = jnp.eye(count, dtype=outputs.dtype).reshape(count, 1, *outputs.shape[1:])
    return count, lambda k: jnp.broadcast_to(eye[k], outputs.shape)


def jacobian(apply, params, inputs):
    """[examples * outputs, parameters], by forward mode, one example after the other."""
    leaves, treedef = jax.tree.flatten(params)
    ends = np.cumsum([x.size for x in leaves])[:-1]

    def flat(vector):
        parts = [p.reshape(x.shape) for p, x in zip(jnp.split(vector, ends), leaves, strict=True)]
        return apply(treedef.unflatten(parts), inputs).ravel()

    return np.asarray(jax.jit(jax.jacfwd(flat))(jnp.concatenate([x.ravel() for x in leaves])))


def dense(belief):
    """The precision as a matrix, by products with unit vectors."""
    leaves, treedef = jax.tree.flatten(belief.params)
    ends = np.cumsum([x.size for x in leaves])[:-1]

    def times(vector):
        parts = [p.reshape(x.shape) for p, x in zip(jnp.split(vector, ends), leaves, strict=True)]
        found = belief.times(treedef.unflatten(parts))
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(found)])

    return np.asarray(jax.jit(jax.vmap(times))(jnp.eye(sum(x.size for x in leaves))))


def fitted(apply, params, inputs, **options):
    """Compiled as one program, which is quicker here; the prior stays known, and is checked."""
    prior = options.pop("prior_precision", 1.0)
    found = trace(apply, params, inputs)
    belief = jax.jit(lambda p, x: kronecker(found, p, x, squared, **options))(params, inputs)
    return belief.with_prior(prior)


def affine(p, x):
    return x @ p["kernel"] + p["bias"]


def net(p, x):
    hidden = jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"]) * p["scale"]
    return hidden @ p["b"]["kernel"] + p["b"]["bias"]


AFFINE = {"kernel": normal(3, 2), "bias": normal(2)}


def parameters():
    return {
        "a": {"kernel": normal(3, 4, seed=2), "bias": normal(4, seed=3)},
        "b": {"kernel": normal(4, 2, seed=4), "bias": normal(2, seed=5)},
        "scale": normal(4, seed=6),
    }


class TestWhereItIsExact:
    @pytest.mark.parametrize("exact", [False, True])
    def test_one_layer_and_squared_errors(self, exact):
        params = jax.tree.map(lambda x: x.astype(float), AFFINE)
        x = normal(7, 3)
        J = jacobian(affine, params, x)
        belief = fitted(affine, params, x, prior_precision=0.3, exact=exact)
        np.testing.assert_allclose(dense(belief), J.T @ J + 0.3 * np.eye(8), atol=1e-10)

    def test_one_example_of_one_output(self):
        """A nonlinear layer: with one row and one cotangent the block is a product."""
        params = {"kernel": normal(3, 4), "bias": normal(4)}

        def apply(p, x):
            return jnp.tanh(affine(p, x)).sum(axis=1, keepdims=True)

        x = normal(1, 3)
        J = jacobian(apply, params, x)
        belief = fitted(apply, params, x, prior_precision=2.0)
        np.testing.assert_allclose(dense(belief), J.T @ J + 2 * np.eye(16), atol=1e-10)

    @pytest.mark.parametrize("time", [None, 3])
    def test_deep_linear_networks(self, time):
        """Every diagonal block, with a loss at every position in the expand setting."""
        params = {"a": normal(3, 4), "b": normal(4, 3, seed=2), "c": normal(3, 2, seed=3)}
        x = normal(5, 3) if time is None else normal(5, time, 3)

        def apply(p, x):
            return x @ p["a"] @ p["b"] @ p["c"]

        J = jacobian(apply, params, x)
        got = dense(fitted(apply, params, x, prior_precision=1e-9, batch_size=2))
        for block in (slice(0, 12), slice(12, 24), slice(24, 30)):
            np.testing.assert_allclose(got[block, block], (J.T @ J)[block, block], atol=1e-6)

    def test_reduce_is_exact_for_a_linear_layer_that_is_averaged(self):
        """And expand is not: the loss sees the mean over positions only."""
        params, x = {"w": normal(3, 2)}, normal(6, 4, 3)

        def apply(p, x):
            return (x @ p["w"]).mean(axis=1)

        J = jacobian(apply, params, x)
        exact = J.T @ J + 1e-9 * np.eye(6)
        given = {"prior_precision": 1e-9}
        np.testing.assert_allclose(
            dense(fitted(apply, params, x, sharing="reduce", **given)), exact, atol=1e-8
        )
        assert np.abs(dense(fitted(apply, params, x, **given)) - exact).max() > 0.1


class TestEKFAC:
    def blocks(self, **options):
        params = parameters()
        x = normal(6, 3)
        J = jacobian(net, params, x)
        got = dense(fitted(net, params, x, prior_precision=1e-9, **options))
        return (J.T @ J)[:16, :16], got[:16, :16]  # the bias of a, then its kernel

    def test_is_nearer_to_the_exact_block(self):
        """And nearest of all that are diagonal in its basis."""
        exact, plain = self.blocks()
        _, better = self.blocks(exact=True)
        far, near = (np.linalg.norm(exact - x) for x in (plain, better))
        assert near < 0.95 * far
        # What is left over has no diagonal in the basis of the factors.
        params, x = parameters(), normal(6, 3)
        belief = fitted(net, params, x, exact=True)
        site = belief.sites[0]
        (_, Qi), (_, Qo) = belief.bases[0]
        for i, o in [(0, 0), (2, 3), (3, 1)]:
            parts = site.leaves(jnp.outer(Qi[:, i], Qo[:, o]))
            vector = np.concatenate([np.asarray(parts[k]).ravel() for k in sorted(parts)])
            assert vector.size == 16
            np.testing.assert_allclose(vector @ (exact - better) @ vector, 0, atol=1e-8)

    def test_shared_kernels(self):
        """Positions of an example add up before they are squared."""
        params, x = {"w": normal(3, 2)}, normal(4, 5, 3)

        def apply(p, x):
            return jnp.tanh(x @ p["w"]).sum(axis=1)

        belief = fitted(apply, params, x, exact=True, prior_precision=1e-9)
        J = jacobian(apply, params, x)
        (_, Qi), (_, Qo) = belief.bases[0]
        Q = np.kron(Qi, Qo)
        np.testing.assert_allclose(
            np.asarray(belief.exact[0]).ravel(), np.diag(Q.T @ J.T @ J @ Q), atol=1e-9
        )

    def test_moments_are_the_diagonal(self):
        params, x = parameters(), normal(5, 3)
        found = trace(net, params, x)
        squares, rest = moments(found, params, x, squared, batch_size=2)
        leaves = dict(zip(found.rest, rest, strict=True))
        for site, square in zip(found.sites, squares, strict=True):
            leaves |= site.leaves(square)
        got = np.concatenate([np.asarray(leaves[k]).ravel() for k in sorted(leaves)])
        np.testing.assert_allclose(got, (jacobian(net, params, x) ** 2).sum(axis=0), rtol=1e-10)


UNITS = {
    "a": {"kernel": jnp.array([0.5, 1.0, 2.0, 3.0]), "bias": jnp.array([0.5, 1.0, 2.0, 3.0])},
    "b": {"kernel": 2.0, "bias": 0.1},
    "scale": jnp.array([1.0, 2.0, 3.0, 4.0]),
}


class TestGaussian:
    @pytest.fixture(params=["kfac", "ekfac", "units"])
    def belief(self, request):
        prior = jax.tree.map(jnp.asarray, UNITS) if request.param == "units" else 0.4
        exact = request.param == "ekfac"
        return fitted(net, parameters(), normal(6, 3), prior_precision=prior, exact=exact)

    def test_is_that_of_its_matrix(self, belief):
        matrix = dense(belief)
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-9)
        covariance = np.linalg.inv(matrix)
        sign, log = np.linalg.slogdet(matrix)
        assert sign == 1
        np.testing.assert_allclose(belief.log_determinant(), log, rtol=1e-10)

        def flat(tree):
            return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])

        np.testing.assert_allclose(flat(belief.variances()), np.diag(covariance), rtol=1e-8)
        np.testing.assert_allclose(flat(belief.diagonal().precision), np.diag(matrix), rtol=1e-9)
        marginal = flat(belief.diagonal(marginal=True).precision)
        np.testing.assert_allclose(marginal, 1 / np.diag(covariance), rtol=1e-8)
        vector = parameters()
        np.testing.assert_allclose(flat(belief.solve(vector)), covariance @ flat(vector), rtol=1e-7)
        again = flat(belief.times(belief.solve(vector)))
        np.testing.assert_allclose(again, flat(vector), atol=1e-9)
        np.testing.assert_array_equal(flat(belief.mean), flat(vector))

    def test_samples_have_its_covariance(self, belief):
        draws = jax.jit(jax.vmap(belief.sample))(jax.random.split(jax.random.key(0), 4_000))
        rows = np.concatenate([np.asarray(x).reshape(4_000, -1) for x in jax.tree.leaves(draws)], 1)
        mean = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(parameters())])
        root = np.linalg.cholesky(dense(belief))
        white = (rows - mean) @ root  # independent standard normals, if the covariance is right
        assert np.abs(white.mean(axis=0)).max() < 5 / np.sqrt(4_000)
        off = white.T @ white / 4_000 - np.eye(white.shape[1])
        assert np.abs(np.diag(off)).max() < 5 * np.sqrt(2 / 4_000)
        np.fill_diagonal(off, 0)
        assert np.abs(off).max() < 5 / np.sqrt(4_000)

    def test_another_prior_is_added(self, belief):
        more = dense(belief.with_prior(5.0)) - dense(belief.with_prior(1.0))
        np.testing.assert_allclose(more, 4 * np.eye(len(more)), atol=1e-9)

    def test_scaling_leaves_the_prior(self, belief):
        prior = np.diag(np.concatenate([np.asarray(x).ravel() for x in belief.prior]))
        data = dense(belief) - prior
        np.testing.assert_allclose(dense(belief.scaled(0.3)), prior + 0.3 * data, atol=1e-9)

    def test_the_slope_of_the_determinant(self, belief):
        """By every precision of the prior it is the marginal variance."""
        if belief.exact is not None:
            slope = jax.grad(lambda d: belief.with_prior(d).log_determinant())(0.4)
            np.testing.assert_allclose(
                slope, sum(x.sum() for x in jax.tree.leaves(belief.variances())), rtol=1e-8
            )
            return
        slopes = jax.grad(lambda d: belief.with_prior(d).log_determinant())(belief.prior_precision)
        for a, b in zip(*map(jax.tree.leaves, (slopes, belief.variances())), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8)


def test_precisions_by_unit_need_no_eigenvectors_of_the_data():
    """Of one layer, where the block is exact: A (x) G + D."""
    params, x = jax.tree.map(lambda v: v.astype(float), AFFINE), normal(7, 3)
    prior = {"kernel": jnp.array([[0.5, 4.0]]), "bias": jnp.array([0.25, 2.0])}
    J = jacobian(affine, params, x)
    wanted = J.T @ J + np.diag([0.25, 2.0] + [0.5, 4.0] * 3)
    np.testing.assert_allclose(
        dense(fitted(affine, params, x, prior_precision=prior)), wanted, atol=1e-9
    )
    inside = jax.jit(lambda d: fitted(affine, params, x, prior_precision=d).diagonal().precision)
    got = inside(prior)
    np.testing.assert_allclose(got["bias"], np.diag(wanted)[:2], rtol=1e-9)


def test_within_jit_and_back():
    params, x = parameters(), normal(6, 3)
    inside = jax.jit(lambda p, x: fitted(net, p, x, batch_size=4))(params, x)
    outside = fitted(net, params, x)
    np.testing.assert_allclose(inside.log_determinant(), outside.log_determinant(), rtol=1e-9)
    assert inside.sites == outside.sites


class TestErrors:
    def test_priors(self):
        params, x = jax.tree.map(lambda v: v.astype(float), AFFINE), normal(4, 3)
        with pytest.raises(ValueError, match="prior precision of 'kernel' must be positive"):
            fitted(affine, params, x, prior_precision={"kernel": 0.0, "bias": 1.0})
        with pytest.raises(ValueError, match="a number, or a pytree like the parameters"):
            fitted(affine, params, x, prior_precision={"kernel": 1.0})
        with pytest.raises(
            ValueError, match=r"'kernel' has shape \(4,\), which does not broadcast"
        ):
            fitted(affine, params, x, prior_precision={"kernel": jnp.ones(4), "bias": 1.0})
        each = {"kernel": 1 + normal(3, 2) ** 2, "bias": 1.0}
        with pytest.raises(ValueError, match=r"of 'kernel' .* must be a product"):
            fitted(affine, params, x, prior_precision=each)
        with pytest.raises(ValueError, match="ekfac needs one prior precision for 'kernel'"):
            fitted(affine, params, x, prior_precision={"kernel": 1.0, "bias": 2.0}, exact=True)

    def test_options(self):
        params, x = jax.tree.map(lambda v: v.astype(float), AFFINE), normal(4, 3)
        with pytest.raises(ValueError, match="sharing must be 'expand' or 'reduce', not 'both'"):
            fitted(affine, params, x, sharing="both")
        with pytest.raises(ValueError, match=r"batch_size must be .* not 0"):
            kfac.summed(lambda p, v: v, params, x, 0)

    def test_vectors_of_another_shape(self):
        params, x = jax.tree.map(lambda v: v.astype(float), AFFINE), normal(4, 3)
        with pytest.raises(ValueError, match="not like the parameters"):
            fitted(affine, params, x).times({"kernel": params["kernel"]})
