"""What the build_predictor.py scripts of all runtimes share: flags, and the way from a device to a platform."""
import os
import time
from dataclasses import dataclass
from datetime import date

import numpy as np

from ..errors import UserError
from ..files import START_OVER
from ..search_space.superspace import SUPERSPACES
from ..settings import add_settings, setting
from .builder import RESERVE, Platform, measure, test_networks
from .candidates import smallest_network, space_blocks
from .profiling import Profile
from .tables import DATA, load_platform
from .validation import CLOSE, WITHIN, Errors, check_name, named, pairs_of, register, report_lines, spearman


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Which platform of which hyperspaces, how long, how noisy: the flags of build_predictor.py."""
    platform: str = setting('', 'name of the new platform', flags=())
    superspace: tuple[str, ...] = setting(('mobilew', 'onnxw'), 'hyperspaces whose blocks are measured', flags=())
    from_platform: str | None = setting(None, 'platform in data/latency to adapt; few measurements do')
    minutes: float = setting(25.0, 'time for all of it', above=0)
    networks: int = setting(15, 'random test networks of each hyperspace', least=1)
    max_drift: float = setting(0.1, 'a chunk of models whose reference is off by more than this share was disturbed, '
                               'and is left out', above=0)
    max_disturbed: float = setting(0.33, 'with a larger share of chunks disturbed no platform is written', most=1)
    resume: bool = setting(False, 'continue the measurements of a run that was stopped')
    force: bool = setting(False, 'replace a platform of this name')
    seed: int = setting(0, 'seed of what is measured', most=2 ** 32 - 1)
    output: str = setting(os.path.join('checkpoints', 'predictor'), 'folder of <platform>/measurements.jsonl')
    data: str = setting(DATA, 'folder of the platforms')


def add_build_arguments(parser):
    """The flags of BuildSettings."""
    parser.add_argument('--platform', required=True, help='name of the new platform, such as my_host')
    parser.add_argument('--superspace', nargs='+', default=list(BuildSettings.superspace), choices=list(SUPERSPACES),
                        help='hyperspaces whose blocks are measured')
    add_settings(parser, BuildSettings)


def build(settings, make_device, timing=None):
    """Measure, fit, validate, register a platform by BuildSettings; returns its folder.

    make_device() gives a device as profiling.py describes it.
    """
    folder = check_name(settings.platform, settings.data, settings.force)
    device = make_device()
    superspaces = list(dict.fromkeys(settings.superspace))
    base = _base(settings.from_platform, superspaces) if settings.from_platform else None
    path = os.path.join(settings.output, settings.platform, 'measurements.jsonl')
    old = path.removesuffix('.jsonl') + '.csv'
    if settings.resume and os.path.exists(old) and not os.path.exists(path):
        raise UserError(f'{old}: of an older version; {START_OVER}')
    depends_on = {'device': str(device), 'superspaces': superspaces, 'networks': settings.networks,
                  'seed': settings.seed}
    profile = Profile(path, device, smallest_network(superspaces[0]), depends_on, settings.resume, settings.max_drift,
                      settings.max_disturbed, timing)
    print(f'{device}\nmeasurements: {path}', flush=True)
    try:
        platform = _measured(settings, profile, superspaces, settings.minutes, base)
    except UserError:
        if profile.new:
            raise
        # refused before, when all its time was used up
        minutes = profile.seconds / 60 / (1 - RESERVE) + settings.minutes
        platform = _measured(settings, profile, superspaces, minutes, base)
    origin = {'adapted from': settings.from_platform} if base else {}
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
          f'with --platform {settings.platform}')
    return folder


def _base(name, superspaces):
    """KernelModel of a platform in data/latency; LatencyError where it is none or lacks a block type of the spaces."""
    model = load_platform(os.path.join(DATA, name))[1]
    model.predict_blocks(space_blocks(*superspaces))
    return model


def _measured(settings, profile, superspaces, minutes, base):
    """Platform of what `minutes` of measurements give; UserError where they cannot be believed."""
    tests = test_networks(superspaces, settings.networks, settings.seed)
    measure(profile, superspaces, tests, minutes, settings.seed, _say)
    profile.check()
    print(f'fitting to {len(profile.rows)} measurements', flush=True)
    platform = Platform(settings.platform, profile, seed=settings.seed, base=base)
    check_repeated(platform, settings.max_drift)
    return platform


def check_repeated(platform, max_drift, least=10, share=0.75):
    """UserError where too many blocks took another time when they were measured again; platform: builder.Platform."""
    seen = np.abs([again / before - 1 for again, before in platform.again])
    if len(seen) >= least and np.mean(seen <= max_drift) < share:
        raise UserError(f'too noisy: of {len(seen)} blocks that were measured twice, {np.mean(seen <= max_drift):.0%} '
                        f'agree within {max_drift:.0%} (needed: {share:.0%}); no platform is written. Stop what else '
                        'runs here and start over, or --resume --max_drift to believe it anyway')


def _say(line):
    print(f'{time.strftime("%H:%M:%S")} {line}', flush=True)
