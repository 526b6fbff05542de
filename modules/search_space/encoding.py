"""Supernet, block, sub-stage and subnet strings, both ways, validated.

    supernet      onnxw-151122-023231      block type and width window of stages 1..6
    block id      stage3_1                 stage 3 with block type 1 (block KD)
    LUT id        stage3_1_2               the same with width window 2
    sub-stage     5#32#8_3#40#3            kernel # width # expand ratio, one per block; e is None without one
    subnet        d…_k…_w…_e…_r…           depths of the 8 stages; k, w, e of every block; input resolution

Every parser raises EncodingError with one line that names the text, the stage, the value and what is allowed.
"""
import re
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import NamedTuple

from ..cli import note
from .block import Block, out_size
from .macro_arch import DEPTH_STAGES, IMAGE_CHANNELS
from .superspace import SUPERSPACES, SearchSpaceError, Superspace, get_superspace


class EncodingError(SearchSpaceError):
    """An encoding is malformed or not a member of its space."""


_NUMBER = r'0|[1-9][0-9]{0,5}'           # as it is printed: no leading zeros


def _as_text(value):
    """A string to parse; EncodingError for anything else."""
    if not isinstance(value, str):
        raise EncodingError(f'{value!r}: an encoding is a string, not {type(value).__name__}')
    return value


def _allowed(values):
    return ' '.join(str(value) for value in values)


def _check(condition, text, message):
    if not condition:
        raise EncodingError(f'{text}: {message}')


def _member(where, kind, value, allowed):
    """The one of `allowed` that equals the value, so as it is declared; EncodingError where none does."""
    _check(value in allowed, where, f'{kind} {value} is not one of {_allowed(allowed)}')
    return allowed[allowed.index(value)]


@dataclass(frozen=True)
class Supernet:
    """A member of a hyperspace: one block type and one width window for each of stages 1..6."""
    superspace: Superspace
    block_types: tuple
    windows: tuple

    def __post_init__(self):
        space = self.superspace
        for kind, values in (('block types', self.block_types), ('width windows', self.windows)):
            _check_count(space, kind, values, space.name)
        for name, block_type, window in zip(space.searchable_stages, self.block_types, self.windows):
            for kind, value, count in (('block type', block_type, len(space.block_types)),
                                       ('width window', window, space.stage(name).num_windows)):
                _check(value in range(count), f'{space.name} {name}',
                       f'{kind} {value} is not one of {_allowed(range(count))}')

    def __str__(self):
        return f'{self.superspace.name}-{self.choice.replace("_", "-")}'

    @property
    def choice(self):
        """The choice part, `151122_023231`."""
        return ''.join(map(str, self.block_types)) + '_' + ''.join(map(str, self.windows))

    @cached_property
    def choices(self):
        """{stage name: (Stage, BlockType, widths)} of every stage, in order."""
        stages = self.superspace.searchable_stages
        digits, windows = (dict(zip(stages, values)) for values in (self.block_types, self.windows))
        return {stage.name: (stage, self.superspace.block_type(stage.name, digits.get(stage.name)),
                             stage.window_widths(windows[stage.name]) if stage.name in windows else stage.widths)
                for stage in self.superspace.stages}

    def block_type(self, stage):
        """BlockType of a stage by name."""
        return self.choices[stage][1]

    def widths(self, stage):
        """Widths (channels) the stage may use: its width window, or all of an unsearched stage's."""
        return self.choices[stage][2]


def _check_count(space, kind, values, text):
    stages = space.searchable_stages
    _check(len(values) == len(stages), text,
           f'{len(values)} {kind}, expected {len(stages)}, one each for {stages[0]}..{stages[-1]}')


def _digits(space, kind, text):
    """One digit per searchable stage; EncodingError naming the stage of a character that is none."""
    _check_count(space, kind, text, repr(text))
    for name, character in zip(space.searchable_stages, text):
        _check(character in '0123456789', name, f'{character!r} in {text!r} is not a digit ({kind})')
    return tuple(map(int, text))


