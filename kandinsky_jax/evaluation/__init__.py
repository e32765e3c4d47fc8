"""Evaluation: how well pictures fit their prompts, and how far sets of pictures are apart."""

from kandinsky_jax.evaluation.bootstrap import Interval, Resampling, bootstrap_interval
from kandinsky_jax.evaluation.distances import (
    Moments,
    clip_scores,
    frechet_distance,
    kernel_distance,
    maximum_mean_discrepancy,
    moments_of,
    nearest_candidates,
)
from kandinsky_jax.evaluation.extractors import CLIPTowers, Extractor, FunctionFeatures, InceptionFeatures, Picture
from kandinsky_jax.evaluation.feature_store import FeatureSet
from kandinsky_jax.evaluation.inception import InceptionV3, load_inception, resize_like_tensorflow
from kandinsky_jax.evaluation.metrics import (
    CLIPMaximumMeanDiscrepancy,
    CLIPScore,
    FrechetInceptionDistance,
    KernelInceptionDistance,
    Measurement,
    Metric,
    NearestCandidate,
    NearestName,
    PictureMetric,
    mean_measurement,
)
from kandinsky_jax.evaluation.report import Evaluation
from kandinsky_jax.evaluation.runner import METRICS, EvaluationError, evaluate

__all__ = [
    "METRICS",
    "CLIPMaximumMeanDiscrepancy",
    "CLIPScore",
    "CLIPTowers",
    "Evaluation",
    "EvaluationError",
    "Extractor",
    "FeatureSet",
    "FrechetInceptionDistance",
    "FunctionFeatures",
    "InceptionFeatures",
    "InceptionV3",
    "Interval",
    "KernelInceptionDistance",
    "Measurement",
    "Metric",
    "Moments",
    "NearestCandidate",
    "NearestName",
    "Picture",
    "PictureMetric",
    "Resampling",
    "bootstrap_interval",
    "clip_scores",
    "evaluate",
    "frechet_distance",
    "kernel_distance",
    "load_inception",
    "maximum_mean_discrepancy",
    "mean_measurement",
    "moments_of",
    "nearest_candidates",
    "resize_like_tensorflow",
]
