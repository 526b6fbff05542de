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
from ..latency.validation import check_name
from ..search_space.encoding import parse_subnet, parse_supernet, subnet_config
from ..search_space.sampling import max_subnet, min_subnet, sample_subnet, sample_supernet
from ..search_space.superspace import get_superspace

SPACE, TEACHER, CONFIG = 'demo', 'efficientnet-lite0', 'supernet_training_configs/demo_short.yaml'
ALIGN = True                            # --align_sample: all blocks of a stage share k, w, e
MEASURED = 'demo_host'                  # platform that a demo may replace
LOSS_T, LOSS_A = 0.1, 0.01              # the space search's defaults
DRAWN = 300                             # random spaces, to choose a latency and a space by
QUANTILE, WIDTH = 0.65, 0.15            # of their subnets' latencies the one searched for; share of it the window takes
MAX_DISTURBED = 0.9                     # of what is measured on this machine; the rest is enough for a demo
RANDOM, BEST = 3, 2                     # deployed subnets: random ones, and best ones of each search


@dataclass(frozen=True)
class Scale:
    """How much of everything a demo does."""
    teacher_steps: int = 20
    kd_steps: int = 110
    kd_lsq_steps: int = 25
    lut_rows: int = 40
    spaces: int = 486                   # all of them
    population: int = 100
    random_spaces: int = 1              # supernets beside that of the space found
    fp32_steps: int = 900               # of 32 images: half an epoch
    lsq_steps: int = 180
    valid_images: int = 1600
    subnets: int = 16                   # population of the subnet search
    rounds: int = 3
    eval_images: int = 5000
    runs: int = 300
    measure_minutes: float = 2.0
    kd_resolutions: tuple = (32, 40, 48)


FULL = Scale()
QUICK = Scale(teacher_steps=2, kd_steps=2, kd_lsq_steps=1, lut_rows=5, spaces=40, population=10, fp32_steps=3,
              lsq_steps=2, valid_images=40, subnets=4, rounds=1, eval_images=40, runs=10,
              measure_minutes=0.1, kd_resolutions=(32,))


class Deployed(NamedTuple):
    """A network that is deployed and measured at the end; what: what it is to a reader."""
    what: str
    supernet: object
    subnet: object


class Demo:
    """One demo in `folder`, and what it chooses from the results of its steps.

    platform: latency platform; None: this machine is measured and registered as `measured_name`.
    """

    def __init__(self, folder, dataset, dataset_path, scale=FULL, platform=None, measured_name=MEASURED, seed=0):
        self.folder, self.scale, self.seed = folder, scale, seed
        self.measured, self.platform = platform is None, platform or measured_name
        self.data = ['--dataset_path', dataset_path, '--dataset', dataset]
        self.valid_size = 400 if dataset == 'digits' else 5000

    def path(self, *names):
        return os.path.join(self.folder, *names)

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
    def window(self):
        """(c, d) in ms: subnets of c - d to c are searched for. Some subnets of most spaces are there."""
        rng, latencies = random.Random(f'{self.seed} window'), []
        for _ in range(DRAWN):
            supernet = sample_supernet(SPACE, rng)
            latencies.append(self.predict(supernet, sample_subnet(supernet, rng, ALIGN)))
        c = float(np.quantile(latencies, QUANTILE))
        return float(f'{c:.3g}'), float(f'{WIDTH * c:.2g}')

    def fits(self, supernet, subnet):
        c, d = self.window
        return c - d <= self.predict(supernet, subnet) <= c

    @property
    def search_folder(self):
        return self.path('block_kd', 'search', SPACE, f'c{self.window[0]:g}_t{LOSS_T:g}_a{LOSS_A:g}')

    @property
    def found_space(self):
        """The Supernet that the space search put first."""
        return parse_supernet(_rows(os.path.join(self.search_folder, 'top50.csv'))[0]['supernet'])

    def place(self, supernet):
        """(place by score, 1 the best and None where it was not scored; number of the spaces scored)."""
        rows = sorted(_rows(os.path.join(self.search_folder, 'history.csv')), key=lambda row: -float(row['score']))
        names = [row['encoding'] for row in rows]
        return names.index(str(supernet)) + 1 if str(supernet) in names else None, len(names)

    @cached_property
    def random_spaces(self):
        """Supernets drawn at random from those of which random subnets hit the window."""
        rng, spaces = random.Random(f'{self.seed} space'), []
        for _ in range(DRAWN):
            supernet = sample_supernet(SPACE, rng)
            if supernet not in (self.found_space, *spaces) and any(
                    self.fits(supernet, sample_subnet(supernet, rng, ALIGN)) for _ in range(50)):
                spaces.append(supernet)
            if len(spaces) == self.scale.random_spaces:
                return spaces
        raise UserError(f'hardly a space has subnets of about {self.window[0]} ms')

    @property
    def spaces(self):
        """The Supernets that are trained and searched: the one found, then the random ones."""
        return [self.found_space, *self.random_spaces]

    def best_subnets(self, supernet):
        """Subnets that the subnet search put first, the best one first."""
        c, d = self.window
        name = f'best_c{c:g}_d{d:g}.csv'
        return [parse_subnet(row['subnet'], supernet)
                for row in _rows(self.path('search_subnet', f'{supernet}-align1', name))]

    def random_subnets(self, supernet, count):
        """Random subnets of the window."""
        rng, subnets = random.Random(f'{self.seed} subnets'), {}
        for _ in range(10000):
            subnet = sample_subnet(supernet, rng, ALIGN)
            if self.fits(supernet, subnet):
                subnets[subnet] = None
            if len(subnets) == count:
                break
        return list(subnets)

    def deployed(self):
        """[Deployed]: what was found beside hand-made baselines, each network once."""
        found, networks = self.found_space, []
        for number, space in enumerate(self.spaces):
            what = f'best of random space {number}' if number else 'found'
            networks += [(f'{what}, {i}', space, s) for i, s in enumerate(self.best_subnets(space)[:BEST], 1)]
        networks += [(f'random subnet {i}', found, s) for i, s in enumerate(self.random_subnets(found, RANDOM), 1)]
        networks += [('largest subnet', found, max_subnet(found)), ('smallest subnet', found, min_subnet(found))]
        return list({network[1:]: Deployed(*network) for network in reversed(networks)}.values())[::-1]


