"""Block KD with LSQ+ quantisation-aware training, from the fp32 checkpoints of train_block_kd.py.

    python -m torch.distributed.launch --nproc_per_node=4 lsq_block_kd.py --superspace onnxw \\
        --output_path checkpoints/block_kd/onnxw --inplace_distill_from_teacher --num_epochs 1 \\
        --stage_list stage1_0 stage1_2 --hw_list 160 192 224 --dataset_path dataset --train_batch_size 32 \\
        --teacher_checkpoint_path checkpoints/block_kd/teacher_checkpoint/efficientnet_b5/checkpoint.pth

Writes <output_path>/<block>/lsq.pth. The teacher is int8 too (lsq_finetune_teacher.py makes one).
"""
from modules.block_kd.teacher import build_teacher
from modules.block_kd.trainer import LsqBlockKDSettings
from modules.cli import run
from modules.training.distributed import distributed_job
from train_block_kd import get_parser, train


def get_args():
    p = get_parser(__doc__, LsqBlockKDSettings)
    p.add_argument('--teacher_checkpoint_path', required=True, help='checkpoint of the int8 teacher')
    return p.parse_args()


def main(args):
    with distributed_job(args.local_rank, args.device, args.deterministic) as job:
        teacher = build_teacher(args.teacher_arch, quant=True, checkpoint=args.teacher_checkpoint_path)
        train(args, job, teacher, LsqBlockKDSettings)


if __name__ == '__main__':
    run(main, get_args)
