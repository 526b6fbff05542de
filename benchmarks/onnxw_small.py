"""A hyperspace for measurements: the six block types of onnxw in the narrow stages of demo, for small pictures.

    python train_block_kd.py --plugin benchmarks/onnxw_small.py --superspace onnxw_small …
"""
import dataclasses

from modules.search_space.superspace import SUPERSPACES, register_superspace

register_superspace(dataclasses.replace(SUPERSPACES['demo'], name='onnxw_small',
                                        block_types=SUPERSPACES['onnxw'].block_types))