def _rows(path):
    with open(path, encoding='utf-8', newline='') as f:
        return list(csv.DictReader(f))


class Step(NamedTuple):
    """A step; minutes: of the full demo on two quiet cores.

    commands(demo): [[script, argument, …], …], or with side_by_side [commands, …] of which each goes its own way.
    """
    name: str
    title: str
    minutes: float
    commands: callable
    side_by_side: bool = False


def _block_kd(script, demo, steps, batch, *more):
    return [[script, '--superspace', SPACE, '--teacher_arch', TEACHER, '--output_path', demo.path('block_kd', SPACE),
             '--inplace_distill_from_teacher', '--train_batch_size', batch, '--num_epochs', 1, '--max_steps', steps,
             '--num_calib_batches', 4, '--num_valid_batches', 4, '--augment', 'none', '--resume',
             '--hw_list', *demo.scale.kd_resolutions, *more, *demo.data, '--valid_size', demo.valid_size,
             '--stage_list', *get_superspace(SPACE).searchable_stages]]


def _teacher_checkpoint(demo):
    return demo.path('block_kd', 'teacher_checkpoint', TEACHER.replace('-', '_'), 'checkpoint.pth')


def teacher(demo):
    return [['lsq_finetune_teacher.py', '--teacher_arch', TEACHER, '--from_teacher', '--learning_rate', 2e-5,
             '--max_steps', demo.scale.teacher_steps, '--image_size', 48, '--num_eval_images', 200, '--augment', 'none',
             '--output_path', demo.path('block_kd', 'teacher_checkpoint'), *demo.data,
             '--valid_size', demo.valid_size]]


def block_kd(demo):
    rates = [0.005, 0.01, 0.01, 0.01, 0.01, 0.005]
    return _block_kd('train_block_kd.py', demo, demo.scale.kd_steps, 32, '--learning_rate_list', *rates)


def block_kd_lsq(demo):
    return _block_kd('lsq_block_kd.py', demo, demo.scale.kd_lsq_steps, 32, '--learning_rate_list', *[0.0005] * 6,
                     '--teacher_checkpoint_path', _teacher_checkpoint(demo))


def predictor(demo):
    if not demo.measured:
        return []
    return [['onnx_tools/build_predictor.py', '--platform', demo.platform, '--superspace', SPACE, '--minutes',
             demo.scale.measure_minutes, '--max_disturbed', MAX_DISTURBED, '--output', demo.path('predictor'),
             '--resume', '--force']]


