"""Which blocks and networks are measured for a platform: spread over regions, and more where errors are large."""
import dataclasses
import random

import numpy as np

from ..search_space.block import out_size
from ..search_space.encoding import stage_blocks, subnet_config
from ..search_space.named import find_subnet, named_subnets
from ..search_space.sampling import min_subnet, sample_subnet, sample_supernet
from ..search_space.superspace import get_superspace

FEW = 10                    # a region of fewer blocks (stem, head) is fitted to all of them
TRUSTED = 4                 # a region's error counts fully beside that of all regions from this many blocks on


def space_blocks(*superspaces):
    """[Block] that networks of the hyperspaces can have, each once, at every resolution, stem and head included."""
    blocks = {}
    spaces = map(get_superspace, superspaces)
    for space, stage in ((s, stage) for s in spaces for stage in s.stages):
        types = [space.fixed[stage.name]] if stage.name in space.fixed else space.block_types
        for resolution in space.resolutions:
            hw = out_size(resolution, space.input_stride(stage.name))
            places = [(stage, hw, space.input_widths(stage.name))]
            if max(stage.depths) > 1:           # any but the first
                places.append((dataclasses.replace(stage, stride=1), out_size(hw, stage.stride), stage.widths))
            for place, pixels, inputs in places:
                blocks.update((block, None) for t in types for cin in inputs for w in stage.widths
                              for k in t.kernels for e in t.expands
                              for block in stage_blocks(place, t, [(k, w, e)], cin, pixels))
    return list(blocks)


def region(block):
    """What blocks of similar latency share: type, activation, kernel size and the size of the map, in octaves."""
    return block.name, block.activation, block.kernel, round(np.log2(out_size(block.hw, block.stride or 1)))


def named_networks(superspaces):
    """{name: Blocks} of the published networks of the hyperspaces."""
    found = {name: find_subnet(name) for name in named_subnets()}
    return {name: subnet_config(supernet, subnet).blocks for name, (supernet, subnet) in found.items()
            if supernet.superspace.name in superspaces}


def random_network(superspace, rng):
    """Blocks of a random subnet of a random supernet."""
    supernet = sample_supernet(superspace, rng)
    return subnet_config(supernet, sample_subnet(supernet, rng)).blocks


def smallest_network(superspace):
    """Blocks of the smallest subnet of the first supernet."""
    supernet = f'{superspace}-{"0" * len(get_superspace(superspace).searchable_stages)}'
    return subnet_config(supernet, min_subnet(supernet)).blocks


class Candidates:
    """Blocks of hyperspaces by region, handed out at random, each once; rng: random.Random.

    weights: {region: chance of a draw to fall into it}, equal at first.
    """

    def __init__(self, superspaces, rng):
        self.rng, self.by_region = rng, {}
        for block in space_blocks(*superspaces):
            self.by_region.setdefault(region(block), []).append(block)
        for blocks in self.by_region.values():
            rng.shuffle(blocks)
        self.weights = dict.fromkeys(self.by_region, 1.0)
        self.large = {name for name, blocks in self.by_region.items() if len(blocks) >= FEW}
        self.small_drawn = []           # of small regions: there is no other block to tell what they take

    def draw(self, count, held_out=False):
        """`count` Blocks (fewer where none is left) by the weights; held_out: by equal ones, none of a small region."""
        drawn = []
        for _ in range(count):
            names = [name for name, blocks in self.by_region.items() if blocks and (name in self.large or not held_out)]
            if not names:
                break
            weights = None if held_out else [self.weights[name] for name in names]
            name = self.rng.choices(names, weights)[0]
            drawn.append(self.by_region[name].pop())
            if name not in self.large:
                self.small_drawn.append(drawn[-1])
        return drawn

    def aim(self, blocks, errors):
        """Set the weights to the regions' errors (rms): errors of predictions of Blocks, relative.

        A region of few blocks is taken to be partly as wrong as all together.
        """
        squares, mean = {}, float(np.mean(np.square(errors)))
        for block, error in zip(blocks, errors):
            squares.setdefault(region(block), []).append(error ** 2)
        self.weights = {name: ((sum(squares.get(name, ())) + TRUSTED * mean)
                               / (len(squares.get(name, ())) + TRUSTED)) ** 0.5 for name in self.by_region}


def make_candidates(superspaces, seed):
    """(Candidates, random.Random for networks), apart, so that neither depends on how many of the other were drawn."""
    return Candidates(superspaces, random.Random(f'{seed} blocks')), random.Random(f'{seed} networks')