def parse_supernet(text, superspace=None):
    """Supernet from `onnxw-151122-023231`, or from its choice part alone when `superspace` is given.

    The choice may be joined by - or _; without a width part every window is 0.
    """
    if isinstance(text, Supernet):
        _check(superspace is None or text.superspace == get_superspace(superspace), text,
               f'a supernet of {text.superspace.name}, not of {getattr(superspace, "name", superspace)}')
        return text
    text = _as_text(text)
    if superspace is None and re.match('[0-9]', text):
        raise EncodingError(f'{text!r}: the superspace is missing; expected such as onnxw-111111-000000')
    if superspace is None or text.partition('-')[0] in SUPERSPACES:
        name, _, choice = text.partition('-')
        try:
            space = get_superspace(name)
        except SearchSpaceError as error:
            raise EncodingError(f'{text}: {error}') from None
        _check(superspace is None or space == get_superspace(superspace), text,
               f'a supernet of {space.name}, not of {getattr(superspace, "name", superspace)}')
    else:
        space, choice = get_superspace(superspace), text
    parts = re.split('[-_]', choice)
    _check(len(parts) <= 2, f'{text!r}', f'{len(parts)} parts, expected block types and width windows')
    types, windows = parts[0], parts[1] if len(parts) == 2 else '0' * len(space.searchable_stages)
    try:
        return Supernet(space, _digits(space, 'block types', types), _digits(space, 'width windows', windows))
    except EncodingError as error:
        raise EncodingError(f'{text!r}: {error}') from None


class BlockId(NamedTuple):
    """Stage name, block type digit and, for a block LUT, the width window (None: the whole width list)."""
    stage: str
    block_type: int
    window: int | None = None

    def __str__(self):
        return '_'.join(str(part) for part in self if part is not None)


def parse_block_id(superspace, text):
    """BlockId from `stage3_1` or `stage3_1_2`, checked against the hyperspace."""
    return _parse_block_id(get_superspace(superspace).name, text if isinstance(text, BlockId) else _as_text(text))


@cache
def _parse_block_id(superspace, text):
    space = get_superspace(superspace)
    text = str(text)
    match = re.fullmatch(rf'(stage[1-6])_({_NUMBER})(?:_({_NUMBER}))?', text)
    _check(match, f'{text!r}',
           'not a block id: expected stage1_0 .. stage6_0 (stage_type) or stage1_0_0 (stage_type_window)')
    digit, window = int(match[2]), None if match[3] is None else int(match[3])
    _check(digit < len(space.block_types), text,
           f'{space.name} {match[1]}: block type {digit} is not one of {_allowed(range(len(space.block_types)))}')
    count = space.stage(match[1]).num_windows
    _check(window is None or window < count, text,
           f'{space.name} {match[1]}: width window {window} is not one of {_allowed(range(count))}')
    return BlockId(match[1], digit, window)


def format_sub_stage(blocks):
    """`5#32#8_3#40#3` from [(k, w, e), …]."""
    return '_'.join(f'{k}#{w}#{e}' for k, w, e in blocks)


@cache
def _stage_of(superspace, block_id):
    """(Stage, BlockType, input widths) of a BlockId."""
    space = get_superspace(superspace)
    return space.stage(block_id.stage), space.block_type(*block_id[:2]), space.input_widths(block_id.stage)


@cache
def _sub_stage_choices(superspace, block_id):
    """(kernels, widths, expands, depths) of a block id."""
    stage, block_type, _ = _stage_of(superspace, block_id)
    widths = stage.widths if block_id.window is None else stage.window_widths(block_id.window)
    return block_type.kernels, widths, block_type.expands, stage.depths


@lru_cache(maxsize=1 << 16)
def _parse_choice(superspace, block_id, part):
    """(k, w, e) of `5#32#8`, printed as it is declared."""
    kernels, widths, expands, _ = _sub_stage_choices(superspace, block_id)
    match = re.fullmatch(rf'({_NUMBER})#({_NUMBER})#(None|[0-9.]+)', part)
    _check(match, f'{part!r}', f'not kernel#width#expand: kernels {_allowed(kernels)}, widths {_allowed(widths)}, '
                               f'expand ratios {_allowed(expands)}')
    printed = {str(e): e for e in expands}
    k, w, e = _check_choice(part, (int(match[1]), int(match[2]), match[3]), (kernels, widths, tuple(printed)))
    return k, w, printed[e]


def _check_choice(where, choice, allowed):
    """(k, w, e) as they are declared in `allowed`, the values of each."""
    return tuple(map(_member, [where] * 3, ('kernel', 'width', 'expand ratio'), choice, allowed))


def _check_sub_stage(superspace, block_id, choices, check, show):
    """[check(choice)] of choices, in the right number; EncodingError names the block of show(choices)."""
    checked = []
    for i, choice in enumerate(choices):
        try:
            checked.append(check(choice))
        except EncodingError as error:
            raise EncodingError(f'{show(choices)!r}: {superspace} {block_id} block {i}: {error}') from None
    depths = _sub_stage_choices(superspace, block_id)[-1]
    if len(checked) not in depths:
        raise EncodingError(f'{show(choices)}: {superspace} {block_id}: depth {len(checked)} is not one of '
                            + _allowed(depths))
    return checked


