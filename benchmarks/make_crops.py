"""Cut big pictures into many random crops: a small set of natural images for block KD on a laptop.

    python benchmarks/make_crops.py --sources /usr/share/wallpapers /usr/share/backgrounds /usr/share/openclipart \\
        --output dataset/crops --number 6000 --size 160

Each crop has a random side, from --size pixels to the whole picture, and is saved as --size x --size JPEG.
Pictures are drawn by area so that big photographs give more crops than clip-art. Crops as flat as a sky or a
picture's white ground are redrawn: NSR divides by the variance over space, so they would outweigh all others.
"""
import math
import os
import random
import sys
from collections import Counter

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from PIL import Image
from tqdm import tqdm

from modules.cli import parser, positive, run
from modules.errors import UserError
from modules.training.sources import to_rgb

ENDINGS = ('.png', '.jpg', '.jpeg', '.webp')
MAX_PIXELS = 50_000_000
TILE, FLAT, TRIES = 16, 4, 10   # pixels; standard deviation in grey levels of 255; crops tried for one


def get_args():
    p = parser(__doc__)
    p.add_argument('--sources', nargs='+', required=True, help='folders of pictures')
    p.add_argument('--output', required=True, help='folder of the crops')
    p.add_argument('--number', type=positive(int), default=6000, help='crops')
    p.add_argument('--size', type=positive(int), default=160, help='pixels')
    p.add_argument('--min_detail', type=float, default=0.5, help='share of 16-pixel tiles that are not flat')
    p.add_argument('--seed', type=int, default=0, help='seed of the crops')
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


def random_crop(image, size, rng):
    """size x size pixels of a random square of the image, at least that large."""
    side = int(math.exp(rng.uniform(math.log(size), math.log(min(image.size)))))
    left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    return image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))


def detail(crop):
    """Share of the tiles of a picture that are not flat."""
    grey = np.asarray(crop.convert('L'), dtype=float)
    n = len(grey) // TILE
    tiles = grey[:n * TILE, :n * TILE].reshape(n, TILE, n, TILE)
    return float((tiles.std((1, 3)) >= FLAT).mean())


def main(args):
    rng = random.Random(args.seed)
    found = pictures(args.sources, args.size)
    if not found:
        raise UserError(f'no picture of at least {args.size} pixels in {" ".join(args.sources)}')
    chosen = rng.choices([path for path, _ in found], [weight for _, weight in found], k=args.number)
    os.makedirs(args.output, exist_ok=True)
    number, wanted = 0, Counter(chosen)
    for path in tqdm(sorted(set(chosen)), disable=None):
        try:
            image = to_rgb(Image.open(path))
        except OSError as error:
            print(f'{path}: {error}', file=sys.stderr)
            continue
        for _ in range(TRIES * wanted[path]):
            crop = random_crop(image, args.size, rng)
            if detail(crop) >= args.min_detail:
                crop.save(os.path.join(args.output, f'{number:05d}.jpg'), quality=95)
                number += 1
                wanted[path] -= 1
            if not wanted[path]:
                break
    print(f'{number} crops of {len(set(chosen))} pictures in {args.output}')


if __name__ == '__main__':
    run(main, get_args)
