"""A latency platform from a block table in nn-Meter's JSON format, such as export_lut.py writes.

    python onnx_tools/import_lut.py --table my_lut.json --platform my_host

Writes data/latency/my_host/: the table's latencies as they are, and nets fitted to them for blocks it lacks. (As it
is, `--platform my_lut.json` also works, and refuses blocks it lacks.)
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, positive, run
from modules.latency.exchange import import_table
from modules.latency.tables import DATA
from modules.latency.validation import check_name


def get_args():
    p = parser(__doc__)
    p.add_argument('--table', required=True, help='file *.json')
    p.add_argument('--platform', required=True, help='name of the new platform, such as my_host')
    p.add_argument('--epochs', type=positive(int), default=40, help='epochs of the nets')
    p.add_argument('--force', action='store_true', help='replace a platform of this name')
    p.add_argument('--data', default=DATA, help='folder of the platforms')
    return p.parse_args()


def main(args):
    folder = check_name(args.platform, args.data, args.force)
    count, error = import_table(args.table, folder, args.epochs)
    print(f'{folder}: {count} blocks; a tenth of them, held out, is predicted with a median error of {error:.1%}')


if __name__ == '__main__':
    run(main, get_args)
