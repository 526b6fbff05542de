"""Hyperspaces as data, here `Superspace`: a stage table, the block types of the searchable stages, stem and head.

A new hyperspace is one more row of `SUPERSPACES`; a new block type is one more layout function
(modules/modeling/layout.py) and its name in a row here. Nothing else has to know. Without editing this file:
register_superspace(), docs/your_hyperspace.md.
"""
import math
from dataclasses import dataclass, field

from ..errors import UserError
from . import macro_arch
from .macro_arch import DEPTH_STAGES, SEARCHABLE_STAGES, span

MOST_PIXELS = 2048                      # of an image's side


class SearchSpaceError(UserError):
    """Something is not a member of a search space; the message is one line that names it."""


@dataclass(frozen=True)
class BlockType:
    """What a stage's blocks may be: `name` is a layout's name, kernels k (pixels), expands e as declared.

    Blocks without an expand ratio have expands (None,).
    """
    name: str
    kernels: tuple = (3,)
    expands: tuple = (None,)
    activation: str = 'relu'


@dataclass(frozen=True)
class Superspace:
    """A hyperspace: `block_types[digit]` may be used in any of stages 1..6; `fixed` are stem and head."""
    name: str
    stages: tuple
    block_types: tuple
    fixed: dict = field(hash=False)
    platform: str                                   # default latency platform
    resolutions: tuple = span(160, 224, 16)         # input resolutions of supernets, pixels
    kd_resolutions: tuple = (160, 192, 224)         # of block KD and block LUTs

    def stage(self, name):
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise SearchSpaceError(f'{self.name}: no stage {name!r}; stages: {" ".join(s.name for s in self.stages)}')

    @property
    def searchable_stages(self):
        """Names of the stages that the space search decides on: stage1 .. stage6, or the first of them."""
        return tuple(stage.name for stage in self.stages if stage.name in SEARCHABLE_STAGES)

    @property
    def depth_stages(self):
        """Names of the stages that a subnet encoding speaks of."""
        return tuple(stage.name for stage in self.stages if stage.name in DEPTH_STAGES)

    @property
    def resolution_step(self):
        """Image resolutions are multiples of this many pixels."""
        return math.gcd(16, *self.kd_resolutions)

    def previous_stage(self, name):
        """The stage before `name`, None for the first."""
        index = self.stages.index(self.stage(name))
        return self.stages[index - 1] if index else None

    def input_widths(self, name):
        """Every width the input of stage `name` can have: the previous stage's whole list."""
        previous = self.previous_stage(name)
        return previous.widths if previous else (macro_arch.IMAGE_CHANNELS,)

    def input_stride(self, name):
        """Down-sampling between the image and the input of stage `name`."""
        stride = 1
        for stage in self.stages:
            if stage.name == name:
                return stride
            stride *= stage.stride
        raise SearchSpaceError(f'{self.name}: no stage {name!r}')

    def block_type(self, stage, digit=None):
        """BlockType of a stem or head stage, or of a searchable stage with block type `digit`."""
        if stage in self.fixed:
            return self.fixed[stage]
        if digit is None or not 0 <= digit < len(self.block_types):
            raise SearchSpaceError(
                f'{self.name}: {stage}: block type {digit} is not one of 0..{len(self.block_types) - 1}')
        return self.block_types[digit]

    def block_ids(self):
        """All block-KD stages, `stage1_0` … in order."""
        return [f'{stage}_{digit}' for stage in self.searchable_stages for digit in range(len(self.block_types))]

    def lut_ids(self):
        """All block-LUT names, `stage1_0_0` … in order."""
        return [f'{block}_{window}' for block in self.block_ids()
                for window in range(self.stage(block.split('_')[0]).num_windows)]


K3, K5, K35, K357 = (3,), (5,), (3, 5), (3, 5, 7)
RESNET_E = (0.5, 1.0, 1.5)
MBCONV_MOBILE = (3, 6, 8)
MBCONV_ONNX = (4, 6, 8)
FUSED_E = (1, 2, 3, 4)


