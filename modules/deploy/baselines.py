"""What a user would deploy without a search: ready-made networks of timm, and ONNX Runtime's own static quantiser."""
import io
import os
import tempfile
import warnings

import torch

from ..errors import UserError
from ..optional import need

CONVOLUTIONS = ('Conv', 'MatMul', 'Gemm')       # what the quantiser's documentation advises for convolutional networks


def ready_made(name, num_classes, resolution, pretrained=False):
    """timm's network `name` for images (N, 3, resolution, resolution), with a new head; UserError for an unknown one.

    pretrained: ImageNet's weights but for the head, of a package, timm's hub or its cache: EfficientNets only, by the
    names of --teacher_arch.
    """
    import timm
    if pretrained:
        from ..block_kd.teacher import build_teacher, timm_name
        weights, name = build_teacher(name).state_dict(), timm_name(name)
    elif not timm.is_model(name):
        raise UserError(f'{name}: timm has no such model; see timm.list_models()')
    network = timm.create_model(name)
    if pretrained:
        network.load_state_dict({key: weights[key] for key in network.state_dict()})
    network.reset_classifier(num_classes)
    network.resolution = resolution
    return network


@torch.no_grad()
def export_ready_made(network):
    """fp32 ModelProto of a network of ready_made(), in eval mode on the CPU; any number of images."""
    onnx, buffer = need('onnx'), io.BytesIO()
    images = torch.zeros(1, 3, network.resolution, network.resolution)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')         # that another exporter, which needs one more package, is the default
        torch.onnx.export(network.eval().to(memory_format=torch.contiguous_format), images, buffer, dynamo=False,
                          input_names=['input'], output_names=['logits'], opset_version=17,
                          dynamic_axes={'input': {0: 'N'}, 'logits': {0: 'N'}})
    return onnx.load_from_string(buffer.getvalue())


def quantize_static(model, batches, op_types=CONVOLUTIONS, reduce_range=False):
    """INT8 ModelProto (QDQ, uint8 activations, int8 weights per channel) of an fp32 one, by ONNX Runtime.

    batches: calibration images, tensors (N, 3, r, r); op_types: operators to quantise, None: all it knows;
    reduce_range: weights of 7 bits.
    """
    onnx = need('onnx')
    need('onnxruntime')
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
