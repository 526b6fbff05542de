"""Latency platforms from and to nn-Meter's block tables (JSON), without loss."""
import contextlib
import os

import numpy as np

from ..files import new_folder
from ..search_space.block import Block
from .candidates import space_blocks
from .kernel_model import LatencyError
from .predictor import PUBLISHED, LatencyPredictor
from .regression import Design, fit_nets
from .tables import DATA, load_platform, read_table, save_platform

ENDS = {'FirstConvBlock', 'FinalExpandBlock', 'FeatureMixBlock', 'LogitsBlock'}
LEAST, MOST = 20, 6000         # blocks of a table that its model is fitted to


def platform_table(platform, superspaces=(), trust_pickles=False):
    """{Block: ms} of a platform: of all blocks of the hyperspaces, or of those it has in its own table."""
    predictor = LatencyPredictor(platform, trust_pickles=trust_pickles)
    if superspaces:
        blocks = space_blocks(*superspaces)
        return dict(zip(blocks, predictor.predict_blocks(blocks)))
    return {Block(*key): ms for key, ms in predictor.table.items()}


def import_table(path, folder, epochs=40, seed=0):
    """Write the platform `folder` of a JSON block table: its latencies as they are, and nets fitted to them for
    blocks it lacks. Returns (number of blocks, median relative error of the nets on blocks they were not fitted to).

    To a table without stem or head the nets of a published platform that knows its blocks are fitted, so that these are
    predicted too: on a part of the Zen 3 platform's table they were off by 6 to 11 % (median), other blocks by 2 %.
    """
    table = read_table(path)
    if len(table) < LEAST:
        raise LatencyError(f'{path}: {len(table)} blocks, too few to fit nets to (needed: {LEAST})')
    blocks = list(table)
    chosen = np.random.default_rng(seed).permutation(len(blocks))[:MOST]
    held = chosen[:len(chosen) // 10]
    design, ms = Design([[block] for block in blocks]), np.array(list(table.values()))
    groups = [(chosen[len(held):], len(chosen) - len(held))]
    model = fit_nets(path, design, ms, groups, tiled=True, block_factor=True, epochs=epochs, batch=128, seed=seed,
                     base=_published(blocks))
    error = np.median(np.abs(design.predict(model)[held] / ms[held] - 1)) if len(held) else float('nan')
    if len(held) and not np.isfinite(error):
        raise LatencyError(f'{path}: no model can be fitted to these latencies')
    with new_folder(folder) as temporary:
        save_platform(temporary, model, table)
    return len(table), float(error)


def _published(blocks):
    """KernelModel of the first published platform that knows all of the Blocks; None where none does, and where they
    have both ends of a network."""
    for name in PUBLISHED if ENDS - {block.name for block in blocks} else ():
        model = load_platform(os.path.join(DATA, name))[1]
        with contextlib.suppress(LatencyError):
            model.predict_blocks(blocks)
            return model
    return None
