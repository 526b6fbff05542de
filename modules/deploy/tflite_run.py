"""TFLite models run on this machine by ai-edge-litert (LiteRT, XNNPACK kernels)."""
import os

import numpy as np

from ..errors import UserError
from ..optional import need


class Interpreter:
    """A TFLite model of one image on `threads` threads."""

    def __init__(self, model, threads=1):
        litert = need('ai_edge_litert.interpreter')
        named = isinstance(model, (str, os.PathLike))
        source = {'model_path': os.fspath(model)} if named else {'model_content': model}
        try:
            self.litert = litert.Interpreter(**source, num_threads=threads)
            self.litert.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            name = os.fspath(model) if named else 'the model'
            raise UserError(f'{name}: TFLite cannot open it ({str(error)[:120]})') from None
        self._input, self._output = self.litert.get_input_details()[0], self.litert.get_output_details()[0]
        noise = np.random.default_rng(0).standard_normal(self._input['shape'], np.float32)
        self.litert.set_tensor(self._input['index'], noise)

    def run(self, images):
        """Logits (N, classes) of images (N, C, r, r), normalised; without a classifier features (N, C * H * W)."""
        outputs = []
        for image in np.ascontiguousarray(np.asarray(images, np.float32).transpose(0, 2, 3, 1)):
            self.litert.set_tensor(self._input['index'], image[None])
            self.litert.invoke()
            outputs.append(self.litert.get_tensor(self._output['index']))
        outputs = np.concatenate(outputs)
        return outputs if outputs.ndim == 2 else outputs.transpose(0, 3, 1, 2).reshape(len(outputs), -1)

    def invoke(self):
        """One run on the last image (noise before the first), for timing."""
        self.litert.invoke()


def open_interpreter(model, threads=1):
    """Interpreter of a .tflite file or of its bytes; UserError where TFLite cannot open it."""
    return Interpreter(model, threads)
