"""Latency in ms on a device, without the device."""
from .kernel_model import LatencyError
from .predictor import LatencyPredictor, add_platform_arguments, open_predictor

__all__ = ['LatencyError', 'LatencyPredictor', 'add_platform_arguments', 'open_predictor']
