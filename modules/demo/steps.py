"""The steps of the demo: which scripts run, with which flags. Later commands depend on what earlier steps found."""
import csv
import os
import random
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..files import write_text
from ..latency import LatencyPredictor
from ..latency.predictor import MFLOPS
from ..latency.validation import check_name
from ..search_space.encoding import parse_subnet, parse_supernet, subnet_config
from ..search_space.sampling import max_subnet, min_subnet, sample_subnet, sample_supernet
from ..search_space.superspace import get_superspace
from ..training.sources import plain_name
from ..zoo import folder_name

TEACHER, CONFIG = 'efficientnet-lite0', 'supernet_training_configs/block_kd_short.yaml'
ALIGN = True                            # --align_sample: all blocks of a stage share k, w, e
MEASURED = 'demo_host'                  # platform that a demo may replace
LOSS_T, LOSS_A = 0.1, 0.01              # the space search's defaults
DRAWN = 300                             # random subnets of random spaces, to choose the latency window by
QUANTILE, WIDTH = 0.65, 0.15            # of their latencies the one searched for; share of it the window takes
MAX_DISTURBED = 0.9                     # of what is measured on this machine; the rest is enough for a demo
BATCH = 32                              # images a step
RATE = 0.05                             # learning rate of ready-made networks from random weights
PRETRAINED_RATE = 0.02                  # and from ImageNet's


FOUND, FLOPS = 'found by INT8 latency', 'found by FLOPs'


@dataclass(frozen=True)
class Scale:
    """How much of everything a demo does. Steps are of 32 images."""
    teacher_steps: int = 20
    kd_steps: int = 150
    kd_lsq_steps: int = 30
    lut_rows: int = 40
    spaces: int = 216                   # all of them
    population: int = 100
    init_steps: int = 100
    fp32_steps: int = 300
    lsq_steps: int = 60
    valid_images: int = 1000
    subnets: int = 16                   # population of the subnet search
    rounds: int = 2
    finish_steps: int = 120
    baseline_steps: int = 1200          # of a ready-made network
    pretrained_steps: int = 200
    eval_images: int | None = None      # all test images
    runs: int = 300
    measure_minutes: float = 2.0
    one_resolution: bool = False        # block KD at the smallest alone


FULL = Scale()
QUICK = Scale(teacher_steps=2, kd_steps=2, kd_lsq_steps=1, lut_rows=5, spaces=40, population=10, init_steps=2,
              fp32_steps=3, lsq_steps=2, valid_images=40, subnets=4, rounds=1, finish_steps=2, baseline_steps=2,
              pretrained_steps=1, eval_images=40, runs=10, measure_minutes=0.1, one_resolution=True)
BASELINES = {                           # name of timm, or of a teacher: what it is to a reader, pretrained
    'mobilenetv3_small_050': ('MobileNetV3-small 0.5, ready-made', False),
    TEACHER: ('the teacher, EfficientNet-lite0, pretrained', True)}


class Deployed(NamedTuple):
    """A subnet that is finished, deployed and measured; what: what it is to a reader."""
    what: str
    supernet: object
    subnet: object

    @property
    def entry(self):
        """Its line of input.csv."""
        return f'{self.supernet.superspace.name},{self.supernet.choice},{self.subnet}'


