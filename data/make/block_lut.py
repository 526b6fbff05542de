"""Make the shipped block LUTs (data/block_lut) from models fitted to the published ones.

    python data/make/block_lut.py --reference ../shared/reference/lut --output data/block_lut

The published LUTs are not ours to ship. For each file 4000 sub-stages are drawn with our own sampler; FLOPs and
params are computed, latency comes from the shipped latency predictors, and the NSR loss from a regression on
the published rows of the same block type and stage plus one of that regression's residuals, drawn from
published rows with a similar prediction, so that the scatter and the tails stay. Of the 4000 rows 1000 are kept that
are spread evenly over resolution, latency and loss: the same distribution with less chance in it than 1000
draws have. Seeded: the same rows every time. About 10 minutes on 2 cores; needs scikit-learn.
"""
import math
import os
import random
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from modules import cli
from modules.block_kd.lut import SHIPPED, LutRow, lut_files, read_rows, write_block_lut
from modules.block_kd.lut_builder import Sample
from modules.errors import UserError
from modules.files import new_folder
from modules.latency import LatencyPredictor
from modules.modeling.complexity import config_complexity
from modules.search_space.encoding import parse_block_id
from modules.search_space.sampling import sample_sub_stage
from modules.search_space.superspace import get_superspace

NEIGHBOURS = 40         # published rows among which a residual is drawn
POOL = 4                # rows drawn for each row kept


def features(depths, blocks, flops, params):
    """Features of a sub-stage's Blocks for the regression: a list of floats whose length depends on `depths` only.

    Sizes of the whole, means and extremes over the blocks, then each block's k and w relative to the others,
    and e (0 past the last block).
    """
    kernels, widths = [block.kernel for block in blocks], [block.cout for block in blocks]
    expands, depth = [block.expand or 0 for block in blocks], len(blocks)
    kernel, width, widest = sum(kernels) / depth, sum(widths) / depth, max(widths)
    row = [depth, 1 / depth, blocks[0].cin, blocks[0].hw, math.log(flops), math.log(params), kernel,
           sum(map(math.log, kernels)), width, math.log(width), sum(expands) / depth, min(widths), widest,
           kernels[0], widths[0], expands[0], kernels[-1], widths[-1], expands[-1]]
    row += [float(depth == d) for d in depths]
    for values in ([k - kernel for k in kernels], [math.log(w / widest) for w in widths], expands):
        row += values + [0] * (max(depths) - depth)
    return row


