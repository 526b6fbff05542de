"""Runs a pipeline's steps: says what each does and how long it may take, and continues from the steps that are done."""
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time

from .. import ROOT, usable_cores
from ..errors import UserError
from ..files import write_text

POLL = 0.1                              # seconds between looks at running scripts


@contextlib.contextmanager
def alone(folder):
    """Hold `folder` for this pipeline and everything it starts; UserError where another one lives.

    The lock is inherited: after a kill of the driver alone, a script that it had started keeps it until it ends.
    """
    import fcntl
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'lock'), 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f'{folder}: another pipeline, or a script it started, is still running there') from None
        yield lock


def chosen_steps(pipeline, steps):
    """Those of `steps` that the pipeline's settings name."""
    return [step for step in steps if step.name in pipeline.settings.steps]


def _minutes(pipeline, step):
    """Planned minutes of a step on the machine that the settings speak of; 0 where they do not say."""
    return pipeline.settings.steps.get(step.name, {}).get('planned_minutes', 0)


def _chains(pipeline, step):
    """[[[word, …] of a command, …] of a chain, …] of a step; chains run side by side."""
    commands = step.commands(pipeline)
    chains = [[[str(part) for part in command] for command in chain]
              for chain in (commands if step.side_by_side else [commands])]
    if pipeline.settings.nproc_per_node:            # each training has all processes
        chains = [[command for chain in chains for command in chain]]
    return chains


def print_steps(pipeline, steps, say=print):
    """Print the commands of all steps, as a scheduler may take them, in their order; nothing is run."""
    for number, step in enumerate(steps, 1):
        minutes = _minutes(pipeline, step)
        say(f'# {number}. {step.title}' + (f' ({minutes:g} minutes planned)' if minutes else ''))
        for chain in _chains(pipeline, step):
            for command in chain:
                say(f'python {shlex.join(command)}')


def check_flags(pipeline, steps):
    """UserError for flags in the settings that their scripts do not take; pipeline: a dry one."""
    parsers, argv = {}, sys.argv
    for step in steps:
        for command in (command for chain in _chains(pipeline, step) for command in chain):
            script, said = _script(command), io.StringIO()
            words = [re.sub(r'^(LATENCY|DELTA|MFLOPS)$', '1', word) for word in command[command.index(script) + 1:]]
            if script not in parsers:
                parsers[script] = runpy.run_path(os.path.join(ROOT, script))['get_args']
            sys.argv = [script, *words]
            try:
                with contextlib.redirect_stderr(said):
                    parsers[script]()
            except SystemExit:
                problem = said.getvalue().strip().split('\n')[-1].rpartition('error: ')[2]
                raise UserError(f'steps: {step.name}: {script}: {problem}') from None
            finally:
                sys.argv = argv


def run_steps(pipeline, steps, lock, say=print):
    """Run what is not done of `steps`; returns the seconds each took.

    Each leaves <folder>/done/<step>.json with its commands and seconds.
    """
    all_seconds = []
    left, speed = sum(_minutes(pipeline, step) for step in steps), 1.0      # speed: times the planned minutes
    planned = taken = 0.0
    for number, step in enumerate(steps, 1):
        record, minutes = pipeline.path('done', f'{step.name}.json'), _minutes(pipeline, step)
        chains = _chains(pipeline, step)
        say(f'\n[{number}/{len(steps)}] {step.title}')
        done = _read(record)
        if done is None:
            if left:
                say(f'    about {minutes * speed:.1f} minutes, {left * speed:.0f} to the end')
            started = time.monotonic()
            _run(chains, lock, say)
            seconds = time.monotonic() - started
            done = {'commands': chains, 'seconds': round(seconds, 1)}
            write_text(record, json.dumps(done, indent=1) + '\n')
            planned, taken = planned + minutes, taken + seconds / 60
            speed = (1 + taken) / (1 + planned)
        elif done['commands'] != chains:
            raise UserError(f'{record}: made with other commands; remove {pipeline.folder}, or give another '
                            '--output_path')
        else:
            say(f'    done before, in {done["seconds"] / 60:.1f} minutes')
        left -= minutes
        all_seconds.append(done['seconds'])
    return all_seconds


def _read(record):
    """{'commands': …, 'seconds': …} of a step that is done, None of one that is not; UserError for a damaged one."""
    try:
        with open(record, encoding='utf-8') as f:
            done = json.load(f)
        return {'commands': done['commands'], 'seconds': max(0.0, float(done['seconds']))}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{record}: cannot be read; remove it, and the step is run again') from None


def _run(chains, lock, say):
    """Run chains of commands, each chain one by one, as many chains side by side as there are cores, in turns.

    Ctrl-C reaches the driver alone, which ends the scripts.
    """
    cores = usable_cores()
    at_once, waiting, running = min(len(chains), cores), [chain for chain in chains if chain], {}
    threads = str(cores // at_once) if at_once > 1 else None
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                command, *rest = waiting.pop(0)
                running[_start(command, lock, threads, say)] = _script(command), rest
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                script, rest = running.pop(process)
                if process.returncode:
                    raise UserError(f'{script} ended with code {process.returncode}; mend that and run it all again, '
                                    'it continues from there')
                if rest:
                    waiting.append(rest)
            if running and not ended:
                time.sleep(POLL)
    finally:
        for process in running:
            process.terminate()                             # a training writes its state first
        for process in running:
            process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)      # its data loaders, which hold the lock


def _script(command):
    return next(word for word in command if word.endswith('.py'))


def _start(command, lock, threads, say):
    """A started script in a session of its own; threads: of its arithmetic, None for one a core."""
    own = {} if threads is None or 'OMP_NUM_THREADS' in os.environ else {'OMP_NUM_THREADS': threads}
    say(f'    $ {"".join(f"{key}={value} " for key, value in own.items())}python {shlex.join(command)}')
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env={**os.environ, **own},
                            pass_fds=[lock.fileno()], start_new_session=True)
