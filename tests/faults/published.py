"""`load_published` as a command, for tests/test_pretrained.py: prints the sum of the weights that it has loaded."""

import json
import sys

from nanogpt.model import GPT, Shape
from nanogpt.pretrained import load_published


def main(argv: list[str]) -> None:
    """`argv`: the model's shape as JSON, and the published name."""
    model = GPT(Shape(**json.loads(argv[0])))
    load_published(model, argv[1], lambda line: print(line, file=sys.stderr))
    print(sum(parameter.double().sum().item() for parameter in model.parameters()))
