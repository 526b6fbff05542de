"""What the space search and the subnet search share: a history on disk, and evolution that repeats nothing.

A killed search resumes by replaying: the same seed makes the same proposals in the same order, and those that
the history holds are looked up, not scored again. So the end is that of an unbroken run, whatever was killed.
"""
import math
import os
import sys
from collections import deque

from .files import Journal, hold, read_journal


class History:
    """Scores by encoding in a Journal, `<folder>/history.csv`, appended as they come.

    columns: names of the numbers of an entry. settings: what decides the scores (JSON values); with `resume` they
    must be those the history was made with, else UserError. Without `resume` an old history is kept as
    history_old.csv. check(encoding, numbers) raises ValueError for an entry that cannot be of this search.
    """

    def __init__(self, folder, columns, settings, resume=False, check=None):
        self.columns, self.entries, self._check = ('encoding', *columns), {}, check
        path = os.path.join(folder, 'history.csv')
        hold(path)
        self.journal = Journal(path, settings, self._read, resume, self.columns)
        if self.journal.set_aside:
            print(f'without --resume the search starts anew; the scores so far are kept as {self.journal.set_aside}',
                  file=sys.stderr)

    def _read(self, line):
        """Add the entry of a line."""
        encoding, *values = cells = line.split(',')
        if tuple(cells) == self.columns:
            return
        numbers = tuple(map(float, values))
        if len(cells) != len(self.columns) or encoding in self.entries or any(map(math.isnan, numbers)):
            raise ValueError
        if self._check is not None:
            self._check(encoding, numbers)
        self.entries[encoding] = numbers

    def __contains__(self, encoding):
        return encoding in self.entries

    def __len__(self):
        return len(self.entries)

    def get(self, encoding, compute):
        """The entry (a tuple of numbers) of an encoding; compute() is called, and its result kept, if it is new."""
        if encoding not in self.entries:
            self.entries[encoding] = numbers = tuple(map(float, compute()))
            self.journal.append(encoding, *numbers)
        return self.entries[encoding]

    def close(self):
        self.journal.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_history(folder):
    """(settings, [{column: text}] in order) of the History in a folder."""
    settings, (columns, *rows), _ = read_journal(os.path.join(folder, 'history.csv'), lambda line: line.split(','))
    return settings, [dict(zip(columns, row)) for row in rows]


def walk_to_new(step, start, seen, max_steps=50):
    """step(start), step of that, … until the string of what is reached is not in the set `seen`, else None.

    So where all neighbours of a good parent were scored, its neighbours' neighbours come next.
    """
    individual = start
    for _ in range(max_steps):
        individual = step(individual)
        if str(individual) not in seen:
            return individual
    return None


def regularized_evolution(initial, random_individual, mutations, score, rng, total, population_size=500,
                          parent_sample_size=125):
    """Aging evolution (Real et al., AAAI 2019) that scores `total` different individuals; yields (individual, score).

    score(individual) is a tuple whose first number counts, the larger the better. initial: first individuals;
    random_individual() fills the population up. Each step the best of `parent_sample_size` random individuals is the
    parent, each of `mutations` (functions of an individual) gives a child, and the oldest die. A child that was scored
    before is mutated on; where that finds nothing new it is a random individual. total must not exceed the number of
    individuals there are. rng: random.Random.
    """
    seen, population, scored = set(), deque(maxlen=population_size), 0

    def new_random():
        individual = None
        while individual is None:
            individual = walk_to_new(lambda _: random_individual(), None, seen)
        return individual

    initial = iter(initial)
    while scored < total:
        if scored < population_size:
            children = [lambda: next(initial, None)]
        else:
            parent = max(rng.sample(list(population), min(parent_sample_size, len(population))),
                         key=lambda entry: entry[1][0])[0]
            children = [lambda mutate=mutate: walk_to_new(mutate, parent, seen) for mutate in mutations]
        for child in children[:total - scored]:
            individual = child()
            if individual is None:
                individual = new_random()
            seen.add(str(individual))
            population.append((individual, score(individual)))
            scored += 1
            yield population[-1]
