"""Latencies of exported networks, on this machine or on a phone: what benchmark.py of the tools does."""
import os
import platform
import re
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..files import check_file
from ..latency.profiling import add_host_arguments, run_on_one_core
from ..optional import need
from ..settings import add_settings, setting
from .export import REDUCE_RANGE, SUBNETS, export, random_source, read_entries
from .runtimes import ONNX

TOGETHER = 8                # networks that are measured in turns on this machine


class Latency(NamedTuple):
    """Milliseconds of one image over all timed runs."""
    mean: float
    median: float
    p5: float
    p95: float

    @property
    def typical(self):
        """What tables and speed-ups show: a busy moment of the machine does not move it."""
        return self.median

    def __str__(self):
        return f'mean {self.mean:.3f} ms, median {self.median:.3f}, p5 {self.p5:.3f}, p95 {self.p95:.3f}'


def in_turns(calls, warmup=100, runs=100, rounds=10):
    """{name: Latency} of {name: function}, taken in turns: a busy moment of the machine meets them all."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    times = {name: [] for name in calls}
    while min(map(len, times.values())) < runs:
        for name, call in calls.items():
            for _ in range(min(max(1, runs // rounds), runs - len(times[name]))):
                start = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: Latency(float(np.mean(ms)), *map(float, np.percentile(ms, (50, 5, 95))))
            for name, ms in times.items()}


def processor():
    """Name of this machine's processor."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            found = dict(re.findall(r'^(model name|cpu family|model)\s*: (.*)$', f.read(), re.M))
        family = f' (family {found["cpu family"]}, model {found["model"]})' if 'cpu family' in found else ''
        return found['model name'] + family
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


class Host:
    """This machine with a Runtime on `threads` threads."""

    def __init__(self, runtime, threads=1):
        self.runtime, self.threads = runtime, threads
        self.name, self.software = processor(), f'{runtime.name} {runtime.version}'

    def latencies(self, paths, warmup=100, runs=100):
        """{name: Latency} of {name: file of a model}, in turns."""
        return in_turns({kind: self.runtime.open(path, self.threads).invoke for kind, path in paths.items()}, warmup,
                        runs)


@dataclass(kw_only=True)
class BenchmarkSettings:
    """Which subnets, where models and latencies go, how many runs."""
    input: str = setting('', SUBNETS)
    model_path: str = setting('', 'folder of the models')
    output: str | None = setting(None, 'csv to append to; default: <model_path>/latency.csv')
    warmup: int = setting(100, 'untimed runs of each model', least=1)
    runs: int = setting(100, 'timed runs of each model', least=1)
    reduce_range: bool = setting(False, REDUCE_RANGE)
    core: int | None = setting(None, 'core of this machine', flags=())      # these two: of add_host_arguments()
    threads: int = setting(1, 'threads of the runtime', flags=())


def add_benchmark_arguments(parser, runtime):
    """The flags of BenchmarkSettings with the defaults of a Runtime."""
    add_settings(parser, BenchmarkSettings, skip=() if runtime is ONNX else ('reduce_range',))
    add_host_arguments(parser, runtime.name)
    parser.set_defaults(input=runtime.input, model_path=runtime.models)


def benchmark(settings, runtime, phone=None):
    """Latencies of the fp32 and the INT8 model of each subnet, in turns, printed and appended to a CSV.

    phone: phone.Phone that runs them instead of this machine. Missing models are exported with random weights: latency
    does not depend on them.
    """
    output = settings.output or os.path.join(settings.model_path, 'latency.csv')
    entries = read_entries(settings.input)
    check_file(output)
    for package in runtime.run_packages:
        need(package)
    if phone is None:
        run_on_one_core(settings)
    device = phone or Host(runtime, settings.threads)
    print(f'on {device.name}: {device.software}', flush=True)
    count = TOGETHER if phone is None else 1
    for start in range(0, len(entries), count):
        together = entries[start:start + count]
        paths = {(entry, kind): _model(entry, kind == 'int8', settings, runtime)
                 for entry in together for kind in ('fp32', 'int8')}
        latencies = device.latencies(paths, settings.warmup, settings.runs)
        for entry in together:
            fp32, int8 = latencies[entry, 'fp32'], latencies[entry, 'int8']
            speed_up = fp32.typical / int8.typical
            print(f'{entry.supernet} {entry.subnet}\n  fp32: {fp32}\n  int8: {int8}\n  speed-up {speed_up:.2f}',
                  flush=True)
            _append_line(output, [f'{entry.supernet.superspace.name}-{entry.choice}-{entry.subnet}',
                                  f'{fp32.typical:.4f}', f'{int8.typical:.4f}', f'{speed_up:.4f}', device.name,
                                  device.software])
    print(output)


def _model(entry, quant_mode, settings, runtime):
    """File of an Entry's model, exported with random weights where it is missing."""
    path = runtime.path(settings.model_path, entry, quant_mode)
    if runtime.read(path) is None:
        for package in runtime.export_packages:
            need(package)
        export(random_source(entry, quant_mode), settings.model_path, quant_mode, runtime, settings.reduce_range)
        print(f'exported {path} with random weights', flush=True)
    return path


def _append_line(path, cells):
    """Add a line to a CSV in one write, so that lines of two runs do not mix; commas in cells are left out."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, 'ab', buffering=0) as f:
        f.write((','.join(cell.replace(',', '') for cell in cells) + '\n').encode())
