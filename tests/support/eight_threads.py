"""Eight threads that use convext at once: one swapped network that all call while its dictionaries change, and networks
of their own that they swap, train, read a report of and revert. Prints how many calls gave what the unswapped network
gives. A program, so that it can run under any Python: `python tests/support/eight_threads.py [SECONDS]`.
"""

import copy
import sys
import threading
import time

import torch
from torch import nn

import convext

THREADS = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 8, 1)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return x + self.conv3(torch.relu(self.bn2(self.conv2(y))))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), Block(), Block(), nn.AdaptiveAvgPool2d(1)).double()


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def trained(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.train()
    model(x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def run(seconds: float) -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain = network().eval()
    shared = convext.swap(copy.deepcopy(plain))
    until, counts, errors = time.monotonic() + seconds, [0] * THREADS, []

    def work(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        try:
            while time.monotonic() < until or counts[number] < 4:
                x = torch.randn(2, 3, 9 + number % 3, 11, generator=generator, dtype=torch.float64)
                with torch.no_grad():
                    expected = plain(x)
                    check(shared(x), expected)
                    shared[2].note = counts[number]  # so that its facts are looked at anew
                    check(shared(x), expected)
                    setattr(shared[3], f"note{number}", None)
                    check(shared(x), expected)
                mine, twin = network(), None
                twin = copy.deepcopy(mine)
                for found, gradient in zip(trained(convext.swap(mine), x), trained(twin, x), strict=True):
                    check(found, gradient)
                assert len(convext.report(mine)) == 7
                convext.revert(mine)
                check(mine(x), twin(x))
                counts[number] += 1
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return sum(counts)


if __name__ == "__main__":
    sys.setswitchinterval(1e-5)
    print(run(float(sys.argv[1]) if len(sys.argv) > 1 else 5.0))