def check_sub_stage(superspace, block_id, choices):
    """[(k, w, e), …] as they are declared (e: 3, 0.5, None), 0 also standing for no expand ratio.

    EncodingError where they are no sub-stage of the BlockId's kernels, widths, expands and depths.
    """
    *allowed, _ = _sub_stage_choices(superspace.name, block_id)
    return _check_sub_stage(superspace.name, block_id, [(k, w, e or None) for k, w, e in choices],
                            lambda choice: _check_choice(choice, choice, allowed), format_sub_stage)


def parse_sub_stage(superspace, block_id, text):
    """[(k, w, e), …] from `5#32#8_3#40#3`, checked against the block id's kernels, widths, expands and depths.

    The expand ratio comes back as it is declared (3, 0.5, None).
    """
    space = get_superspace(superspace)
    block_id = parse_block_id(space, block_id)
    return _check_sub_stage(space.name, block_id, _as_text(text).split('_'),
                            lambda part: _parse_choice(space.name, block_id, part), '_'.join)


@dataclass(frozen=True)
class Subnet:
    """A subnet: depths of first_conv, stage0, stage1..6; k, w, e of their blocks in order; resolution in pixels.

    expands holds None for blocks without an expand ratio.
    """
    depths: tuple
    kernels: tuple
    widths: tuple
    expands: tuple
    resolution: int

    def __str__(self):
        expands = ['0' if e is None else str(float(e)) for e in self.expands]
        parts = [('d', self.depths), ('k', self.kernels), ('w', self.widths), ('e', expands)]
        return '_'.join(key + '#'.join(map(str, values)) for key, values in parts) + f'_r{self.resolution}'

    @classmethod
    def from_stages(cls, stages, resolution):
        """Subnet from [[(k, w, e), …] per stage of DEPTH_STAGES]."""
        blocks = [block for stage in stages for block in stage]
        kernels, widths, expands = zip(*blocks)
        return cls(tuple(map(len, stages)), kernels, widths, expands, resolution)

    def stages(self):
        """{stage name: [(k, w, e), …]} of the stages of the encoding, in order."""
        blocks = iter(zip(self.kernels, self.widths, self.expands))
        return {name: [next(blocks) for _ in range(depth)] for name, depth in zip(DEPTH_STAGES, self.depths)}


_SUBNET = re.compile(rf'd([0-9#]+)_k([0-9#]+)_w([0-9#]+)_e([0-9.#]+)_r({_NUMBER})')


def parse_subnet(text, supernet=None, allow='window'):
    """Subnet from its string; with `supernet` (Supernet or string) it must be a member of it, as check_subnet() says.
    """
    if isinstance(text, Subnet):
        subnet = text
    else:
        match = _SUBNET.fullmatch(_as_text(text))
        _check(match, f'{text!r}', 'not a subnet encoding d…_k…_w…_e…_r… with values joined by #')
        try:
            depths, kernels, widths = (tuple(int(v) for v in part.split('#')) for part in match.groups()[:3])
            expands = tuple(float(v) or None for v in match[4].split('#'))
        except ValueError:
            raise EncodingError(f'{text}: empty or malformed number between #') from None
        subnet = Subnet(depths, kernels, widths, expands, int(match[5]))
        _check(str(subnet) == text, text, f'not as it would be printed: {subnet}')
    stages = DEPTH_STAGES if supernet is None else parse_supernet(supernet).superspace.depth_stages
    _check(len(subnet.depths) == len(stages) or supernet is None and len(subnet.depths) < len(stages), text,
           f'd: {len(subnet.depths)} depths, expected {len(stages)}: {_allowed(stages)}')
    for key, values in (('k', subnet.kernels), ('w', subnet.widths), ('e', subnet.expands)):
        _check(len(values) == sum(subnet.depths), text,
               f'{key}: {len(values)} values, expected one per block: {sum(subnet.depths)}')
    return subnet if supernet is None else check_subnet(subnet, supernet, allow)


@cache
def _warn(line):
    note(line)


def _taken_widths(stage, window, allow):
    """Widths of a stage that a subnet may have: its window's, those that the weights hold, or all of the stage's."""
    return {'window': window, 'weights': [w for w in stage.widths if w <= max(window)], 'stage': stage.widths}[allow]


