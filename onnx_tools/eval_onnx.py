"""Accuracy of exported subnets in ONNX Runtime, and their agreement with torch.

    python onnx_tools/eval_onnx.py --quant_mode --dataset_path ./dataset
    python onnx_tools/eval_onnx.py --quant_mode --network checkpoints/downstream/net.pth --dataset FashionMNIST

Takes the subnets, weights and options of export_onnx.py, exports what is missing or of other weights, and runs each
network in torch and its ONNX model on the test images. Agreement: images for which both name the same class.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from modules.cli import parser, positive, run
from modules.deploy.graph import need
from modules.deploy.jobs import add_export_arguments, entries_of, export, images_for, subject
from modules.deploy.onnx_run import agreement, open_session
from modules.errors import UserError
from modules.files import write_csv
from modules.modeling.ops.op import resize
from modules.training.data import eval_loader


def get_args():
    p = parser(__doc__)
    add_export_arguments(p)
    p.add_argument('--quant_mode', action='store_true', help='INT8 models too')
    p.add_argument('--num_eval_images', type=positive(int), help='for short runs; default: all test images')
    p.add_argument('--threads', type=positive(int), default=1, help='of ONNX Runtime')
    p.add_argument('--output', metavar='FILE', help='CSV of the results')
    return p.parse_args()


def main(args):
    need('onnx'), need('onnxruntime')
    if args.skip_weights:
        raise UserError('--skip_weights: random weights have no accuracy')
    entries, rows = entries_of(args), []
    data = images_for(entries, args)
    for entry in entries:
        print(f'{entry.supernet} {entry.subnet}')
        for quant_mode in (False, True)[:1 + args.quant_mode]:
            source = subject(entry, args, quant_mode, data)
            path, model, _ = export(source, args.model_path, quant_mode)
            test = eval_loader(data.test, args.batch_size, workers=args.num_workers, limit_images=args.num_eval_images)
            result = agreement(source.network, open_session(model, args.threads), test, resize)
            kind = 'int8' if quant_mode else 'fp32'
            print(f'  {kind}: {result}\n        {path}', flush=True)
            rows.append([entry.supernet, entry.subnet, kind, *(f'{value:.4f}' for value in result[:4]), result.images])
            if args.output:
                write_csv(args.output, ('supernet', 'subnet', 'kind', *result._fields), rows)


if __name__ == '__main__':
    run(main, get_args)
