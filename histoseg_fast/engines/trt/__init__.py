"""TensorRT engines of a plan: typed graph, build, inspection, cache. `prepare.prepare` is the way in.

Nothing here imports tensorrt, onnx or CUDA before a function that needs them is called.
"""
