"""The steps of a pipeline: which scripts run, with which flags. Later commands depend on what earlier steps found."""
import csv
import os
import random
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..files import write_text
from ..history import read_history
from ..latency import LatencyPredictor
from ..latency.predictor import MFLOPS
from ..latency.validation import check_name
from ..search_space.encoding import parse_subnet, parse_supernet, subnet_config
from ..search_space.named import folder_name
from ..search_space.sampling import max_subnet, min_subnet, sample_subnet, sample_supernet
from ..search_space.superspace import get_superspace
from ..training.sources import plain_name
from .settings import Settings

DRAWN = 300                             # random subnets of random spaces, to choose the latency window by
FOUND, FLOPS, LARGEST, SMALLEST = 'found by INT8 latency', 'found by FLOPs', 'largest subnet', 'smallest subnet'
BY_HAND = 'best of a space by hand'
DISTRIBUTED = ('lsq_finetune_teacher.py', 'train_block_kd.py', 'lsq_block_kd.py', 'eval_block_kd.py',
               'train_supernet.py', 'search_subnet.py', 'downstream_cls.py')


class Unknown(str):
    """What a dry run prints for a result that is not there yet, in commands and folder names."""
    choice = property(str)

    def __format__(self, spec):
        return str(self)


class Deployed(NamedTuple):
    """A subnet that is finished, deployed and measured; what: what it is to a reader."""
    what: str
    supernet: object
    subnet: object

    @property
    def entry(self):
        """Its line of input.csv."""
        return f'{self.supernet.superspace.name},{self.supernet.choice},{self.subnet}'

    @property
    def name(self):
        """Of its folders and files."""
        if isinstance(self.subnet, Unknown):
            return f'{self.supernet}_{self.subnet}'
        return folder_name(str(self.subnet), self.supernet, self.subnet)


