"""TFLite latencies on a phone: adb and TensorFlow's benchmark_model binary.

benchmark_model is built from TensorFlow's source or fetched as a nightly build (docs/tflite.md); it prints statistics
of its runs, from which the figures come.
"""
import argparse
import os
import posixpath
import re
import subprocess
import tempfile
from typing import NamedTuple

from ..errors import UserError

FOLDER = '/data/local/tmp'              # where an Android shell may write and execute
BINARY = posixpath.join(FOLDER, 'benchmark_model')
MASK = '70'                             # of taskset, hexadecimal: the three big cores of a Pixel 4
_STATISTICS = re.compile(r'count=(\d+) .*?avg=([\d.e+]+) std=([\d.e+]+)')        # microseconds
_MEMORY = re.compile(r'[Mm]emory footprint.*overall=([\d.]+)')                  # MB
_STATUS = 'spaceevo exit status'


def add_phone_arguments(parser):
    """Which phone, and how it runs models."""
    parser.add_argument('--adb', nargs='?', const='adb', metavar='PATH', help='on a phone, through this adb')
    parser.add_argument('--serial', help='on the phone with this serial number')
    parser.add_argument('--mask', type=_mask, default=MASK, help="hexadecimal mask of the phone's cores, for taskset")
    parser.add_argument('--benchmark_binary', type=_plain, default=BINARY, help='benchmark_model on the phone')
    parser.add_argument('--push_binary', metavar='FILE', help='a local benchmark_model to push there first')


def _mask(text):
    if not re.fullmatch('(0x)?[0-9a-fA-F]*[1-9a-fA-F][0-9a-fA-F]*', text):
        raise argparse.ArgumentTypeError(f'{text} is not a hexadecimal mask such as {MASK}')
    return text


def _plain(text):
    if not re.fullmatch(r'[\w./+-]+', text, re.ASCII):
        raise argparse.ArgumentTypeError(f'{text} is not the plain path of a program')
    return text


def phone_of(args):
    """Phone that the arguments ask for, None for this machine."""
    if args.adb or args.serial:
        return Phone(args.adb or 'adb', args.serial, args.mask, args.benchmark_binary, args.push_binary, args.threads)
    if args.push_binary:
        raise UserError('--push_binary: for a phone, with --adb or --serial')
    return None


class PhoneLatency(NamedTuple):
    """Milliseconds of one image, and MB of memory (None where the binary does not say)."""
    mean: float
    std: float
    memory: float | None

    @property
    def typical(self):
        """As of benchmark.Latency; the phone's benchmark tells no median."""
        return self.mean

    def __str__(self):
        memory = '' if self.memory is None else f', {self.memory:.1f} MB'
        return f'mean {self.mean:.3f} ms, standard deviation {self.std:.3f}{memory}'


class Phone:
    """An Android phone behind adb.

    adb: the executable; serial: which phone, None where there is one; mask: of taskset; binary: benchmark_model on
    the phone; push_binary: a local file to put there first; timeout: seconds that a command may take. Whatever fails
    is a UserError.
    """

    software = 'TFLite benchmark_model'

    def __init__(self, adb='adb', serial=None, mask=MASK, binary=BINARY, push_binary=None, threads=1, timeout=600):
        self.name = f'phone {serial}' if serial else 'phone'
        self.adb, self.mask, self.binary, self.threads, self.timeout = adb, mask, binary, threads, timeout
        self.selected = ['-s', serial] if serial else []
        if push_binary:
            if not os.path.isfile(push_binary):
                raise UserError(f'{push_binary}: no such file')
            self._call('push', push_binary, binary)
            self._shell(f'chmod 755 {binary}')

    def latencies(self, paths, warmup=100, runs=100):
        """{kind: PhoneLatency} of {kind: .tflite file}, as benchmark.Host."""
        return {kind: self.latency(path, warmup, runs) for kind, path in paths.items()}

    def latency(self, model, warmup=100, runs=100):
        """PhoneLatency of a .tflite file, or of its bytes."""
        if isinstance(model, bytes):
            with tempfile.NamedTemporaryFile(suffix='.tflite') as f:
                f.write(model)
                f.flush()
                return self.latency(f.name, warmup, runs)
        there = posixpath.join(FOLDER, f'spaceevo-{os.getpid()}.tflite')      # of this process: two do not mix
        try:
            self._call('push', os.fspath(model), there)
            output = self._shell(
                f'taskset {self.mask} {self.binary} --graph={there} --num_threads={self.threads} '
                f'--warmup_runs={warmup} --num_runs={runs} --warmup_min_secs=0 --min_secs=0 --max_secs={self.timeout}')
        finally:
            self._run('shell', f'rm -f {there}')
        return parse_benchmark(output, runs)

    def _shell(self, command):
        """Output of a command on the phone, which must succeed; old versions of adb do not pass its status on."""
        output = self._call('shell', f'{command}; echo {_STATUS} $?')
        output, mark, status = output.rpartition(_STATUS)
        if not mark or status.strip() != '0':
            raise UserError(f'adb shell {command}: failed ({_last_line(output) or "no output"})')
        return output

    def _call(self, *arguments):
        done = self._run(*arguments)
        if done.returncode:
            raise UserError(f'adb {" ".join(arguments)}: failed ({_last_line(done.stdout) or "no output"})')
        return done.stdout

    def _run(self, *arguments):
        try:
            return subprocess.run([self.adb, *self.selected, *arguments], stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True, errors='replace', timeout=self.timeout)
        except subprocess.TimeoutExpired:
            raise UserError(f'adb {" ".join(arguments)}: no answer in {self.timeout} s') from None
        except OSError as error:
            raise UserError(f"{self.adb}: {error.strerror}; adb is part of Android's platform-tools, "
                            '--adb says where it is') from None


def _last_line(text):
    return (text.strip().split('\n') or [''])[-1].strip()


def parse_benchmark(output, runs):
    """PhoneLatency of benchmark_model's output: its last statistics, those of the timed runs, at least `runs` of them.

    UserError where there are none, or of fewer runs.
    """
    found = _STATISTICS.findall(output)
    if len(found) < 2:                  # of the warm-up, then of the timed runs
        raise UserError(f'benchmark_model: no latency in its output (it ends: {_last_line(output)})')
    count, mean, std = found[-1]
    if int(count) < runs:
        raise UserError(f'benchmark_model: stopped after {count} of {runs} runs')
    memory = _MEMORY.findall(output)
    return PhoneLatency(float(mean) / 1000, float(std) / 1000, float(memory[-1]) if memory else None)
