"""TFLite as a device of modules/latency/profiling.py: on this machine by ai-edge-litert, or on a phone through adb."""
import numpy as np

from ..optional import need, version_of
from ..search_space.block import Block
from .chain import is_first, is_last, processor, random_chain, timed, write_chain
from .int8 import Int8Exporter, Real
from .tf_graph import TfGraph
from .tflite import convert

NOTHING = (Block('FinalExpandBlock', 1, 8, 8, 1, None, 1, 'relu'),)       # what a call costs: the least of blocks
PHONE_WARMUP = 10                                                         # untimed runs of a model


class LiteRtDevice:
    """This machine with ai-edge-litert on `threads` threads."""

    def __init__(self, threads=1):
        need('tensorflow'), need('ai_edge_litert')
        self.threads, self.version = threads, version_of('ai_edge_litert')

    def __str__(self):
        return f'{processor()}, LiteRT {self.version}, {self.threads} thread{"s" * (self.threads > 1)}'

    def prepare(self, blocks):
        """run(count) -> [ms] of the INT8 model of Blocks in a row, random weights; for none of next to nothing."""
        interpreter = need('ai_edge_litert.interpreter').Interpreter(model_content=chain_model(blocks or NOTHING),
                                                                     num_threads=self.threads)
        interpreter.allocate_tensors()
        given = interpreter.get_input_details()[0]
        noise = 30 * np.random.default_rng(0).standard_normal(given['shape'])
        interpreter.set_tensor(given['index'], noise.astype(given['dtype']))    # as codes, also of an image
        return timed(interpreter.invoke, self.threads)


class PhoneDevice:
    """A phone (adb.Phone) with TFLite's benchmark_model; `name` is that of the phone."""

    def __init__(self, phone, name):
        need('tensorflow'), need('ai_edge_litert')
        self.phone, self.name = phone, name

    def __str__(self):
        threads = self.phone.threads
        return f'{self.name}, TFLite benchmark_model, {threads} thread{"s" * (threads > 1)}, cores {self.phone.mask}'

    def prepare(self, blocks):
        """run(count) -> [mean ms of so many runs]; each call pushes the model."""
        model = chain_model(blocks or NOTHING)
        return lambda count: [self.phone.latency(model, PHONE_WARMUP, count).mean]


def chain_model(blocks):
    """Bytes of the INT8 .tflite of Blocks in a row; integers in and out but at a network's two ends."""
    network, ranges, images = random_chain(blocks)

    def write(image):
        exporter = Int8Exporter(TfGraph(image), ranges)
        return write_chain(exporter, network, ranges, images, blocks,
                           lambda target: exporter.quantised(Real(image), target, 'codes'))
    return without_ends(convert(network, write, True), not is_first(blocks), not is_last(blocks))


def without_ends(model, first, last):
    """Bytes of a .tflite without the QUANTIZE after its input (`first`), the DEQUANTIZE before its output (`last`)."""
    schema, flatbuffers = need('ai_edge_litert.schema_py_generated'), need('flatbuffers')
    tree = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model))
    graph, codes = tree.subgraphs[0], schema.BuiltinOperator

    def is_a(operator, code):
        return tree.operatorCodes[operator.opcodeIndex].builtinCode == code

    if first:
        readers = [op for op in graph.operators if graph.inputs[0] in op.inputs]
        if len(readers) == 1 and is_a(readers[0], codes.QUANTIZE):
            graph.inputs = readers[0].outputs
            graph.operators.remove(readers[0])
    if last:
        writer, = (op for op in graph.operators if graph.outputs[0] in op.outputs)
        if is_a(writer, codes.DEQUANTIZE):
            graph.outputs = writer.inputs
            graph.operators.remove(writer)
    tree.signatureDefs = None                   # they name the tensors that are gone
    builder = flatbuffers.Builder(len(model))
    builder.Finish(tree.Pack(builder), b'TFL3')
    return bytes(builder.Output())
