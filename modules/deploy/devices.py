"""Devices of modules/latency/profiling.py, on which build_predictor.py measures blocks, chains of them and networks.

A block that is not the first of a network reads codes and one that is not the last writes them, as inside a network:
no float map is quantised or written that would not be there. Weights are random.
"""
import time

import numpy as np
import torch

from ..modeling.network import LOGITS, Network, io_sizes, named_blocks
from ..modeling.ops.lsq_plus import set_quant_mode
from ..optional import need
from ..search_space.block import Block
from ..search_space.encoding import SubnetConfig
from ..training.calibrate import calibrate
from .benchmark import processor
from .int8_exporter import Int8Exporter, PendingTensor
from .onnx_models import IR_VERSION, OPSET, OnnxGraph
from .quantisation import IMAGE, FloatTensor, QuantisedTensor, observe
from .runtimes import ONNX_RUNTIMES, TFLITE, Interpreter
from .tflite_models import TfliteGraph

NOISE_IMAGES = 2            # for batch-norm statistics and ranges; one has no variance at 1 x 1 pixels
NOTHING = (Block('FinalExpandBlock', 1, 8, 8, 1, None, 1, 'relu'),)     # the least of blocks: what a TFLite call costs
PHONE_WARMUP = 10           # untimed runs of a model


def timed(call, threads):
    """run(count) -> [ms] of a function.

    One thread computes in the caller: its own time leaves out what other processes had of the core.
    """
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns

    def run(count):
        times = []
        for _ in range(count):
            start = clock()
            call()
            times.append(1e-6 * (clock() - start))
        return times
    return run


def _threads(count):
    return f'{count} thread{"s" if count > 1 else ""}'


class OnnxDevice:
    """This host with a runtime of ONNX_RUNTIMES on `threads` threads; reduce_range: models with weights of 7 bits."""

    def __init__(self, threads=1, reduce_range=False, runtime='onnxruntime'):
        need('onnx')
        self.threads, self.reduce_range, self.runtime = threads, reduce_range, ONNX_RUNTIMES[runtime]
        self.version = self.runtime.version

    def __str__(self):
        weights = ', 7-bit weights' if self.reduce_range else ''
        return f'{processor()}, {self.runtime.name} {self.version}, {_threads(self.threads)}{weights}'

    def prepare(self, blocks):
        """run(count) -> [ms] of the INT8 model of Blocks in a row; of an empty model for none."""
        model = onnx_chain(blocks, **self.runtime.int8_options(self.reduce_range)) if blocks else empty_onnx_model()
        session, rng = self.runtime.open_session(model, self.threads), np.random.default_rng(0)
        given = session.get_inputs()[0]
        shape = (1, *given.shape[1:])
        feed = {given.name: rng.integers(0, 256, shape, np.uint8) if 'uint8' in given.type
                else rng.standard_normal(shape, np.float32)}
        return timed(lambda: session.run(None, feed), self.threads)


class LiteRtDevice:
    """This machine with ai-edge-litert on `threads` threads."""

    def __init__(self, threads=1):
        _need_tflite()
        self.threads, self.version = threads, TFLITE.version

    def __str__(self):
        return f'{processor()}, LiteRT {self.version}, {_threads(self.threads)}'

    def prepare(self, blocks):
        """run(count) -> [ms] of the INT8 model of Blocks in a row; for none of next to nothing."""
        return timed(Interpreter(tflite_chain(blocks or NOTHING), self.threads).invoke, self.threads)


class PhoneDevice:
    """A phone.Phone with TFLite's benchmark_model; `name` is that of the phone."""

    def __init__(self, phone, name):
        _need_tflite()
        self.phone, self.name = phone, name

    def __str__(self):
        return f'{self.name}, TFLite benchmark_model, {_threads(self.phone.threads)}, cores {self.phone.mask}'

    def prepare(self, blocks):
        """run(count) -> [mean ms of so many runs]; each call pushes the model."""
        model = tflite_chain(blocks or NOTHING)
        return lambda count: [self.phone.latency(model, PHONE_WARMUP, count).mean]


