"""Fit the shipped latency platforms to the published figures and write data/latency/<platform>/.

    python data/make/latency.py --reference ../shared/reference

First a part of the figures is held out and scored, then the model fitted to all of them is written (about ten
minutes on one core). The published figures themselves stay where they are: what is written are the weights of
a platform's nets (model.npz) and their predictions for every block of its spaces (blocks.npz).
"""
import csv
import os
import sys
from dataclasses import dataclass

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from modules import cli
from modules.block_kd.lut import lut_files, read_rows
from modules.latency.candidates import space_blocks
from modules.latency.kernel_model import kernels_of
from modules.latency.kernels import Kernel
from modules.latency.regression import Design, fit_corrections, fit_nets, interpolate_corrections
from modules.latency.tables import DATA, read_table, save_platform
from modules.search_space.superspace import get_superspace


@dataclass(frozen=True)
class Recipe:
    """How a platform is fitted.

    figures: file of single blocks or kernels; lut: hyperspace of its LUT rows; spaces: what is predicted.
    """
    figures: str
    lut: str
    spaces: tuple
    tiled: bool                 # see kernel_model.kernel_features
    block_factor: bool          # whole blocks were measured; else latencies are sums of kernel predictors
    figures_per_epoch: int      # 0: each once
    rows_per_epoch: int
    prior: float                # spread of the nets' relative error: of a block (onnx_lut) or a kernel
    noise: float                # relative error of a row that corrections need not explain
    epochs: int = 50


# Prior and noise: an x86 block is a single measurement with a few per cent of scatter, so a part of what rows
# say is not believed; the Pixel 4 rows are exact sums of kernel predictions, so all of it is.
RECIPES = {
    'onnx_lut': Recipe('latency/onnx_lut_blocks.json.gz', 'onnxw', ('onnxw', 'onnx', 'onnx_v1'), True, True,
                       0, 15000, 0.06, 0.02),
    'tflite27_cpu_int8': Recipe('latency/tflite27_cpu_int8_kernels.csv', 'mobilew',
                                ('mobilew', 'mobile_original', 'mobile_v1'), False, False,
                                400, 20000, 0.1, 0.003),
}


class Figures:
    """Published figures of a platform: items (see regression.Design), ms, and what each item is.

    origin: [(lut id, resolution of the image or 0), …], the lut id '' for single blocks or kernels.
    """

    def __init__(self, recipe, reference):
        path = os.path.join(reference, recipe.figures)
        figures = read_kernels(path) if path.endswith('.csv') else list(read_table(path).items())
        rows = read_lut_rows(os.path.join(reference, 'lut', recipe.lut), recipe.lut)
        self.items = [[item] for item, _ in figures] + [blocks for blocks, _, _ in rows]
        self.ms = np.array([ms for _, ms in figures] + [ms for _, ms, _ in rows])
        self.origin = [('', 0)] * len(figures) + [origin for _, _, origin in rows]
        self.is_row = np.arange(len(self.ms)) >= len(figures)
        self.design = Design(self.items)


def read_kernels(path):
    """[(Kernel, ms), …] of a CSV with columns kernel, hw, cin, cout, kernel_size, stride, ms."""
    figures = []
    with open(path, newline='', encoding='utf-8') as file:
        for row in csv.DictReader(file):
            columns = 'hw', 'cin', 'cout', 'kernel_size', 'stride'
            hw, cin, cout, k, stride = (int(row[column] or 0) for column in columns)
            figures.append((Kernel(row['kernel'], hw or 1, cin, cout or cin, k, stride), float(row['ms'])))
    return figures


def read_lut_rows(folder, superspace):
    """[(Blocks of the sub-stage, ms, (lut id, resolution)), …] of a hyperspace's block LUTs."""
    space = get_superspace(superspace)
    return [(row.blocks, row.latency, (lut_id, row.hw * space.input_stride(lut_id.split('_')[0])))
            for lut_id, path in lut_files(folder, space).items() for row in read_rows(path, space, lut_id)]


