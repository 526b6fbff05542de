"""Hyperspaces for measurements on small pictures, with narrow stages.

    python train_block_kd.py --plugin benchmarks/onnxw_small.py --superspace onnxw_small …

onnxw_small: the six block types of onnxw. demo_narrow: those of demo; what results.md measured in `demo` until
2026-11-28 is of this one.
"""
import dataclasses

from modules.search_space.macro_arch import span, stage_table
from modules.search_space.superspace import SUPERSPACES, register_superspace

STAGES = stage_table((16,), (16,), [
    (span(16, 32, 8), (1, 2), 2),
    (span(24, 48, 8), span(1, 3), 2),
    (span(48, 96, 16), span(1, 3), 2),
], stage0_depths=(1,), head=(256, 320, 10))

for name, types in (('onnxw_small', 'onnxw'), ('demo_narrow', 'demo')):
    register_superspace(dataclasses.replace(SUPERSPACES['demo'], name=name, stages=STAGES,
                                            block_types=SUPERSPACES[types].block_types))
