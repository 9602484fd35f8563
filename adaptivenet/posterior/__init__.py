"""Posteriors over parameters: one belief for pruning, protection, step size and bit width."""

from __future__ import annotations

from adaptivenet.posterior import (
    calibration,
    concrete,
    horseshoe,
    importance,
    markov,
    meanfield,
    metrics,
    reduction,
    sampling,
    sparse_vd,
)
from adaptivenet.posterior.capture import Captured, Site, Trace, capture, trace
from adaptivenet.posterior.draws import noisy_value_and_grad, sample_parameters
from adaptivenet.posterior.dropout import Prediction, mc_dropout
from adaptivenet.posterior.evidence import Tuned, effective_parameters, log_evidence, tune_prior
from adaptivenet.posterior.fisher import (
    Fisher,
    FisherState,
    SquaredGradient,
    fisher,
    squared_gradient,
    value_and_squared_grads,
)
from adaptivenet.posterior.fisher_exact import fisher_diagonal
from adaptivenet.posterior.gaussian import (
    Posterior,
    calibrate,
    check,
    entropy,
    find,
    isotropic,
    kl,
    log_density,
    obd,
    product,
    quotient,
    sample,
    snr,
    temper,
)
from adaptivenet.posterior.ivon import IvonState, ivon, scale_by_ivon
from adaptivenet.posterior.kronecker import KroneckerPosterior
from adaptivenet.posterior.laplace import Laplace, as_gaussian, laplace, log_likelihood
from adaptivenet.posterior.mesu import MesuState, bgd, mesu
from adaptivenet.posterior.predict import (
    Linearised,
    Moments,
    averaged,
    linearised,
    probabilities,
    regression,
)
from adaptivenet.posterior.structured import DiagonalPosterior, FullPosterior, Gaussian
from adaptivenet.posterior.swag import SwagState, sample_swag, swag
from adaptivenet.posterior.transformation import (
    Estimator,
    Held,
    PosteriorState,
    held,
    with_posterior,
)

__all__ = [
    "Captured",
    "DiagonalPosterior",
    "Estimator",
    "Fisher",
    "FisherState",
    "FullPosterior",
    "Gaussian",
    "Held",
    "IvonState",
    "KroneckerPosterior",
    "Laplace",
    "Linearised",
    "MesuState",
    "Moments",
    "Posterior",
    "PosteriorState",
    "Prediction",
    "Site",
    "SquaredGradient",
    "SwagState",
    "Trace",
    "Tuned",
    "as_gaussian",
    "averaged",
    "bgd",
    "calibrate",
    "calibration",
    "capture",
    "check",
    "concrete",
    "effective_parameters",
    "entropy",
    "find",
    "fisher",
    "fisher_diagonal",
    "held",
    "horseshoe",
    "importance",
    "isotropic",
    "ivon",
    "kl",
    "laplace",
    "linearised",
    "log_density",
    "log_evidence",
    "log_likelihood",
    "markov",
    "mc_dropout",
    "meanfield",
    "mesu",
    "metrics",
    "noisy_value_and_grad",
    "obd",
    "probabilities",
    "product",
    "quotient",
    "reduction",
    "regression",
    "sample",
    "sample_parameters",
    "sample_swag",
    "sampling",
    "scale_by_ivon",
    "snr",
    "sparse_vd",
    "squared_gradient",
    "swag",
    "temper",
    "trace",
    "tune_prior",
    "value_and_squared_grads",
    "with_posterior",
]
