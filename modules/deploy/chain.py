"""Blocks in a row as a network with random weights, for devices of modules/latency/profiling.py that measure them."""
import platform
import re
import time

import torch

from ..modeling.network import LOGITS, Network, named_blocks
from ..modeling.ops.lsq_plus import set_quant_mode
from ..search_space.encoding import SubnetConfig
from ..training.calibrate import calibrate
from .graph import IMAGE
from .int8 import Pending, Real
from .trace import Range, observe

IMAGES = 2                  # of noise, for batch-norm statistics and ranges; one has no variance at 1 x 1 pixels


def random_chain(blocks):
    """(Network in int8 and eval mode, its ranges on noise, the noise) of Blocks (search_space.block) in a row."""
    first = blocks[0]
    stages = [LOGITS if block.name == 'LogitsBlock' else f'block{i}' for i, block in enumerate(blocks)]
    config = SubnetConfig(first.hw, {stage: [block] for stage, block in zip(stages, blocks)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network(config)
        images = torch.randn(IMAGES, first.cin, first.hw, first.hw)
    calibrate(network, [images])
    set_quant_mode(network)
    return network, observe(network, [images]), images


def is_first(blocks):
    """Whether a chain begins with an image, not with the codes of a block before it."""
    return blocks[0].name == 'FirstConvBlock'


def is_last(blocks):
    """Whether a chain ends in logits, not in codes for a block after it."""
    return blocks[-1].name == 'LogitsBlock'


def write_chain(exporter, network, ranges, images, blocks, enter):
    """Output, a tensor of the exporter's graph, of a random_chain(): codes but where it ends in logits.

    enter(Target) gives the Codes that a chain which does not begin with an image reads.
    """
    ranges[IMAGE] = Range()
    ranges[IMAGE].see(images)
    x = Real(exporter.graph.image) if is_first(blocks) else Pending(IMAGE, enter)
    for name, block in named_blocks(network):
        x = exporter.block(x, block, name)
    return x if is_last(blocks) else exporter.calibrated(x).tensor


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


def processor():
    """Name of this machine's processor."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            facts = dict(re.findall(r'^(model name|cpu family|model)\s*: (.*)$', f.read(), re.M))
        family = f' (family {facts["cpu family"]}, model {facts["model"]})' if 'cpu family' in facts else ''
        return facts['model name'] + family
    except (OSError, KeyError):
        return platform.processor() or platform.machine()
