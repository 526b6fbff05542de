"""A latency platform as nn-Meter's JSON block table, `<name>_<hw>_<cin>_<cout>_<k>_<e>_<stride>_<act>: ms`.

    python onnx_tools/export_lut.py --platform onnx_lut --output my_lut.json
    python onnx_tools/export_lut.py --platform onnx_lut --superspace demo --output demo.json

Without --superspace: the blocks that the platform has predicted beforehand, all of its hyperspaces'. The file is a
platform as it is (`--platform my_lut.json`); onnx_tools/import_lut.py makes a folder of it.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, run
from modules.errors import UserError
from modules.latency.exchange import platform_table
from modules.latency.tables import write_table
from modules.search_space.superspace import SUPERSPACES


def get_args():
    p = parser(__doc__)
    p.add_argument('--platform', required=True, help='platform, or a block table *.json')
    p.add_argument('--superspace', nargs='+', default=[], choices=list(SUPERSPACES), help='hyperspaces whose blocks '
                   'are written')
    p.add_argument('--output', required=True, help='file *.json')
    p.add_argument('--trust_pickles', action='store_true', help="open nn-Meter's predictors, which are pickles")
    return p.parse_args()


def main(args):
    if not args.output.endswith('.json'):
        raise UserError(f'{args.output}: the name of a block table ends in .json')
    table = platform_table(args.platform, args.superspace, args.trust_pickles)
    if not table:
        raise UserError(f'{args.platform}: has no blocks of its own; --superspace says which to predict')
    write_table(args.output, table)
    print(f'{args.output}: {len(table)} blocks')


if __name__ == '__main__':
    run(main, get_args)
