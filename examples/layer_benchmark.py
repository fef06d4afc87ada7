"""Your own layers, forward and training step, beside PyTorch's: change LAYERS to those of your network.

    python examples/layer_benchmark.py [--threads 1] [--seconds 1]

Expect: one line a layer with the microseconds of PyTorch's convolution, how many times as fast convext's is, in the
forward pass and with both gradients, and the kernel that served it. Both sides take turns, and are compared before they
are timed: a result further off than rounding explains ends the script. 15 seconds. A ratio of about one beside `aten`
is no fault: there the choice takes PyTorch's own kernel. `convext bench layers` does the same for a whole network.
"""

import argparse

import torch
import torch.nn.functional as F

import convext
from convext.bench.timing import interleave

# name: (N, C, H, W), filters, their extent, other arguments of conv2d
LAYERS = {
    "3x3": ((1, 64, 56, 56), 64, 3, {"padding": 1}),
    "3x3, stride 2": ((1, 128, 56, 56), 128, 3, {"padding": 1, "stride": 2}),
    "pointwise": ((1, 96, 28, 28), 192, 1, {}),
    "depthwise": ((1, 192, 28, 28), 192, 3, {"padding": 1, "groups": 192}),
    "dilated": ((1, 64, 28, 28), 64, 3, {"padding": 2, "dilation": 2}),
    "a first layer": ((1, 3, 224, 224), 32, 3, {"padding": 1, "stride": 2}),
}


def kernel_of(call) -> str:
    """The backend and kernel of the forward pass in a call."""
    before = dict(convext.backends.counts())
    call()
    ran = [key for key, calls in convext.backends.counts().items() if calls > before.get(key, 0)]
    return ", ".join(f"{backend} {kernel}" for backend, pass_, kernel in ran if pass_ == "fprop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each layer and pass")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{'layer':15} {'forward':>21} {'with gradients':>21}  kernel")

    for name, (shape, filters, extent, arguments) in LAYERS.items():
        x = torch.randn(shape, requires_grad=True)
        w = torch.randn(filters, shape[1] // arguments.get("groups", 1), extent, extent, requires_grad=True)
        dy = torch.randn_like(F.conv2d(x, w, **arguments))

        def forward(conv2d, x=x, w=w, arguments=arguments):
            with torch.inference_mode():
                return (conv2d(x, w, **arguments),)

        def step(conv2d, x=x, w=w, dy=dy, arguments=arguments):
            return torch.autograd.grad(conv2d(x, w, **arguments), (x, w), dy)

        cells = []
        for call in (forward, step):
            sides = {"torch": lambda call=call: call(F.conv2d), "convext": lambda call=call: call(convext.conv2d)}
            for expected, actual in zip(sides["torch"](), sides["convext"]()):
                torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
            timings = interleave(sides, seconds=options.seconds)
            ratio = timings["convext"].times_faster_than(timings["torch"])
            cells.append(f"{timings['torch'].median * 1e6:9.0f} us, x{ratio:5.2f}")
        kernel = kernel_of(lambda: forward(convext.conv2d))
        print(f"{name:15} {cells[0]:>21} {cells[1]:>21}  {kernel}")


if __name__ == "__main__":
    main()