class Pipeline:
    """One pipeline in `folder`, and what it chooses from the results of its steps.

    data: data.PipelineData. reduce_range: INT8 models with weights of 7 bits, fine-tuned so. plugins: paths for
    --plugin of each script. dry: results that are not there yet are Unknown, instead of an error.
    """

    def __init__(self, folder, data, settings=None, reduce_range=False, dry=False, plugins=()):
        self.folder, self.data, self.dry = folder, data, dry
        self.plugins = [word for path in plugins or () for word in ('--plugin', path)]
        self.settings = settings = (settings or Settings()).of(data.dataset)
        self.measured, self.platform = not settings.platform, settings.platform or settings.measured_name
        self.space = settings.superspace
        self.image_size = max(get_superspace(self.space).resolutions)
        self.narrow = ['--reduce_range'] * reduce_range
        self.narrow_training = ['--weight_bits', 7] if reduce_range else []
        self.align = ['--align_sample'] * settings.align_sample

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def check(self):
        """UserError for a platform that does not predict the space's blocks, or a name that is another's."""
        if self.measured:
            ours = self.platform == Settings().measured_name or os.path.isdir(self.path('predictor', self.platform))
            check_name(self.platform, force=ours)
        elif not self.window[0] > 0:            # predicts subnets of all sorts, which may fail
            raise UserError(f'{self.platform}: predicts {self.window[0]} ms for networks of {self.space}')

    def known(self, what, find):
        """find(), the result of an earlier step; in a dry run before it Unknown(what)."""
        if not self.dry:
            return find()
        try:
            return find()
        except (UserError, OSError):
            return Unknown(what)

    @cached_property
    def predictor(self):
        return LatencyPredictor(self.platform)

    def predict(self, supernet, subnet):
        """Predicted INT8 latency in ms."""
        return self.predictor.predict_subnet(subnet_config(supernet, subnet))

    @cached_property
    def drawn(self):
        """[(ms, MFLOPs)] of random subnets of random spaces, the same for every seed."""
        rng, mflops, drawn = random.Random('window'), LatencyPredictor(MFLOPS), []
        for _ in range(DRAWN):
            supernet = sample_supernet(self.space, rng)
            subnet = sample_subnet(supernet, rng, self.settings.align_sample)
            drawn.append((self.predict(supernet, subnet), mflops.predict_subnet(subnet_config(supernet, subnet))))
        return drawn

    @cached_property
    def window(self):
        """(c, d) in ms: subnets of c - d to c are searched for. UserError where no random subnet is there."""
        c = self.settings.latency
        width = self.settings.latency_width
        if self.dry and c and not os.path.isdir(os.path.join('data', 'latency', self.platform)):
            return c, float(f'{width * c:.2g}')
        latencies = self.known('LATENCY', lambda: [ms for ms, _ in self.drawn])
        if isinstance(latencies, Unknown):
            return latencies, Unknown('DELTA')
        if not c:
            c = float(f'{np.quantile(latencies, self.settings.latency_quantile):.3g}')
        if not any(c - width * c <= ms <= c for ms in latencies):
            raise UserError(f'--latency {c:g}: random networks of {self.space} take {min(latencies):.2g} to '
                            f'{max(latencies):.2g} ms on {self.platform}')
        return c, float(f'{width * c:.2g}')

    @property
    def budget(self):
        """MFLOPs that one would search by without a predictor: as many random subnets have less as take less than c."""
        def find():
            share = np.mean([ms <= self.window[0] for ms, _ in self.drawn])
            return float(f'{np.quantile([mflops for _, mflops in self.drawn], share):.3g}')
        return Unknown('MFLOPS') if isinstance(self.window[0], Unknown) else self.known('MFLOPS', find)

    def search_folder(self, constraint):
        s = self.settings
        return self.path('block_kd', 'search', self.space,
                         f'c{constraint:g}_t{s.latency_loss_t:g}_a{s.latency_loss_a:g}')

    def _first(self, constraint):
        """The Supernet that a space search put first, of those with subnets on both sides of the window's middle."""
        c, d = self.window
        path = os.path.join(self.search_folder(constraint), 'top50.csv')
        with open(path, encoding='utf-8', newline='') as f:
            for space in (parse_supernet(row['supernet']) for row in csv.DictReader(f)):
                if self.predict(space, min_subnet(space)) < c - d / 2 < self.predict(space, max_subnet(space)):
                    return space
        raise UserError(f'{path}: no space with subnets of {c - d:.3g} to {c:.3g} ms')

    @property
    def found_space(self):
        """By the INT8 latency of the device."""
        return self.known('FOUND_SPACE', lambda: self._first(self.window[0]))

    @property
    def flops_space(self):
        """By FLOPs; may be the same. Without compare_flops it is."""
        if not self.settings.compare_flops:
            return self.found_space
        return self.known('FLOPS_SPACE', lambda: self._first(self.budget))

    @property
    def hand_space(self):
        """Of the spaces with the block types that one would take by hand, compare_types, the one of the best score by
        latency; without any the one found."""
        def find():
            folder = self.search_folder(self.window[0])
            scores = {row['encoding']: float(row['score']) for row in read_history(folder)[1]
                      if row['encoding'].startswith(f'{self.space}-{self.settings.compare_types}-')}
            if not scores:
                raise UserError(f'{folder}: no space of the types {self.settings.compare_types}')
            return parse_supernet(max(scores, key=scores.get))
        return self.known('HAND_SPACE', find) if self.settings.compare_types else self.found_space

    @property
    def spaces(self):
        """The Supernets that are trained and searched, the one found first."""
        return list(dict.fromkeys([self.found_space, self.flops_space, self.hand_space]))

    def results(self, supernet):
        """Folder of a subnet search."""
        return self.path('search_subnet', f'{supernet}-align{int(self.settings.align_sample)}')

    def best_subnet(self, supernet):
        """Subnet that a subnet search put first; UserError where there is none of the window."""
        c, d = self.window
        with open(os.path.join(self.results(supernet), f'best_c{c:g}_d{d:g}.csv'), encoding='utf-8', newline='') as f:
            return parse_subnet(next(csv.DictReader(f))['subnet'], supernet)

    def deployed(self):
        """[Deployed], what was found first, each network once."""
        found, others = self.found_space, ((FLOPS, self.flops_space), (BY_HAND, self.hand_space))
        networks = [(FOUND, found, self.known('FOUND_SUBNET', lambda: self.best_subnet(found))),
                    *((what, space, self.known(f'{space}_SUBNET', lambda space=space: self.best_subnet(space)))
                      for what, space in others if space != found),
                    (LARGEST, found, self.known('max', lambda: max_subnet(found))),
                    (SMALLEST, found, self.known('min', lambda: min_subnet(found)))]
        return list({network[1:]: Deployed(*network) for network in reversed(networks)}.values())[::-1]

    def finished(self, network):
        """The file of a Deployed after fine-tuning."""
        return self.path('finished', network.name, plain_name(self.data.dataset), 'lsq.pth')

    def accuracy_file(self, network):
        return self.path('accuracy', f'{network.name}.csv')

    # commands

    def script(self, name, step, *connections, without=()):
        """A command: a script with the flags that connect it to the other steps, then those of the settings."""
        own = self.settings.flags(step, *without)
        command = [name, *self.plugins, *connections, *own]
        if self.settings.nproc_per_node and name in DISTRIBUTED:
            command = ['-m', 'torch.distributed.run', '--nproc_per_node', self.settings.nproc_per_node, *command]
        return command

    def length(self, step, epochs='--num_epochs', part=None):
        """Flags of `train_steps` steps of a batch, of `part` where the section has them part by part, in several epochs
        where the pictures are few; none where the section says epochs itself."""
        steps = self.settings.steps.get(step, {}).get('train_steps')
        if isinstance(steps, dict):
            if part not in steps:
                raise UserError(f'steps: {step}: train_steps: none for {part}' if part else
                                f'steps: {step}: train_steps: expected one number')
            steps = steps[part]
        if steps is None:
            return []
        epoch = max(1, self.data.images // self.settings.batch_size)
        return [epochs, max(1, round(steps / epoch)), '--max_steps', min(steps, epoch)]

    @property
    def teacher_checkpoint(self):
        return self.path('block_kd', 'teacher_checkpoint', self.settings.teacher_arch.replace('-', '_'),
                         'checkpoint.pth')


class Step(NamedTuple):
    """A step; commands(pipeline): [[script, argument, …], …], or with side_by_side [commands, …] of which each goes its
    own way. A step that the settings do not name is left out."""
    name: str
    title: str
    commands: callable
    side_by_side: bool = False


def teacher(p):
    _ = p.window                            # a latency that no network has ends here, not after hours of block KD
    return [p.script('lsq_finetune_teacher.py', 'teacher', '--teacher_arch', p.settings.teacher_arch, '--output_path',
                     p.path('block_kd', 'teacher_checkpoint'), '--image_size', p.image_size, '--seed',
                     p.settings.seed, '--resume', *p.data.flags)]


def block_kd(p):
    parts = [*get_superspace(p.space).searchable_stages, 'stem']
    steps = p.settings.steps['block_kd'].get('train_steps')
    by_part = isinstance(steps, dict)
    if by_part:
        parts.sort(key=lambda part: steps.get(part, 0), reverse=True)
    chains = [parts] if p.settings.nproc_per_node and not by_part else [[part] for part in parts]

    def train(script, step, chain, *more):
        return p.script(script, step, '--superspace', p.space, '--teacher_arch', p.settings.teacher_arch,
                        '--output_path', p.path('block_kd', p.space), '--inplace_distill_from_teacher', '--resume',
                        '--train_batch_size', p.settings.batch_size, *p.length(step, part=chain[0]), '--seed',
                        p.settings.seed, *more, *p.data.flags, '--stage_list', *chain)

    return [[train('train_block_kd.py', 'block_kd', chain),
             train('lsq_block_kd.py', 'block_kd_lsq', chain, '--teacher_checkpoint_path', p.teacher_checkpoint)]
            for chain in chains]


def predictor(p):
    if not p.measured:
        return []
    return [p.script('onnx_tools/build_predictor.py', 'predictor', '--platform', p.platform, '--superspace', p.space,
                     '--output', p.path('predictor'), '--seed', p.settings.seed, '--resume', '--force', *p.narrow)]


def block_lut(p):
    return [p.script('eval_block_kd.py', 'block_lut', '--superspace', p.space, '--platform', p.platform,
                     '--teacher_arch', p.settings.teacher_arch, '--checkpoint_path', p.path('block_kd'),
                     '--output_path', p.path('block_kd', 'lut'), '--teacher_checkpoint_path', p.teacher_checkpoint,
                     '--seed', p.settings.seed, *p.data.flags)]


def space_search(p):
    s = p.settings
    by_latency, by_flops = (p.platform, p.window[0]), (MFLOPS, p.budget)
    return [p.script('search_block_kd.py', 'space_search', '--superspace', p.space, '--latency_constraint', constraint,
                     '--platform', platform, '--latency_loss_t', s.latency_loss_t, '--latency_loss_a',
                     s.latency_loss_a, '--lut_path', p.path('block_kd', 'lut'),
                     '--output_dir', p.path('block_kd', 'search'), '--seed', s.seed, '--resume')
            for platform, constraint in [by_latency, by_flops][:1 + s.compare_flops]]


def _supernet(p, space, step, *more, without=()):
    return p.script('train_supernet.py', step, '--superspace', p.space, '--supernet_choice', space.choice, *p.align,
                    '--output_path', p.path('supernet_training'), '--batch_size_per_gpu', p.settings.batch_size,
                    *p.length(step, '--epochs'), '--seed', p.settings.seed, '--resume', *more, *p.data.flags,
                    without=without)


def supernets(p):
    start = ['--init_block_kd', p.path('block_kd', p.space)] if p.settings.init_block_kd else []
    return [*([_supernet(p, space, 'supernets', *start), _supernet(p, space, 'supernets_lsq', '--quant_mode')]
              for space in p.spaces), *baselines(p)]


def baseline_step(model):
    """Name of the settings' section of a ready-made network."""
    return f'baseline {model}'


def baselines(p, *more):
    return [[p.script('onnx_tools/baseline.py', step, '--model', model, '--image_size', p.image_size, '--batch_size',
                      p.settings.batch_size, *p.length(step), '--output', p.path('baselines'), '--seed',
                      p.settings.seed, '--resume', *p.narrow, *more, *p.data.flags)]
            for model in p.settings.baselines for step in [baseline_step(model)]]


def subnet_search(p):
    c, d = p.window
    return [[p.script('search_subnet.py', 'subnet_search', '--superspace', p.space, '--supernet_choice', space.choice,
                      *p.align, '--latency_constraint', c, '--latency_delta', d, '--platform', p.platform,
                      '--checkpoint_path', p.path('supernet_training'), '--output_path', p.path('search_subnet'),
                      '--seed', p.settings.seed, '--resume', *p.data.flags)] for space in p.spaces]


def finish(p):
    return [[p.script('downstream_cls.py', 'finish', '--superspace', p.space, '--supernet_choice',
                      network.supernet.choice, '--subnet_name', network.subnet, *p.align, '--keep_head', '--distill',
                      '--checkpoint_path', p.path('supernet_training'), '--output_path', p.path('finished'),
                      '--batch_size', p.settings.batch_size, *p.length('finish'), '--seed', p.settings.seed,
                      '--resume', *p.narrow_training, *p.data.flags),
             p.script('onnx_tools/eval_onnx.py', 'accuracy', '--network', p.finished(network), '--only_int8',
                      '--model_path', p.path('models'), '--output', p.accuracy_file(network), *p.narrow,
                      *p.data.flags)] for network in sorted(p.deployed(), key=lambda network: network.what != LARGEST)]


def latency(p):
    if not p.dry:
        write_text(p.path('input.csv'), ''.join(f'{network.entry}\n' for network in p.deployed()))
    return [p.script('onnx_tools/benchmark.py', 'latency', '--input', p.path('input.csv'), '--model_path',
                     p.path('models'), '--output', p.path('latency.csv'), *p.narrow),
            *(command for command, in baselines(p, '--only_latency'))]      # before, others ran beside them


STEPS = (
    Step('predictor', 'measure INT8 blocks on this machine and fit a latency predictor', predictor),
    Step('teacher', 'quantise the pretrained teacher with LSQ+', teacher),
    Step('block_kd', 'block KD: stem and each block type of each stage learn to copy the teacher, fp32 then LSQ+',
         block_kd, side_by_side=True),
    Step('block_lut', 'block LUT: loss and latency of random sub-stages of each block and width window', block_lut),
    Step('space_search', 'space search: block types and widths by Q-T score', space_search),
    Step('supernets', 'train what was found as weight-sharing supernets, fp32 then LSQ+; and ready-made networks',
         supernets, side_by_side=True),
    Step('subnet_search', 'search each supernet for the best subnets of the INT8 latency window', subnet_search,
         side_by_side=True),
    Step('finish', 'fine-tune what was found, in INT8; export to ONNX, accuracy in ONNX Runtime', finish,
         side_by_side=True),
    Step('latency', 'latency in ONNX Runtime', latency),
)
