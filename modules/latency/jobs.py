"""What the build_predictor scripts of all runtimes share: arguments, and the way from a device to a platform."""
import os
import time
from datetime import date

import numpy as np
import torch

from ..cli import SEED, positive, within
from ..errors import UserError
from ..search_space.superspace import SUPERSPACES
from .builder import RESERVE, Platform, measure, test_networks
from .candidates import smallest_network, space_blocks
from .profiling import Profile
from .tables import DATA, load_platform
from .validation import CLOSE, WITHIN, Errors, check_name, named, pairs_of, register, report_lines, spearman

CHECKPOINTS = os.path.join('checkpoints', 'predictor')


def add_build_arguments(parser, minutes=25.0):
    """Which platform, which hyperspaces, how long, how noisy."""
    parser.add_argument('--platform', required=True, help='name of the new platform, such as my_host')
    parser.add_argument('--superspace', nargs='+', default=['mobilew', 'onnxw'], choices=list(SUPERSPACES),
                        help='hyperspaces whose blocks are measured')
    parser.add_argument('--from_platform', metavar='NAME', help='platform in data/latency to adapt; few '
                        'measurements do')
    parser.add_argument('--minutes', type=positive(float), default=minutes, help='time for all of it')
    parser.add_argument('--networks', type=positive(int), default=15, help='random test networks of each hyperspace')
    parser.add_argument('--max_drift', type=positive(float), default=0.1, help='a chunk of models whose reference is '
                        'off by more than this share was disturbed, and is left out')
    parser.add_argument('--max_disturbed', type=within(float, 0, 1), default=0.33, help='with a larger share of chunks '
                        'disturbed no platform is written')
    parser.add_argument('--resume', action='store_true', help='go on with the measurements of a run that was stopped')
    parser.add_argument('--force', action='store_true', help='replace a platform of this name')
    parser.add_argument('--seed', type=SEED, default=0, help='of what is measured')
    parser.add_argument('--output', default=CHECKPOINTS, help='folder of <platform>/measurements.csv')
    parser.add_argument('--data', default=DATA, help='folder of the platforms')


def add_host_arguments(parser, runtime):
    """--core and --threads of a runtime on this machine."""
    parser.add_argument('--core', type=within(int, 0, 4095),
                        help='core of this machine to run on; default: the last one')
    parser.add_argument('--threads', type=positive(int), default=1,
                        help=f'of {runtime}; with more than one the process is not pinned')


def run_on_one_core(args):
    """Pin a run of one thread, as add_host_arguments() say."""
    if args.threads == 1:
        torch.set_num_threads(1)
        pin(args.core)


def pin(core=None):
    """Keep this process and its threads on one core, by default the last it may use; the core, None where the system
    cannot."""
    if not hasattr(os, 'sched_setaffinity'):
        return None
    allowed = os.sched_getaffinity(0)
    core = max(allowed) if core is None else core
    if core not in allowed:
        raise UserError(f'--core {core}: this process may use {" ".join(map(str, sorted(allowed)))}')
    os.sched_setaffinity(0, {core})
    return core


def build(args, make_device, turns=None):
    """Measure, fit, validate, register a platform as add_build_arguments() say; returns its folder.

    make_device() gives a device as profiling.py describes it.
    """
    folder = check_name(args.platform, args.data, args.force)
    device = make_device()
    superspaces = list(dict.fromkeys(args.superspace))
    base = _base(args.from_platform, superspaces) if args.from_platform else None
    path = os.path.join(args.output, args.platform, 'measurements.csv')
    facts = {'device': str(device), 'superspaces': superspaces, 'networks': args.networks, 'seed': args.seed}
    profile = Profile(path, device, smallest_network(superspaces[0]), facts, args.resume, args.max_drift,
                      args.max_disturbed, turns)
    print(f'{device}\nmeasurements: {path}', flush=True)
    try:
        platform = _measured(args, profile, superspaces, args.minutes, base)
    except UserError:
        if profile.new:
            raise
        # refused before, when all its time was used up
        minutes = profile.seconds / 60 / (1 - RESERVE) + args.minutes
        platform = _measured(args, profile, superspaces, minutes, base)
    origin = {'adapted from': args.from_platform} if base else {}
    lines = report_lines(platform, {'device': device, **origin, 'hyperspaces': ' '.join(superspaces),
                                    'date': date.today().isoformat(),
                                    'time': f'{profile.seconds / 60:.1f} min, of it {platform.fit_seconds:.0f} s for '
                                            'the last fit'}, profile.disturbed())
    register(platform, folder, superspaces, lines)
    print('\n'.join(lines))
    blocks, networks = Errors(pairs_of(platform.held_out)), Errors(pairs_of(named(platform.networks)
                                                                            or platform.networks))
    print(f'{folder}: {blocks.within(CLOSE):.1%} of held-out blocks within 5 %, {blocks.within(WITHIN):.1%} within '
          f'10 %, networks within {networks.worst:.1%}, rank correlation {spearman(platform.networks):.4f}; use it '
          f'with --platform {args.platform}')
    return folder


def _base(name, superspaces):
    """KernelModel of a platform in data/latency; LatencyError where it is none or lacks a block type of the spaces."""
    model = load_platform(os.path.join(DATA, name))[1]
    model.predict_blocks(space_blocks(*superspaces))
    return model


def _measured(args, profile, superspaces, minutes, base):
    """Platform of what `minutes` of measurements give; UserError where they cannot be believed."""
    measure(profile, superspaces, test_networks(superspaces, args.networks, args.seed), minutes, args.seed, _say)
    profile.check()
    print(f'fitting to {len(profile.rows)} measurements', flush=True)
    platform = Platform(args.platform, profile, seed=args.seed, base=base)
    check_repeated(platform, args.max_drift)
    return platform


def check_repeated(platform, max_drift, least=10, share=0.75):
    """UserError where too many blocks took another time when they were measured again; platform: builder.Platform."""
    seen = np.abs([again / before - 1 for again, before in platform.again])
    if len(seen) >= least and np.mean(seen <= max_drift) < share:
        raise UserError(f'too noisy: of {len(seen)} blocks that were measured twice, {np.mean(seen <= max_drift):.0%} '
                        f'agree within {max_drift:.0%} (needed: {share:.0%}); no platform is written. Stop what else '
                        'runs here and begin anew, or --resume --max_drift to believe it anyway')


def _say(line):
    print(f'{time.strftime("%H:%M:%S")} {line}', flush=True)
