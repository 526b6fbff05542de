"""Cut big pictures into many random crops: a small set of natural images for block KD on a laptop.

    python benchmarks/make_crops.py --sources /usr/share/wallpapers /usr/share/backgrounds /usr/share/openclipart \\
        --output dataset/crops --number 6000 --size 160

Each crop has a random side, from --size pixels to the whole picture, and is saved as --size x --size JPEG.
Pictures are drawn by area so that big photographs give more crops than clip-art.
"""
import math
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from PIL import Image
from tqdm import tqdm

from modules.cli import parser, positive, run
from modules.errors import UserError
from modules.training.sources import to_rgb

ENDINGS = ('.png', '.jpg', '.jpeg', '.webp')
MAX_PIXELS = 50_000_000


def get_args():
    p = parser(__doc__)
    p.add_argument('--sources', nargs='+', required=True, help='folders of pictures')
    p.add_argument('--output', required=True, help='folder of the crops')
    p.add_argument('--number', type=positive(int), default=6000, help='crops')
    p.add_argument('--size', type=positive(int), default=160, help='pixels')
    p.add_argument('--seed', type=int, default=0, help='of the crops')
    return p.parse_args()


def pictures(folders, size):
    """[(path, weight)]; weight is the square root of the area, 0 left out."""
    found = []
    for folder in folders:
        for base, _, names in sorted(os.walk(folder)):
            for name in sorted(names):
                path = os.path.join(base, name)
                if name.lower().endswith(ENDINGS) and not os.path.islink(path):
                    try:
                        width, height = Image.open(path).size
                    except (OSError, Image.DecompressionBombError):
                        continue
                    if min(width, height) >= size and width * height <= MAX_PIXELS:
                        found.append((path, math.sqrt(width * height)))
    return found


def main(args):
    rng = random.Random(args.seed)
    found = pictures(args.sources, args.size)
    if not found:
        raise UserError(f'no picture of at least {args.size} pixels in {" ".join(args.sources)}')
    chosen = rng.choices([path for path, _ in found], [weight for _, weight in found], k=args.number)
    os.makedirs(args.output, exist_ok=True)
    number = 0
    for path in tqdm(sorted(set(chosen)), disable=None):
        try:
            image = to_rgb(Image.open(path))
        except OSError as error:
            print(f'{path}: {error}', file=sys.stderr)
            continue
        for _ in range(chosen.count(path)):
            side = int(math.exp(rng.uniform(math.log(args.size), math.log(min(image.size)))))
            left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
            crop = image.resize((args.size, args.size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
            crop.save(os.path.join(args.output, f'{number:05d}.jpg'), quality=95)
            number += 1
    print(f'{number} crops of {len(set(chosen))} pictures in {args.output}')


if __name__ == '__main__':
    run(main, get_args)