def block_lut(demo):
    return [['eval_block_kd.py', '--superspace', SPACE, '--platform', demo.platform, '--teacher_arch', TEACHER,
             '--checkpoint_path', demo.path('block_kd'), '--output_path', demo.path('block_kd', 'lut'),
             '--teacher_checkpoint_path', _teacher_checkpoint(demo), '--num_samples_per_stage', demo.scale.lut_rows,
             '--calib_batch_size', 32, '--num_calib_batches', 2, '--eval_batch_size', 32, '--num_eval_batches', 2,
             '--hw_list', *demo.scale.kd_resolutions, *demo.data, '--valid_size', demo.valid_size]]


def space_search(demo):
    return [['search_block_kd.py', '--superspace', SPACE, '--latency_constraint', demo.window[0],
             '--platform', demo.platform, '--latency_loss_t', LOSS_T, '--latency_loss_a', LOSS_A,
             '--lut_path', demo.path('block_kd', 'lut'), '--output_dir', demo.path('block_kd', 'search'),
             '--num_spaces', demo.scale.spaces, '--population_size', demo.scale.population,
             '--parent_sample_size', demo.scale.population // 4, '--resume']]


def _supernet(demo, supernet, steps, *more):
    return [['train_supernet.py', '--config-file', CONFIG, '--superspace', SPACE, '--supernet_choice', supernet.choice,
             '--align_sample', '--output_path', demo.path('supernet_training'), '--max_steps', steps,
             '--num_valid_images', demo.scale.valid_images, '--resume', *more, *demo.data,
             '--valid_size', demo.valid_size]]


def supernets(demo):
    return [_supernet(demo, space, demo.scale.fp32_steps) + _supernet(demo, space, demo.scale.lsq_steps, '--quant_mode')
            for space in demo.spaces]


def subnet_search(demo):
    c, d = demo.window
    scale = demo.scale
    return [[['search_subnet.py', '--superspace', SPACE, '--supernet_choice', space.choice, '--align_sample',
              '--latency_constraint', c, '--latency_delta', d, '--platform', demo.platform,
              '--arch_mutate_prob', 0.1, '--resolution_mutate_prob', 0.1,       # as its results were measured
              '--checkpoint_path', demo.path('supernet_training'), '--output_path', demo.path('search_subnet'),
              '--population_size', scale.subnets, '--num_rounds', scale.rounds, '--num_mutations', scale.subnets // 2,
              '--num_crossovers', scale.subnets // 2, '--num_valid_images', scale.valid_images,
              '--num_calib_batches', 4, '--num_eval_images', 100, '--resume', *demo.data,
              '--valid_size', demo.valid_size]] for space in demo.spaces]


def deploy(demo):
    write_text(demo.path('input.csv'), ''.join(f'{SPACE},{network.supernet.choice},{network.subnet}\n'
                                               for network in demo.deployed()))
    models = ['--input', demo.path('input.csv'), '--model_path', demo.path('models')]
    weights = ['--quant_mode', '--checkpoint_path', demo.path('supernet_training'), '--align_sample',
               '--num_calib_batches', 8, *demo.data, '--valid_size', demo.valid_size]
    return [['onnx_tools/export_onnx.py', *models, *weights],
            ['onnx_tools/eval_onnx.py', *models, *weights, '--num_eval_images', demo.scale.eval_images,
             '--output', demo.path('accuracy.csv')],
            ['onnx_tools/benchmark.py', *models, '--runs', demo.scale.runs, '--output', demo.path('latency.csv')]]


STEPS = (
    Step('teacher', 'quantise the pretrained teacher, EfficientNet-lite0, with LSQ+', 0.3, teacher),
    Step('block_kd', 'block KD: each block type of each stage learns to copy the teacher, in fp32', 2.0, block_kd),
    Step('block_kd_lsq', 'block KD with LSQ+ quantisation-aware training', 1.1, block_kd_lsq),
    Step('predictor', 'measure INT8 blocks on this machine and fit a latency predictor', 2.1, predictor),
    Step('block_lut', 'block LUT: loss and latency of random sub-stages of each block and width window', 0.7,
         block_lut),
    Step('space_search', 'space search: block types and widths by Q-T score', 0.1, space_search),
    Step('supernets', 'train the found space as a supernet, and random spaces to compare, fp32 then LSQ+', 5.0,
         supernets, side_by_side=True),
    Step('subnet_search', 'search each supernet for the best subnets of the latency window', 1.8, subnet_search,
         side_by_side=True),
    Step('deploy', 'export to INT8 ONNX, accuracy and latency in ONNX Runtime', 2.4, deploy),
)
