"""Hyperspaces for measurements on small pictures.

    python train_block_kd.py --plugin benchmarks/onnxw_small.py --superspace onnxw_small …

onnxw_small: the six block types of onnxw in narrow stages. demo_narrow, demo_resnet: what results.md measured in `demo`
until 2026-11-28 and 2026-11-29, with ResNet in the place of fused MBConv.
"""
import dataclasses

from modules.search_space.macro_arch import DEMO, span, stage_table
from modules.search_space.superspace import SUPERSPACES, BlockType, register_superspace

NARROW = stage_table((16,), (16,), [
    (span(16, 32, 8), (1, 2), 2),
    (span(24, 48, 8), span(1, 3), 2),
    (span(48, 96, 16), span(1, 3), 2),
], stage0_depths=(1,), head=(256, 320, 10))
demo = SUPERSPACES['demo']
before = (*demo.block_types[:2], BlockType('ResNetBlock', (3, 5), (0.5, 1.0)))

for name, stages, types in (('onnxw_small', NARROW, SUPERSPACES['onnxw'].block_types), ('demo_narrow', NARROW, before),
                            ('demo_resnet', DEMO, before)):
    register_superspace(dataclasses.replace(demo, name=name, stages=stages, block_types=types))