class NsrModel:
    """Regression of the NSR loss of one block id (`stage3_1`), with its residuals.

    rows: features of the published sub-stages of all width windows (the trained stage is the same), loss their
    NSR. The regression is a weighted mean of boosted trees and a quadratic polynomial. Weights and residuals are of
    rows it has not seen (5-fold); the residuals are sorted by its prediction of them.
    """

    def __init__(self, rows, loss):
        from sklearn.ensemble import HistGradientBoostingRegressor
        from sklearn.linear_model import Ridge
        from sklearn.model_selection import KFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import PolynomialFeatures, StandardScaler
        rows, loss = np.array(rows, float), np.asarray(loss)
        trees = HistGradientBoostingRegressor(max_iter=300, learning_rate=0.06, max_leaf_nodes=15,
                                              min_samples_leaf=10, random_state=0)
        smooth = make_pipeline(StandardScaler(), PolynomialFeatures(2), StandardScaler(), Ridge(1))
        self.models = trees, smooth
        folds = KFold(5, shuffle=True, random_state=0)
        of_trees, of_smooth = (cross_val_predict(model, rows, loss, cv=folds) for model in self.models)
        gap = of_smooth - of_trees
        share = float(np.clip(np.dot(gap, loss - of_trees) / np.dot(gap, gap), 0, 1))
        self.weights, predicted = (1 - share, share), of_trees + share * gap
        for model in self.models:
            model.fit(rows, loss)
        order = np.argsort(predicted)
        self.predicted, self.residuals = predicted[order], (loss - predicted)[order]
        self.r2 = float(1 - np.var(loss - predicted) / np.var(loss))

    def sample(self, rows, rng):
        """(rows,) NSR losses: prediction plus a residual of a published row predicted alike; rng numpy Generator."""
        predicted = sum(weight * model.predict(np.array(rows, float))
                        for weight, model in zip(self.weights, self.models))
        count = min(NEIGHBOURS, len(self.residuals))
        first = np.clip(np.searchsorted(self.predicted, predicted) - count // 2, 0, len(self.residuals) - count)
        return predicted + self.residuals[first + rng.integers(count, size=len(predicted))]


def fit_models(reference, superspace):
    """{block id: NsrModel} from the published LUTs in a folder."""
    space, models = get_superspace(superspace), {}
    files = lut_files(reference, space)
    for block_id in space.block_ids():
        depths = space.stage(block_id.split('_')[0]).depths
        rows = [row for lut_id, path in files.items() if lut_id.rpartition('_')[0] == block_id
                for row in read_rows(path, space, lut_id)]
        model = models[block_id] = NsrModel([features(depths, row.blocks, row.flops, row.params) for row in rows],
                                            [row.loss for row in rows])
        print(f'{space.name} {block_id}: {len(rows)} published rows, R2 on unseen rows {model.r2:.3f}, '
              f'share of the polynomial {model.weights[1]:.2f}', flush=True)
    return models


def spread_evenly(latency, loss, count, rng):
    """Indices of `count` rows of a larger draw that follow its joint distribution of latency and loss closely.

    The rows are put in order along a path through (latency, loss): groups of similar latency, within a group by
    loss, up and down in turn. Then every n-th is taken, from a random start.
    """
    group = max(1, round(len(latency) / count * (count / 4) ** 0.5))
    order, by_latency = [], np.argsort(latency, kind='stable')
    for i, start in enumerate(range(0, len(latency), group)):
        members = by_latency[start:start + group]
        order.append(members[np.argsort(loss[members] * (-1) ** i, kind='stable')])
    places = (np.arange(count) + rng.random()) * len(latency) / count
    return np.concatenate(order)[places.astype(int)]


def make_rows(space, lut_id, model, predictor, count, seed):
    """`count` LutRows of a block LUT, the resolutions in equal shares."""
    rng, block_id = random.Random(f'{seed} {space.name} {lut_id}'), parse_block_id(space, lut_id)
    drawn, rows = [], []
    for _ in range(POOL * count):
        blocks = Sample.of(space, block_id, *sample_sub_stage(space, block_id, rng)).blocks
        complexity = config_complexity(blocks)
        drawn.append((blocks, *complexity, max(sum(predictor.predict_blocks(blocks)), 1e-4)))
        rows.append(features(space.stage(block_id.stage).depths, blocks, *complexity))
    generator = np.random.default_rng(rng.getrandbits(64))
    loss = np.maximum(model.sample(rows, generator), 1e-4)
    hw, latency = np.array([blocks[0].hw for blocks, *_ in drawn]), np.array([row[-1] for row in drawn])
    kept, sizes = [], sorted(set(hw.tolist()))
    for i, size in enumerate(sizes):
        here = np.flatnonzero(hw == size)
        share = count // len(sizes) + (i < count % len(sizes))
        kept += here[spread_evenly(latency[here], loss[here], share, generator)].tolist()
    return [LutRow(drawn[i][0], float(loss[i]), *drawn[i][1:]) for i in sorted(kept)]


def make_luts(reference, output, superspaces, count=1000, seed=0):
    """Replace `output`/<superspace>/; it appears when it is complete."""
    for space in map(get_superspace, superspaces):
        predictor, models = LatencyPredictor(space.platform), fit_models(reference, space)
        target = os.path.join(output, space.name)
        with new_folder(target) as folder:
            for lut_id in space.lut_ids():
                rows = make_rows(space, lut_id, models[lut_id.rpartition('_')[0]], predictor, count, seed)
                write_block_lut(os.path.join(folder, f'{lut_id}.csv.gz'), rows)
        print(f'{target}: {len(space.lut_ids())} files of {count} rows')


def get_args():
    parser = cli.parser(__doc__)
    parser.add_argument('--reference', required=True, help='folder of the published LUTs')
    parser.add_argument('--output', default=SHIPPED, help='folder to write to')
    parser.add_argument('--superspace', nargs='+', default=['mobilew', 'onnxw'], help='hyperspaces to make')
    parser.add_argument('--num_rows', type=cli.positive(int), default=1000, help='rows of a file')
    parser.add_argument('--seed', type=cli.SEED, default=0, help='seed of the rows drawn')
    args = parser.parse_args()
    if os.path.abspath(args.reference) == os.path.abspath(args.output):
        raise UserError('--output would replace the published LUTs in --reference')
    return args


def main(args):
    make_luts(args.reference, args.output, args.superspace, args.num_rows, args.seed)


if __name__ == '__main__':
    cli.run(main, get_args)
