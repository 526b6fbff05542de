"""The original's import path of the space search."""
from .searcher import BlockKDSearcher, search_spaces

__all__ = ['BlockKDSearcher', 'search_spaces']