def _need_tflite():
    for package in TFLITE.packages:
        need(package)


# -- models of blocks in a row ----------------------------------------------------------------------------------

class _Chain:
    """A Network in int8 and eval mode of Blocks (search_space.block) in a row, with random weights."""

    def __init__(self, blocks):
        first = blocks[0]
        stages = [LOGITS if block.name == 'LogitsBlock' else f'block{i}' for i, block in enumerate(blocks)]
        config = SubnetConfig(first.hw, {stage: [block] for stage, block in zip(stages, blocks)})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = Network(config)
            noise = torch.randn(NOISE_IMAGES, first.cin, first.hw, first.hw)
        calibrate(self.network, [noise])
        set_quant_mode(self.network)
        self.ranges = observe(self.network, [noise])
        self.reads_codes = first.name != 'FirstConvBlock'           # not an image
        self.writes_codes = blocks[-1].name != 'LogitsBlock'

    def write(self, exporter, enter):
        """Output, a tensor of the exporter's graph; enter(Target) gives the QuantisedTensor that a chain which does
        not begin with an image reads."""
        x = PendingTensor(IMAGE, enter) if self.reads_codes else exporter.image()
        for name, block in named_blocks(self.network):
            x = exporter.block(x, block, name)
        return exporter.calibrated(x).tensor if self.writes_codes else x


def onnx_chain(blocks, reduce_range=False, float_swish=False):
    """ModelProto of Blocks in a row; codes in and out but at a network's two ends; options: of export_int8()."""
    chain, graph = _Chain(blocks), OnnxGraph(float_swish=float_swish)
    output = chain.write(Int8Exporter(graph, chain.ranges, reduce_range),
                         lambda target: QuantisedTensor(graph.image, target.params, target.shift))
    return _onnx_model(graph, io_sizes(chain.network)[0], chain.reads_codes, output, chain.writes_codes)


def empty_onnx_model():
    """ModelProto that does next to nothing: what a call costs."""
    graph = OnnxGraph()
    return _onnx_model(graph, (8, 1, 1), True, graph.clip(graph.image, None, 0, 200), True)


def _onnx_model(graph, shape, reads_codes, output, writes_codes):
    """ModelProto; codes are (N, H, W, C), in which ONNX Runtime computes: it then turns nothing around at the ends of
    a block that it would not turn around inside a network."""
    helper, kinds = graph.onnx.helper, graph.onnx.TensorProto
    before, after = [], []
    given, result = IMAGE, output
    if reads_codes:
        given, shape = 'codes', (*shape[1:], shape[0])
        before = [helper.make_node('Transpose', [given], [IMAGE], perm=(0, 3, 1, 2))]
    if writes_codes:
        result = 'result'
        after = [helper.make_node('Transpose', [output], [result], perm=(0, 2, 3, 1))]
    tensors = [helper.make_tensor_value_info(name, kinds.UINT8 if codes else kinds.FLOAT, sizes)
               for name, codes, sizes in ((given, reads_codes, ['N', *shape]), (result, writes_codes, None))]
    return helper.make_model(helper.make_graph([*before, *graph.nodes, *after], 'blocks', tensors[:1], tensors[1:],
                                               list(graph.constants.values())),
                             opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION)


def tflite_chain(blocks):
    """Bytes of the INT8 .tflite of Blocks in a row; integers in and out but at a network's two ends."""
    chain = _Chain(blocks)
    graph = TfliteGraph(io_sizes(chain.network)[0], chain.reads_codes)
    exporter = Int8Exporter(graph, chain.ranges)
    output = chain.write(exporter, lambda target: exporter.quantised(FloatTensor(graph.image), target, 'codes'))
    return graph.model(output if chain.writes_codes else graph.dequantised(output))
