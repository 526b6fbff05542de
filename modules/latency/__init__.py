"""Latency in ms on a device, without the device."""
from .kernel_model import LatencyError
from .predictor import MFLOPS, LatencyPredictor, add_platform_arguments, open_predictor, unit_of

__all__ = ['MFLOPS', 'LatencyError', 'LatencyPredictor', 'add_platform_arguments', 'open_predictor', 'unit_of']
