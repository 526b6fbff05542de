"""Hyperspaces for measurements on small pictures.

    python train_block_kd.py --plugin benchmarks/onnxw_small.py --superspace onnxw_small …

onnxw_small: the six block types of onnxw in narrow stages. demo_narrow, demo_resnet, demo_kernels, demo_deep: what
results.md and the log measured in `demo` until 2026-11-28 and on 2026-11-29: the first three with two kernels a block
and hswish, the first two with ResNet in the place of fused MBConv, all with two expand ratios.
"""
import dataclasses

from modules.search_space.macro_arch import span, stage_table
from modules.search_space.superspace import SUPERSPACES, BlockType, register_superspace

NARROW = stage_table((16,), (16,), [
    (span(16, 32, 8), (1, 2), 2),
    (span(24, 48, 8), span(1, 3), 2),
    (span(48, 96, 16), span(1, 3), 2),
], stage0_depths=(1,), head=(256, 320, 10))
DEEP = stage_table((24,), (24,), [
    ((24, 32, 48), (1, 2), 2),
    ((48, 64, 80), span(1, 3), 2),
    ((96, 128, 160), span(1, 3), 2),
], stage0_depths=(1,), head=(320, 512, 10))
demo = SUPERSPACES['demo']
mobile = (BlockType('MobileNetV2ResBlock', (3, 5), (3, 6), 'relu6'),
          BlockType('MobileNetV3ResBlock', (3, 5), (3, 6), 'hswish'))
fused = BlockType('FusedMBConvResBlock', (3,), (2, 4), 'relu6')
one_kernel = (BlockType('MobileNetV2ResBlock', (3,), (3, 6), 'relu6'),
              BlockType('MobileNetV3ResBlock', (5,), (3, 6), 'swish'), fused)
resnet = (*mobile, BlockType('ResNetBlock', (3, 5), (0.5, 1.0)))

for name, stages, types in (('onnxw_small', NARROW, SUPERSPACES['onnxw'].block_types), ('demo_narrow', NARROW, resnet),
                            ('demo_resnet', DEEP, resnet), ('demo_kernels', DEEP, (*mobile, fused)),
                            ('demo_deep', DEEP, one_kernel)):
    register_superspace(dataclasses.replace(demo, name=name, stages=stages, block_types=types))
