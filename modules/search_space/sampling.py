"""Random members of a space, mutation and crossover. Randomness is a random.Random that is passed in."""
from .encoding import Subnet, Supernet, parse_block_id, parse_supernet
from .macro_arch import ENDS
from .superspace import get_superspace


def _sample_block(block_type, widths, rng):
    return rng.choice(block_type.kernels), rng.choice(widths), rng.choice(block_type.expands)


def _sample_blocks(block_type, widths, depth, rng, align=False):
    if align:
        return [_sample_block(block_type, widths, rng)] * depth
    return [_sample_block(block_type, widths, rng) for _ in range(depth)]


def sample_subnet(supernet, rng, align=False):
    """Uniform over each choice; `align`: all blocks of a stage share the first one's k, w, e."""
    supernet = parse_supernet(supernet)
    stages = []
    for name in supernet.superspace.depth_stages:
        depth = rng.choice(supernet.superspace.stage(name).depths)
        stages.append(_sample_blocks(supernet.block_type(name), supernet.widths(name), depth, rng, align))
    return Subnet.from_stages(stages, rng.choice(supernet.superspace.resolutions))


def _extreme_subnet(supernet, pick):
    supernet = parse_supernet(supernet)
    stages = []
    for name in supernet.superspace.depth_stages:
        block_type = supernet.block_type(name)
        block = pick(block_type.kernels), pick(supernet.widths(name)), pick(block_type.expands)
        stages.append([block] * pick(supernet.superspace.stage(name).depths))
    return Subnet.from_stages(stages, pick(supernet.superspace.resolutions))


def _largest(values):
    return values[-1]


def _smallest(values):
    return values[0]


def max_subnet(supernet):
    """The largest subnet: every choice at its largest."""
    return _extreme_subnet(supernet, _largest)


def min_subnet(supernet):
    """The smallest subnet: every choice at its smallest."""
    return _extreme_subnet(supernet, _smallest)


def mutate_subnet(supernet, subnet, rng, arch_mutate_prob=0.1, resolution_mutate_prob=0.1, align=False):
    """Each depth, k, w, e redrawn with arch_mutate_prob, the resolution with resolution_mutate_prob.

    New blocks of a deepened stage are drawn at random; with `align` they are the stage's (mutated) first block.
    """
    supernet = parse_supernet(supernet)

    def redraw(value, choices, probability=arch_mutate_prob):
        return rng.choice(choices) if rng.random() < probability else value

    stages = []
    for name, blocks in subnet.stages().items():
        block_type, widths = supernet.block_type(name), supernet.widths(name)
        depth = redraw(len(blocks), supernet.superspace.stage(name).depths)
        mutated = [(redraw(k, block_type.kernels), redraw(w, widths), redraw(e, block_type.expands))
                   for k, w, e in blocks[:1 if align else depth]]
        if align:
            mutated *= depth
        else:
            mutated += _sample_blocks(block_type, widths, depth - len(mutated), rng)
        stages.append(mutated)
    return Subnet.from_stages(stages, redraw(subnet.resolution, supernet.superspace.resolutions,
                                             resolution_mutate_prob))


def crossover_subnets(first, second, rng, align=False):
    """Depth, each block's k, w, e and the resolution from one of the two parents of one supernet."""
    stages = []
    for a, b in zip(first.stages().values(), second.stages().values()):
        depth = len(rng.choice((a, b)))
        longer = a if len(a) >= len(b) else b
        blocks = [tuple(rng.choice(pair) for pair in zip(x, y)) for x, y in zip(a, b)]
        blocks += longer[len(blocks):]
        stages.append([blocks[0]] * depth if align else blocks[:depth])
    return Subnet.from_stages(stages, rng.choice((first.resolution, second.resolution)))


def sample_sub_stage(superspace, block_id, rng, hw_list=None, width_list=None):
    """A random row of a block LUT: ([(k, w, e), …], cin, resolution).

    Depth, then k, w (from `width_list`, the block id's width window, or the whole list) and e per block; the
    input width from the previous stage's whole list; the image resolution (pixels) from `hw_list`, default
    the space's.
    """
    space = get_superspace(superspace)
    block_id = parse_block_id(space, block_id)
    stage, block_type = space.stage(block_id.stage), space.block_type(*block_id[:2])
    widths = width_list or (stage.widths if block_id.window is None else stage.window_widths(block_id.window))
    blocks = _sample_blocks(block_type, widths, rng.choice(stage.depths), rng)
    return blocks, rng.choice(space.input_widths(block_id.stage)), rng.choice(hw_list or space.kd_resolutions)


def sample_end(superspace, end, rng):
    """Random blocks of the stem or the head, {stage: [(k, w, e), …]}, and an input width (macro_arch.ENDS)."""
    space, blocks = get_superspace(superspace), {}
    for name in ENDS[end]:
        stage = space.stage(name)
        blocks[name] = _sample_blocks(space.block_type(name), stage.widths, rng.choice(stage.depths), rng)
    return blocks, rng.choice(space.input_widths(ENDS[end][0]))


def sample_supernet(superspace, rng):
    """A random space: block type and width window of each searchable stage."""
    space = get_superspace(superspace)
    return Supernet(space, tuple(rng.randrange(len(space.block_types)) for _ in space.searchable_stages),
                    tuple(rng.randrange(space.stage(name).num_windows) for name in space.searchable_stages))


def _change_one(values, counts, rng):
    changeable = [i for i, count in enumerate(counts) if count > 1]
    if not changeable:
        return values
    i = rng.choice(changeable)
    return values[:i] + (rng.choice([v for v in range(counts[i]) if v != values[i]]),) + values[i + 1:]


def mutate_block_type(supernet, rng):
    """The same space with the block type of one stage changed."""
    counts = [len(supernet.superspace.block_types)] * len(supernet.superspace.searchable_stages)
    return Supernet(supernet.superspace, _change_one(supernet.block_types, counts, rng), supernet.windows)


def mutate_window(supernet, rng):
    """The same space with the width window of one stage changed (unchanged where no stage has a second)."""
    counts = [supernet.superspace.stage(name).num_windows for name in supernet.superspace.searchable_stages]
    return Supernet(supernet.superspace, supernet.block_types, _change_one(supernet.windows, counts, rng))