def stem_and_head(stage0, head_activation):
    """Superspace.fixed: BlockTypes of the stages that are not searched; stage0: its BlockType."""
    return {'first_conv': BlockType('FirstConvBlock', K3, (None,), 'relu'),
            'stage0': stage0,
            'final_expand': BlockType('FinalExpandBlock', (1,), (None,), head_activation),
            'feature_mix': BlockType('FeatureMixBlock', (1,), (None,), head_activation),
            'logits': BlockType('LogitsBlock', (0,), (None,), 'relu')}


_MOBILE_STAGE0 = BlockType('MobileNetV2Block', K3, (1,), 'relu')
_ONNX_STAGE0 = BlockType('ResNetBlock', K3, (0.5,), 'relu')


def _onnx_blocks(resnet_kernels):
    return (BlockType('MobileNetV1DualBlock', K35),
            BlockType('MobileNetV2ResBlock', K35, MBCONV_ONNX, 'relu6'),
            BlockType('MobileNetV3ResBlock', K35, MBCONV_ONNX, 'hswish'),
            BlockType('ResNetBlock', resnet_kernels, RESNET_E),
            BlockType('ResNetSEBlock', resnet_kernels, RESNET_E))


_MOBILEW_BLOCKS = (BlockType('MobileNetV1DualBlock', K357),
                   BlockType('MobileNetV2ResBlock', K357, MBCONV_MOBILE, 'relu6'),
                   BlockType('MobileNetV3ResBlock', K357, MBCONV_MOBILE, 'swish'),
                   BlockType('ResNetBlock', K35, RESNET_E),
                   BlockType('FusedMBConvSEResBlock', K357, FUSED_E, 'swish'),
                   BlockType('MobileNetV3K3ResBlock', K357, MBCONV_MOBILE, 'swish'),
                   BlockType('MobileNetV2K3ResBlock', K357, MBCONV_MOBILE, 'relu6'))
_MOBILE_BLOCKS = (BlockType('MobileNetV1Block', K357),
                  BlockType('MobileNetV2Block', K357, MBCONV_MOBILE, 'relu6'),
                  BlockType('MobileNetV3Block', K357, MBCONV_MOBILE, 'hswish'),
                  BlockType('ResNetBlock', K35, RESNET_E),
                  BlockType('ResNetSEBlock', K35, RESNET_E))
_MOBILE_RES_BLOCKS = (BlockType('MobileNetV1DualBlock', K357),
                      BlockType('MobileNetV2ResBlock', K357, MBCONV_MOBILE, 'relu6'),
                      BlockType('MobileNetV3ResBlock', K357, MBCONV_MOBILE, 'hswish'), *_MOBILE_BLOCKS[3:])
_ONNXW_BLOCKS = _onnx_blocks(K357) + (BlockType('FusedMBConvResBlock', K357, FUSED_E, 'swish'),)

# MobileNetV2's; EfficientNet's MBConv6 with SE, few FLOPs that int8 does slowly; EfficientNetV2's fused MBConv4, many
# that it does quickly. One kernel and one expand ratio each: in the few steps of a laptop, what shares weights learns
# less
_LAPTOP_BLOCKS = (BlockType('MobileNetV2ResBlock', K3, (6,), 'relu6'),
                  BlockType('MobileNetV3ResBlock', K5, (6,), 'swish'),
                  BlockType('FusedMBConvResBlock', K3, (4,), 'relu6'))

PIXEL4, VNNI = 'tflite27_cpu_int8', 'onnx_lut'

