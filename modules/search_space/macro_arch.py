"""Stage tables: which stages a network has, and the strides, widths and depths each one offers.

Widths are channels. Only stages 1..6 are searched by the space search; the others are the same in every
supernet of a hyperspace. Source: the SpaceEvo macro architecture (ICCV 2023), and DEMO of our own.
"""
from dataclasses import dataclass

SEARCHABLE_STAGES = ('stage1', 'stage2', 'stage3', 'stage4', 'stage5', 'stage6')
DEPTH_STAGES = ('first_conv', 'stage0') + SEARCHABLE_STAGES     # the stages a subnet encoding speaks of
HEAD_STAGES = ('final_expand', 'feature_mix', 'logits')
ENDS = {'stem': ('first_conv', 'stage0'), 'head': HEAD_STAGES}  # stages that no search chooses, as block KD trains them
IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class Stage:
    """One row of a stage table.

    stride is the stride of the stage's first block (the others have stride 1); window is the number of
    neighbouring widths a supernet may use at once, None for all of them.
    """
    name: str
    stride: int
    widths: tuple
    depths: tuple = (1,)
    window: int | None = None

    @property
    def num_windows(self):
        return 1 if self.window is None else len(self.widths) - self.window + 1

    def window_widths(self, index):
        """Widths of width window `index`: widths[index : index + window]."""
        if not 0 <= index < self.num_windows:
            raise ValueError(f'{self.name}: width window {index} is not one of 0..{self.num_windows - 1}')
        return self.widths if self.window is None else self.widths[index:index + self.window]


def span(first, last, step=1):
    """first, first+step, … last, both ends included."""
    return tuple(range(first, last + 1, step))


def stage_table(first_conv, stage0, searchable, stage0_depths=(1, 2), head=(1280, 1920, 1000)):
    """Stages from first_conv to logits, with the teacher's strides.

    first_conv, stage0: widths; searchable: one to six rows (widths, depths, window) of stage1, stage2, …, window left
    out or None for all widths; head: widths of final_expand, feature_mix and logits (the classes).
    """
    strides = (2, 2, 2, 1, 2, 1)
    rows = [Stage('first_conv', 2, first_conv), Stage('stage0', 1, stage0, stage0_depths)]
    rows += [Stage(name, stride, *row) for name, stride, row in zip(SEARCHABLE_STAGES, strides, searchable)]
    return tuple(rows + [Stage(name, 1, (width,)) for name, width in zip(HEAD_STAGES, head)])


MOBILE_W = stage_table(span(16, 32, 8), span(16, 32, 8), [
    (span(24, 40, 8), span(2, 4), 2),
    (span(24, 72, 8), span(2, 4), 2),
    (span(56, 112, 8), span(2, 6), 3),
    (span(112, 176, 8), span(2, 8), 3),
    ((192, 200, 208, 216, 224, 240, 256, 272, 288), span(2, 8), 5),
    (span(216, 360, 16), span(1, 2), 7),
])

ONNX_W = stage_table((16, 32), (16, 32), [
    (span(32, 64, 16), span(2, 4), 2),
    (span(32, 96, 16), span(2, 4), 2),
    (span(64, 144, 16), span(2, 6), 3),
    (span(112, 192, 16), span(2, 6), 3),
    (span(192, 304, 16), span(2, 6), 5),
    (span(304, 448, 16), span(1, 2), 7),
])

_MOBILE_WIDTHS = (span(24, 32, 8), span(40, 56, 8), span(80, 104, 8), span(96, 128, 8),
                  span(192, 256, 16), span(320, 416, 16))


def _mobile(depths):
    return stage_table(span(32, 40, 8), span(16, 24, 8), list(zip(_MOBILE_WIDTHS, depths)), stage0_depths=(1,))


MOBILE_ORIGINAL = _mobile([span(2, 4)] * 6)
MOBILE_V1 = _mobile([span(2, 4)] * 3 + [span(2, 6)] * 2 + [span(1, 2)])

ONNX = stage_table((16, 32), (16, 32), [
    ((32, 48), span(2, 3)),
    ((48, 64), span(2, 4)),
    (span(80, 128, 16), span(2, 6)),
    ((128, 144), span(2, 6)),
    (span(192, 256, 16), span(2, 6)),
    (span(320, 432, 16), span(1, 2)),
])

# half as many stages, for small pictures; few wide blocks, since INT8 gains where a convolution is wide
DEMO = stage_table((24,), (24,), [
    ((32, 48, 64), (1, 2), 2),
    ((64, 80, 96), (1, 2), 2),
    ((128, 160, 192), (1, 2), 2),
], stage0_depths=(1,), head=(320, 512, 10))

# between DEMO and the published ones: pictures of 128 to 192 pixels on one machine without a GPU
SMALL = stage_table((16,), (16,), [
    ((24, 32, 40), (1, 2), 2),
    ((32, 48, 64), span(1, 3), 2),
    ((64, 80, 96), span(1, 3), 2),
    ((96, 112, 128), span(1, 3), 2),
    ((160, 192, 224), span(1, 3), 2),
], stage0_depths=(1,), head=(640, 1024, 1000))
