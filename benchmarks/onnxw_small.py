"""Hyperspaces for measurements on small pictures.

    python train_block_kd.py --plugin benchmarks/onnxw_small.py --superspace onnxw_small …

onnxw_small: the six block types of onnxw in narrow stages. demo_narrow, demo_mbconv: what results.md measured in `demo`
until 2026-11-28 and 2026-11-29; MobileNetV2, MobileNetV3 and ResNet, in narrow stages and in those of demo.
"""
import dataclasses

from modules.search_space.macro_arch import DEMO, span, stage_table
from modules.search_space.superspace import SUPERSPACES, register_superspace

NARROW = stage_table((16,), (16,), [
    (span(16, 32, 8), (1, 2), 2),
    (span(24, 48, 8), span(1, 3), 2),
    (span(48, 96, 16), span(1, 3), 2),
], stage0_depths=(1,), head=(256, 320, 10))
demo, (mobilenet_v2, *_) = SUPERSPACES['demo'], SUPERSPACES['small'].block_types

for name, stages, types in (('onnxw_small', NARROW, SUPERSPACES['onnxw'].block_types),
                            ('demo_narrow', NARROW, (mobilenet_v2, *demo.block_types[1:])),
                            ('demo_mbconv', DEMO, (mobilenet_v2, *demo.block_types[1:]))):
    register_superspace(dataclasses.replace(demo, name=name, stages=stages, block_types=types))