SUPERSPACES = {space.name: space for space in (
    Superspace('mobilew', macro_arch.MOBILE_W, _MOBILEW_BLOCKS, stem_and_head(_MOBILE_STAGE0, 'swish'), PIXEL4),
    Superspace('onnxw', macro_arch.ONNX_W, _ONNXW_BLOCKS, stem_and_head(_ONNX_STAGE0, 'hswish'), VNNI),
    Superspace('mobile_original', macro_arch.MOBILE_ORIGINAL, _MOBILE_BLOCKS,
               stem_and_head(_MOBILE_STAGE0, 'hswish'), PIXEL4),
    Superspace('mobile_v1', macro_arch.MOBILE_V1, _MOBILE_BLOCKS, stem_and_head(_MOBILE_STAGE0, 'hswish'), PIXEL4),
    Superspace('mobile_v1_res', macro_arch.MOBILE_V1, _MOBILE_RES_BLOCKS, stem_and_head(_MOBILE_STAGE0, 'hswish'),
               PIXEL4),                 # mobile_v1 with the block types that always have a shortcut
    Superspace('onnx', macro_arch.ONNX, _onnx_blocks(K357), stem_and_head(_ONNX_STAGE0, 'hswish'), VNNI),
    Superspace('onnx_v1', macro_arch.ONNX, _onnx_blocks(K35), stem_and_head(_ONNX_STAGE0, 'hswish'), VNNI),
    Superspace('demo', macro_arch.DEMO, _LAPTOP_BLOCKS, stem_and_head(_ONNX_STAGE0, 'hswish'), VNNI,
               resolutions=(32, 40, 48), kd_resolutions=(40, 48)),      # of 32, stage3 has 2 x 2 to learn from
    Superspace('demo_96', macro_arch.DEMO, _LAPTOP_BLOCKS, stem_and_head(_ONNX_STAGE0, 'hswish'), VNNI,
               resolutions=(64, 80, 96), kd_resolutions=(64, 80, 96)),      # demo for pictures with finer detail
    Superspace('small', macro_arch.SMALL, _LAPTOP_BLOCKS, stem_and_head(_ONNX_STAGE0, 'hswish'), VNNI,
               resolutions=span(128, 192, 16), kd_resolutions=(128, 160, 192)),
)}


def register_superspace(space):
    """Add a Superspace of your own: every script and function knows it from then on.

    Raises SearchSpaceError for a name that is taken or would not be understood in an encoding, for more block types
    or width windows than a digit can name, and for choices that are not in ascending order.
    """
    def check(condition, problem):
        if not condition:
            raise SearchSpaceError(f'superspace {space.name}: {problem}')

    check(space.name not in SUPERSPACES, 'exists')
    check(space.name.isidentifier(), 'not a name of letters, digits and _')
    count = len(space.searchable_stages)
    check(count and space.searchable_stages == SEARCHABLE_STAGES[:count], 'searched stages are stage1, stage2, …')
    check(1 <= len(space.block_types) <= 10, f'{len(space.block_types)} block types, expected 1 to 10')
    for stage in space.stages:
        check(stage.name in space.fixed or stage.num_windows in range(1, 11),
              f'{stage.name}: {stage.num_windows} width windows, expected 1 to 10')
        for choices in (stage.widths, stage.depths):
            check(list(choices) == sorted(set(choices)), f'{stage.name}: {choices} is not in ascending order')
    for block_type in (*space.block_types, *space.fixed.values()):
        for choices in (block_type.kernels, block_type.expands):
            check(None in choices or list(choices) == sorted(set(choices)),
                  f'{block_type.name}: {choices} is not in ascending order')
    SUPERSPACES[space.name] = space


def check_resolutions(hw_list, superspace):
    """Image resolutions (pixels) as a tuple; SearchSpaceError for one that is no multiple of the space's step."""
    step = get_superspace(superspace).resolution_step
    for hw in hw_list:
        if not 0 < hw <= MOST_PIXELS or hw % step:
            raise SearchSpaceError(f'resolution {hw} is not a multiple of {step} pixels up to {MOST_PIXELS}')
    return tuple(hw_list)


def get_superspace(superspace):
    """Superspace by name; a Superspace is returned as it is. Raises SearchSpaceError for an unknown name."""
    if isinstance(superspace, Superspace):
        return superspace
    if superspace not in SUPERSPACES:
        raise SearchSpaceError(f'no superspace {superspace!r}; known: {" ".join(SUPERSPACES)}')
    return SUPERSPACES[superspace]


def get_available_superspaces():
    """Names of the hyperspaces, the registered ones too."""
    return list(SUPERSPACES)
