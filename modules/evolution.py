"""What the space search and the subnet search share: a history on disk, and evolution that repeats nothing.

A killed search resumes by replaying: the same seed makes the same proposals in the same order, and those that
the history holds are looked up, not scored again. So the end is that of an unbroken run, whatever was killed.
"""
import csv
import json
import math
import os
import sys
from collections import deque

from .errors import UserError
from .files import hold, set_aside, write_text


class History:
    """Scores by encoding, appended to `<folder>/history.csv` as they come; settings beside it in settings.json.

    columns: names of the numbers of an entry. settings: what decides the scores (JSON values); with `resume` they
    must be those the history was made with, else UserError. Without `resume` an old history is kept as
    history_old.csv. check(encoding, numbers) raises UserError or ValueError for an entry that cannot be of this search.
    """

    def __init__(self, folder, columns, settings, resume=False, check=None):
        self.path, self.columns, self.entries = os.path.join(folder, 'history.csv'), tuple(columns), {}
        settings_path = os.path.join(folder, 'settings.json')
        settings = json.loads(json.dumps(settings))
        size = 0
        hold(self.path)
        if resume and os.path.exists(self.path):
            self._check_settings(settings_path, settings)
            size = self._read(check)
        else:
            old = set_aside(self.path)
            if old:
                print(f'without --resume the search starts anew; the scores so far are kept as {old}', file=sys.stderr)
        os.makedirs(folder, exist_ok=True)
        write_text(settings_path, json.dumps(settings, indent=1) + '\n')
        self.file = open(self.path, 'a', newline='')
        self.file.truncate(size)                    # drops a line that a kill left incomplete
        self.writer = csv.writer(self.file, lineterminator='\n')
        if not size:
            self._append(('encoding',) + self.columns)

    def _check_settings(self, path, settings):
        try:
            with open(path, encoding='utf-8') as file:
                before = json.load(file)
            if not isinstance(before, dict):
                raise ValueError
        except (OSError, ValueError, RecursionError):
            raise UserError(f'{path}: cannot be read; start anew without --resume') from None
        for key in list(settings) + list(before):
            if settings.get(key) != before.get(key):
                raise UserError(f'{path}: made with {key} {before.get(key)}, not {settings.get(key)}; use that, '
                                'or start anew without --resume')

    def _read(self, check):
        """Read the complete lines; their length in bytes."""
        with open(self.path, 'rb') as file:
            data = file.read()
        data = data[:data.rfind(b'\n') + 1]
        try:
            lines = data.decode().splitlines()
        except UnicodeDecodeError as error:
            number = data.count(b'\n', 0, error.start) + 1
            raise UserError(f'{self.path}:{number}: not text; start anew without --resume') from None
        for number, line in enumerate(lines, 1):
            try:
                row, = csv.reader([line])
                if number == 1:
                    if tuple(row[1:]) != self.columns:
                        raise ValueError
                    continue
                encoding, *values = row
                if len(values) != len(self.columns) or encoding in self.entries:
                    raise ValueError
                numbers = tuple(map(float, values))
                if any(map(math.isnan, numbers)):
                    raise ValueError
                if check is not None:
                    check(encoding, numbers)
                self.entries[encoding] = numbers
            except (ValueError, csv.Error):
                raise UserError(f'{self.path}:{number}: not a line of this search: {line[:200]!r}; start anew '
                                'without --resume') from None
        return len(data)

    def _append(self, row):
        self.writer.writerow(row)
        self.file.flush()

    def __contains__(self, encoding):
        return encoding in self.entries

    def __len__(self):
        return len(self.entries)

    def get(self, encoding, compute):
        """The entry (a tuple of numbers) of an encoding; compute() is called, and its result kept, if it is new."""
        if encoding not in self.entries:
            values = tuple(compute())
            self._append((encoding,) + tuple(repr(float(value)) for value in values))
            self.entries[encoding] = tuple(map(float, values))
        return self.entries[encoding]

    def close(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def walk_to_new(step, start, seen, max_steps=50):
    """step(start), step of that, … until the string of what is reached is not in the set `seen`, else None.

    So where all neighbours of a good parent were scored, its neighbours' neighbours come next.
    """
    member = start
    for _ in range(max_steps):
        member = step(member)
        if str(member) not in seen:
            return member
    return None


def regularized_evolution(initial, random_member, mutations, score, rng, total, population_size=500,
                          parent_sample_size=125):
    """Aging evolution (Real et al., AAAI 2019) that scores `total` different members; yields (member, score).

    score(member) is a tuple whose first number counts, the larger the better. initial: first members;
    random_member() fills the population up. Each step the best of `parent_sample_size` random members is the
    parent, each of `mutations` (functions of a member) gives a child, and the oldest members die. A child that was
    scored before is mutated on; where that finds nothing new it is a random member. total must not exceed the
    number of members there are. rng: random.Random.
    """
    seen, population, scored = set(), deque(maxlen=population_size), 0

    def new_random():
        member = None
        while member is None:
            member = walk_to_new(lambda _: random_member(), None, seen)
        return member

    initial = iter(initial)
    while scored < total:
        if scored < population_size:
            children = [lambda: next(initial, None) or new_random()]
        else:
            parent = max(rng.sample(list(population), min(parent_sample_size, len(population))),
                         key=lambda entry: entry[1][0])[0]
            children = [lambda mutate=mutate: walk_to_new(mutate, parent, seen) or new_random() for mutate in mutations]
        for child in children[:total - scored]:
            member = child()
            seen.add(str(member))
            population.append((member, score(member)))
            scored += 1
            yield population[-1]
