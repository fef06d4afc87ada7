"""Swaps torchvision's ResNet-18 and fine-tunes it: the swap is one line, and everything else is the usual loop.

    python examples/finetune.py [--pretrained] [--epochs 3]

Expect: the loss of each epoch on scikit-learn's 1,437 scanned digits, then "... of 360 held-out digits are read
rightly", above 90 % after three epochs, and that a plain ResNet-18 with the same weights reads them alike. Ten seconds
of a core. --pretrained begins with the weights for ImageNet, which torchvision downloads. Needs the extra `demo`.
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from torch import nn

import convext


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """(images, labels): images (1797, 3, 16, 16) in [-1, 1]."""
    scans = load_digits()
    images = torch.from_numpy(scans.images).float()[:, None] / 8 - 1
    return F.interpolate(images, size=16, mode="bilinear").repeat(1, 3, 1, 1), torch.from_numpy(scans.target)


def network(pretrained: bool) -> nn.Module:
    model = torchvision.models.resnet18(weights="DEFAULT" if pretrained else None)
    model.fc = nn.Linear(model.fc.in_features, 10)  # ten digits instead of ImageNet's classes
    return model


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.inference_mode():
        return (model.eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", action="store_true", help="begin with the weights for ImageNet")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    torch.manual_seed(0)
    images, labels = digits()
    order = torch.randperm(len(images))
    train, test = order[:-360], order[-360:]

    model = convext.swap(network(options.pretrained))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(options.epochs):
        model.train()
        total = 0.0
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1}: loss {total / len(train):.3f}")

    swapped = accuracy(model, images[test], labels[test])
    print(f"{swapped:.1%} of 360 held-out digits are read rightly")

    plain = network(pretrained=False)
    plain.load_state_dict(model.state_dict())  # a swapped model's state dict is the plain one's
    print(f"{accuracy(plain, images[test], labels[test]):.1%} by a plain ResNet-18 with the same weights")


if __name__ == "__main__":
    main()
