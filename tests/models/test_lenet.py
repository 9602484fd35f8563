"""LeNet-5-Caffe against Flax's own layers, and its bad inputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivenet import models


def by_flax(model, images, activation=lambda hidden: hidden):
    """The network written with Flax's layers."""
    hidden = nnx.max_pool(activation(model.conv1(images)), (2, 2), (2, 2))
    hidden = nnx.max_pool(activation(model.conv2(hidden)), (2, 2), (2, 2))
    hidden = hidden.reshape(hidden.shape[0], -1)
    return model.dense2(jax.nn.relu(model.dense1(hidden)))


@pytest.fixture(scope="module")
def model():
    return models.LeNet5((3, 4), 6, 5, rngs=nnx.Rngs(0))


def test_equals_the_same_network_of_flax_layers(model):
    images = jax.random.normal(jax.random.key(1), (2, 28, 28, 1))
    np.testing.assert_allclose(model(images), by_flax(model, images), rtol=1e-5, atol=1e-5)


def test_an_activation_between_convolution_and_pooling(model):
    images = jax.random.normal(jax.random.key(1), (2, 28, 28, 1))
    expected = by_flax(model, images, jax.nn.relu)
    found = model(images, activation=jax.nn.relu)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.max(np.abs(found - model(images))) > 0.1


def test_flat_images_and_a_single_one(model):
    images = jax.random.normal(jax.random.key(1), (2, 28, 28, 1))
    logits = model(images)
    np.testing.assert_array_equal(model(images.reshape(2, 784)), logits)
    np.testing.assert_allclose(model(images[0]), logits[0], rtol=1e-6, atol=1e-6)


def test_weights_of_both_are_those_of_the_literature():
    drawn = jax.eval_shape(models.lenet5_init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(drawn) if leaf.ndim > 1) == 430_500
    assert sum(leaf.size for leaf in jax.tree.leaves(drawn)) == 431_080
    sizes = models.LENET_300_100
    assert sum(a * b for a, b in itertools.pairwise(sizes)) == 266_200


def test_bad_inputs(model):
    with pytest.raises(ValueError, match=r"images \[..., 784\] or .*not \(2, 783\)"):
        model(jnp.zeros((2, 783)))
    with pytest.raises(TypeError, match="floating inputs, got int32"):
        model(jnp.zeros((2, 784), jnp.int32))
