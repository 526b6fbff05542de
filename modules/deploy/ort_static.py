"""ONNX Runtime's own static quantiser: what people who do not train with LSQ+ get."""
import os
import tempfile

from ..optional import need

CONVOLUTIONS = ('Conv', 'MatMul', 'Gemm')       # what the quantiser's documentation advises for convolutional networks


def quantize_static(model, batches, op_types=CONVOLUTIONS, reduce_range=False):
    """INT8 ModelProto (QDQ, uint8 activations, int8 weights per channel) of an fp32 one.

    batches: calibration images, tensors (N, 3, r, r); op_types: operators to quantise, None: all it knows;
    reduce_range: weights of 7 bits.
    """
    onnx, _ = need('onnx'), need('onnxruntime')
    from onnxruntime import quantization

    class Batches(quantization.CalibrationDataReader):
        def __init__(self):
            self.feeds = ({model.graph.input[0].name: images.numpy()} for images in batches)

        def get_next(self):
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, quantised = os.path.join(folder, 'fp32.onnx'), os.path.join(folder, 'int8.onnx')
        onnx.save(model, plain)
        quantization.shape_inference.quant_pre_process(plain, plain)
        quantization.quantize_static(plain, quantised, Batches(), quant_format=quantization.QuantFormat.QDQ,
                                     per_channel=True, reduce_range=reduce_range,
                                     activation_type=quantization.QuantType.QUInt8,
                                     weight_type=quantization.QuantType.QInt8,
                                     op_types_to_quantize=None if op_types is None else list(op_types))
        return onnx.load(quantised)
