"""LatencyPredictor: latencies in ms of blocks, sub-stages and networks, one interface for all platforms.

    LatencyPredictor('tflite27_cpu_int8')      Pixel 4, TFLite 2.7, one big core, int8
    LatencyPredictor('onnx_lut')               x86 VNNI, ONNX Runtime, one thread, int8
    LatencyPredictor('epyc_zen3_ort1.32_1t')   AMD Zen 3, ONNX Runtime 1.32, one thread, int8
    LatencyPredictor('my_host')                a folder data/latency/my_host/ written by build_predictor.py
    LatencyPredictor('path/to/onnx_lut.json')  a block table in nn-Meter's JSON format
    LatencyPredictor('my_phone')               kernel predictors registered with nn-Meter
    LatencyPredictor('mflops')                 no latency at all: multiply-adds in millions, to compare with

A network's latency is the sum over its blocks. The first two are models fitted to the latencies that were published
with SpaceEvo (ICCV 2023); data/make/latency.py says how, and prints their errors on held-out figures. The third was
measured by build_predictor.py, whose report is in its folder.
"""
import os
from functools import cache

from ..cli import note
from ..modeling.complexity import block_complexity
from ..search_space.block import Block
from ..search_space.encoding import sub_stage_blocks
from .kernel_model import LatencyError
from .tables import DATA, format_key, load_platform, read_table

MFLOPS = 'mflops'               # the platform whose latencies are multiply-adds
PUBLISHED = ('onnx_lut', 'tflite27_cpu_int8')


def add_platform_arguments(parser):
    """--platform and --trust_pickles, of open_predictor()."""
    parser.add_argument('--platform', help="latency platform, or a block table *.json; default: the hyperspace's")
    parser.add_argument('--trust_pickles', action='store_true', help="open nn-Meter's pickles, which are code")


def open_predictor(args, superspace):
    """The LatencyPredictor of add_platform_arguments(); superspace: a Superspace, whose platform is the default."""
    return LatencyPredictor(args.platform or superspace.platform, trust_pickles=args.trust_pickles)


class LatencyPredictor:
    """Predicts latencies of one platform.

    platform: see the module. trust_pickles: nn-Meter's predictors are pickles, which run code when they are opened;
    without this flag they are refused.

    Raises LatencyError (one line) for an unknown platform and for a block the platform cannot predict.
    """

    def __init__(self, platform, *, trust_pickles=False):
        self.platform = str(platform)
        self._table, self._model = _open_platform(self.platform, trust_pickles)
        self._predicted = {}

    @property
    def unit(self):
        """What predictions are in: ms, or MFLOPs."""
        return unit_of(self.platform)

    @property
    def table(self):
        """{Block, or its plain tuple: ms} of the blocks the platform has figures of."""
        return dict(self._table)

    def predict_block(self, name, hw, cin, cout, kernel_size, expand_ratio, stride, activation):
        """ms of one block; hw: pixels of its input; expand_ratio None (or 0) where the block has none."""
        block = Block(name, hw, cin, cout, kernel_size, expand_ratio or None, stride, activation)
        return self.predict_blocks([block])[0]

    def predict_sub_stage(self, superspace, block_id, sub_stage, input_shape):
        """ms for one image of a sub-stage, as ('mobilew', 'stage3_5', '5#72#6_3#112#8', (1, 32, 28, 28)).

        input_shape: (N, C, H, W) with H = W. Raises EncodingError where the sub-stage is not in the space.
        """
        return sum(self.predict_blocks(sub_stage_blocks(superspace, block_id, sub_stage, input_shape)))

    def predict_subnet(self, config):
        """ms of a network, stem and head included; config: encoding.SubnetConfig."""
        return sum(self.predict_blocks(config.blocks))

    def predict_blocks(self, blocks):
        """List of ms of Blocks."""
        found = [self._table.get(block) or self._predicted.get(block) for block in blocks]
        missing = list(dict.fromkeys(block for block, ms in zip(blocks, found) if ms is None))
        if missing and self._model is None:
            raise LatencyError(f'{self.platform}: no latency of {format_key(missing[0])}; onnx_tools/import_lut.py '
                               'makes a platform of the table that predicts what it lacks')
        if missing:
            self._predicted.update(zip(missing, map(float, self._model.predict_blocks(missing))))
        return [self._predicted[block] if ms is None else ms for block, ms in zip(blocks, found)]


def unit_of(platform):
    """Unit of a platform's latencies."""
    return 'MFLOPs' if platform == MFLOPS else 'ms'


class FlopsModel:
    """Multiply-adds in the place of a latency: what a search without a device goes by."""

    @staticmethod
    def predict_blocks(blocks):
        """MFLOPs of Blocks."""
        return [block_complexity(block)[0] / 1e6 for block in blocks]


def _platforms():
    """Names of the platforms in data/latency/."""
    return sorted(entry.name for entry in os.scandir(DATA) if entry.is_dir())


_say = cache(note)              # once, however many predictors are opened


def _open_platform(platform, trust_pickles):
    """({Block: ms}, model or None); a model has predict_blocks(Blocks) -> ms."""
    if platform == MFLOPS:
        return {}, FlopsModel()
    if platform.endswith('.json'):
        return read_table(platform), None
    from . import nn_meter_adapter
    folder = os.path.join(DATA, platform)
    if os.path.basename(platform) == platform and os.path.isdir(folder):
        if not nn_meter_adapter.is_registered(platform):
            return load_platform(folder)
        if not trust_pickles:
            _say(f'{platform}: the model in {folder}; a predictor of this name is registered with nn-Meter, which '
                 '--trust_pickles would use')
            return load_platform(folder)
        _say(f'{platform}: the predictor that is registered with nn-Meter, not the model in {folder}')
    try:
        return {}, nn_meter_adapter.load(platform, trust_pickles)
    except LatencyError as error:
        raise LatencyError(f'{error}; platforms here are {", ".join([*_platforms(), MFLOPS])}, and the path of a block '
                           'table ends in .json') from None