class Demo:
    """One demo in `folder`, and what it chooses from the results of its steps.

    data: data.DemoData; platform: latency platform; None: this machine is measured and registered as `measured_name`.
    reduce_range: INT8 models with weights of 7 bits.
    """

    def __init__(self, folder, data, scale=FULL, platform=None, measured_name=MEASURED, seed=0, reduce_range=False):
        self.folder, self.data, self.scale, self.seed = folder, data, scale, seed
        self.measured, self.platform = platform is None, platform or measured_name
        self.space, self.image_size = data.space, max(get_superspace(data.space).resolutions)
        self.narrow = ['--reduce_range'] * reduce_range

    def path(self, *names):
        return os.path.join(self.folder, *names)

    @property
    def kd_resolutions(self):
        return get_superspace(self.space).kd_resolutions[:1 if self.scale.one_resolution else None]

    def check(self):
        """UserError for a platform that does not predict the demo's blocks, or a name that is another's."""
        if self.measured:
            ours = self.platform == MEASURED or os.path.isdir(self.path('predictor', self.platform))
            check_name(self.platform, force=ours)
        elif not self.window[0] > 0:            # predicts subnets of all sorts, which may fail
            raise UserError(f'{self.platform}: predicts {self.window[0]} ms for networks of the demo')

    @cached_property
    def predictor(self):
        return LatencyPredictor(self.platform)

    def predict(self, supernet, subnet):
        """Predicted INT8 latency in ms."""
        return self.predictor.predict_subnet(subnet_config(supernet, subnet))

    @cached_property
    def _drawn(self):
        """[(ms, MFLOPs)] of random subnets of random spaces."""
        rng, mflops, drawn = random.Random('window'), LatencyPredictor(MFLOPS), []      # the same for every seed
        for _ in range(DRAWN):
            supernet = sample_supernet(self.space, rng)
            subnet = sample_subnet(supernet, rng, ALIGN)
            drawn.append((self.predict(supernet, subnet), mflops.predict_subnet(subnet_config(supernet, subnet))))
        return drawn

    @cached_property
    def window(self):
        """(c, d) in ms: subnets of c - d to c are searched for. Some subnets of most spaces are there."""
        c = float(np.quantile([ms for ms, _ in self._drawn], QUANTILE))
        return float(f'{c:.3g}'), float(f'{WIDTH * c:.2g}')

    @property
    def budget(self):
        """MFLOPs that one would search by without a predictor: the median of random subnets of the window."""
        c, d = self.window
        return float(f'{np.median([mflops for ms, mflops in self._drawn if c - d <= ms <= c]):.3g}')

    def search_folder(self, constraint):
        return self.path('block_kd', 'search', self.space, f'c{constraint:g}_t{LOSS_T:g}_a{LOSS_A:g}')

    def _first(self, constraint):
        """The Supernet that a space search put first."""
        with open(os.path.join(self.search_folder(constraint), 'top50.csv'), encoding='utf-8', newline='') as f:
            return parse_supernet(next(csv.DictReader(f))['supernet'])

    @property
    def found_space(self):
        """By the INT8 latency of the device."""
        return self._first(self.window[0])

    @property
    def flops_space(self):
        """By FLOPs; may be the same."""
        return self._first(self.budget)

    @property
    def spaces(self):
        """The Supernets that are trained and searched, the one found first."""
        return list(dict.fromkeys([self.found_space, self.flops_space]))

    def results(self, supernet):
        """Folder of a subnet search."""
        return self.path('search_subnet', f'{supernet}-align1')

    def best_subnet(self, supernet):
        """Subnet that a subnet search put first; UserError where there is none of the window."""
        c, d = self.window
        with open(os.path.join(self.results(supernet), f'best_c{c:g}_d{d:g}.csv'), encoding='utf-8', newline='') as f:
            return parse_subnet(next(csv.DictReader(f))['subnet'], supernet)

    def deployed(self):
        """[Deployed], what was found first, each network once."""
        found = self.found_space
        networks = [(FOUND, found, self.best_subnet(found)), ('largest subnet', found, max_subnet(found)),
                    ('smallest subnet', found, min_subnet(found))]
        if self.flops_space != found:
            networks.insert(1, (FLOPS, self.flops_space, self.best_subnet(self.flops_space)))
        return list({network[1:]: Deployed(*network) for network in reversed(networks)}.values())[::-1]

    def finished(self, network):
        """The file of a Deployed after fine-tuning."""
        return self.path('finished', folder_name(str(network.subnet), network.supernet, network.subnet),
                         plain_name(self.data.dataset), 'lsq.pth')

    def accuracy_file(self, network):
        return self.path('accuracy', f'{folder_name(str(network.subnet), network.supernet, network.subnet)}.csv')


class Step(NamedTuple):
    """A step; minutes: of the full demo on two quiet cores.

    commands(demo): [[script, argument, …], …], or with side_by_side [commands, …] of which each goes its own way.
    """
    name: str
    title: str
    minutes: float
    commands: callable
    side_by_side: bool = False


