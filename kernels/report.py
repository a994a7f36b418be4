"""python -m fastpix2pix.kernels.report: what every kernel compiles to, on every generation of GPU.

A module of kernels takes part by offering ``specimens(dtype)``: pairs of a label (op and shape class) and a
function without arguments that calls the public op, once forward or once backward, on ``torch.empty``
tensors of the CPU, shaped, typed and sliced as in the networks. The report calls it under
``launch.observed(..., run=False)``: nothing is computed, but the op's own launcher chooses kernels, blocks,
warps and declares the bytes moved, so that what is reported is what would be launched.
"""
