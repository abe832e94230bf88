"""Softmax cross-entropy with pixel and class weights."""

from .op import weighted_cross_entropy

__all__ = ["weighted_cross_entropy"]
