"""What a search has scored, on disk: a killed search resumes by replaying it.

The same seed makes the same proposals in the same order, and those that the history holds are looked up, not scored
again. So the end is that of an unbroken run, whatever was killed.
"""
import math
import os
import sys

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
            print(f'without --resume the search starts over; the scores so far are kept as {self.journal.set_aside}',
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
