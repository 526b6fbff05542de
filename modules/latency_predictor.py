"""The original's import path of LatencyPredictor."""
from .latency import LatencyPredictor

__all__ = ['LatencyPredictor']
