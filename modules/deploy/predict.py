"""From a picture to the input of an exported model, as its test images were prepared; kept in the model's metadata."""
import torch
from PIL import Image

from ..cli import positive
from ..errors import UserError, one_line
from ..modeling.ops.op import resize
from ..training.data import build_transforms, to_floats
from ..training.sources import to_rgb


def preprocessing(data, image_size, resolution):
    """{key: value} of how the pictures of `data` (open_data() of image_size pixels) become a model's input.

    stretch: the whole picture becomes image_size x image_size; else its short side resize_short_side pixels, and the
    middle image_size x image_size are cut out. Then resolution x resolution, RGB in 0..1 minus mean, by std; bicubic
    all the time.
    """
    stretch = bool(data.test.source.small)
    mean, std = data.test.mean_std
    return {'image_size': image_size, 'stretch': stretch,
            'resize_short_side': None if stretch else round(image_size * 256 / 224), 'resolution': resolution,
            'interpolation': 'bicubic', 'channels': 'RGB', 'mean': list(mean), 'std': list(std)}


def prepare(picture, metadata):
    """(1, 3, r, r) float32 of a PIL image by a model's metadata."""
    how = metadata['preprocessing']
    _, transform = build_transforms(how['image_size'], small=how['stretch'])
    pixels = to_floats(transform(to_rgb(picture)), (tuple(how['mean']), tuple(how['std'])))
    return resize(pixels[None], how['resolution'])


def add_predict_arguments(parser, runtime):
    """Which model, which pictures, how many classes of each."""
    parser.add_argument('--model', required=True, help=f'a .{runtime.ending} file of export_{runtime.ending}.py, '
                        f'eval_{runtime.ending}.py or pipeline.py')
    parser.add_argument('pictures', nargs='+', metavar='picture', help='files of pictures')
    parser.add_argument('--top', type=positive(int), default=3, help='classes that are printed')


def predict(path, pictures, top, runtime):
    """Print the `top` most likely classes of each picture (a file) by the model at `path`."""
    model, metadata = _open(path, runtime)
    run = runtime.open(model).run
    for picture in pictures:
        shares = torch.as_tensor(run(_read(picture, metadata).numpy()))[0].softmax(0)
        values, classes = shares.topk(min(top, len(shares)))
        print(f'{picture}: ' + ', '.join(f'{metadata["classes"][number]} {100 * value:.1f} %'
                                         for value, number in zip(values.tolist(), classes.tolist())), flush=True)


def _open(path, runtime):
    """(model, metadata) of a file; UserError where that does not say how pictures become its input."""
    try:
        with open(path, 'rb') as f:
            model = runtime.from_bytes(f.read())
        metadata = runtime.metadata(model)
    except OSError:
        raise
    except Exception as error:                  # a damaged file raises what protobuf or flatbuffers please
        raise UserError(f'{path}: not a model of this exporter ({one_line(error)[:80]})') from None
    if 'preprocessing' not in metadata:
        raise UserError(f'{path}: does not say how pictures become its input: exported with random weights, or before '
                        'this was kept; export it again')
    return model, metadata


def _read(path, metadata):
    """A picture's file as the model's input."""
    try:
        with Image.open(path) as picture:
            return prepare(picture, metadata)
    except (FileNotFoundError, IsADirectoryError):
        raise
    except Exception as error:                  # decoders raise many kinds
        raise UserError(f'{path}: not a picture that can be read ({one_line(error)[:80]})') from None
