"""ONNX Runtime as a device of modules/latency/profiling.py: INT8 models of single blocks, chains and networks.

A block that is not the first of a network reads uint8 codes and one that is not the last writes them, as inside a
network: no float map is quantised or written that would not be there.
"""
import platform
import re
import time

import numpy as np
import torch

from ..modeling.network import Network, io_sizes, named_blocks
from ..modeling.ops.lsq_plus import set_quant_mode
from ..optional import need
from ..search_space.encoding import BlockConfig, SubnetConfig
from ..training.calibrate import calibrate
from .graph import IMAGE, IR_VERSION, OPSET, Graph
from .int8 import Codes, Int8Exporter, Pending, Real
from .onnx_run import open_session
from .trace import Range, observe

IMAGES = 2                  # of noise, for batch-norm statistics and ranges; one has no variance at 1 x 1 pixels


class OrtDevice:
    """This host with ONNX Runtime on `threads` threads."""

    def __init__(self, threads=1):
        need('onnx')
        self.threads, self.version = threads, need('onnxruntime').__version__
        # one thread computes in the caller: its own time leaves out what other processes had of the core
        self.clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns

    def __str__(self):
        return f'{processor()}, ONNX Runtime {self.version}, {self.threads} thread{"s" * (self.threads > 1)}'

    def prepare(self, blocks):
        """run(count) -> [ms] of the INT8 model of Blocks in a row, random weights; of an empty model for none."""
        session = open_session(chain_model(blocks) if blocks else empty_model(), self.threads)
        given, rng = session.get_inputs()[0], np.random.default_rng(0)
        shape = (1, *given.shape[1:])
        image = (rng.integers(0, 256, shape, np.uint8) if 'uint8' in given.type
                 else rng.standard_normal(shape, np.float32))
        feed = {given.name: image}

        def run(count):
            times = []
            for _ in range(count):
                start = self.clock()
                session.run(None, feed)
                times.append(1e-6 * (self.clock() - start))
            return times
        return run


def processor():
    """Name of this machine's processor."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            facts = dict(re.findall(r'^(model name|cpu family|model)\s*: (.*)$', f.read(), re.M))
        family = f' (family {facts["cpu family"]}, model {facts["model"]})' if 'cpu family' in facts else ''
        return facts['model name'] + family
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def chain_model(blocks):
    """ModelProto of Blocks (kernel_model.Block) in a row; codes in and out but at a network's two ends."""
    first, last = blocks[0], blocks[-1]
    config = SubnetConfig(first.hw, tuple(BlockConfig(f'b{i}', *block) for i, block in enumerate(blocks)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network(config)
        images = torch.randn(IMAGES, first.cin, first.hw, first.hw)
    calibrate(network, [images])
    set_quant_mode(network)
    ranges = observe(network, [images])
    ranges[IMAGE] = Range()
    ranges[IMAGE].see(images)
    graph = Graph()
    exporter = Int8Exporter(graph, ranges)
    codes_in, codes_out = first.name != 'FirstConvBlock', last.name != 'LogitsBlock'
    x = Real(graph.image)
    if codes_in:
        x = Pending(IMAGE, lambda target: Codes(graph.image, target.grid, target.shift))
    for name, block in named_blocks(network):
        x = exporter.block(x, block, name)
    if codes_out:
        x = exporter.calibrated(x).tensor
    return _model(graph, io_sizes(network)[0], codes_in, x, codes_out)


def empty_model():
    """ModelProto that does next to nothing: what a call costs."""
    graph = Graph()
    return _model(graph, (8, 1, 1), True, graph.clip_codes(graph.image, None, 0, 200), True)


def _model(graph, shape, codes_in, output, codes_out):
    """ModelProto; codes are (N, H, W, C), in which ONNX Runtime computes: it then turns nothing around at the ends of
    a block that it would not turn around inside a network."""
    helper, kinds = graph.onnx.helper, graph.onnx.TensorProto
    before, after = [], []
    given, result = IMAGE, output
    if codes_in:
        given, shape = 'codes', (*shape[1:], shape[0])
        before = [helper.make_node('Transpose', [given], [IMAGE], perm=(0, 3, 1, 2))]
    if codes_out:
        result = 'result'
        after = [helper.make_node('Transpose', [output], [result], perm=(0, 2, 3, 1))]
    tensors = [helper.make_tensor_value_info(name, kinds.UINT8 if codes else kinds.FLOAT, sizes)
               for name, codes, sizes in ((given, codes_in, ['N', *shape]), (result, codes_out, None))]
    return helper.make_model(helper.make_graph([*before, *graph.nodes, *after], 'blocks', tensors[:1], tensors[1:],
                                               list(graph.constants.values())),
                             opset_imports=[helper.make_opsetid('', OPSET)], ir_version=IR_VERSION)
