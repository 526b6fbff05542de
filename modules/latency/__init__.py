"""Latency in ms on a device, without the device."""
from .kernel_model import LatencyError
from .predictor import LatencyPredictor

__all__ = ['LatencyError', 'LatencyPredictor']
