"""SpaceEvo: search INT8-friendly search spaces, then the networks in them."""
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))     # of the repository
