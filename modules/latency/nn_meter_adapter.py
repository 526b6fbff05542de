"""Block latencies (ms) from kernel predictors that are registered with nn-Meter.

    pip install -r requirements-nn-meter.txt
    nn-meter register --predictor meta.yaml

    # meta.yaml
    name: my_phone                           # the platform's name
    version: 1.0
    category: cpu
    package_location: /path/to/my_phone      # conv-bn-relu.pkl, dwconv-bn-relu.pkl, … and fusion_rules.json
    kernel_predictors: [conv-bn-relu, dwconv-bn-relu, fc, global-avgpool, hswish, swish, se, add, addrelu]

`nn-meter register` appends that entry to ~/.nn_meter/config/predictors.yaml, which is read here as YAML;
nn-Meter itself is not imported. Each <kernel>.pkl is a pickled scikit-learn regressor from a kernel's
features (kernels.Kernel.features) to ms. A pickle is code: none is opened without `trust_pickles`.
nn-Meter's built-in predictors are no local folders but downloads, and are refused.

Where this differs from `nn-meter predict`: a kernel without a predictor is an error, not 0 ms (nn-Meter
leaves it out silently, swish always); and global-avgpool gets its real input size.
Source: nn-Meter 2.0 (MobiSys 2021).
"""
import os
import pickle
import re
from pathlib import Path

import numpy as np

from .kernel_model import LatencyError
from .kernels import block_kernels
from .tables import DATA

REGISTRY = '~/.nn_meter/config/predictors.yaml'
INSTALL = 'pip install -r requirements-nn-meter.txt'
UNFUSED = {'addrelu': ('add', 'relu')}      # what nn-Meter predicts for a backend that does not fuse the two


def _first_line(error):
    return str(error).strip().partition('\n')[0] or type(error).__name__


def registered_predictors():
    """{name: entry} of nn-Meter's registry, empty where there is none; of several versions the latest.

    Of equal versions the first registered, as in nn-Meter. Raises LatencyError for a malformed registry.
    """
    path = Path(REGISTRY).expanduser()
    if not path.is_file():
        return {}
    try:
        import yaml
    except ImportError:
        raise LatencyError(f'{path}: reading it needs PyYAML: {INSTALL}') from None
    try:
        entries = yaml.safe_load(path.read_text(encoding='utf-8')) or []
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise LatencyError(f'{path}: {" ".join(str(error).split())}') from None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and 'name' in e for e in entries):
        raise LatencyError(f"{path}: not nn-Meter's registry, a list of predictors that each have a name")
    latest = {}
    for entry in entries:
        name = str(entry['name'])
        if name not in latest or _version(entry) > _version(latest[name]):
            latest[name] = entry
    return latest


def is_registered(platform):
    """Whether a local folder of predictors is registered by this name; a registry that cannot be read has none."""
    try:
        return bool(registered_predictors().get(platform, {}).get('package_location'))
    except LatencyError:
        return False


def _version(entry):
    return [int(number) for number in re.findall(r'\d+', str(entry.get('version')))]


def load(platform, trust_pickles=False):
    """NNMeterPredictor of a platform that was registered with `nn-meter register --predictor meta.yaml`.

    `trust_pickles`: open its pickles, which runs whatever code is in them. Raises LatencyError for a platform
    that is not registered or is built in, for a folder without its files, and unless `trust_pickles`.
    """
    registered = registered_predictors()
    local = sorted(name for name, entry in registered.items() if entry.get('package_location'))
    how_to = f'nn-meter register --predictor meta.yaml ({INSTALL})'
    if platform not in registered:
        known = sorted(name for name in os.listdir(DATA) if os.path.isdir(os.path.join(DATA, name)))
        raise LatencyError(f'{platform}: no such platform; there are {" ".join([*known, *local])}, those measured by '
                           f'build_predictor.py, and what is registered with nn-Meter: {how_to}')
    if platform not in local:
        raise LatencyError(f'{platform}: built into nn-Meter, which downloads it when it is used; '
                           f'only a local folder can be used here: {how_to}')
    entry = registered[platform]
    folder = Path(entry['package_location'])
    files = {path.stem: path for path in sorted(folder.glob('*.pkl'))}
    missing = [f'{kernel}.pkl' for kernel in entry.get('kernel_predictors') or () if kernel not in files]
    if missing or not files:
        raise LatencyError(f'{platform}: {folder} has no {" ".join(missing) or "*.pkl"}')
    if not trust_pickles:
        raise LatencyError(f'{platform}: the kernel predictors in {folder} are pickles, which can run any '
                           'code when they are opened; if you trust them, pass --trust_pickles')
    return NNMeterPredictor(platform, folder, {kernel: _open(path) for kernel, path in files.items()})


def _open(path):
    try:
        with open(path, 'rb') as file:
            model = pickle.load(file)       # only behind trust_pickles, see load
    except ModuleNotFoundError as error:
        package = str(error.name).partition('.')[0]
        raise LatencyError(f'{path}: opening it needs the package {package}: {INSTALL}') from None
    except Exception as error:  # unpickling may raise anything
        raise LatencyError(f'{path}: cannot be opened: {_first_line(error)}') from None
    if not hasattr(model, 'predict'):
        raise LatencyError(f'{path}: holds a {type(model).__name__}, not a kernel predictor')
    return model


class NNMeterPredictor:
    """Latencies of blocks as sums of kernel latencies; `models` {kernel name: scikit-learn regressor}."""

    def __init__(self, platform, folder, models):
        self.platform, self.folder, self.models = platform, folder, models
        self._ms = {}                       # {Kernel: ms}, every kernel predicted so far

    def predict_blocks(self, blocks):
        """Array of latencies in ms, one per Block.

        Kernels that were not seen before are predicted with one call per kernel type. Raises LatencyError for
        a kernel that has no predictor.
        """
        lists = [self._kernels(block) for block in blocks]
        rows = {}
        for kernel in dict.fromkeys(kernel for kernels in lists for kernel in kernels):
            if kernel not in self._ms:
                rows.setdefault(kernel.name, []).append(kernel)
        for name, kernels in rows.items():
            self._ms.update(zip(kernels, self._predict(name, [kernel.features() for kernel in kernels])))
        return np.array([sum(self._ms[kernel] for kernel in kernels) for kernels in lists], dtype=float)

    def _kernels(self, block):
        kernels = []
        try:
            fused = block_kernels(block)
        except (ValueError, TypeError, ZeroDivisionError) as error:     # unknown block type, no expand ratio or stride
            raise LatencyError(f'{self.platform}: {" ".join(map(str, block))}: {error}') from None
        for kernel in fused:
            names = (kernel.name,) if kernel.name in self.models else UNFUSED.get(kernel.name, (kernel.name,))
            for name in names:
                if name not in self.models:
                    raise LatencyError(f'{self.platform}: {block.name}: no predictor of kernel {kernel.name} '
                                       f'in {self.folder}; there are: {" ".join(self.models)}')
                kernels.append(kernel._replace(name=name))
        return kernels

    def _predict(self, name, features):
        try:
            ms = self.models[name].predict(features)
            return np.asarray(ms, dtype=float).reshape(len(features)).tolist()
        except Exception as error:  # a foreign model may raise anything
            raise LatencyError(f'{self.folder / name}.pkl: cannot predict from {len(features[0])} features: '
                               f'{_first_line(error)}') from None
