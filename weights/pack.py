"""Pack a weights file for this folder: in half precision, so at half the size.

run: python weights/pack.py mnist_GAN/weights_epoch_200.pt weights/main_gan.pt
"""

import hashlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common


def pack(weights):
    """The contents of a weights file, with every network in float16."""
    packed = {**weights, "shipped": True}  # so that bundled digits may stand in for its data
    for part, state in weights.items():
        if isinstance(state, dict) and all(isinstance(x, torch.Tensor) for x in state.values()):
            packed[part] = {name: halved(tensor) for name, tensor in state.items()}
    return packed


def halved(tensor):
    return tensor.half() if tensor.is_floating_point() else tensor


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = sys.argv[1:]
    try:
        weights = common.load_weights(source, None, "model_kwargs")
    except common.BadInput as error:
        sys.exit(f"pack.py: {error}")
    common.save_tensors(target, pack(weights))
    content = Path(target).read_bytes()
    print(f"{target}: {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}")