def fit(platform, recipe, figures, train, epochs=None, seed=0):
    """KernelModel of the figures where `train` (bool array) is true, with its corrections."""
    singles, rows = np.flatnonzero(train & ~figures.is_row), np.flatnonzero(train & figures.is_row)
    groups = [(singles, recipe.figures_per_epoch or len(singles)), (rows, recipe.rows_per_epoch)]
    model = fit_nets(platform, figures.design, figures.ms, groups, recipe.tiled, recipe.block_factor,
                     epochs or recipe.epochs, seed=seed)
    model.corrections = fit_corrections(model, figures.design, figures.ms, rows, recipe.prior, recipe.noise)
    if not recipe.block_factor:
        kernels = {kernel for block in space_blocks(*recipe.spaces)
                   for kernel in kernels_of(block)}
        model.corrections.update(interpolate_corrections(model.corrections, kernels))
    return model


def print_scores(title, figures, predicted, chosen):
    """A line per group of the chosen items: number, median relative error, shares within 5 and 10 %."""
    error = np.abs(predicted / figures.ms - 1)
    groups = {}
    for i in np.flatnonzero(chosen):
        lut_id = figures.origin[i][0]
        if lut_id:
            stage, block_type, _ = lut_id.split('_')
            resolution = figures.origin[i][1]
            names = ['rows', f'rows: block type {block_type}', f'rows: {stage}', f'rows: r{resolution}']
        else:
            item = figures.items[i][0]
            names = ['single figures', f'single figures: {item.name}']
        for name in names:
            groups.setdefault(name, []).append(error[i])
    print(f'{title}\n{"":<40}{"n":>8}{"median %":>10}{"within 5 %":>12}{"within 10 %":>13}')
    for name in sorted(groups):
        e = np.array(groups[name])
        print(f'{name:<40}{len(e):>8}{100 * np.median(e):>10.2f}{100 * np.mean(e <= 0.05):>12.2f}'
              f'{100 * np.mean(e <= 0.1):>13.2f}', flush=True)


def hold_out(platform, recipe, figures, epochs, seed):
    """Print the scores of 20 % of single blocks and 40 % of each LUT's rows, then of a whole resolution."""
    rng = np.random.default_rng(seed)
    share = np.where(figures.is_row, 0.4, 0.2 if recipe.block_factor else 0.0)
    held = rng.random(len(share)) < share
    model = fit(platform, recipe, figures, ~held, epochs, seed)
    print_scores(f'{platform}: held-out figures', figures, figures.design.predict(model), held)
    model.corrections = {}
    print_scores(f'{platform}: the same by the nets alone', figures, figures.design.predict(model), held)
    held = np.array([resolution == 192 for _, resolution in figures.origin])
    model = fit(platform, recipe, figures, ~held, epochs, seed)
    print_scores(f'{platform}: rows of a held-out resolution', figures, figures.design.predict(model), held)


def main(args):
    for platform in args.platform:
        recipe = RECIPES[platform]
        figures = Figures(recipe, args.reference)
        if not args.skip_scores:
            hold_out(platform, recipe, figures, args.epochs, args.seed)
        model = fit(platform, recipe, figures, np.ones(len(figures.ms), bool), args.epochs, args.seed)
        print_scores(f'{platform}: fit to all figures', figures, figures.design.predict(model),
                     np.ones(len(figures.ms), bool))
        blocks = space_blocks(*recipe.spaces)
        folder = save_platform(os.path.join(args.output, platform), model, blocks)
        print(f'{folder}: nets, and predictions of {len(blocks)} blocks')


def get_args():
    parser = cli.parser(__doc__)
    parser.add_argument('--reference', required=True, help='folder with lut/ and latency/')
    parser.add_argument('--platform', nargs='+', default=list(RECIPES), choices=list(RECIPES), help='platforms to fit')
    parser.add_argument('--output', default=DATA, help='folder of the platforms')
    parser.add_argument('--epochs', type=cli.positive(int), help='over the figures; default: 50')
    parser.add_argument('--seed', type=cli.SEED, default=0, help='seed of the nets and of what is held out')
    parser.add_argument('--skip_scores', action='store_true', help='only fit to all figures and write')
    return parser.parse_args()


if __name__ == '__main__':
    cli.run(main, get_args)