def _length(demo, steps, epochs='--num_epochs'):
    """Flags of about `steps` steps of BATCH images, in several epochs where the pictures are few."""
    epoch = max(1, demo.data.images // BATCH)
    return [epochs, max(1, round(steps / epoch)), '--max_steps', min(steps, epoch)]


def _block_kd(script, demo, steps, rates, *more):
    """Two chains that take about as long: the narrow stages' maps are larger."""
    command = [script, '--superspace', demo.space, '--teacher_arch', TEACHER,
               '--output_path', demo.path('block_kd', demo.space),
               '--inplace_distill_from_teacher', '--train_batch_size', BATCH, *_length(demo, steps),
               '--num_calib_batches', 4, '--num_valid_batches', 4, '--augment', 'none', '--resume', '--num_workers', 0,
               '--hw_list', *demo.kd_resolutions, *more, *demo.data.flags, '--learning_rate_list', *rates]
    first, *others = get_superspace(demo.space).searchable_stages
    return [[[*command, '--stage_list', *stages]] for stages in (['stem', first], others)]


def _teacher_checkpoint(demo):
    return demo.path('block_kd', 'teacher_checkpoint', TEACHER.replace('-', '_'), 'checkpoint.pth')


def teacher(demo):
    return [['lsq_finetune_teacher.py', '--teacher_arch', TEACHER, '--from_teacher', '--learning_rate', 2e-5,
             '--max_steps', demo.scale.teacher_steps, '--image_size', demo.image_size, '--num_eval_images', 200,
             '--augment', 'none', '--output_path', demo.path('block_kd', 'teacher_checkpoint'), *demo.data.flags]]


def block_kd(demo):
    return _block_kd('train_block_kd.py', demo, demo.scale.kd_steps, [0.005, 0.01, 0.01, 0.01, 0.01, 0.005])


def block_kd_lsq(demo):
    return _block_kd('lsq_block_kd.py', demo, demo.scale.kd_lsq_steps, [0.0005] * 6,
                     '--teacher_checkpoint_path', _teacher_checkpoint(demo))


def predictor(demo):
    if not demo.measured:
        return []
    return [['onnx_tools/build_predictor.py', '--platform', demo.platform, '--superspace', demo.space, '--minutes',
             demo.scale.measure_minutes, '--max_disturbed', MAX_DISTURBED, '--output', demo.path('predictor'),
             '--resume', '--force', *demo.narrow]]


def block_lut(demo):
    return [['eval_block_kd.py', '--superspace', demo.space, '--platform', demo.platform, '--teacher_arch', TEACHER,
             '--checkpoint_path', demo.path('block_kd'), '--output_path', demo.path('block_kd', 'lut'),
             '--teacher_checkpoint_path', _teacher_checkpoint(demo), '--num_samples_per_stage', demo.scale.lut_rows,
             '--calib_batch_size', 32, '--num_calib_batches', 2, '--eval_batch_size', 32, '--num_eval_batches', 2,
             '--hw_list', *demo.kd_resolutions, *demo.data.flags]]


def space_search(demo):
    scale = demo.scale
    return [['search_block_kd.py', '--superspace', demo.space, '--latency_constraint', constraint,
             '--platform', platform, '--latency_loss_t', LOSS_T, '--latency_loss_a', LOSS_A,
             '--lut_path', demo.path('block_kd', 'lut'),
             '--output_dir', demo.path('block_kd', 'search'), '--num_spaces', scale.spaces, '--population_size',
             scale.population, '--parent_sample_size', scale.population // 4, '--seed', demo.seed, '--resume']
            for platform, constraint in ((demo.platform, demo.window[0]), (MFLOPS, demo.budget))]


def _supernet(demo, supernet, steps, *more):
    return ['train_supernet.py', '--config-file', CONFIG, '--superspace', demo.space,
            '--supernet_choice', supernet.choice, '--align_sample', '--output_path', demo.path('supernet_training'),
            *_length(demo, steps, '--epochs'),
            '--num_valid_images', demo.scale.valid_images, '--seed', demo.seed, '--resume', *more, *demo.data.flags]


def supernets(demo):
    start = ['--init_block_kd', demo.path('block_kd', demo.space), '--init_steps', demo.scale.init_steps]
    return [[_supernet(demo, space, demo.scale.fp32_steps, *start),
             _supernet(demo, space, demo.scale.lsq_steps, '--quant_mode')] for space in demo.spaces]


def subnet_search(demo):
    c, d = demo.window
    scale = demo.scale
    return [[['search_subnet.py', '--superspace', demo.space, '--supernet_choice', space.choice, '--align_sample',
              '--latency_constraint', c, '--latency_delta', d, '--platform', demo.platform,
              '--arch_mutate_prob', 0.1, '--resolution_mutate_prob', 0.1,       # as its results were measured
              '--checkpoint_path', demo.path('supernet_training'), '--output_path', demo.path('search_subnet'),
              '--population_size', scale.subnets, '--num_rounds', scale.rounds, '--num_mutations', scale.subnets // 2,
              '--num_crossovers', scale.subnets // 2, '--num_valid_images', scale.valid_images, '--seed', demo.seed,
              '--num_calib_batches', 4, '--num_eval_images', 100, '--resume', *demo.data.flags]]
            for space in demo.spaces]


def finish(demo):
    return [[['downstream_cls.py', '--superspace', demo.space, '--supernet_choice', network.supernet.choice,
              '--subnet_name', network.subnet, '--align_sample', '--keep_head', '--distill',
              '--checkpoint_path', demo.path('supernet_training'), '--output_path', demo.path('finished'),
              '--batch_size', BATCH, *_length(demo, demo.scale.finish_steps), '--warmup_epochs', 0.1,
              '--label_smoothing', 0, '--num_calib_batches', 8, '--num_eval_images', demo.scale.valid_images,
              '--seed', demo.seed, '--resume', *demo.data.flags]] for network in demo.deployed()]


def baselines(demo):
    scale = demo.scale
    return [[['onnx_tools/baseline.py', '--model', model, *['--pretrained'] * pretrained,
              '--image_size', demo.image_size, '--batch_size', BATCH,
              *_length(demo, scale.pretrained_steps if pretrained else scale.baseline_steps),
              '--learning_rate', PRETRAINED_RATE if pretrained else RATE, '--warmup_epochs', 0.1,
              '--label_smoothing', 0, '--num_calib_batches', 8, *_images(demo), '--runs', scale.runs, '--augment',
              'default', '--output', demo.path('baselines'), '--seed', demo.seed, '--resume', *demo.narrow,
              *demo.data.flags]] for model, (_, pretrained) in BASELINES.items()]


def _images(demo):
    return [] if demo.scale.eval_images is None else ['--num_eval_images', demo.scale.eval_images]


def accuracy(demo):
    return [[['onnx_tools/eval_onnx.py', '--network', demo.finished(network), '--quant_mode', '--model_path',
              demo.path('models'), '--num_calib_batches', 8, *_images(demo), '--output', demo.accuracy_file(network),
              *demo.narrow, *demo.data.flags]] for network in demo.deployed()]


def latency(demo):
    write_text(demo.path('input.csv'), ''.join(f'{network.entry}\n' for network in demo.deployed()))
    return [['onnx_tools/benchmark.py', '--input', demo.path('input.csv'), '--model_path', demo.path('models'),
             '--runs', demo.scale.runs, '--output', demo.path('latency.csv'), *demo.narrow]]


STEPS = (
    Step('teacher', 'quantise the pretrained teacher, EfficientNet-lite0, with LSQ+', 0.7, teacher),
    Step('block_kd', 'block KD: stem and each block type of each stage learn to copy the teacher, in fp32', 4.2,
         block_kd, side_by_side=True),
    Step('block_kd_lsq', 'block KD with LSQ+ quantisation-aware training', 1.2, block_kd_lsq, side_by_side=True),
    Step('predictor', 'measure INT8 blocks on this machine and fit a latency predictor', 2.1, predictor),
    Step('block_lut', 'block LUT: loss and latency of random sub-stages of each block and width window', 0.8,
         block_lut),
    Step('space_search', 'space search: block types and widths by Q-T score, for INT8 latency and for FLOPs', 0.1,
         space_search),
    Step('supernets', 'train both spaces as supernets that start from block KD, fp32 then LSQ+', 4.5, supernets,
         side_by_side=True),
    Step('subnet_search', 'search each supernet for the best subnets of the INT8 latency window', 2, subnet_search,
         side_by_side=True),
    Step('finish', 'fine-tune what was found, in INT8', 2.2, finish, side_by_side=True),
    Step('baselines', 'train ready-made networks to compare with', 2.4, baselines, side_by_side=True),
    Step('accuracy', 'export to INT8 ONNX, accuracy in ONNX Runtime', 1.5, accuracy, side_by_side=True),
    Step('latency', 'latency in ONNX Runtime', 0.4, latency),
)