def check_subnet(subnet, supernet, allow='window'):
    """The subnet, its expand ratios as they are declared; EncodingError where it is not in the supernet.

    allow: widths of the `window`; or, with a warning for one outside, which the original did not check, `weights`
    (those up to the window's largest, whose channels the supernet's weights hold) or `stage` (all of the stage's).
    """
    supernet = parse_supernet(supernet)
    space, expands = supernet.superspace, []

    def check(where, key, value, allowed):
        if value not in allowed:
            shown = _allowed(0 if v is None else v for v in allowed)
            raise EncodingError(f'{supernet} {where}: {key} {value or 0} is not one of {shown} (subnet {subnet})')

    for name, blocks in subnet.stages().items():
        stage, block_type, window = supernet.choices[name]
        check(name, 'depth', len(blocks), stage.depths)
        for i, (k, w, e) in enumerate(blocks):
            if k not in block_type.kernels or w not in window or e not in block_type.expands:
                check(f'{name} block {i}', 'kernel', k, block_type.kernels)
                if w not in _taken_widths(stage, window, allow):
                    check(f'{name} block {i}', 'width', w, window)
                check(f'{name} block {i}', 'expand ratio', e, block_type.expands)
                if w not in window:
                    _warn(f'{supernet} {name} block {i}: width {w} is outside its window {_allowed(window)}: taken, as '
                          'the original does')
            expands.append(block_type.expands[block_type.expands.index(e)])
    check('input', 'resolution', subnet.resolution, space.resolutions)
    return Subnet(subnet.depths, subnet.kernels, subnet.widths, tuple(expands), subnet.resolution)


class SubnetConfig(NamedTuple):
    """A concrete network: input resolution (pixels) and its Blocks from first_conv to logits, {stage name: [Block, …]}.
    """
    resolution: int
    stages: dict

    @property
    def blocks(self):
        """All its Blocks, in order."""
        return tuple(block for blocks in self.stages.values() for block in blocks)


def stage_blocks(stage, block_type, choices, cin, hw):
    """Blocks of one stage whose input has `cin` channels and `hw` pixels; choices [(k, w, e), …]."""
    if block_type.name == 'LogitsBlock':                # as block tables write the linear layer
        return [Block(block_type.name, 1, cin, w, k, e, 0, block_type.activation) for k, w, e in choices]
    blocks = []
    for i, (k, w, e) in enumerate(choices):
        stride = stage.stride if i == 0 else 1
        blocks.append(Block(block_type.name, hw, cin, w, k, e, stride, block_type.activation))
        cin, hw = w, out_size(hw, stride)
    return blocks


def sub_stage_blocks(superspace, block_id, sub_stage, input_shape):
    """Blocks of a sub-stage string; input_shape is (N, C, H, W) of the stage's input, H = W.

    Raises EncodingError where the sub-stage or its input channels are not in the space.
    """
    space = get_superspace(superspace)
    block_id = parse_block_id(space, block_id)
    choices = parse_sub_stage(space, block_id, sub_stage)
    shape = tuple(input_shape or ())
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] < 1:
        raise EncodingError(f'{block_id}: input shape {input_shape} is not (N, C, H, W) with H = W')
    stage, block_type, _ = _stage_of(space.name, block_id)
    return stage_blocks(stage, block_type, choices, check_input_width(space, block_id, shape[1]), shape[2])


def check_input_width(superspace, block_id, cin):
    """The input width of a BlockId's stage; EncodingError where it is none of the previous stage's."""
    widths = _stage_of(superspace.name, block_id)[-1]
    if cin not in widths:
        raise EncodingError(f'{superspace.name} {block_id}: input width {cin} is not one of {_allowed(widths)}')
    return cin


def subnet_config(supernet, subnet, num_classes=None):
    """SubnetConfig of a subnet (Subnet or string) of a supernet (Supernet or string), stem and head included.

    num_classes: outputs of the last layer where they differ from the stage table's.
    """
    supernet = parse_supernet(supernet)
    subnet = parse_subnet(subnet, supernet, 'stage')
    chosen, stages, cin, hw = subnet.stages(), {}, IMAGE_CHANNELS, subnet.resolution
    for stage, block_type, _ in supernet.choices.values():
        choices = chosen.get(stage.name) or [(block_type.kernels[0], stage.widths[0], block_type.expands[0])]
        blocks = stages[stage.name] = stage_blocks(stage, block_type, choices, cin, hw)
        cin, hw = blocks[-1].cout, out_size(hw, stage.stride)
    if num_classes:
        blocks[-1] = blocks[-1]._replace(cout=num_classes)
    return SubnetConfig(subnet.resolution, stages)
