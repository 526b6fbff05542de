"""A static Network as TFLite, fp32 or INT8 on its trained LSQ+ scales. docs/tflite.md explains it.

Models take one image (1, r, r, C) as float32, normalised, and give logits (1, classes) as float32; of a Network without
a classifier the last block's map (1, H, W, C). Needs tensorflow and ai-edge-litert.
"""
import json
import warnings

from ..modeling.keras_network import keras_network
from ..modeling.network import io_sizes
from ..optional import need
from .int8 import write_int8
from .tf_graph import TfGraph

FACTS = 'spaceevo'                      # the entry of the file's metadata that is ours


def export_tflite_fp32(network, metadata=None):
    """Bytes of the fp32 .tflite of a Network in eval mode on the CPU; metadata {key: anything json takes}."""
    model = keras_network(network)
    return _with_facts(convert(network, lambda image: model(image, training=False), False), metadata)


def export_tflite_int8(network, ranges, metadata=None):
    """Bytes of the INT8 .tflite of a Network in int8 and eval mode; ranges: of trace.observe() on real images."""
    return _with_facts(convert(network, lambda image: write_int8(TfGraph(image), network, ranges)[0], True), metadata)


def convert(network, write, quantised):
    """Bytes of what write(image) computes; quantised: on integers between its fake-quant ops."""
    tf = need('tensorflow')
    channels, height, width = io_sizes(network)[0]
    image = tf.TensorSpec((1, height, width, channels), tf.float32, 'image')
    function = tf.function(write, input_signature=[image], autograph=False).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], tf.Module())
    if quantised:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    with warnings.catch_warnings():     # that it was given no images: the fake-quant ops have the ranges
        warnings.simplefilter('ignore')
        return converter.convert()


def _with_facts(model, metadata):
    """A model's bytes with `metadata` in them."""
    schema, flatbuffers = need('ai_edge_litert.schema_py_generated'), need('flatbuffers')
    tree = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model))
    entry, buffer = schema.MetadataT(), schema.BufferT()
    entry.name, entry.buffer, buffer.data = FACTS, len(tree.buffers), list(json.dumps(metadata or {}).encode())
    tree.buffers.append(buffer)
    tree.metadata = [*(tree.metadata or []), entry]
    builder = flatbuffers.Builder(len(model))
    builder.Finish(tree.Pack(builder), b'TFL3')
    return bytes(builder.Output())


def facts(model):
    """{key: value} of the metadata that a model's bytes were exported with; ValueError where they are none of ours."""
    tree = need('ai_edge_litert.schema_py_generated').Model.GetRootAs(model)
    for entry in map(tree.Metadata, range(tree.MetadataLength())):
        if entry.Name() == FACTS.encode():
            return json.loads(tree.Buffers(entry.Buffer()).DataAsNumpy().tobytes())
    raise ValueError('no model of this exporter')
